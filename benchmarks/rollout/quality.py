"""Simulated rollouts that differ in nothing but how good the new bundle is. Seeded; no bundle is run.

A fleet of 100 boards, each a sample every ten seconds. Audits: 1 % of the samples of every board, 10 % of
those that are canaries; they are minutes apart and taken for strangers. Once a board has the release, it
shadows half of its samples while it is a canary (`DEFAULT_WAVES`), and ten minutes of these are one scene;
where the two bundles differ, the sample goes up, and its verdict comes with the next look. The judge looks
every half an hour of simulated time. Each pair is lost, won, different but neither, or the same, with the
rates of its case; independently, or, where scenes `stand still`, one for all pairs of a scene.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from msgspec.structs import replace

from cloud_hub.core.rollout.events import HealthJudged, Judged, Reported, Seen, Tick
from cloud_hub.core.rollout.findings import Fine, Health, Metric
from cloud_hub.core.rollout.judge import JudgeRules, Pairs, Scene, decide_quality
from cloud_hub.core.rollout.rollout import begin, next_state, rules_of
from cloud_hub.core.rollout.state import Outcome, Phase, RolloutState
from cloud_hub.core.rollout.waves import DEFAULT_WAVES, Device, Wave

ROLLOUTS: Final = 400
FLEET: Final = 100
SAMPLES_PER_HOUR: Final = 360.0
AUDIT_RATE: Final = 0.01
LOOK_HOURS: Final = 0.5
SCENE_HOURS: Final = 1 / 6
HORIZON_HOURS: Final = 14 * 24.0
BEFORE_HALF: Final = 2
"""The index of the 50 % wave in `DEFAULT_WAVES`."""

_OFFLINE: Final = 0.15
_BOTH_WRONG: Final = 0.2
"""Of the pairs on which exactly one is right, so many more differ and are both wrong."""
_WELL: Final = Health((Fine(Metric.LATENCY, 1.0, 1),))


class Canary(StrEnum):
    """What the canaries do beside auditing more."""

    AUDITS = "audits only"
    SHADOWS = "shadows"
    STANDS_STILL = "shadows, stands still"


@dataclass(frozen=True, slots=True)
class Case:
    """How much worse the new bundle is (0..1), and on how many inputs exactly one of the two is right."""

    drop: float
    discordant: float
    canary: Canary

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """Of pairs lost, won, differing with both wrong, and the same."""
        lost, won = (self.discordant + self.drop) / 2, (self.discordant - self.drop) / 2
        neither = _BOTH_WRONG * self.discordant
        return lost, won, neither, 1.0 - lost - won - neither


@dataclass(frozen=True, slots=True)
class Course:
    """How one rollout ended: `wave` is the last one opened."""

    phase: Phase
    wave: int
    hours: float
    audits: int
    shadowed: int
    differing: int

    @property
    def pairs(self) -> int:
        """Both sources."""
        return self.audits + self.shadowed


def cases(drops: Iterable[float], discordances: Iterable[float]) -> list[Case]:
    """Those that can be: a bundle cannot lose more than it differs."""
    return [
        Case(drop, discordant, canary)
        for discordant in discordances
        for drop in drops
        for canary in Canary
        if drop <= discordant
    ]


def simulate(case: Case, seed: int, rollouts: int = ROLLOUTS) -> list[Course]:
    """So many rollouts of one case."""
    rng = np.random.default_rng(
        [seed, round(1e6 * case.drop), round(1e6 * case.discordant), *case.canary.encode()]
    )
    return [_roll_out(case, rng) for _ in range(rollouts)]


def _roll_out(case: Case, rng: np.random.Generator) -> Course:
    waves = DEFAULT_WAVES if case.canary != Canary.AUDITS else tuple(map(_without_shadow, DEFAULT_WAVES))
    # The salt is another one each time: so are the canaries.
    offline = rng.random(FLEET) < _OFFLINE
    state, _ = begin(
        f"rollout-{rng.integers(2**32)}",
        model="m",
        release="new",
        previous="old",
        waves=waves,
        fleet=[Device(f"board-{n}", is_online=not offline[n]) for n in range(FLEET)],
        now_s=0.0,
        by="",
    )
    audits, shadowed, rules, hours = Pairs(), Pairs(), JudgeRules(), 0.0
    while state.is_widening and hours < HORIZON_HOURS:
        hours += LOOK_HOURS
        audits += _audit(case, state, rng)
        shadowed += _shadow(case, state, rng)
        state = _boards_answer(state, 3600.0 * hours, rng)
        judgement = decide_quality(audits + shadowed, rules_of(state, rules))
        for event in (Judged(judgement), HealthJudged(_WELL), Tick()):
            state, _ = next_state(state, event, now_s=3600.0 * hours)
    return Course(state.phase, state.wave, hours, audits.count, shadowed.count, shadowed.differing)


def _without_shadow(wave: Wave) -> Wave:
    sampling = None if wave.sampling is None else replace(wave.sampling, shadow_share=0.0)
    return replace(wave, sampling=sampling)


def _audit(case: Case, state: RolloutState, rng: np.random.Generator) -> Pairs:
    """Audits of the fleet until the next look; the hub answers each with both bundles."""
    canaries = 0 if state.sampling is None else sum(each.is_offered for each in state.members.values())
    raised = AUDIT_RATE if state.sampling is None else state.sampling.audit_rate
    online = (1.0 - _OFFLINE) * (FLEET - canaries)
    count = int(rng.poisson(LOOK_HOURS * SAMPLES_PER_HOUR * (online * AUDIT_RATE + canaries * raised)))
    lost, won, neither, _ = (int(n) for n in rng.multinomial(count, case.shares))
    return Pairs(count, lost + won + neither, lost, won)


def _shadow(case: Case, state: RolloutState, rng: np.random.Generator) -> Pairs:
    """Live samples until the next look that the canaries answer with both bundles."""
    if state.sampling is None or not state.sampling.shadow_share:
        return Pairs()
    running = sum(each.outcome is Outcome.COMMITTED for each in state.members.values())
    scenes = running * round(LOOK_HOURS / SCENE_HOURS)
    size = round(SCENE_HOURS * SAMPLES_PER_HOUR * state.sampling.shadow_share)
    if case.canary == Canary.STANDS_STILL:
        drawn = size * rng.multinomial(1, case.shares, scenes)
    else:
        drawn = rng.multinomial(size, case.shares, scenes)
    kinds = Counter((int(lost), int(won)) for lost, won, _, _ in drawn)
    lost, won, neither, _ = (int(n) for n in drawn.sum(axis=0))
    return Pairs(
        scenes * size,
        lost + won + neither,
        lost,
        won,
        scenes=tuple(Scene(size, *kind, 0, times) for kind, times in kinds.items()),
    )


def _boards_answer(state: RolloutState, now_s: float, rng: np.random.Generator) -> RolloutState:
    for name, member in state.members.items():
        if member.online_since_s is None:
            if rng.random() < 0.1:
                state, _ = next_state(state, Seen(Device(name)), now_s=now_s)
        elif member.is_offered and member.outcome is Outcome.NONE and rng.random() < 0.7:
            state, _ = next_state(state, Reported(name, "new", True), now_s=now_s)
    return state
