"""Answers at 200 samples/s while a child trains on the same core, and while none does. A real broker.

Segments of four kinds take turns in one run, every round in another order, so that whatever else the machine
does meets them alike:

    nothing         no round is offered
    nothing again   the same: by how much two equal segments differ is what no ratio can tell from chance
    busy loop       a process lowered just as a training is, that computes and touches hardly any memory
    training        a round was offered; its child had begun to train and was still at it at the end

What `busy loop` costs is the scheduler's part of what `training` costs; the rest is caches and memory. On a
machine that others keep busy, their work moves onto the device's core where no child holds it: there
`nothing` is the slower one, and `training / busy loop` the ratio that says something of training. The
bundles are those that ship, fed by their virtual sensors. The device is `edge-daemon run` with `[training]`
at its defaults but for the vitals, which would forbid training on a machine as busy as this one may be; it
has one core, which the child shares; broker, load generator and the consumer that acknowledges the cases
have the other. The examples were kept by a run before, that counts for nothing.

Latency is from message in to result out, on the generator's clock. The range of a ratio is the middle 90 %
of 2,000 redraws of whole rounds.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import psutil

from benchmarks.harness import machine_line, parse_options, spread_of, write_json
from benchmarks.load import LoadGenerator, Step
from benchmarks.processes import Subject, choose_cores, running, running_board, running_broker, running_hub
from benchmarks.training_tables import (
    KINDS,
    RATE_HZ,
    Kind,
    Segment,
    print_ratios,
    print_rows,
    ratio_of,
    row_of,
)
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.codec import encode
from edge_cascade.messages import RoundOffer, RoundTerms, SelfLabels
from edge_cascade.mqtt import Broker, MqttSession
from edge_cascade.round_terms import encode_terms, public_key_of, sign_terms
from edge_cascade.shipped import find_bundle, shipped_models
from edge_cascade.topics import DEFAULT_PREFIX, down_topic
from edge_cascade.weights import shapes_of, size_bytes_of, weights_digest
from edge_daemon.bench.samples import default_samples
from edge_daemon.simulate.brokers import free_port

# Every kind follows every other equally often (Williams 1949).
_ORDERS: Final = ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))
_DEVICE_ID: Final = "bench-training"
_EXAMPLES: Final = 2000
_MIN_EXAMPLES: Final = 500
_FILL_S: Final = 30.0
_WARM_UP: Final = 100
_BEGUN_CPU_S: Final = 1.0
"""By then a child has loaded what it needs, and trains."""
_PATIENCE_S: Final = 120.0


class Rounds:
    """The hub's side of a round as far as offering it and taking it back go."""

    def __init__(self, port: int, bundle: Bundle) -> None:
        self._key = secrets.token_bytes(32)
        self._bundle = bundle
        self._offered = 0
        self._session = MqttSession(Broker(port=port), "rounds", subscriptions=[], on_message=lambda _: None)

    @property
    def hub_key(self) -> str:
        """What the device must be told."""
        return public_key_of(self._key).hex()

    def start(self) -> None:
        """Connect."""
        self._session.start()
        _wait(lambda: self._session.is_listening, "the broker does not answer")

    def stop(self) -> None:
        """Disconnect."""
        self._session.stop()

    def offer(self) -> None:
        """A round of the most epochs that there can be, at a rate that changes next to nothing."""
        base = self._bundle.parameters()
        self._offered += 1
        terms = encode_terms(
            RoundTerms(
                model=self._bundle.graph.model,
                round_id=f"round-{self._offered}",
                graph=bytes.fromhex(self._bundle.graph_sha256),
                training_base=weights_digest(base),
                base_bytes=size_bytes_of(shapes_of(base)),
                encoding="int8",
                top_share_ppm=0,
                epochs=1000,
                batch_size=32,
                learning_rate_ppm=10,
                momentum_ppm=0,
                prox_mu_ppm=0,
                min_examples=_MIN_EXAMPLES,
                max_examples=_EXAMPLES,
                self_labels=SelfLabels.HARD,
            )
        )
        self._publish(encode(RoundOffer(terms, sign_terms(terms, self._key), seconds_left=3600)))

    def clear(self) -> None:
        """Take it back: what trains for it is stopped."""
        self._publish(b"")

    def _publish(self, payload: bytes) -> None:
        topic = down_topic(DEFAULT_PREFIX, _DEVICE_ID, "round")
        if self._session.publish(topic, payload, retain=True) is None:
            raise SystemExit("benchmarks.training: the broker took no offer")


