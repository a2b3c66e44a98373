"""What the hub has seen of both bundles and of the boards that swapped. No judgement, no thread of its own.

Audits are answered here by both bundles as shipped; on what a canary shadowed the board has had both answers,
and sends the input only where they differ. Cases that a gate asked for are in neither. A case is one that the
audit coin sent or one that was shadowed, never both: so each input counts once.

Verdicts that came late and people who spoke since are heard with each look, and a hub that starts again finds
the same counts. What never changes is kept: the bundles' answers, and the counts of `shadows`.
"""

from __future__ import annotations

import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from cloud_hub.core.rollout.findings import Course, Health
from cloud_hub.core.rollout.health import decide_health
from cloud_hub.core.rollout.judge import Pairs, count_pairs
from cloud_hub.core.rollout.state import Outcome, RolloutState
from cloud_hub.core.rollout.waves import place_of
from cloud_hub.core.rollout.windows import Stretch, course_of
from cloud_hub.errors import RolloutError
from cloud_hub.examples import CaseStore
from cloud_hub.models import HubModel
from cloud_hub.registry import release_directory
from cloud_hub.rollouts.answers import UNREADABLE, BundleAnswers
from cloud_hub.rollouts.shadows import ShadowCounts
from cloud_hub.store.evidence import audited_page, committed_at, vitals_between
from cloud_hub.store.releases import get_release
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.errors import BundleError

PAGE: Final = 256
MAX_CASES: Final = 100_000
"""Of one rollout, the first; what is undecided after so many needs a person."""
MAX_REPLAYS_A_LOOK: Final = 8192
MAX_BUNDLES: Final = 4
MAX_ROLLOUTS: Final = 8
"""Whose counts are kept."""
MAX_BOARDS: Final = 200
"""Boards of either side whose health is compared; drawn by hash, so always the same."""
MAX_ROWS_A_WINDOW: Final = 2000
WINDOW_S: Final = 86400.0


