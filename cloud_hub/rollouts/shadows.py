"""What boards shadowed in one rollout, every report read once. No judgement, no thread of its own.

A scene is settled when the truth of each of its differing pairs is known. Settled scenes are only counted;
the others are kept, and what is known of them is asked again with each look. A label of a person may change
what is settled: then everything is counted anew.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

from cloud_hub.core.rollout.judge import Pairs, Scene
from cloud_hub.store.database import Database
from cloud_hub.store.evidence import StoredShadow, labelled_shadows, references_of, shadow_page
from edge_cascade.messages import ShadowScene

PAGE: Final = 256
MAX_SHADOWS: Final = 100_000
"""Reports of one rollout, the first."""

Kind: TypeAlias = tuple[int, int, int, int, int]
"""Of a scene: pairs, differing, lost, won and pending."""


@dataclass(frozen=True, slots=True)
class _OpenScene:
    """`lost` and `won` are of the pairs whose truth is known; `pending` holds the others: case, old, new."""

    device: str
    boot: bytes
    pairs: int
    differing: int
    lost: int
    won: int
    pending: tuple[tuple[int, int, int], ...]

    @property
    def kind(self) -> Kind:
        return self.pairs, self.differing, self.lost, self.won, len(self.pending)


class ShadowCounts:
    """Counts the pairs of one rollout, look by look. Not safe for use by two threads.

    `bundles` are the old and the new one; only reports with ids above `after_id` count.
    """

    def __init__(
        self, database: Database, model: str, full_model: bytes, bundles: tuple[bytes, bytes], after_id: int
    ) -> None:
        self.full_model, self.bundles = full_model, bundles
        self._database = database
        self._model = model
        self._first_id = after_id
        self._labels = 0
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._after_id, self._seen = self._first_id, 0
        self._settled: defaultdict[str, Counter[Kind]] = defaultdict(Counter)
        self._open: list[_OpenScene] = []

    def look(self, members: Collection[str]) -> Pairs:
        """All pairs of these boards so far.

        Raises:
            StoreError: what was read until then is not read again.
        """
        # Before anything else: who speaks meanwhile is heard with the next look.
        labels, is_news = self._database.run(
            partial(labelled_shadows, model=self._model, after_label=self._labels)
        )
        if is_news:
            self._begin_anew()
        self._labels = labels
        self._ask_again()
        while self._seen < MAX_SHADOWS and self._read_page():
            pass
        scenes: Counter[Kind] = Counter()
        for device, settled in self._settled.items():
            if device in members:
                scenes += settled
        scenes.update(each.kind for each in self._open if each.device in members)
        return _pairs_of(scenes)

    def _read_page(self) -> bool:
        page: list[StoredShadow] = self._database.run(
            partial(shadow_page, model=self._model, bundles=self.bundles, after_id=self._after_id, limit=PAGE)
        )
        if not page:
            return False
        new = [
            _open_scene(report, scene, is_new=report.bundle == self.bundles[1])
            for report in page
            for scene in report.scenes
            if _is_sound(scene)
        ]
        asked = self._with_references(new)
        self._after_id, self._seen = page[-1].id, self._seen + len(page)
        self._keep(asked)
        return True

    def _ask_again(self) -> None:
        asked: list[_OpenScene] = []
        for start in range(0, len(self._open), PAGE):
            asked += self._with_references(self._open[start : start + PAGE])
        self._open = []
        self._keep(asked)

    def _keep(self, scenes: Sequence[_OpenScene]) -> None:
        for scene in scenes:
            if scene.pending:
                self._open.append(scene)
            else:
                self._settled[scene.device][scene.kind] += 1

    def _with_references(self, scenes: Sequence[_OpenScene]) -> list[_OpenScene]:
        wanted: defaultdict[tuple[str, bytes], set[int]] = defaultdict(set)
        for scene in scenes:
            if scene.pending:
                wanted[scene.device, scene.boot] |= {seq for seq, _, _ in scene.pending}
        if not wanted:
            return list(scenes)
        # One piece of work a page, not one a board: what boards send goes through the same thread.
        references = self._database.run(
            lambda c: {
                (device, boot): references_of(
                    c, self._model, self.full_model, device=device, boot=boot, seqs=seqs
                )
                for (device, boot), seqs in wanted.items()
            }
        )
        return [
            _settle(scene, references[scene.device, scene.boot]) if scene.pending else scene
            for scene in scenes
        ]


def _is_sound(scene: ShadowScene) -> bool:
    """Of a scene that contradicts itself nothing counts."""
    differing = scene.differing
    return (
        len(differing) <= scene.pairs
        and len({pair.seq for pair in differing}) == len(differing)
        and all(pair.served_label != pair.other_label for pair in differing)
    )


def _open_scene(report: StoredShadow, scene: ShadowScene, *, is_new: bool) -> _OpenScene:
    """`is_new`: the new bundle answered and the old one was asked."""
    pending = tuple(
        (pair.seq, pair.other_label, pair.served_label)
        if is_new
        else (pair.seq, pair.served_label, pair.other_label)
        for pair in scene.differing
    )
    return _OpenScene(report.device, report.boot, scene.pairs, len(pending), 0, 0, pending)


def _settle(scene: _OpenScene, references: dict[int, int]) -> _OpenScene:
    lost, won = scene.lost, scene.won
    for seq, old, new in scene.pending:
        right = references.get(seq)
        lost += right == old
        won += right == new
    pending = tuple(each for each in scene.pending if each[0] not in references)
    return _OpenScene(scene.device, scene.boot, scene.pairs, scene.differing, lost, won, pending)


def _pairs_of(scenes: Counter[Kind]) -> Pairs:
    total: Counter[str] = Counter()
    kept: Counter[tuple[int, int, int, int]] = Counter()
    for (size, differing, lost, won, pending), times in scenes.items():
        total["count"] += size * times
        total["differing"] += differing * times
        total["lost"] += lost * times
        total["won"] += won * times
        total["pending"] += pending * times
        if size > 1:
            kept[size, lost, won, pending] += times
    return Pairs(**total, scenes=tuple(Scene(*scene, times) for scene, times in sorted(kept.items())))
