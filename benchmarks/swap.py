"""Answers while bundles are swapped, at 200 and 2,000 samples/s. A real broker, a real board, signed releases.

`edge-daemon run` goes back and forth between the shipped bundle and a signed release of the same network with
other weights, as a hub asks it to: metadata fetched and verified, a trial in a child process, the new pipeline
built beside, flipped between two samples, the old one closed, probation, commit. Every sample is counted and
every answer compared with what its bundle says alone: samples on which the two say nearly the same are not
used, so that a mixture of old and new weights would show.

The device and its trials have one core; broker, load generator and the hub's stand-ins the other. The limits
that compare latencies are wide, for a trial beside a loaded core is a noisy one; probation is short.

Latency is from message in to result out, on the generator's clock. See `swap_tables` for windows and ratios.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import machine_line, parse_options, write_json
from benchmarks.load import LoadGenerator
from benchmarks.processes import (
    choose_cores,
    running,
    running_board,
    running_broker,
    running_hub,
    wait_for_port,
)
from benchmarks.swap_tables import Answers, Swap, flips_of, print_memory, print_rows, rows_of
from cloud_hub.releases.create import create_repository
from cloud_hub.releases.keys import make_key
from edge_cascade.bundle import GRAPH, WEIGHTS, Bundle, load_bundle
from edge_cascade.codec import decode, encode
from edge_cascade.ladder import Ladder
from edge_cascade.messages import SHIPPED, DesiredModel, DesiredState, SwapReport
from edge_cascade.mqtt import Broker, Incoming, MqttSession
from edge_cascade.shipped import find_bundle, shipped_models
from edge_cascade.topics import DEFAULT_PREFIX, down_topic, fleet_filter
from edge_daemon.bench.samples import default_samples
from edge_daemon.models import open_stage
from edge_daemon.simulate.brokers import free_port
from edge_daemon.simulate.made_release import make_release

RATES_HZ: Final = (200.0, 2000.0)
_DEVICE_ID: Final = "bench-swap"
_RELEASE: Final = "r1"
_MIN_APART: Final = 0.02
"""Samples are used on which the two bundles' probabilities differ by this, or their labels or exits do."""
_TOLERANCE: Final = 0.004
"""Batches of another size add up in another order, and int8 rounds."""
_WARM_UP_S: Final = 5.0
_PATIENCE_S: Final = 180.0


class Told(msgspec.Struct):
    """What is compared of an answer."""

    label: str
    probability: float
    exit: int
    bundle: str = ""


class Pair:
    """Two bundles of one network, and the samples that tell them apart."""

    def __init__(self, model: str, directory: Path) -> None:
        shipped = find_bundle(model)
        # A worse one differs more than an equally good one does.
        made = make_release("bad", load_bundle(shipped), directory / "release", seed=1)
        self.directories = (shipped, made.directory)
        self.bundles = tuple(load_bundle(each) for each in self.directories)
        drawn = default_samples(model, self.bundles[0]).x
        self._index = {bundle.bundle_id: index for index, bundle in enumerate(self.bundles)}
        told = [_told(bundle, drawn) for bundle in self.bundles]
        chosen = [i for i in range(len(drawn)) if _differ(told[0][i], told[1][i])]
        self.share = len(chosen) / len(drawn)
        self._told = [[each[i] for i in chosen] for each in told]
        self.payloads = [drawn[i].astype("<f4").tobytes() for i in chosen]

    def deviation(self, number: int, answer: Told) -> tuple[int, float]:
        """Which bundle answered, and how far from its own output; infinity for another label or exit."""
        index = self._index.get(answer.bundle, -1)
        expected = self._told[index][number % len(self.payloads)]
        if index < 0 or (answer.label, answer.exit) != (expected.label, expected.exit):
            return index, float("inf")
        return index, abs(answer.probability - expected.probability)


