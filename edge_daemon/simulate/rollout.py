"""`--rollout`: a signed release goes through a virtual fleet of real boards, and what was caught is told.

The boards are processes, for a release may crash them. Only the sensors and the site are virtual, and time is
short: waves of seconds, audits and shadowed samples by the dozen a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_cascade.bundle import load_bundle
from edge_cascade.shipped import find_bundle
from edge_cascade.topics import DEFAULT_PREFIX
from edge_daemon.errors import SimulationError
from edge_daemon.simulate.board import Board, broker_tables, wait_until_ready
from edge_daemon.simulate.brokers import BrokerKind
from edge_daemon.simulate.crashes import Victim, decide_kill
from edge_daemon.simulate.hub import SimulatedHub
from edge_daemon.simulate.made_release import MadeRelease, make_release
from edge_daemon.simulate.rollout_kinds import Kind
from edge_daemon.simulate.rollout_report import BoardView, Facts, RolloutReport, make_report
from edge_daemon.simulate.sensors import open_source
from edge_daemon.simulate.site import VirtualSite

START_S: Final = 60.0
PATIENCE_S: Final = 300.0
SETTLE_S: Final = 60.0
POLL_S: Final = 0.25

DRIFT: Final = 0.3
"""How far the world moves while a release that is called `drifted` goes out."""

LOOKS: Final[Mapping[str, object]] = {"look_every_s": 1.0}
SAMPLING: Final = {"audit_rate": 0.2, "shadow_share": 0.8}
PLAN: Final[Mapping[str, object]] = {
    # Every sample of the virtual site has a sensor of its own: no scene repeats itself.
    "scene_s": 1,
    "waves": [
        {"name": "canary", "count": 1, "soak_s": 3.0, "max_drop": 0.04, "sampling": SAMPLING},
        {"name": "half", "share": 0.5, "soak_s": 3.0, "max_drop": 0.04, "sampling": SAMPLING},
        {"name": "all", "share": 1.0, "soak_s": 1.0, "max_drop": None},
    ],
    # The boards of the fleet take each other's cores: what shifts in latency is no news here.
    "health": {"max_latency_factor": 50.0},
}


@dataclass(frozen=True, slots=True)
class RolloutScenario:
    """What to simulate. `samples` of each board, at `rate_hz`, are its past before the release is offered."""

    kind: Kind
    model: str
    devices: int
    samples: int
    rate_hz: float
    seed: int


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """How far a run is, for people to watch."""

    sent: int
    answered: int
    by_release: int
    what: str


class RolloutFleet:
    """One run from start to report."""

    def __init__(self, scenario: RolloutScenario, broker: BrokerKind, directory: Path) -> None:
        self._scenario = scenario
        self._broker = broker
        self._directory = directory
        self._names = [f"board-{number:03d}" for number in range(scenario.devices)]
        self._bundle = load_bundle(find_bundle(scenario.model))
        self._site = VirtualSite(broker, directory / "site", self._bundle)
        self._hub = SimulatedHub(broker, directory / "hub", scenario.model, rollouts=LOOKS)
        self._boards: list[Board] = []
        self._victims: dict[str, Victim] = {}
        self._sending = threading.Thread(target=self._send, name="sensors", daemon=True)
        self._stopping = threading.Event()
        self._has_drifted = threading.Event()

    def run(self, watch: Callable[[RolloutProgress], None]) -> RolloutReport:
        """Run the scenario; `watch` is called a few times a second.

        Raises:
            SimulationError: when something does not start, or the rollout comes to no end.
        """
        started_s = time.monotonic()
        try:
            self._start(watch)
            made = self._make(watch)
            release = self._hub.add_release(made.directory)
            rollout = self._hub.start_rollout(release, PLAN)
            shown = self._watch(rollout, made, watch)
            self._stopping.set()
            self._sending.join()
            self._settle(made, watch)
            return self._conclude(made, shown, time.monotonic() - started_s)
        finally:
            self._stop()

    # --- before --------------------------------------------------------------------------------------------

    def _start(self, watch: Callable[[RolloutProgress], None]) -> None:
        watch(self._progress("starting", None))
        self._site.start()
        self._hub.start(self._names)
        root, token = self._hub.make_keys()
        for name in self._names:
            board = Board(
                name, self._directory / name, self._tables(name, root, token), model=self._scenario.model
            )
            self._boards.append(board)
            board.start()
        self._site.listen()
        wait_until_ready(self._boards, START_S)
        self._sending.start()

    def _tables(self, name: str, root: Path, token: Path) -> dict[str, Mapping[str, object]]:
        return {
            "inlet.broker": broker_tables(self._site.address),
            "results": {"prefix": f"results/{name}"},
            "hub": {"prefix": DEFAULT_PREFIX, "report_every_s": 1.0},
            "hub.broker": broker_tables(self._hub.address_for(name)),
            "audit": {"max_raised_per_hour": 1e6},
            "releases": {
                "enabled": True,
                "url": self._hub.fleet_url,
                "root": str(root),
                "token_file": str(token),
                "jitter_s": 0.0,
                "probation_samples": 100,
                # What crashes must not prove itself before somebody came to kill it.
                "min_probation_s": PATIENCE_S if self._scenario.kind == "crash" else 2.0,
                "max_shadow_per_hour": 1e6,
                # Boards share this machine's cores: a trial beside other boards is a noisy one.
                "max_latency_factor": 4.0,
            },
        }

    def _make(self, watch: Callable[[RolloutProgress], None]) -> MadeRelease:
        """The release, while the boards come to have a past."""
        scenario = self._scenario
        until_s = time.monotonic() + scenario.samples / scenario.rate_hz
        made = make_release(scenario.kind, self._bundle, self._directory / "release", seed=scenario.seed)
        while time.monotonic() < until_s:
            watch(self._progress("the boards' past", None))
            time.sleep(POLL_S)
        if scenario.kind == "drifted":
            self._has_drifted.set()
        return made

    # --- meanwhile -----------------------------------------------------------------------------------------

    def _send(self) -> None:
        scenario = self._scenario
        still, drifted = (
            [
                open_source(scenario.model, seed=scenario.seed * 1000 + number, drift=drift)
                for number in range(scenario.devices)
            ]
            for drift in (0.0, DRIFT)
        )
        begin_s, number = time.monotonic(), 0
        while not self._stopping.is_set():
            for position, name in enumerate(self._names):
                due_s = begin_s + (number + position / scenario.devices) / scenario.rate_hz
                time.sleep(max(due_s - time.monotonic(), 0.0))
                sources = drifted if self._has_drifted.is_set() else still
                self._site.send(name, f"s{number}", next(sources[position]))
            number += 1

    def _watch(
        self, rollout: str, made: MadeRelease, watch: Callable[[RolloutProgress], None]
    ) -> dict[str, Any]:
        """Until the rollout has ended and every board runs what it should; the rollout as last shown."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            shown = self._hub.rollout(rollout)
            about = shown["rollout"]
            wave = about["wave_name"] or "no wave yet"
            watch(self._progress(f"{about['phase']}: {wave}", made))
            if self._scenario.kind == "crash":
                self._crash(made)
            if about["phase"] in {"done", "halted"} and self._is_over(shown):
                return shown
            time.sleep(POLL_S)
        missing = "; ".join(self._hub.rollout(rollout)["waits_for"]) or "nothing"
        raise SimulationError(f"the rollout came to no end in {PATIENCE_S:.0f} s; it waits for: {missing}")

    def _is_over(self, shown: Mapping[str, Any]) -> bool:
        """Whether every board that was offered the release has said where it ended."""
        ended = {"committed"} if shown["rollout"]["phase"] == "done" else {"back", "reverted"}
        return all(each["outcome"] in ended for each in shown["devices"] if each["is_offered"])

    def _crash(self, made: MadeRelease) -> None:
        """Kill whoever has answered by the release for a moment."""
        answered = self._site.answered_by(self._names)
        for board in self._boards:
            victim = self._victims.get(board.name, Victim())
            answers = answered.get((board.name, made.bundle), 0)
            if decide_kill(board.swap_state(), made.bundle, victim, answers=answers):
                board.kill()
                self._victims[board.name] = Victim(victim.kills + 1, answers)

    def _settle(self, made: MadeRelease, watch: Callable[[RolloutProgress], None]) -> None:
        deadline_s = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline_s:
            watch(self._progress("settling", made))
            counted = self._site.counted()
            # A board that is too busy to say how many has said nothing.
            spooled = [board.counters().get("edge_spool_rows") for board in self._boards]
            if counted.answered >= counted.sent and not any(rows is None or rows > 0.0 for rows in spooled):
                return
            time.sleep(POLL_S)

    # --- afterwards ----------------------------------------------------------------------------------------

    def _progress(self, what: str, made: MadeRelease | None) -> RolloutProgress:
        counted = self._site.counted()
        by_release = 0
        if made is not None:
            answered = self._site.answered_by(self._names)
            by_release = sum(count for (_, bundle), count in answered.items() if bundle == made.bundle)
        return RolloutProgress(counted.sent, counted.answered, by_release, what)

    def _conclude(self, made: MadeRelease, shown: dict[str, Any], seconds: float) -> RolloutReport:
        counters = {board.name: board.counters() for board in self._boards}
        boards = [
            BoardView(
                name=board.name,
                outcome=outcome["outcome"] if outcome["is_offered"] else "not offered",
                reason=outcome["reason"],
                wave=outcome["wave"],
                starts=board.starts,
                shadow_pairs=int(counters[board.name].get("edge_shadow_pairs_total", 0)),
            )
            for board in self._boards
            for outcome in shown["devices"]
            if outcome["name"] == board.name
        ]
        scenario = self._scenario
        return make_report(
            self._site.ledger,
            Facts(
                kind=scenario.kind,
                model=scenario.model,
                broker=self._broker,
                seconds=seconds,
                shipped=self._bundle.bundle_id,
                release=made.bundle,
                drop=made.drop,
                shown=shown,
                boards=boards,
                cases=self._hub.cases(),
                shed=sum(int(each.get("edge_shed_total", 0)) for each in counters.values()),
                dropped=sum(int(each.get("edge_spool_dropped_total", 0)) for each in counters.values()),
            ),
        )

    def _stop(self) -> None:
        self._stopping.set()
        if self._sending.is_alive():
            self._sending.join()
        # All at once: each drains for itself.
        ending = [threading.Thread(target=board.stop) for board in self._boards]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()
        self._hub.stop()
        self._site.stop()
