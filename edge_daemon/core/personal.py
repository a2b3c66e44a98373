"""Do a board's own heads answer better than those of its bundle? No I/O, no clock, no chance.

Judged by *test, then train* (Dawid 1984, "Present position and potential developments"; Blum, Kalai and
Langford 1999, "Beating the hold-out"): of every sample whose truth the board hears of, and which was answered
after the heads were trained, both answers are held against the truth before anything learns from it. A scene,
which is what one sensor showed in one stretch of time, is one reason: it is won where the board's own heads
were right more often than the shared ones, lost where less often, and no reason where they were even.

Two bets are laid on the won and lost scenes, on "of these, more are won" and on "more are lost". If what is
betted on is not so, the capital is not expected to grow; that it ever reaches `NEEDED` has a chance of at
most 1 / `NEEDED` (Ville 1939). Capital is spread over a fixed grid of bets and depends on counts alone, as in
docs/adr/0019-judging-by-scenes.md. While the own heads are served, the bet against them begins again whenever
it has less than it began with: a long good past must not pay for a bad present. So it is bounded how often
good heads are taken out of service, not whether (Shin, Ramdas and Rinaldo 2022, "E-detectors", arXiv
2203.03532): heads that are just as good stay for `NEEDED` won and lost scenes or more, on average.

What this does not see: most truths are verdicts, and most verdicts are about samples that a gate was unsure
of, the shared one's or, while they are served, that of the own heads. What is judged is who is right about
those, not about all samples. Audits and labels of the site are the remedy; they count as much as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np

NEEDED: Final = 20.0
"""The e-value at which heads are served, or no longer."""
MAX_OPEN: Final = 1024
"""Scenes at once; what a sensor beyond shows is left out."""

_BETS: Final = np.array((0.05, 0.1, 0.2, 0.4, 0.65, 0.9))


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether the own heads are to answer, and the scenes that count for or against them since."""

    is_preferred: bool = False
    wins: int = 0
    losses: int = 0


def evidence(gains: int, losses: int) -> float:
    """What a stake of 1 on "of these scenes, more are gains" has become; an e-value."""
    logs = gains * np.log1p(_BETS) + losses * np.log1p(-_BETS)
    return math.exp(min(float(np.logaddexp.reduce(logs)) - math.log(len(_BETS)), 700.0))


def next_standing(standing: Standing, *, is_won: bool) -> Standing:
    """After one more scene that tells. A change of mind begins the count anew."""
    wins, losses = standing.wins + is_won, standing.losses + (not is_won)
    if not standing.is_preferred:
        is_better = evidence(wins, losses) >= NEEDED
        return Standing(is_preferred=True) if is_better else Standing(False, wins, losses)
    against = evidence(losses, wins)
    if against >= NEEDED:
        return Standing()
    return Standing(True, wins, losses) if against >= 1.0 else Standing(True)


@dataclass(slots=True)
class _Scene:
    since_s: float
    balance: int = 0


@dataclass(slots=True)
class OpenScenes:
    """The scenes of one comparison that are not over, by sensor. Times are monotonic seconds."""

    scene_s: float
    # In the order in which they began, which is that in which they end.
    _open: dict[str, _Scene] = field(default_factory=dict)

    def add(self, sensor: str, *, own_right: bool, shared_right: bool, now_s: float) -> None:
        """Count what became of one sample."""
        scene = self._open.get(sensor)
        if scene is None:
            if len(self._open) >= MAX_OPEN:
                return
            scene = self._open[sensor] = _Scene(now_s)
        scene.balance += own_right - shared_right

    def take_over(self, *, now_s: float) -> list[bool]:
        """Whether won, of each scene that is over and tells; those are forgotten."""
        told = []
        for sensor, scene in list(self._open.items()):
            if now_s - scene.since_s < self.scene_s:
                break
            del self._open[sensor]
            if scene.balance:
                told.append(scene.balance > 0)
        return told