class Hub:
    """The hub's side of releases: files and signatures on disk, wishes and reports over MQTT."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        self.served = directory / "served"
        self.root = directory / "root.json"
        self._pair = pair
        self._reports: dict[int, SwapReport] = {}
        self._heard = threading.Condition()
        self._revision = 0
        self._session: MqttSession | None = None
        fleet = self.served / "v1" / "fleet"
        blobs = fleet / "blobs"
        blobs.mkdir(parents=True)
        release = pair.directories[1]
        for part in (GRAPH, WEIGHTS):
            for path in (release / part).iterdir():
                content = path.read_bytes()
                (blobs / hashlib.sha256(content).hexdigest()).write_bytes(content)
        key, now = make_key(directory / "keys" / "offline.pem", None), datetime.now(UTC)
        repository = create_repository(
            directory / "tuf", [key], [key], root_threshold=1, targets_threshold=1, now=now
        )
        repository.sign_offline(
            self._bundle.graph.model,
            1,
            graph=(release / GRAPH / "manifest.json").read_bytes(),
            weights=(release / WEIGHTS / "manifest.json").read_bytes(),
            keys=[key],
            now=now,
        )
        self.root.write_bytes(repository.first_root())
        (fleet / "metadata").symlink_to(repository.metadata_directory)

    @property
    def _bundle(self) -> Bundle:
        return self._pair.bundles[1]

    def connect(self, port: int) -> MqttSession:
        """Listen to how attempts end."""
        session = MqttSession(
            Broker(port=port),
            "wishes",
            subscriptions=[fleet_filter(DEFAULT_PREFIX, "telemetry")],
            on_message=self._hear,
        )
        session.start()
        self._session = session
        return session

    def swap(self, index: int) -> tuple[float, float, str]:
        """Have the board run bundle 0 or 1: when that was said, when it was done, and what failed."""
        self._revision += 1
        bundle = self._bundle
        asked = DesiredModel(bundle.graph.model, SHIPPED, bytes(32))
        if index == 1:
            asked = DesiredModel(
                bundle.graph.model,
                _RELEASE,
                bytes.fromhex(bundle.bundle_id),
                bytes.fromhex(bundle.graph_sha256),
                bytes.fromhex(bundle.weights_sha256),
                sum(path.stat().st_size for path in self._pair.directories[1].rglob("*") if path.is_file()),
            )
        topic = down_topic(DEFAULT_PREFIX, _DEVICE_ID, "desired")
        assert self._session is not None
        seen, wished_s = len(self._reports), time.perf_counter()
        self._session.publish(topic, encode(DesiredState(_DEVICE_ID, self._revision, [asked])), retain=True)
        with self._heard:
            if not self._heard.wait_for(lambda: len(self._reports) > seen, _PATIENCE_S):
                raise SystemExit("benchmarks.swap: the device does not say how its swap ended")
        report = self._reports[max(self._reports)]
        failure = f"{report.failure}: {report.detail}" if report.failure else ""
        return wished_s, time.perf_counter(), failure

    def _hear(self, incoming: Incoming) -> None:
        message = decode(incoming.payload)
        if isinstance(message, SwapReport):
            with self._heard:
                # Once each, however often it is sent.
                self._reports[message.seq] = message
                self._heard.notify_all()


class Bench:
    """Broker, hub's stand-ins, device and load."""

    def __init__(
        self, stack: ExitStack, model: str, directory: Path, cores: tuple[int | None, int | None]
    ) -> None:
        own, other = cores
        self._pair = Pair(model, directory)
        self._hub = Hub(directory, self._pair)
        self._answers = Answers()
        broker, files = free_port(), free_port()
        stack.enter_context(running_broker(broker, directory, other))
        serve = [sys.executable, "-m", "http.server", str(files), "--bind", "127.0.0.1"]
        serve += ["--directory", str(self._hub.served)]
        stack.enter_context(running("files", serve, directory, other))
        wait_for_port(files)
        stack.enter_context(running_hub(broker, directory, other))
        tables = _RELEASES.format(files=files, root=self._hub.root)
        board = running_board(_DEVICE_ID, self._pair.directories[0], broker, directory, own, tables=tables)
        self._device = stack.enter_context(board)
        stack.callback(self._hub.connect(broker).stop)
        decoder = msgspec.json.Decoder(Told)
        self._load = LoadGenerator(broker, ["a/results/+"], functools.partial(self._note, decoder))
        stack.callback(self._load.close)

    def measure(self, rate_hz: float, count: int, pause_s: float) -> dict[str, object]:
        """Swap `count` times under load, and tell."""
        swaps: list[Swap] = []
        problems: list[BaseException] = []
        before = {name: self._device.counter(name) for name in _COUNTERS}
        rss_bytes: list[int] = []

        def direct() -> None:
            try:
                time.sleep(_WARM_UP_S)
                rss_bytes.append(self._rss_bytes())
                for number in range(count):
                    bundle = 1 - number % 2
                    wished_s, ended_s, failure = self._hub.swap(bundle)
                    time.sleep(pause_s)
                    swaps.append(Swap(bundle, wished_s, ended_s, self._rss_bytes(), failure))
            except BaseException as problem:  # noqa: BLE001 - told below, on the thread that waits
                problems.append(problem)

        director = threading.Thread(target=direct)
        director.start()
        step = self._load.run(
            "a/raw", self._pair.payloads, rate_hz, sys.maxsize, qos=1, is_over=lambda: not director.is_alive()
        )
        self._load.drain(quiet_s=2.0, timeout_s=20.0)
        if problems:
            raise problems[0]
        answers, self._answers = self._answers, Answers()
        rows = rows_of(answers, swaps)
        name = self._pair.bundles[0].graph.model
        by = {bundle.bundle_id[:12]: answers.bundle.count(i) for i, bundle in enumerate(self._pair.bundles)}
        ends = sum(not swap.failure for swap in swaps)
        counted = {each: self._device.counter(each) - before[each] for each in _COUNTERS}
        print(
            f"{name} at {rate_hz:g}/s ({step.sent / step.sending_s:.0f}/s sent): {ends} of {len(swaps)} swaps "
            f"committed, {step.sent} samples sent, {step.sent - step.answered} unanswered, {step.repeated} "
            f"answered twice, {answers.mixed} by a mixture; most that an answer was away from its bundle's "
            f"own: {answers.deviation:.1e}; answered by {by}; device's counters {counted}; "
            f"{self._pair.share:.0%} of the samples tell the bundles apart"
        )
        for failure in {swap.failure for swap in swaps if swap.failure}:
            print(f"not committed: {failure}")
        print_rows(f"{name} at {rate_hz:g} samples/s, {ends} swaps", rows)
        print_memory(rss_bytes[0], swaps)
        flips = flips_of(answers, swaps)
        return {
            "rate_hz": rate_hz,
            "sent": step.sent,
            "answered": step.answered,
            "repeated": step.repeated,
            "mixed": answers.mixed,
            "deviation": answers.deviation,
            "committed": ends,
            "rows": rows,
            "rss_before": rss_bytes[0],
            "swaps": [
                {
                    "to": swap.bundle,
                    "seconds": swap.ended_s - swap.wished_s,
                    "flip_after_s": flip_s - swap.wished_s,
                    "rss_bytes": swap.rss_bytes,
                    "failure": swap.failure,
                }
                for swap, flip_s in zip(swaps, flips, strict=True)
            ],
        }

    def _note(
        self, decoder: msgspec.json.Decoder[Told], number: int, sent_ns: int, now_ns: int, payload: bytes
    ) -> None:
        bundle, deviation = self._pair.deviation(number, decoder.decode(payload))
        answers = self._answers
        answers.sent_s.append(sent_ns / 1e9)
        answers.took_us.append((now_ns - sent_ns) / 1e3)
        answers.bundle.append(bundle)
        if deviation > _TOLERANCE:
            answers.mixed += 1
        else:
            answers.deviation = max(answers.deviation, deviation)

    def _rss_bytes(self) -> int:
        pages = Path(f"/proc/{self._device.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--swaps", type=int, default=100, help="at each rate")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two swaps")
    parser.add_argument("--rates", type=float, nargs="*", default=RATES_HZ)
    parser.add_argument("--model", default="digits", choices=shipped_models())
    parser.add_argument("--any-core", action="store_true", help="pin nothing: all have all cores")
    options = parse_options(parser)
    print(machine_line())
    cores = (None, None) if options.any_core else choose_cores()
    if cores[1] is not None:
        os.sched_setaffinity(0, {cores[1]})
    figures = []
    for rate_hz in options.rates:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            bench = Bench(stack, options.model, directory, cores)
            figures.append(bench.measure(rate_hz, options.swaps, options.pause))
    write_json(options.json, {"model": options.model, "any_core": options.any_core, "rates": figures})


def _told(bundle: Bundle, drawn: NDArray[np.float32]) -> list[Told]:
    ladder = Ladder(bundle, bundle.plan(), open_stage)
    answers = [ladder.climb(x).answer for x in drawn]
    return [Told(bundle.graph.labels[each.label], each.probability, each.rung) for each in answers]


def _differ(one: Told, other: Told) -> bool:
    is_other = (one.label, one.exit) != (other.label, other.exit)
    return is_other or abs(one.probability - other.probability) >= _MIN_APART


_COUNTERS: Final = ("edge_shed_total", "edge_failed_total", "edge_results_unpublished_total")

_RELEASES: Final = """\
[releases]
enabled = true
url = "http://127.0.0.1:{files}/v1/fleet"
root = "{root}"
jitter_s = 0.0
probation_samples = 20
min_probation_s = 0.0
max_latency_factor = 100.0
"""


if __name__ == "__main__":
    main()
