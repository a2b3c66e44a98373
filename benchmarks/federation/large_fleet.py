"""One round of 10,000 boards: a real broker, a real hub, and every board's words from one connection.

mosquitto and `cloud-hub run` are processes of their own, with the `digits` model as it ships. 10,000 boards say that they
are there; a series of one round with a cohort of all of them is started as the command line does it; each board answers as
soon as its offer comes, with an int8 update of its own, and sends it again when no acknowledgement has come for a while. Nobody
trains and nobody needs a base: the first base of a series is the bundle's own. Before that an auditor has sent the holdout.
The hub screens, averages, judges and commits.

The hub's intake takes 4,096 messages at once. Boards keep what is not acknowledged and send it again; for a status they do
not, so the boards come online no faster than the hub hears of them.
"""

from __future__ import annotations

import queue
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import psutil

from benchmarks.federation.bench import Bench
from benchmarks.harness import print_table
from benchmarks.processes import running, running_broker, wait_until_ready
from cloud_hub.commands import database_of
from cloud_hub.config import load_config
from cloud_hub.errors import RoundError
from cloud_hub.federation.figures import Round, round_page
from cloud_hub.federation.settings import SeriesSettings
from cloud_hub.federation.start import start_series
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.codec import decode, encode
from edge_cascade.deltas import encode_delta
from edge_cascade.gate import Exit
from edge_cascade.messages import (
    Acks,
    Case,
    CaseBatch,
    ClientUpdate,
    Reason,
    RoundOffer,
    RunningModel,
    Status,
)
from edge_cascade.mqtt import Broker, Incoming, MqttSession
from edge_cascade.packing import pack_exits
from edge_cascade.round_terms import decode_terms
from edge_cascade.shipped import find_bundle
from edge_cascade.tensors import encode_tensor
from edge_cascade.topics import DEFAULT_PREFIX, down_topic, up_topic
from edge_daemon.simulate.brokers import find_mosquitto, free_port

BOARDS: Final = 10_000
HOLDOUT: Final = 400
DIFFERENT: Final = 50
AGAIN_S: Final = 5.0
"""After so long without any acknowledgement, what is not acknowledged is sent again."""

_ONLINE_AT_ONCE: Final = 1_000
_PATIENCE_S: Final = 600.0
_BOOT: Final = bytes(8)
_BATCH: Final = 100

_HUB: Final = """\
[hub]
state_dir = "{state}"
holdout_share = 1.0
[broker]
port = {broker}
[http]
port = {http}
[[models]]
bundle = "digits"
[log]
level = "warning"
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds from the first offer, and what the hub's process took for the round."""

    boards: int
    offered_s: float
    answered_s: float
    acknowledged_s: float
    sent_again: int
    cleared_s: float
    committed_s: float
    cpu_s: float
    rss_before_mb: float
    peak_mb: float
    broker_peak_mb: float
    counted: int
    up_bytes: int
    down_bytes: int
    phase: str
    guard: str


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    if find_mosquitto() is None:
        print("large-fleet: mosquitto is not installed (apt-get install mosquitto): left out")
        return {}
    boards, holdout = bench.some((BOARDS, HOLDOUT), (20, 100))
    with ExitStack() as stack, bench.console.status("large-fleet"):
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        figures = _Round(stack, directory, boards).measure(holdout)
    _print(figures)
    return {"round": msgspec.to_builtins(figures)}


