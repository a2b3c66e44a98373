"""Asks a second bundle what it would have said, on a share of live samples, beside the answers.

A coin picks the samples before anything of their outcome is looked at. The pair of answers is counted by
scenes; where the two differ, the input goes to the hub as well, which says who was right. Audited samples are
left out: the hub asks both bundles about those itself. What the thread does not get to is dropped as it comes
and counted.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.errors import CascadeError
from edge_cascade.ladder import Ladder
from edge_cascade.messages import (
    Case,
    DesiredModel,
    DifferingPair,
    Reason,
    ShadowReport,
    ShadowScene,
)
from edge_cascade.packing import pack_exits
from edge_cascade.pauses import Pause, no_pause
from edge_cascade.tensors import encode_tensor
from edge_daemon.core.scenes import Allowance, Scenes, select_reports
from edge_daemon.core.spooling import case_item, shadow_item
from edge_daemon.errors import EdgeError
from edge_daemon.memory import give_back_memory
from edge_daemon.pipeline import Outcome, Sample
from edge_daemon.ports import Clock, Spool
from edge_daemon.sensors import read_rss_bytes
from edge_daemon.side_thread import SideThread

log = logging.getLogger(__name__)

AGAIN_S: Final = 60.0
"""What could not be opened (memory was short) is tried again after that."""


@dataclass(frozen=True, slots=True)
class Shadowing:
    """What the hub asks for besides a bundle, and what it applies to; the other bundle by its directory."""

    asked: DesiredModel
    serving: str
    other_directory: Path | None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a shadow works with: whose samples these are, and where reports and cases go."""

    device: str
    boot: bytes
    next_seq: Callable[[], int]
    spool: Spool
    clock: Clock
    open_ladder: Callable[[Bundle], Ladder]
    """Opens a bundle as this board would serve it."""
    pause: Pause = no_pause
    """Comes between pieces of work that answers would feel."""


@dataclass(slots=True)
class _Comparison:
    """Two bundles of a model at work."""

    serving: Bundle
    other: Bundle
    ladder: Ladder
    share: float
    scenes: Scenes
    held_bytes: int
    """About what the other bundle takes."""


class _Drawn(msgspec.Struct, frozen=True):
    model: str
    sample: Sample
    outcome: Outcome


