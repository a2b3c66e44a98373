"""Runs a virtual fleet: real devices, a real hub, real brokers; only sensors and the site are virtual.

Devices and hub share nothing but MQTT. The virtual site publishes every sample under a sensor name of its
own, so that answers and verdicts find their sample without any help from the devices.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_cascade.backends.onnx import open_whole_model
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.codec import encode
from edge_cascade.messages import Case, CaseBatch, Reason
from edge_cascade.preprocess import normalise
from edge_cascade.shipped import find_bundle, shipped_model_dir
from edge_cascade.tensors import decode_tensor, through_wire
from edge_cascade.topics import DEFAULT_PREFIX, up_topic
from edge_daemon.config import (
    AuditConfig,
    Config,
    DeviceConfig,
    HttpConfig,
    HubConfig,
    InletConfig,
    ModelConfig,
    ResultsConfig,
    SourceConfig,
    TrainingConfig,
)
from edge_daemon.daemon import Daemon
from edge_daemon.errors import SimulationError
from edge_daemon.simulate.brokers import BrokerKind
from edge_daemon.simulate.hub import SimulatedHub
from edge_daemon.simulate.learning import Fresh, LearningReport, learning_report
from edge_daemon.simulate.ledger import (
    Keeping,
    Setting,
    SimulationReport,
    Traffic,
    make_report,
)
from edge_daemon.simulate.sensors import Labelled, open_source
from edge_daemon.simulate.series import HOLDOUT_SHARE, LEARNING_AUDITS, Series
from edge_daemon.simulate.site import VirtualSite

# How long the last answers and verdicts may take after the last sample and the end of an outage.
SETTLE_S: Final = 60.0
FULL_BATCH: Final = 256


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to simulate; `samples` and `rate_hz` are per device, the outage comes after a third of the run.

    With `rounds` the fleet learns after half of the samples; the other half gives the draft its certificate.
    """

    model: str
    devices: int
    samples: int
    rate_hz: float
    seed: int
    drift: float
    outage_s: float
    rounds: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, for people to watch."""

    total: int
    sent: int
    answered: int
    awaited_verdicts: int
    verdicts: int
    spooled: int
    hub_away: bool
    rounds: str = ""


class Fleet:
    """One run from start to report."""

    def __init__(self, scenario: Scenario, kind: BrokerKind, directory: Path) -> None:
        self._scenario = scenario
        self._kind = kind
        self._directory = directory
        self._names = [f"board-{number:03d}" for number in range(scenario.devices)]
        self._bundle = load_bundle(find_bundle(scenario.model))
        self._site = VirtualSite(kind, directory / "site", self._bundle)
        share = HOLDOUT_SHARE if scenario.rounds else None
        self._hub = SimulatedHub(kind, directory / "hub", scenario.model, holdout_share=share)
        self._full: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None
        self._daemons: list[Daemon] = []

    def run(self, watch: Callable[[Progress], None]) -> SimulationReport:
        """Run the scenario; `watch` is called a few times a second.

        Raises:
            SimulationError: when something does not start.
        """
        started_s = time.monotonic()
        try:
            self._start()
            sources = self._open_sources()
            if self._scenario.rounds:
                half = self._scenario.samples // 2
                self._send_all(sources, range(half), watch)
                self._settle(watch)
                series = self._series()
                series.run(partial(self._watch_rounds, watch))
                self._send_all(sources, range(half, self._scenario.samples), watch)
                self._settle(watch)
                series.wait_for_draft(partial(self._watch_rounds, watch))
                return self._conclude(time.monotonic() - started_s, series)
            self._send_all(sources, range(self._scenario.samples), watch)
            self._settle(watch)
            return self._conclude(time.monotonic() - started_s, None)
        finally:
            self._stop()

    def _start(self) -> None:
        self._site.start()
        self._hub.start(self._names)
        rng = random.Random(self._scenario.seed)
        for name in self._names:
            daemon = Daemon(self._config(name), rng=random.Random(rng.random()))
            self._daemons.append(daemon)
            daemon.start()
        self._site.listen()
        self._wait_until(lambda: self._site.is_up and all(each.health().ready for each in self._daemons))

    def _config(self, name: str) -> Config:
        scenario = self._scenario
        return Config(
            device=DeviceConfig(id=name, state_dir=str(self._directory / name), drain_s=10.0),
            models=(ModelConfig(bundle=scenario.model),),
            inlet=InletConfig(
                sources=(SourceConfig(topic=f"sensors/{name}/{{sensor}}", format="float32le"),),
                broker=self._site.address,
            ),
            results=ResultsConfig(prefix=f"results/{name}"),
            hub=HubConfig(broker=self._hub.address_for(name), prefix=DEFAULT_PREFIX),
            audit=AuditConfig(rate=LEARNING_AUDITS, max_per_hour=1e6) if scenario.rounds else AuditConfig(),
            training=self._training(),
            http=HttpConfig(enabled=False),
        )

    def _training(self) -> TrainingConfig:
        if not self._scenario.rounds:
            return TrainingConfig()
        # What else runs on this machine is the rest of the fleet.
        return TrainingConfig(
            enabled=True,
            hub_key=self._hub.round_key(),
            max_load=1.0,
            max_temperature_celsius=150.0,
            min_free_mb=0,
            on_battery=True,
        )

    def _open_sources(self) -> list[Iterator[Labelled]]:
        scenario = self._scenario
        return [
            open_source(scenario.model, seed=scenario.seed * 1000 + number, drift=scenario.drift)
            for number in range(scenario.devices)
        ]

    def _send_all(
        self, sources: list[Iterator[Labelled]], numbers: range, watch: Callable[[Progress], None]
    ) -> None:
        scenario = self._scenario
        begin_s = time.monotonic()
        length_s = scenario.samples / scenario.rate_hz
        outage_at_s = length_s / 3
        outage_over = scenario.outage_s <= 0 or numbers.start > 0
        away = False
        for number in numbers:
            for position, (name, source) in enumerate(zip(self._names, sources, strict=True)):
                due_s = begin_s + (number - numbers.start + position / scenario.devices) / scenario.rate_hz
                _sleep_until(due_s)
                self._site.send(name, f"s{number}", next(source))
            elapsed_s = time.monotonic() - begin_s
            if not outage_over and not away and elapsed_s >= outage_at_s:
                self._hub.stop_broker()
                away = True
            if away and elapsed_s >= outage_at_s + scenario.outage_s:
                self._hub.start_broker()
                away, outage_over = False, True
            watch(self._progress(hub_away=away))
        if away:
            self._wait_out(begin_s + outage_at_s + scenario.outage_s, watch)

    def _wait_out(self, until_s: float, watch: Callable[[Progress], None]) -> None:
        while time.monotonic() < until_s:
            watch(self._progress(hub_away=True))
            time.sleep(0.1)
        self._hub.start_broker()

    def _settle(self, watch: Callable[[Progress], None]) -> None:
        deadline_s = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline_s:
            progress = self._progress(hub_away=False)
            watch(progress)
            is_answered = progress.answered + self._shed() >= progress.sent
            if is_answered and progress.verdicts >= progress.awaited_verdicts and progress.spooled == 0:
                return
            time.sleep(0.05)

    # --- rounds --------------------------------------------------------------------------------------------

    def _series(self) -> Series:
        scenario = self._scenario
        return Series(
            self._hub,
            scenario.model,
            rounds=scenario.rounds,
            devices=scenario.devices,
            seed=scenario.seed,
        )

    def _watch_rounds(self, watch: Callable[[Progress], None], words: str) -> None:
        watch(self._progress(hub_away=False, rounds=words))

    def _judge_learning(self, series: Series) -> Callable[[], LearningReport]:
        """What the hub says of the series now; judged once the hub has ended."""
        shown, rounds, draft = series.shown(), series.rounds(), series.draft()

        def judge() -> LearningReport:
            scenario = self._scenario
            fresh = Fresh(scenario.model, seed=scenario.seed, drift=scenario.drift)
            wire = self._bundle.graph.wire
            received = np.stack([through_wire(x, wire) for x in fresh.x])
            return learning_report(
                shown,
                rounds,
                self._bundle,
                hub_state_dir=self._hub.state_dir,
                fresh=fresh,
                full=self._full_labels(received),
                draft=draft,
            )

        return judge

    def _progress(self, *, hub_away: bool, rounds: str = "") -> Progress:
        counted = self._site.counted()
        return Progress(
            total=self._scenario.devices * self._scenario.samples,
            sent=counted.sent,
            answered=counted.answered,
            awaited_verdicts=counted.awaited_verdicts,
            verdicts=counted.verdicts,
            spooled=sum(daemon.spooled_rows() for daemon in self._daemons),
            hub_away=hub_away,
            rounds=rounds,
        )

    def _conclude(self, seconds: float, series: Series | None) -> SimulationReport:
        for daemon in self._daemons:
            daemon.stop()
        counters = [daemon.uplink.counters() for daemon in self._daemons if daemon.uplink is not None]
        traffic = Traffic(
            bytes_up=sum(each["bytes_up"] for each in counters),
            bytes_down=sum(each["bytes_down"] for each in counters),
            bytes_cloud_only=self._bytes_cloud_only(),
        )
        keeping = Keeping(
            hub_case_ids=self._hub.case_ids(),
            shed=self._shed(),
            dropped=sum(count for daemon in self._daemons for count, _ in daemon.metrics.drops().values()),
            redelivered=sum(each["duplicates"] for each in counters),
        )
        setting = Setting(self._scenario.model, self._scenario.devices, self._kind, seconds)
        report = make_report(self._site.ledger, setting, traffic, keeping, self._cloud_labels())
        if series is None:
            return report
        judge = self._judge_learning(series)
        self._hub.stop()
        return msgspec.structs.replace(report, learning=judge())

    def _shed(self) -> int:
        return sum(daemon.metrics.shed.total for daemon in self._daemons)

    def _bytes_cloud_only(self) -> int:
        """Every sample in the batches, the encoding and the topics of a device that sends them all."""
        total = 0
        for name in self._names:
            tensors = [tensor for (device, _), tensor in self._site.encoded.items() if device == name]
            for start in range(0, len(tensors), HubConfig().max_batch_items):
                batch = tensors[start : start + HubConfig().max_batch_items]
                total += len(encode(_whole_batch(name, self._bundle, start, batch)))
                total += len(up_topic(DEFAULT_PREFIX, name, "cases"))
        return total

    def _cloud_labels(self) -> dict[tuple[str, str], str]:
        labels: dict[tuple[str, str], str] = {}
        for keys, x in _decoded_batches(self._site.encoded):
            for key, label in zip(keys, self._full_labels(x), strict=True):
                labels[key] = self._bundle.graph.labels[label]
        return labels

    def _full_labels(self, x: NDArray[np.float32]) -> NDArray[np.int64]:
        """What the full model says of samples as they come off the wire."""
        if self._full is None:
            model = (shipped_model_dir(self._scenario.model) / "full.onnx").read_bytes()
            self._full = open_whole_model(model)
        found: NDArray[np.int64] = self._full(normalise(x, self._bundle.graph.preprocess)).argmax(axis=1)
        return found

    def _stop(self) -> None:
        for daemon in self._daemons:
            daemon.stop()
        self._hub.stop()
        self._site.stop()

    def _wait_until(self, is_done: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_done():
            if time.monotonic() > deadline_s:
                problems = {problem for daemon in self._daemons for problem in daemon.health().problems}
                raise SimulationError(
                    f"the fleet did not come up: {'; '.join(sorted(problems)) or 'no reason given'}"
                )
            time.sleep(0.02)


def _sleep_until(due_s: float) -> None:
    left_s = due_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)


def _whole_batch(device: str, bundle: Bundle, start: int, tensors: list[bytes]) -> CaseBatch:
    now_ms = time.time_ns() // 1_000_000
    cases = [
        Case(start + n, f"s{start + n}", now_ms, 0, b"", True, 0, Reason.UNSURE, False, False, tensor)
        for n, tensor in enumerate(tensors)
    ]
    return CaseBatch(device, bytes(8), bundle.graph.model, bytes.fromhex(bundle.bundle_id), "all", cases)


def _decoded_batches(
    encoded: dict[tuple[str, str], bytes],
) -> Iterator[tuple[list[tuple[str, str]], NDArray[np.float32]]]:
    keys = list(encoded)
    for start in range(0, len(keys), FULL_BATCH):
        chosen = keys[start : start + FULL_BATCH]
        yield chosen, np.stack([decode_tensor(encoded[key]) for key in chosen])
