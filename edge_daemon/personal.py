"""Has a board's own heads answer for as long as they answer better. A thread of its own, in no answer's way.

Heads come from rounds with `private_heads`, truths from the store of examples: verdicts that may train,
labels of the site. Of each truth both are asked; `core.personal` says who is preferred. The heads of the
bundle answer at first, after a swap, with new heads of one's own, and while the hub judges a release on this
board: it compares bundles, not heads. What the thread does not get to is dropped as it comes and counted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import Bundle
from edge_cascade.burst import Burst
from edge_cascade.errors import CascadeError, first_line
from edge_cascade.ladder import Ladder
from edge_cascade.messages import DesiredState
from edge_daemon.core.heads import with_heads
from edge_daemon.core.personal import OpenScenes, Standing, next_standing
from edge_daemon.errors import EdgeError
from edge_daemon.example_ledger import Truth
from edge_daemon.memory import give_back_memory
from edge_daemon.models import Numbering
from edge_daemon.pipeline import Pipeline
from edge_daemon.ports import Clock
from edge_daemon.side_thread import SideThread
from edge_daemon.training.arrays import load_arrays

log = logging.getLogger(__name__)

SCENE_S: Final = 300.0
"""As long as a scene is for whoever judges a release, unless a rollout says otherwise."""
MAX_REMEMBERED: Final = 4096
"""Samples whose truth was counted, so that a human's word after the full model's is not a second one."""
FLIP_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What this works with.

    `open_ladder` opens a bundle as this board would serve it. `install` has a bundle answer whose id is that
    of the one that does, and refuses any other.
    """

    numbering: Numbering
    clock: Clock
    open_ladder: Callable[[Bundle], Ladder]
    install: Callable[[Bundle], Future[Pipeline]]
    scene_s: float = SCENE_S


@dataclass(frozen=True, slots=True)
class _Heads:
    """As they were kept (safetensors). Answers with a number above `since` were given afterwards."""

    content: bytes
    since: int


@dataclass(frozen=True, slots=True)
class _Told:
    """A truth, and the sample that it is about."""

    truth: Truth
    x: NDArray[np.float32]


@dataclass(slots=True)
class _Contest:
    """A bundle, and the same with the board's own heads."""

    shared: Bundle
    own: Bundle
    shared_ladder: Ladder
    own_ladder: Ladder
    since: int
    scenes: OpenScenes
    standing: Standing = field(default_factory=Standing)
    is_served: bool = False
    # An ordered set.
    counted: dict[tuple[bytes, int], None] = field(default_factory=dict)


