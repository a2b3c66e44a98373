"""A message in to its result out, through a real broker, beside a minimal loop that does no more than answer.

Three subjects take turns in the same run, all of them up all the time, each a process of its own on one core:

    device      edge-daemon as configured by default, 5 % of the samples spooled (SQLite, FULL) and uploaded
    no hub      the same with `hub.enabled = false`
    minimal     `minimal_loop`: paho, one session with the same layers, TCP_NODELAY

mosquitto, the load generator and the consumer that acknowledges the cases have the other core. Every sample is
counted: sent = answered + shed + unpublished + unaccounted, where the device's own /metrics says what it shed
and which answers no broker took.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from benchmarks import bundle as benchmark_bundle
from benchmarks.harness import machine_line, parse_options, spread_of, write_json
from benchmarks.load import LoadGenerator
from benchmarks.mqtt_tables import LATENCY_RATE_HZ, Held, Kind, Latency, print_latencies, print_steps
from benchmarks.processes import Subject, choose_cores, running, running_board, running_broker, running_hub
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.ladder import Ladder
from edge_daemon.models import open_stage
from edge_daemon.simulate.brokers import free_port

ESCALATED_SHARE: Final = 0.05
RATES_HZ: Final = (1000, 2000, 4000, 6000, 8000)
_SLICE: Final = 400
_WARM_UP: Final = 200
_POOL: Final = 400
_BEHIND_S: Final = 0.1
"""A rate is held if this long after the last sample was sent every one is answered."""

_SHED: Final = "edge_shed_total"
_UNPUBLISHED: Final = "edge_results_unpublished_total"
_KINDS: Final[tuple[Kind, ...]] = ("raw", "json")


def serve_all(
    stack: ExitStack,
    built: benchmark_bundle.Built,
    directory: Path,
    cores: tuple[int | None, int | None],
    qos: int,
) -> tuple[int, list[Subject]]:
    """Start the broker, the hub's stand-in and the three subjects; the broker's port and the subjects."""
    own, other = cores
    broker_port = free_port()
    stack.enter_context(running_broker(broker_port, directory, other))
    stack.enter_context(running_hub(broker_port, directory, other))

    bundle = load_bundle(built.bundle)
    point = choose_point(bundle)
    subjects = []
    for name, root, hub_enabled in (("device", "a", "true"), ("device, no hub", "b", "false")):
        environ = {
            "EDGE_DAEMON__MODELS__0__POINT": str(point),
            "EDGE_DAEMON__RESULTS__QOS": str(qos),
            "EDGE_DAEMON__HUB__ENABLED": hub_enabled,
        }
        board = running_board(
            f"bench-{root}", built.bundle, broker_port, directory, own,
            root=root, tables=_JSON.format(root=root), environ=environ,
        )  # fmt: skip
        subjects.append(replace(stack.enter_context(board), name=name))
    minimal = [sys.executable, "-m", "benchmarks.minimal_loop", "--port", str(broker_port), "--root", "c"]
    minimal += ["--model", str(built.plain_model), "--qos", str(qos)]
    process = stack.enter_context(running("minimal", minimal, directory, own))
    subjects.append(Subject("minimal", "c", process.pid, None))
    return broker_port, subjects


def choose_point(bundle: Bundle) -> int:
    """The operating point of the default plan that escalates about half of the random samples."""
    plan = bundle.plan()
    x = benchmark_bundle.random_samples(_POOL, np.random.default_rng(1))
    ladder = Ladder(bundle, plan, open_stage)

    def distance(point: int) -> float:
        ladder.set_point(point)
        return abs(sum(not climb.accepted for climb in ladder.climb_batch(x)) / len(x) - 0.5)

    return min(range(len(plan.points)), key=distance)


def make_payloads(bundle: Bundle) -> dict[Kind, list[bytes]]:
    """Samples of which the device escalates `ESCALATED_SHARE`, evenly spread."""
    ladder = Ladder(bundle, bundle.plan(), open_stage, point=choose_point(bundle))
    x = benchmark_bundle.random_samples(4 * _POOL, np.random.default_rng(2))
    accepted, escalated = [], []
    for sample in x:
        (accepted if ladder.climb(sample).accepted else escalated).append(sample.ravel())
    every = round(1 / ESCALATED_SHARE)
    chosen = [
        escalated[index // every % len(escalated)] if index % every == 0 else accepted[index % len(accepted)]
        for index in range(_POOL)
    ]
    return {
        "raw": [sample.astype("<f4").tobytes() for sample in chosen],
        # Four decimals, as a sensor would print them.
        "json": [msgspec.json.encode([round(float(value), 4) for value in sample]) for sample in chosen],
    }


def measure_latency(
    load: LoadGenerator,
    subjects: Sequence[Subject],
    payloads: dict[Kind, list[bytes]],
    samples: int,
    qos: int,
) -> list[Latency]:
    """Slices of every (subject, kind) in turn at the even pace."""
    found = [Latency(subject.name, kind) for subject in subjects for kind in _KINDS]
    for round_ in range(-(-samples // _SLICE) + 1):
        for latency, (subject, kind) in zip(
            found, [(subject, kind) for subject in subjects for kind in _KINDS], strict=True
        ):
            cpu_s = subject.cpu_s()
            count = _SLICE if round_ else _WARM_UP
            step = load.run(f"{subject.root}/{kind}", payloads[kind], LATENCY_RATE_HZ, count, qos=qos)
            load.drain(quiet_s=1.0, timeout_s=10.0)
            if round_:
                latency.us += step.latency_us
                latency.lost += step.sent - step.answered
                latency.cpu_s += subject.cpu_s() - cpu_s
    return found


def measure_rate(
    load: LoadGenerator,
    subject: Subject,
    kind: Kind,
    payloads: Sequence[bytes],
    rate_hz: int,
    seconds: float,
    qos: int,
) -> Held:
    """One step: how many of the samples were answered in time, later, shed, or are not accounted for."""
    before = {name: subject.counter(name) for name in (_SHED, _UNPUBLISHED)}
    cpu_s = subject.cpu_s()
    step = load.run(f"{subject.root}/{kind}", payloads, rate_hz, int(rate_hz * seconds), qos=qos)
    load.drain(quiet_s=_BEHIND_S, timeout_s=_BEHIND_S)
    in_time = step.answered
    load.drain(quiet_s=3.0, timeout_s=60.0)
    return Held(
        subject=subject.name,
        kind=kind,
        rate_hz=rate_hz,
        offered_hz=step.sent / step.sending_s,
        sent=step.sent,
        answered=step.answered,
        answered_hz=step.answered / step.answering_s,
        shed=subject.counter(_SHED) - before[_SHED],
        unpublished=subject.counter(_UNPUBLISHED) - before[_UNPUBLISHED],
        repeated=step.repeated,
        late=step.answered - in_time,
        cpu_us=(subject.cpu_s() - cpu_s) / step.sent * 1e6,
        latency_us=spread_of(step.latency_us or [0.0]),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mqtt", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--samples", type=int, default=2400, help="per subject and format at 200/s")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each step of the rate")
    parser.add_argument("--rounds", type=int, default=3, help="how often the rates are climbed")
    parser.add_argument("--rates", type=int, nargs="*", default=RATES_HZ)
    parser.add_argument("--qos", type=int, choices=(0, 1), default=1, help="of samples and results")
    options = parse_options(parser)
    print(machine_line())
    own, other = choose_cores()
    if other is not None:
        os.sched_setaffinity(0, {other})
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        built = benchmark_bundle.build(directory / "model")
        payloads = make_payloads(load_bundle(built.bundle))
        port, subjects = serve_all(stack, built, directory, (own, other), options.qos)
        load = LoadGenerator(port, [f"{subject.root}/results/+" for subject in subjects])
        _wait_until_answering(load, subjects, payloads["raw"])
        latencies = measure_latency(load, subjects, payloads, options.samples, options.qos)
        print_latencies(latencies)
        steps = [
            measure_rate(load, subject, kind, payloads[kind], rate_hz, options.seconds, options.qos)
            for _ in range(options.rounds)
            for kind in _KINDS
            for rate_hz in options.rates
            for subject in subjects
        ]
        print_steps(steps)
        load.close()
    write_json(
        options.json,
        {
            "qos": options.qos,
            "latency": [
                {"subject": each.subject, "kind": each.kind, "us": spread_of(each.us), "lost": each.lost}
                for each in latencies
            ],
            "steps": [{**msgspec.to_builtins(step), "unaccounted": step.unaccounted} for step in steps],
        },
    )


def _wait_until_answering(
    load: LoadGenerator, subjects: Sequence[Subject], payloads: Sequence[bytes]
) -> None:
    for subject in subjects:
        deadline_s = time.monotonic() + 20.0
        while True:
            step = load.run(f"{subject.root}/raw", payloads, 100.0, 1, qos=1)
            load.drain(quiet_s=0.5, timeout_s=0.5)
            if step.answered:
                break
            if time.monotonic() > deadline_s:
                raise SystemExit(f"benchmarks.mqtt: {subject.name} does not answer")


_JSON: Final = """\
[[inlet.sources]]
topic = "{root}/json/{{sensor}}"
format = "json"
"""


if __name__ == "__main__":
    main()