class Bench:
    """One bundle's broker, hub, device and load."""

    def __init__(
        self, stack: ExitStack, name: str, directory: Path, cores: tuple[int | None, int | None]
    ) -> None:
        self._directory = directory
        self._own, other = cores
        self._bundle_dir = find_bundle(name)
        bundle = load_bundle(self._bundle_dir)
        self._payloads = [x.astype("<f4").tobytes() for x in default_samples(name, bundle).x]
        self._broker = free_port()
        beside = [
            stack.enter_context(start(self._broker, directory, other))
            for start in (running_broker, running_hub)
        ]
        self._beside = [os.getpid(), *(process.pid for process in beside)]
        self._rounds = Rounds(self._broker, bundle)
        self._rounds.start()
        stack.callback(self._rounds.stop)
        self._load = LoadGenerator(self._broker, ["a/results/+"])
        stack.callback(self._load.close)
        self._fill()
        self._device = stack.enter_context(self._running_device(""))

    def measure(self, round_: int, kind: Kind, seconds: float) -> Segment:
        """One segment, once whatever runs beside it has begun."""
        with self._at_work(kind) as child:
            self._send(_WARM_UP)
            pids = [*self._beside, self._device.pid, *([] if child is None else [child.pid])]
            before = _times(pids)
            child_s, start_s = 0.0 if child is None else child.cpu_s(), time.monotonic()
            step = self._send(int(RATE_HZ * seconds))
            passed_s = time.monotonic() - start_s
            if child is not None:
                child_s = _still_running(child) - child_s
            total_s, idle_s, stolen_s, own_s = (_times(pids) - before).tolist()
        return Segment(
            round=round_,
            kind=kind,
            sent=step.sent,
            latency_us=step.latency_us,
            child=child_s / passed_s,
            others=max(1.0 - (idle_s + stolen_s + own_s) / total_s, 0.0),
            stolen=stolen_s / total_s,
            load_1min=os.getloadavg()[0],
        )

    def _fill(self) -> None:
        """Let a device keep examples as fast as it ever does, and end it: they stay on its disk."""
        with self._running_device("own_per_minute = 6000\nown_min_probability = 0.0"):
            self._send(int(RATE_HZ * _FILL_S))

    @contextmanager
    def _running_device(self, keeping: str) -> Iterator[Subject]:
        tables = _TRAINING.format(key=self._rounds.hub_key, keeping=keeping)
        with running_board(
            _DEVICE_ID, self._bundle_dir, self._broker, self._directory, self._own, tables=tables
        ) as board:
            _wait(lambda: self._send(1).answered == 1, "the device does not answer")
            yield board

    def _send(self, count: int) -> Step:
        step = self._load.run("a/raw", self._payloads, RATE_HZ, count, qos=1)
        self._load.drain(quiet_s=1.0, timeout_s=10.0)
        return step

    @contextmanager
    def _at_work(self, kind: Kind) -> Iterator[Subject | None]:
        """What runs beside the answers; None if nothing does."""
        match kind:
            case "training":
                self._rounds.offer()
                try:
                    yield _begun(self._training_child, self._directory / f"{_DEVICE_ID}.log")
                finally:
                    self._rounds.clear()
                    _wait(lambda: self._training_child() is None, "the training does not stop")
            case "busy loop":
                command = [sys.executable, "-c", _BUSY, str(os.getpid())]
                with running("busy", command, self._directory, self._own) as process:
                    yield _begun(lambda: Subject("busy", "", process.pid, None), self._directory / "busy.log")
            case "nothing" | "nothing again":
                yield None

    def _training_child(self) -> Subject | None:
        children = psutil.Process(self._device.pid).children()
        return Subject("child", "", children[0].pid, None) if children else None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=8, help="segments of each kind")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a segment")
    parser.add_argument("--bundles", nargs="*", default=["vibration", "digits"], choices=shipped_models())
    parser.add_argument("--any-core", action="store_true", help="pin nothing: all have all cores")
    options = parse_options(parser)
    print(machine_line())
    cores = (None, None) if options.any_core else choose_cores()
    if cores[1] is not None:
        os.sched_setaffinity(0, {cores[1]})
    figures = {}
    for name in options.bundles:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            bench = Bench(stack, name, directory, cores)
            segments = [
                bench.measure(round_, KINDS[index], options.seconds)
                for round_ in range(options.rounds)
                for index in _ORDERS[round_ % len(_ORDERS)]
            ]
        rows = [row_of(kind, segments) for kind in KINDS]
        pairs: list[tuple[Kind, Kind]] = [(kind, "nothing") for kind in KINDS[1:]]
        ratios = [ratio_of(kind, of, segments) for kind, of in [*pairs, ("training", "busy loop")]]
        print_rows(name, rows)
        print_ratios(name, ratios)
        figures[name] = {
            "rows": rows,
            "ratios": ratios,
            "segments": [
                {**msgspec.to_builtins(segment), "latency_us": spread_of(segment.latency_us)}
                for segment in segments
            ],
        }
    write_json(options.json, {"any_core": options.any_core, **figures})


def _begun(find: Callable[[], Subject | None], log: Path) -> Subject:
    """The process, once it has loaded what it needs; `log` says why it does not come to that."""

    def has_begun() -> bool:
        found = find()
        return found is not None and found.cpu_s() >= _BEGUN_CPU_S

    _wait(has_begun, "the child has not begun", log)
    begun = find()
    assert begun is not None
    return begun


def _still_running(child: Subject) -> float:
    """Its processor time."""
    try:
        return child.cpu_s()
    except OSError as error:
        raise SystemExit(
            f"benchmarks.training: the {child.name} ended before its segment did: lower --seconds"
        ) from error


def _times(pids: Sequence[int]) -> np.ndarray:
    """Seconds so far of all cores: all, idle, stolen by the host; and what these processes have used."""
    times = psutil.cpu_times()
    guest_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    own_s = sum(Subject("", "", pid, None).cpu_s() for pid in pids)
    return np.array([sum(times) - guest_s, idle_s, getattr(times, "steal", 0.0), own_s])


def _wait(until: Callable[[], bool], problem: str, log: Path | None = None) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not until():
        if time.monotonic() > deadline_s:
            said = [] if log is None else log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
            raise SystemExit(": ".join(["benchmarks.training", problem, *said]))
        time.sleep(0.02)


_BUSY: Final = """\
import os, sys
from edge_daemon.training.child import IDLE_NICE, lower_priority
lower_priority(IDLE_NICE)
while os.getppid() == int(sys.argv[1]):
    sum(range(100_000))
"""

_TRAINING: Final = """\
[training]
enabled = true
hub_key = "{key}"
max_passes = 1_000_000_000
max_temperature_celsius = 150.0
max_load = 1.0
min_free_mb = 0
on_battery = true
max_queued = 1_000_000
{keeping}
"""


if __name__ == "__main__":
    main()
