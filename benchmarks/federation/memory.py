"""What a hub needs to average many large updates, beside Flower: memory at the peak, and speed.

Ours is `close_votes`, the hub's own function: it reads each delta where the store keeps it, screens and counts it.
Flower's is `FedAvg.aggregate_fit` of results that are all in memory, as it takes them. Each runs in a process of its own,
whose peak is the kernel's (`VmHWM`), less what it held before the first update. A few different updates stand for all: on
disk they are read again and again, in memory every client has its own copy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import psutil

from benchmarks.federation.bench import Bench
from benchmarks.harness import print_table
from edge_cascade.deltas import encode_delta
from edge_cascade.weights import FloatArray

CLIENTS: Final = 400
TENSORS: Final = 10
NUMBERS: Final = 2_621_440  # 10 MiB of float32
DIFFERENT: Final = 8
_FLOWER_NEEDS: Final = 2.5  # times the updates' size of free memory, or it is not tried


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    clients, numbers = bench.some((CLIENTS, NUMBERS), (8, 20_000))
    figures: dict[str, Any] = {}
    with bench.console.status("memory: ours, fp32"):
        figures["ours, fp32"] = _in_child("fp32", clients, numbers)
    with bench.console.status("memory: ours, int8"):
        figures["ours, int8"] = _in_child("int8", clients, numbers)
    needed = _FLOWER_NEEDS * 4 * clients * numbers
    if find_spec("flwr") is None:
        print("memory: Flower is not installed (pip install flwr): it is left out")
    elif psutil.virtual_memory().available < needed:
        print(f"memory: Flower needs about {needed / 1e9:.0f} GB, which is not free: it is left out")
    else:
        with bench.console.status("memory: Flower"):
            figures["Flower FedAvg"] = _in_child("flower", clients, numbers)
    speed = _speed(clients, numbers, rounds=bench.some(5, 1))
    print_table(
        f"Aggregating {clients} updates of {4 * numbers / 2**20:.0f} MiB (as float32)",
        ("", "peak above the start, MB", "seconds"),
        [(name, f"{each['peak_mb']:.0f}", f"{each['seconds']:.1f}") for name, each in figures.items()],
    )
    print_table(
        "The same updates in memory, GB of clients' weights a second of processor time, medians",
        ("", "GB/s", "of the copy"),
        [(name, f"{each:.1f}", f"{each / speed['np.copyto']:.0%}") for name, each in speed.items()],
    )
    return {"memory": figures, "speed": speed}


def _in_child(what: str, clients: int, numbers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        if what != "flower":
            for index in range(DIFFERENT):
                blob = encode_delta(_delta(numbers, index), "int8" if what == "int8" else "fp32")
                (Path(folder) / f"{index}").write_bytes(blob)
        command = [
            sys.executable,
            "-m",
            "benchmarks.federation.memory",
            what,
            str(clients),
            str(numbers),
            folder,
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _speed(clients: int, numbers: int, *, rounds: int) -> dict[str, float]:
    """Adding and copying take turns, in processor time: both keep to one thread, and others may use the machine."""
    from cloud_hub.core.federation.aggregation import WeightedMean, weigh_by_examples
    from cloud_hub.core.federation.screening import Accepted
    from cloud_hub.core.federation.update import Layout, Update

    # Far more than a cache holds, so that every pass reads memory.
    deltas = [_delta(numbers, index) for index in range(2 * DIFFERENT)]
    votes = [
        Accepted(Update(str(index), 100 + index, b"", delta), 1.0, 0) for index, delta in enumerate(deltas)
    ]
    target = {name: np.empty_like(array) for name, array in deltas[0].items()}
    size = 4 * numbers * clients
    taken: dict[str, list[float]] = {"ours": [], "np.copyto": []}
    for _ in range(rounds):
        started = time.process_time()
        mean = WeightedMean(Layout.of(deltas[0]), weigh_by_examples)
        for client in range(clients):
            mean.add(votes[client % len(votes)])
        mean.close()
        taken["ours"].append(time.process_time() - started)
        started = time.process_time()
        for client in range(clients):
            for name, array in deltas[client % len(deltas)].items():
                np.copyto(target[name], array)
        taken["np.copyto"].append(time.process_time() - started)
    return {name: size / median(seconds) / 1e9 for name, seconds in taken.items()}


def _delta(numbers: int, seed: int) -> dict[str, FloatArray]:
    rng = np.random.default_rng(seed)
    return {
        f"layer{index}": (0.01 * rng.standard_normal(numbers // TENSORS)).astype(np.float32)
        for index in range(TENSORS)
    }


# --- in the child -------------------------------------------------------------------------------------------


def main() -> None:
    """Aggregate, and say what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("fp32", "int8", "flower"))
    parser.add_argument("clients", type=int)
    parser.add_argument("numbers", type=int)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    prepare = _prepare_flower if options.what == "flower" else _prepare_ours
    work = prepare(options)
    # Forget the peak of what came before, which is also the parent's.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_kb("VmRSS")
    seconds = work()
    print(json.dumps({"peak_mb": (_status_kb("VmHWM") - before) / 1000, "seconds": seconds}))


def _prepare_ours(options: argparse.Namespace) -> Callable[[], float]:
    from cloud_hub.core.federation.screening import RoundSpec
    from cloud_hub.core.federation.server import ServerState
    from cloud_hub.core.federation.strategies import fed_avg
    from cloud_hub.core.federation.update import Layout
    from cloud_hub.federation.closing import Votes, close_votes
    from cloud_hub.store.deliveries import Place
    from cloud_hub.store.members import StoredUpdate

    digest = bytes(32)

    def read(place: Place) -> bytes:
        return Path(options.folder, place.blob).read_bytes()

    def work() -> float:
        base = _delta(options.numbers, DIFFERENT)
        updates = [
            StoredUpdate(
                index,
                "round",
                f"device-{index:05}",
                "model",
                digest,
                100 + index,
                options.what,
                Place(str(index % DIFFERENT), 0, 0),
            )
            for index in range(options.clients)
        ]
        spec = RoundSpec(digest, Layout.of(base), 1_000_000)
        started = time.perf_counter()
        closed = close_votes(Votes(updates, read, {}), base, spec, fed_avg(), ServerState(), round_number=0)
        seconds = time.perf_counter() - started
        assert closed.counted == options.clients, closed.findings[:3]
        return seconds

    return work


def _prepare_flower(options: argparse.Namespace) -> Callable[[], float]:
    from benchmarks.federation.flower import fed_avg_of, fit_result

    different = [list(_delta(options.numbers, index).values()) for index in range(DIFFERENT)]

    def work() -> float:
        results = [fit_result(different[index % DIFFERENT], 100 + index) for index in range(options.clients)]
        started = time.perf_counter()
        fed_avg_of(results)
        return time.perf_counter() - started

    return work


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