class Personal(SideThread[_Told]):
    """Compares until stopped. What answers then goes on to answer."""

    def __init__(self, bundles: Mapping[str, Bundle], around: Surroundings) -> None:
        """`bundles`: what answers, by model."""
        super().__init__("personal", around.clock)
        self._around = around
        self._lock = threading.Lock()
        self._bundles = dict(bundles)
        self._heads: dict[str, _Heads] = {}
        self._changed: set[str] = set()
        self._judged: frozenset[str] = frozenset()
        self._contests: dict[str, _Contest] = {}
        self._refusals = Burst()
        self.wins = 0
        self.losses = 0
        self.serving = 0
        """How many models are answered with this board's own heads."""
        self.dropped = 0

    # --- other threads -------------------------------------------------------------------------------------

    def take_heads(self, model: str, content: bytes) -> None:
        """These heads (safetensors) are kept from now on (on the follower's thread)."""
        with self._lock:
            before = self._heads.get(model)
            if model not in self._bundles or (before is not None and before.content == content):
                return
            self._heads[model] = _Heads(content, self._around.numbering.next_seq())
            self._changed.add(model)
        self.wake()

    def take_bundle(self, bundle: Bundle) -> None:
        """Another bundle answers for its model, with its own heads."""
        model = bundle.graph.model
        with self._lock:
            if model not in self._bundles:
                return
            if bundle.graph_sha256 != self._bundles[model].graph_sha256:
                self._heads.pop(model, None)
            self._bundles[model] = bundle
            self._changed.add(model)
        self.wake()

    def hear(self, message: DesiredState) -> None:
        """While the hub judges a release of a model here, the bundle's heads answer."""
        self._judged = frozenset(
            asked.model for asked in message.models if asked.shadow_ppm > 0 or asked.audit_ppm > 0
        )
        self.wake()

    def hear_truth(self, truth: Truth, read: Callable[[], NDArray[np.float32] | None]) -> None:
        """Somebody else has said what a sample is (on the thread of the store of examples)."""
        heads = self._heads.get(truth.model)
        boot, seq = truth.name
        # Of what was answered before, some may have trained these heads.
        if heads is None or boot != self._around.numbering.boot or seq <= heads.since:
            return
        if self.is_full:
            self.dropped += 1
            return
        x = read()
        if x is not None and not self.offer(_Told(truth, x)):
            self.dropped += 1

    # --- the thread ----------------------------------------------------------------------------------------

    def turn(self, told: _Told | None) -> None:
        """Take up other heads and bundles, compare, have those answer that are preferred."""
        self._take_changes()
        if told is not None:
            self._compare(told)
        for contest in self._contests.values():
            self._settle(contest)
        self.serving = sum(contest.is_served for contest in self._contests.values())

    def _take_changes(self) -> None:
        while True:
            with self._lock:
                if not self._changed:
                    return
                model = self._changed.pop()
                bundle, heads = self._bundles[model], self._heads.get(model)
            contest = self._contests.get(model)
            if contest is not None:
                if contest.is_served and contest.shared is bundle:
                    self._serve(contest, own=False)
                    if contest.is_served:
                        # Tried again, or they would go on to answer with nobody to take them back.
                        with self._lock:
                            self._changed.add(model)
                        return
                del self._contests[model], contest
                give_back_memory()
            if heads is not None:
                begun = self._begin(bundle, heads)
                if begun is not None:
                    self._contests[model] = begun

    def _begin(self, bundle: Bundle, heads: _Heads) -> _Contest | None:
        open_ladder = self._around.open_ladder
        try:
            own = with_heads(bundle, load_arrays(heads.content))
            scenes = OpenScenes(self._around.scene_s)
            contest = _Contest(bundle, own, open_ladder(bundle), open_ladder(own), heads.since, scenes)
        except (CascadeError, EdgeError, OSError, MemoryError) as error:
            log.warning("private heads not served model=%s: %s", bundle.graph.model, first_line(error))
            return None
        log.info("private heads compared model=%s bundle=%s", bundle.graph.model, bundle.bundle_id[:12])
        return contest

    def _compare(self, told: _Told) -> None:
        truth = told.truth
        contest = self._contests.get(truth.model)
        # It may have waited while other heads were kept.
        if contest is None or truth.name[1] <= contest.since or truth.name in contest.counted:
            return
        try:
            own, shared = contest.own_ladder.climb(told.x), contest.shared_ladder.climb(told.x)
        except CascadeError as error:
            log.debug("private heads not compared: %s", error)
            return
        if own.failed or shared.failed:
            # A stage that does not run is a matter of health.
            return
        contest.counted[truth.name] = None
        if len(contest.counted) > MAX_REMEMBERED:
            del contest.counted[next(iter(contest.counted))]
        contest.scenes.add(
            truth.sensor,
            own_right=own.answer.label == truth.label,
            shared_right=shared.answer.label == truth.label,
            now_s=self._around.clock.monotonic_s(),
        )

    def _settle(self, contest: _Contest) -> None:
        for is_won in contest.scenes.take_over(now_s=self._around.clock.monotonic_s()):
            self.wins += is_won
            self.losses += not is_won
            contest.standing = next_standing(contest.standing, is_won=is_won)
        wanted = contest.standing.is_preferred and contest.shared.graph.model not in self._judged
        if wanted != contest.is_served:
            self._serve(contest, own=wanted)

    def _serve(self, contest: _Contest, *, own: bool) -> None:
        model = contest.shared.graph.model
        try:
            flipped = self._around.install(contest.own if own else contest.shared)
            try:
                flipped.result(FLIP_S)
            except TimeoutError:
                # Not prevented: it happened meanwhile.
                if flipped.cancel():
                    raise
        except (CascadeError, EdgeError, OSError, MemoryError, TimeoutError) as error:
            # Own heads are not tried again and again; those of the bundle are.
            contest.standing = Standing()
            if self._refusals.note(now_s=self._around.clock.monotonic_s()) is not None:
                log.warning("heads not changed model=%s: %s", model, first_line(error))
            return
        contest.is_served = own
        log.info(
            "%s heads answer model=%s bundle=%s wins=%d losses=%d",
            "private" if own else "shared", model, contest.shared.bundle_id[:12], self.wins, self.losses,
        )  # fmt: skip
        # The future has the pipeline before, and with it its sessions.
        del flipped
        give_back_memory()