class Shadow(SideThread[_Drawn]):
    """Compares until stopped. At a stop what is drawn is compared, and every scene is reported."""

    def __init__(
        self,
        around: Surroundings,
        served: Callable[[str], Bundle],
        *,
        max_cases_per_hour: float,
        rng: random.Random,
    ) -> None:
        """`served`: the bundle that answers for a model now."""
        super().__init__("shadow", around.clock)
        self._around = around
        self._served = served
        self._rng = rng
        self._allowance = Allowance(max_cases_per_hour)
        self._shares: dict[str, tuple[str, float]] = {}
        """By model the bundle that serves and the share of its samples, for the inference thread."""
        self._comparisons: dict[str, _Comparison] = {}
        self._asked: dict[str, Shadowing] = {}
        self._again: dict[str, tuple[float, Shadowing]] = {}
        """By model when to try again to begin, and what."""
        self._lock = threading.Lock()
        self.pairs = 0
        self.differing = 0
        self.dropped = 0
        self.held_bytes = 0
        """About what the other bundles take: it is not what the one that serves takes."""

    # --- other threads -------------------------------------------------------------------------------------

    def hear(self, shadowing: Shadowing) -> None:
        """What is to be compared from now on (on the swapper's thread)."""
        model = shadowing.asked.model
        with self._lock:
            # At once: pairs of what is no longer asked for would be pairs of other bundles.
            self._shares.pop(model, None)
            self._asked[model] = shadowing
        self.wake()

    def observe(self, model: str, sample: Sample, outcome: Outcome) -> None:
        """Look at an answered sample (on the inference thread)."""
        asked = self._shares.get(model)
        if asked is None:
            return
        bundle, share = asked
        # Chance first, then the outcome: see the module's head.
        if self._rng.random() >= share or not self._allowance.allows(now_s=sample.received_s):
            return
        answer, climb, case = outcome.answer, outcome.climb, outcome.case
        if answer is None or climb is None or climb.failed or answer.bundle != bundle:
            # A stage that does not run is a matter of health.
            return
        if case is not None and case.audited:
            return
        if not self.offer(_Drawn(model, sample, outcome)):
            self.dropped += 1

    # --- the thread ----------------------------------------------------------------------------------------

    def turn(self, drawn: _Drawn | None) -> None:
        """Take up what is asked for, compare, report the scenes that are over."""
        self._take_terms()
        if drawn is not None:
            self._compare(drawn)
        for comparison in self._comparisons.values():
            self._report(comparison)

    def end(self) -> None:
        """Compare what is drawn, report every scene."""
        for drawn in self.left():
            self.guard(self.turn, drawn)
        for comparison in self._comparisons.values():
            self.guard(self._report_all, comparison)

    def _take_terms(self) -> None:
        now_s = self._around.clock.monotonic_s()
        for model in [model for model, (due_s, _) in self._again.items() if due_s <= now_s]:
            _, shadowing = self._again.pop(model)
            with self._lock:
                # What was asked for meanwhile goes first.
                self._asked.setdefault(model, shadowing)
        while self._asked:
            with self._lock:
                model, shadowing = self._asked.popitem()
            self._again.pop(model, None)
            self._end(model)
            comparison = self._begin(shadowing)
            if comparison is None:
                continue
            with self._lock:
                if model not in self._asked:
                    self._comparisons[model] = comparison
                    self._count_held()
                    self._shares[model] = (comparison.serving.bundle_id, comparison.share)

    def _begin(self, shadowing: Shadowing) -> _Comparison | None:
        asked = shadowing.asked
        if asked.shadow_ppm == 0 or shadowing.other_directory is None:
            return None
        before_bytes = read_rss_bytes()
        try:
            other = load_bundle(shadowing.other_directory, pause=self._around.pause)
            if asked.bundle.hex() not in {shadowing.serving, other.bundle_id}:
                # What the board serves, or has beside it, is not what is judged.
                return None
            ladder = self._around.open_ladder(other)
        except (CascadeError, EdgeError, OSError, MemoryError) as error:
            self._again[asked.model] = (self._around.clock.monotonic_s() + AGAIN_S, shadowing)
            log.warning("not shadowed model=%s next_try_s=%.0f: %s", asked.model, AGAIN_S, error)
            return None
        serving = self._served(asked.model)
        if serving.bundle_id != shadowing.serving:
            # It was swapped meanwhile, and the swapper says so next.
            return None
        held_bytes = max(read_rss_bytes() - before_bytes, 0)
        log.info(
            "shadowing model=%s serving=%s other=%s share=%.3f",
            asked.model, serving.bundle_id[:12], other.bundle_id[:12], asked.shadow_ppm / 1e6,
        )  # fmt: skip
        share, scenes = asked.shadow_ppm / 1e6, Scenes(asked.scene_s)
        return _Comparison(serving, other, ladder, share, scenes, held_bytes)

    def _end(self, model: str) -> None:
        ended = self._comparisons.pop(model, None)
        if ended is None:
            return
        self._report_all(ended)
        del ended
        give_back_memory()
        self._count_held()

    def _count_held(self) -> None:
        self.held_bytes = sum(each.held_bytes for each in self._comparisons.values())

    def _compare(self, drawn: _Drawn) -> None:
        comparison = self._comparisons.get(drawn.model)
        answer, climb = drawn.outcome.answer, drawn.outcome.climb
        assert answer is not None
        assert climb is not None
        if comparison is None or comparison.serving.bundle_id != answer.bundle:
            return
        sample = drawn.sample
        if not comparison.scenes.has_room(sample.sensor, now_s=sample.received_s):
            self.dropped += 1
            return
        try:
            other = comparison.ladder.climb(sample.x)
        except CascadeError as error:
            log.debug("other bundle without an answer: %s", error)
            return
        if other.failed:
            return
        self.pairs += 1
        differing = None
        if other.answer.label != climb.answer.label:
            self.differing += 1
            seq = int(answer.id.rpartition("-")[2])
            differing = DifferingPair(seq, climb.answer.label, other.answer.label)
            if not answer.escalated:
                # An escalated one is on its way already.
                self._send(comparison, drawn, seq)
        comparison.scenes.add(sample.sensor, differing, now_s=sample.received_s)

    def _send(self, comparison: _Comparison, drawn: _Drawn, seq: int) -> None:
        sample, answer, climb = drawn.sample, drawn.outcome.answer, drawn.outcome.climb
        assert answer is not None
        assert climb is not None
        case = Case(
            seq=seq,
            sensor=sample.sensor,
            taken_at_ms=sample.taken_at_ms,
            point=answer.point,
            exits=pack_exits(climb.exits),
            escalated=False,
            audit_ppm=0,
            reason=Reason.SHADOW,
            deferred=False,
            uncertified=answer.uncertified,
            tensor=encode_tensor(sample.x, comparison.serving.graph.wire),
        )
        self._allowance.charge()
        self._around.spool.append(
            case_item(
                case,
                boot=self._around.boot,
                model=drawn.model,
                bundle=bytes.fromhex(answer.bundle),
                plan=answer.plan,
            )
        )

    def _report(self, comparison: _Comparison) -> None:
        self._tell(comparison, comparison.scenes.take_over(now_s=self._around.clock.monotonic_s()))

    def _report_all(self, comparison: _Comparison) -> None:
        self._tell(comparison, comparison.scenes.take_all())

    def _tell(self, comparison: _Comparison, over: list[ShadowScene]) -> None:
        around = self._around
        for some in select_reports(over):
            report = ShadowReport(
                device=around.device,
                boot=around.boot,
                seq=around.next_seq(),
                model=comparison.serving.graph.model,
                bundle=bytes.fromhex(comparison.serving.bundle_id),
                other=bytes.fromhex(comparison.other.bundle_id),
                scenes=some,
            )
            around.spool.append(shadow_item(report))
