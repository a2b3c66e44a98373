"""Simulated vitals: how often healthy boards are called sick, and how soon sick ones are found. Seeded.

A fleet of 100 boards, each with a pace and a heat of its own. What is told of an hour scatters: latency and
memory by a Student t with three degrees of freedom (10 and 3 percent), temperature by 2 degrees on top of a
day that is hot for everybody, errors and restarts by chance. After the swap every look sees the mean of the
hours so far. Looks come every hour: 12 with one canary, then 12 with ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.core.rollout.findings import Course, HealthRules, Metric, Vitals
from cloud_hub.core.rollout.health import decide_health

Array = NDArray[np.float64]

ROLLOUTS: Final = 400
FLEET: Final = 100
PAST_HOURS: Final = 24
STEPS: Final = ((1, 12), (10, 12))
"""Boards with the release, and looks at them."""

_SAMPLES: Final = 360
_ERRORS: Final = 0.001
_RESTARTS_PER_HOUR: Final = 1 / 500


@dataclass(frozen=True, slots=True)
class Sickness:
    """What the release does to `share` of the boards that have it, rounded: a third leaves one canary well."""

    name: str
    share: float = 1.0
    latency: float = 1.0
    memory: float = 1.0
    celsius: float = 0.0
    errors: float = 0.0
    restarts_per_hour: float = 0.0


SICKNESSES: Final = (
    Sickness("healthy"),
    Sickness("latency +10 %, tolerated", latency=1.1),
    Sickness("latency +40 %", latency=1.4),
    Sickness("latency doubled", latency=2.0),
    Sickness("memory +40 %", memory=1.4),
    Sickness("10 degrees hotter", celsius=10.0),
    Sickness("5 % of samples fail", errors=0.05),
    Sickness("a third of the boards fail half", share=0.34, errors=0.5),
    Sickness("a crash every three hours", restarts_per_hour=1 / 3),
)


@dataclass(frozen=True, slots=True)
class Found:
    """`look` counts from 1 over both steps, None if it was never called worse; by which metrics."""

    look: int | None
    metrics: tuple[Metric, ...] = ()


def simulate(sickness: Sickness, seed: int, rollouts: int = ROLLOUTS) -> list[Found]:
    """So many rollouts of one sickness."""
    rng = np.random.default_rng([seed, *sickness.name.encode()])
    return [_watch(sickness, rng) for _ in range(rollouts)]


def _watch(sickness: Sickness, rng: np.random.Generator) -> Found:
    pace, heat = np.exp(rng.normal(0, 0.5, FLEET)), rng.normal(50, 8, FLEET)
    before = _windows(PAST_HOURS, pace, heat, Sickness(""), np.zeros(FLEET, bool), rng)
    look = 0
    for treated, looks in STEPS:
        sick = np.arange(FLEET) < round(sickness.share * treated)
        after = [_hour(pace, heat, sickness, sick, rng) for _ in range(looks)]
        for hours in range(1, looks + 1):
            look += 1
            now = _mean(after[:hours])
            courses = [Course(*windows) for windows in zip(before, now, strict=True)]
            health = decide_health(courses[:treated], courses[treated:], HealthRules())
            if health.worse:
                return Found(look, tuple(each.metric for each in health.worse))
    return Found(None)


def _windows(
    hours: int,
    pace: Array,
    heat: Array,
    sickness: Sickness,
    sick: NDArray[np.bool_],
    rng: np.random.Generator,
) -> list[Vitals]:
    return _mean([_hour(pace, heat, sickness, sick, rng) for _ in range(hours)])


def _hour(
    pace: Array, heat: Array, sickness: Sickness, sick: NDArray[np.bool_], rng: np.random.Generator
) -> Array:
    """`(5, boards)`: latency, memory, temperature, errors, restarts of one hour."""
    day = rng.normal(0, 6)
    return np.stack(
        [
            10 * pace * np.exp(0.1 * rng.standard_t(3, FLEET)) * np.where(sick, sickness.latency, 1.0),
            1e8 * pace * np.exp(0.03 * rng.standard_t(3, FLEET)) * np.where(sick, sickness.memory, 1.0),
            heat + day + rng.normal(0, 2, FLEET) + np.where(sick, sickness.celsius, 0.0),
            rng.binomial(_SAMPLES, np.where(sick, sickness.errors, 0.0) + _ERRORS).astype(np.float64),
            rng.poisson(np.where(sick, sickness.restarts_per_hour, 0.0) + _RESTARTS_PER_HOUR, FLEET),
        ]
    )


def _mean(hours: Sequence[Array]) -> list[Vitals]:
    told = np.stack(hours)
    (latency, memory, heat), counts = np.median(told[:, :3], axis=0), told[:, 3:].sum(axis=0)
    return [
        Vitals(
            3600.0 * len(hours),
            _SAMPLES * len(hours),
            int(counts[0, board]),
            int(counts[1, board]),
            float(latency[board]),
            int(memory[board]),
            float(heat[board]),
        )
        for board in range(FLEET)
    ]
