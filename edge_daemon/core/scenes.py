"""Scenes of shadowed pairs, and how many inputs they may cost. No I/O, no clock, no chance.

A scene is what one sensor showed in one stretch of time. It is one reason for whoever judges, however many
pairs it has: so a stretch is never cut into several scenes, and pairs beyond a bound are not drawn. Nothing
here that leaves a pair out looks at how it came out: what is reported stays a fair draw.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from edge_cascade.messages import DifferingPair, ShadowScene

MAX_PAIRS: Final = 1024
"""Of one scene; more than that a report could not say to differ."""
MAX_OPEN: Final = 4096
"""Scenes at once; a sensor beyond waits until one is over."""
MAX_SCENES_A_REPORT: Final = 256
MAX_DIFFERING_A_REPORT: Final = 4096


@dataclass(slots=True)
class _Scene:
    since_s: float
    pairs: int = 0
    differing: list[DifferingPair] = field(default_factory=list)


class Scenes:
    """The open scenes of one comparison of two bundles, by sensor. Times are monotonic seconds."""

    def __init__(self, scene_s: float) -> None:
        self._scene_s = scene_s
        # In the order in which they began, which is that in which they end.
        self._open: dict[str, _Scene] = {}
        self._over: list[ShadowScene] = []

    def has_room(self, sensor: str, *, now_s: float) -> bool:
        """Whether a pair of this sensor may be added; ask before anybody knows how it comes out."""
        self._end_those_over(now_s)
        scene = self._open.get(sensor)
        return len(self._open) < MAX_OPEN if scene is None else scene.pairs < MAX_PAIRS

    def add(self, sensor: str, differing: DifferingPair | None, *, now_s: float) -> None:
        """Count a pair for which there was room; `differing` is None where both bundles said the same."""
        scene = self._open.get(sensor)
        if scene is None:
            scene = self._open[sensor] = _Scene(now_s)
        scene.pairs += 1
        if differing is not None:
            scene.differing.append(differing)

    def take_over(self, *, now_s: float) -> list[ShadowScene]:
        """The scenes that are over and were not taken before."""
        self._end_those_over(now_s)
        over, self._over = self._over, []
        return over

    def take_all(self) -> list[ShadowScene]:
        """End every scene: nothing more is compared."""
        for sensor in list(self._open):
            self._end(sensor)
        over, self._over = self._over, []
        return over

    def _end_those_over(self, now_s: float) -> None:
        while self._open:
            sensor, scene = next(iter(self._open.items()))
            if now_s - scene.since_s < self._scene_s:
                return
            self._end(sensor)

    def _end(self, sensor: str) -> None:
        scene = self._open.pop(sensor)
        self._over.append(ShadowScene(sensor, scene.pairs, scene.differing))


class Allowance:
    """At most `per_hour` inputs an hour, that many at once at first.

    It is asked before a pair is drawn and charged once the pair has turned out to differ: whether a pair is
    drawn depends on those before it, never on itself. So it may be overdrawn by what is in hand meanwhile.
    """

    def __init__(self, per_hour: float) -> None:
        self._per_hour = per_hour
        self._left = per_hour
        self._filled_s: float | None = None
        # Written by whoever charges, who may be another thread than the one that asks.
        self._charged = 0
        self._paid = 0

    def allows(self, *, now_s: float) -> bool:
        """Whether another pair may be drawn."""
        charged = self._charged
        self._left -= charged - self._paid
        self._paid = charged
        if self._filled_s is not None:
            earned = (now_s - self._filled_s) * self._per_hour / 3600.0
            # Below one an hour there must be room for one all the same.
            self._left = min(self._left + earned, max(self._per_hour, 1.0))
        self._filled_s = now_s
        return self._left >= 1.0

    def charge(self) -> None:
        """An input leaves the board."""
        self._charged += 1


def select_reports(scenes: Iterable[ShadowScene]) -> list[list[ShadowScene]]:
    """Scenes in order, cut into what one report holds."""
    reports: list[list[ShadowScene]] = []
    differing = 0
    for scene in scenes:
        differing += len(scene.differing)
        if not reports or len(reports[-1]) >= MAX_SCENES_A_REPORT or differing > MAX_DIFFERING_A_REPORT:
            reports.append([])
            differing = len(scene.differing)
        reports[-1].append(scene)
    return reports