class _Round:
    """A broker, a hub and a fleet."""

    def __init__(self, stack: ExitStack, directory: Path, boards: int) -> None:
        port, http = free_port(), free_port()
        hub = directory / "hub.toml"
        hub.write_text(_HUB.format(state=directory / "state", broker=port, http=http), encoding="utf-8")
        self._broker_pid = stack.enter_context(running_broker(port, directory, None)).pid
        command = [sys.executable, "-m", "cloud_hub", "run", "--config", str(hub)]
        self._hub = psutil.Process(stack.enter_context(running("hub", command, directory, None)).pid)
        wait_until_ready(http)
        self._database = database_of(load_config(hub))
        stack.enter_context(self._database)
        self._bundle = load_bundle(find_bundle("digits"))
        self._names = [f"board-{index:05}" for index in range(boards)]
        self._offers: queue.Queue[tuple[str, RoundOffer]] = queue.Queue()
        self._acknowledged: set[tuple[str, int]] = set()
        self._updates: dict[str, bytes] = {}
        self._heard_s = 0.0
        self._cleared = 0
        self._session = MqttSession(
            Broker(port=port),
            "fleet",
            subscriptions=[down_topic(DEFAULT_PREFIX, "+", "round"), down_topic(DEFAULT_PREFIX, "+", "acks")],
            on_message=self._receive,
        )
        self._session.start()
        stack.callback(self._session.stop)
        _wait(lambda: self._session.is_listening, "the broker does not answer")

    def measure(self, holdout: int) -> Figures:
        """One round, from the boards' first word to the next base."""
        self._say_online()
        self._send_holdout(holdout)
        updates = _deltas(self._bundle)
        self._acknowledged.clear()
        self._start(SeriesSettings(
            rounds=1, cohort=len(self._names), sleeper_share=0.0, quorum=1.0, deadline_s=_PATIENCE_S,
            grace_s=1.0, min_holdout=holdout // 2, seed=1,
        ))  # fmt: skip
        device, offer = self._offers.get(timeout=_PATIENCE_S)
        started = time.monotonic()
        rss_before, cpu_before = self._hub.memory_info().rss, sum(self._hub.cpu_times()[:2])
        Path(f"/proc/{self._hub.pid}/clear_refs").write_text("5", encoding="ascii")
        self._answer(0, device, offer, updates)
        offered_s = 0.0
        for index in range(1, len(self._names)):
            device, offer = self._offers.get(timeout=_PATIENCE_S)
            offered_s = time.monotonic() - started
            self._answer(index, device, offer, updates)
        answered_s = time.monotonic() - started
        sent_again = self._send_again()
        acknowledged_s = time.monotonic() - started
        _wait(lambda: self._cleared >= len(self._names), "not every offer was taken away")
        cleared_s = time.monotonic() - started
        _wait(lambda: self._round().closed_at_ms is not None, "the round does not end")
        committed_s = time.monotonic() - started
        ended = self._round()
        return Figures(
            len(self._names),
            offered_s,
            answered_s,
            acknowledged_s,
            sent_again,
            cleared_s,
            committed_s,
            sum(self._hub.cpu_times()[:2]) - cpu_before,
            rss_before / 1e6,
            _peak_mb(self._hub.pid),
            _peak_mb(self._broker_pid),
            ended.counted,
            ended.bytes_up,
            ended.bytes_down,
            ended.phase,
            "" if ended.guard is None else ended.guard.says,
        )

    def _say_online(self) -> None:
        running_model = RunningModel("digits", bytes.fromhex(self._bundle.bundle_id), "default", 0)
        for start in range(0, len(self._names), _ONLINE_AT_ONCE):
            some = self._names[start : start + _ONLINE_AT_ONCE]
            for name in some:
                self._publish(name, "status", encode(Status(name, True, _BOOT, "1", [running_model])))
            wanted = start + len(some)
            _wait(lambda: self._heard() >= wanted, "not every board was heard")  # noqa: B023 - waited for here

    def _send_holdout(self, count: int) -> None:
        """Audits of the test images that ship; the full model answers them."""
        with np.load(find_bundle("digits").parent / "samples.npz", allow_pickle=False) as data:
            x = data["x_test"][:count].astype(np.float32)
        wire, plan = self._bundle.graph.wire, self._bundle.plan().name
        answer = pack_exits([Exit(0, 0, 0.5, 0.5)])
        cases = [
            Case(seq, "s", 0, 0, answer, False, 10_000, Reason.AUDIT, False, False, encode_tensor(each, wire))
            for seq, each in enumerate(x, 1)
        ]
        bundle = bytes.fromhex(self._bundle.bundle_id)
        for start in range(0, count, _BATCH):
            batch = CaseBatch("auditor", _BOOT, "digits", bundle, plan, cases[start : start + _BATCH])
            self._publish("auditor", "cases", encode(batch))
        _wait(lambda: len(self._acknowledged) >= count, "the holdout was not acknowledged")

    def _start(self, settings: SeriesSettings) -> None:
        """As soon as the full model has answered enough of the holdout and every board was heard."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self._database.run(
                    lambda c: start_series(c, self._bundle, settings, created_by="benchmark", now_ms=1)
                )
                return
            except RoundError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.1)

    def _heard(self) -> int:
        from sqlalchemy import func, select

        from cloud_hub.store.schema import devices

        return int(
            self._database.run(lambda c: c.execute(select(func.count()).select_from(devices)).scalar_one())
        )

    def _round(self) -> Round:
        return self._database.run(lambda c: round_page(c, series_id=None, before=None, limit=1)).rounds[0]

    def _answer(self, index: int, device: str, offer: RoundOffer, updates: Sequence[bytes]) -> None:
        terms = decode_terms(offer.terms)
        update = ClientUpdate(
            device,
            _BOOT,
            1,
            terms.model,
            terms.round_id,
            terms.training_base,
            100 + index % 50,
            terms.encoding,
            updates[index % len(updates)],
        )
        self._updates[device] = encode(update)
        self._publish(device, "update", self._updates[device])

    def _send_again(self) -> int:
        """Wait until all is acknowledged, as boards wait; how often one was sent again."""
        sent_again = 0
        deadline_s = time.monotonic() + _PATIENCE_S
        while missing := [name for name in self._updates if (name, 1) not in self._acknowledged]:
            if time.monotonic() > deadline_s:
                raise SystemExit("large-fleet: not every update was acknowledged")
            if time.monotonic() - self._heard_s < AGAIN_S:
                time.sleep(0.02)
                continue
            for name in missing:
                self._publish(name, "update", self._updates[name])
            sent_again += len(missing)
            self._heard_s = time.monotonic()
        return sent_again

    def _publish(self, device: str, channel: Any, payload: bytes) -> None:
        topic = up_topic(DEFAULT_PREFIX, device, channel)
        while self._session.publish(topic, payload, retain=channel == "status") is None:
            time.sleep(0.002)

    def _receive(self, incoming: Incoming) -> None:
        device = incoming.topic.split("/")[-3]
        if not incoming.payload:
            self._cleared += 1
            return
        match decode(incoming.payload):
            case RoundOffer() as offer:
                self._offers.put((device, offer))
            case Acks(committed=committed, duplicate=duplicate):
                self._acknowledged.update((device, seq) for seq in (*committed, *duplicate))
                self._heard_s = time.monotonic()
            case _:
                pass


def _deltas(bundle: Bundle) -> list[bytes]:
    """Small steps, different ones."""
    deltas = []
    for seed in range(DIFFERENT):
        rng = np.random.default_rng(seed)
        step = {
            name: (1e-3 * rng.standard_normal(array.shape)).astype(np.float32)
            for name, array in bundle.parameters().items()
        }
        deltas.append(encode_delta(step, "int8"))
    return deltas


def _wait(is_so: Callable[[], bool], problem: str) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not is_so():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"large-fleet: {problem}")
        time.sleep(0.05)


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1000


def _print(figures: Figures) -> None:
    print_table(
        f"A round of {figures.boards:,} boards, seconds from the first offer",
        ("", "seconds"),
        [
            ("all offered", f"{figures.offered_s:.1f}"),
            ("all have answered", f"{figures.answered_s:.1f}"),
            ("all acknowledged", f"{figures.acknowledged_s:.1f}"),
            ("all offers taken away", f"{figures.cleared_s:.1f}"),
            (f"{figures.phase}, next base made", f"{figures.committed_s:.1f}"),
        ],
    )
    print_table(
        "What it took",
        ("", ""),
        [
            ("votes counted", f"{figures.counted:,}"),
            ("updates sent again", f"{figures.sent_again:,}"),
            ("hub: processor time, s", f"{figures.cpu_s:.1f}"),
            ("hub: memory before / at the peak, MB", f"{figures.rss_before_mb:.0f} / {figures.peak_mb:.0f}"),
            ("broker: memory at the peak, MB", f"{figures.broker_peak_mb:.0f}"),
            ("deltas up, MB", f"{figures.up_bytes / 1e6:.1f}"),
            ("offers down, MB", f"{figures.down_bytes / 1e6:.1f}"),
            ("guard", figures.guard),
        ],
    )