class StoreEvidence:
    """Evidence from the store of a hub; implements `ports.Evidence`."""

    def __init__(
        self,
        store: CaseStore,
        state_dir: Path,
        models: Mapping[str, HubModel],
        *,
        clock_s: Callable[[], float] = time.time,
        max_replays: int = MAX_REPLAYS_A_LOOK,
    ) -> None:
        """`clock_s` is the wall clock by which cases are received; nothing is loaded yet."""
        self._store = store
        self._state_dir = state_dir
        self._models = models
        self._clock_s = clock_s
        self._max_replays = max(max_replays, PAGE)
        self._answers: OrderedDict[str, BundleAnswers] = OrderedDict()
        self._shadows: OrderedDict[str, ShadowCounts] = OrderedDict()

    # --- quality -------------------------------------------------------------------------------------------

    def pairs(self, rollout: RolloutState, *, cases_after: int, scenes_after: int) -> tuple[Pairs, Pairs]:
        """See `ports.Evidence.pairs`."""
        return self._shadowed(rollout, scenes_after), self._audited(rollout, cases_after)

    def _audited(self, rollout: RolloutState, cases_after: int) -> Pairs:
        model = self._model(rollout)
        old, new = (self._answers_of(rollout.model, bundle) for bundle in self._bundles(rollout))
        rows: list[tuple[str, str, int]] = []
        labels: list[tuple[int, int, int]] = []
        until_ms, replays, seen = round(self._clock_s() * 1000), self._max_replays, 0
        while seen < MAX_CASES:
            page = self._store.database.run(
                partial(
                    audited_page,
                    model=rollout.model,
                    full_model=model.full_model,
                    after_id=cases_after,
                    limit=PAGE,
                )
            )
            if not page:
                break
            ours = [row for row in page if row["device"] in rollout.members]
            ids = [int(row["id"]) for row in ours]
            replays -= max(len(old.missing(ids)), len(new.missing(ids)))
            if replays < 0:
                # The rest waits for the next look, and with it the scenes that reach into it.
                until_ms = min(until_ms, page[0]["received_at_ms"])
                break
            said = zip(
                ours,
                old.labels_of(self._store.blobs, ours),
                new.labels_of(self._store.blobs, ours),
                strict=True,
            )
            for row, was, now in said:
                if UNREADABLE not in {was, now}:
                    rows.append((row["device"], row["sensor"], row["received_at_ms"]))
                    labels.append((was, now, row["reference"]))
            cases_after, seen = int(page[-1]["id"]), seen + len(page)
        return _count_audits(rows, labels, scene_s=rollout.scene_s, until_ms=until_ms)

    def _shadowed(self, rollout: RolloutState, scenes_after: int) -> Pairs:
        full_model = self._model(rollout).full_model
        old, new = (bytes.fromhex(bundle) for bundle in self._bundles(rollout))
        counts = self._shadows.get(rollout.id)
        if counts is None or (counts.full_model, counts.bundles) != (full_model, (old, new)):
            counts = ShadowCounts(self._store.database, rollout.model, full_model, (old, new), scenes_after)
            self._shadows[rollout.id] = counts
            while len(self._shadows) > MAX_ROLLOUTS:
                self._shadows.popitem(last=False)
        self._shadows.move_to_end(rollout.id)
        return counts.look(rollout.members)

    # --- bundles -------------------------------------------------------------------------------------------

    def _model(self, rollout: RolloutState) -> HubModel:
        model = self._models.get(rollout.model)
        if model is None:
            raise RolloutError(f"rollout {rollout.id}: this hub has no model {rollout.model!r}")
        return model

    def _bundles(self, rollout: RolloutState) -> tuple[str, str]:
        """The ids of the old and the new bundle."""
        release = self._release_bundle(rollout.release)
        if rollout.previous is not None:
            return self._release_bundle(rollout.previous), release
        shipped = self._model(rollout).bundle
        if shipped is None:
            raise RolloutError(f"rollout {rollout.id}: this hub has no shipped bundle of {rollout.model!r}")
        return shipped.bundle_id, release

    def _release_bundle(self, release: str) -> str:
        bundle: bytes = self._store.database.run(lambda c: get_release(c, int(release))["bundle"])
        return bundle.hex()

    def _answers_of(self, model: str, bundle_id: str) -> BundleAnswers:
        if bundle_id not in self._answers:
            self._answers[bundle_id] = BundleAnswers(self._load(model, bundle_id), max_kept=2 * MAX_CASES)
            while len(self._answers) > MAX_BUNDLES:
                self._answers.popitem(last=False)
        self._answers.move_to_end(bundle_id)
        return self._answers[bundle_id]

    def _load(self, model: str, bundle_id: str) -> Bundle:
        shipped = self._models[model].bundle
        if shipped is not None and shipped.bundle_id == bundle_id:
            return shipped
        try:
            return load_bundle(release_directory(self._state_dir, bundle_id))
        except BundleError as error:
            raise RolloutError(f"bundle {bundle_id[:12]} of {model!r} cannot be read: {error}") from error

    # --- health --------------------------------------------------------------------------------------------

    def health(self, rollout: RolloutState, now_s: float) -> Health:
        """See `ports.Evidence.health`."""
        since_ms = round(rollout.started_s * 1000)
        said = self._store.database.run(
            lambda c: committed_at(c, rollout.model, rollout.release, since_ms=since_ms)
        )
        swapped = [
            (name, member.reached_s, said[name] / 1000)
            for name, member in rollout.members.items()
            if member.outcome is Outcome.COMMITTED and member.reached_s is not None and name in said
        ]
        if not swapped:
            return decide_health([], [], rollout.health_rules)
        # Not by the place of the waves, which would only ever look at the first ones.
        drawn = partial(place_of, f"health of {rollout.id}")
        treated = [
            self._course(rollout, name, offered_s, ran_s, now_s)
            for name, offered_s, ran_s in sorted(swapped, key=lambda each: drawn(each[0]))[:MAX_BOARDS]
        ]
        # Boards left alone are looked at over the stretches of the board in the middle.
        offered_s = statistics.median_low([each[1] for each in swapped])
        ran_s = max(statistics.median_low([each[2] for each in swapped]), offered_s)
        alone = [name for name, member in rollout.members.items() if not member.is_offered]
        controls = [
            self._course(rollout, name, offered_s, ran_s, now_s)
            for name in sorted(alone, key=drawn)[:MAX_BOARDS]
        ]
        return decide_health(treated, controls, rollout.health_rules)

    def _course(
        self, rollout: RolloutState, name: str, offered_s: float, ran_s: float, now_s: float
    ) -> Course:
        before = Stretch(offered_s - WINDOW_S, offered_s)
        after = Stretch(max(ran_s, now_s - WINDOW_S), now_s)
        rows = [
            row
            for stretch in (before, after)
            for row in self._store.database.run(
                partial(
                    vitals_between,
                    device=name,
                    since_ms=round(stretch.since_s * 1000),
                    until_ms=round(stretch.until_s * 1000),
                    limit=MAX_ROWS_A_WINDOW,
                )
            )
        ]
        return course_of(rows, rollout.model, before, after)


def _count_audits(
    rows: Sequence[tuple[str, str, int]],
    labels: Sequence[tuple[int, int, int]],
    *,
    scene_s: float,
    until_ms: int,
) -> Pairs:
    """Rows are device, sensor and receipt (ms); a scene counts when it has been over for its own length."""
    scene_ms = scene_s * 1000
    numbers: dict[tuple[str, str, int], int] = {}
    kept: list[tuple[int, int, int, int]] = []
    for (device, sensor, received_at_ms), said in zip(rows, labels, strict=True):
        stretch = int(received_at_ms // scene_ms)
        if (stretch + 2) * scene_ms <= until_ms:
            kept.append((*said, numbers.setdefault((device, sensor, stretch), len(numbers))))
    if not kept:
        return Pairs()
    old, new, reference, scenes = np.array(kept, np.int64).T
    return count_pairs(old, new, reference, scenes)
