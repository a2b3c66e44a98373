"""What noisy updates give away of one device, as (epsilon, delta) of differential privacy. No I/O, no chance.

A device clips its update to `clip_norm` and adds Gaussian noise of `noise_multiplier * clip_norm` to each
number, before anything is encoded; encoding and counting afterwards cost nothing more. Neighbours are fleets
in which one device has quite other data: its update may move by twice `clip_norm`, so the noise counts as
half its multiplier. Rounds are composed by Renyi differential privacy (Mironov 2017), through the library
dp-accounting.

How cohorts are drawn. They are drawn without replacement, and not uniformly: who is online and who was asked
long ago comes first (`cohort`). A gain from sampling may be claimed only for a uniform draw that is kept
secret. So `aggregate` claims none: the device is taken to be in every round. `aggregate_if_uniform` is what a
uniform draw without replacement would give (Wang, Balle and Kasiviswanathan 2019, theorem 27, where one
device is replaced), and not the several times smaller figure of Poisson sampling, which is often quoted.

What the figures do not cover: escalations and audits, which are inputs; a device that adds no noise, which
lends the others none; and, for the aggregate, that screening compares norms over the cohort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class PrivacyError(Exception):
    """The account cannot be made: a number out of range, or the library is missing."""


@dataclass(frozen=True, slots=True)
class PrivacySpec:
    """The rounds to be accounted for. `noise_multiplier` is that of one device.

    `votes`: how many updates are counted in a round at least, None for the whole cohort; the quorum is the
    careful choice, and `effective_votes` of it where votes weigh differently.
    """

    clip_norm: float
    noise_multiplier: float
    cohort_size: int
    fleet_size: int
    rounds: int
    delta: float
    votes: float | None = None

    def __post_init__(self) -> None:
        if not (0.0 < self.clip_norm < math.inf and 0.0 < self.noise_multiplier < math.inf):
            raise PrivacyError(
                f"clip norm {self.clip_norm} or noise multiplier {self.noise_multiplier} is not above 0"
            )
        if not (1 <= self.cohort_size <= self.fleet_size and self.rounds >= 1):
            raise PrivacyError(
                f"{self.rounds} rounds of {self.cohort_size} devices of a fleet of {self.fleet_size}"
            )
        if not 0.0 < self.delta < 1.0:
            raise PrivacyError(f"delta {self.delta} is not in 0..1: below one over the fleet's size is usual")
        if self.votes is not None and not 1.0 <= self.votes <= self.cohort_size:
            raise PrivacyError(f"{self.votes} votes are not in 1..{self.cohort_size}, the cohort's size")


@dataclass(frozen=True, slots=True)
class PrivacySpent:
    """Epsilon at the given delta.

    `update`: of one update, for the hub, which sees it alone and knows whose it is. `device`: of a device's
    updates of all rounds, for the hub. `aggregate`: of all rounds, for who sees the training bases and
    nothing else; `aggregate_if_uniform`: the same with cohorts drawn uniformly and in secret. `noise_std`: of
    each number of an update; `mean_noise_std`: of each number of the step.
    """

    update: float
    device: float
    aggregate: float
    aggregate_if_uniform: float
    noise_std: float
    mean_noise_std: float


def measure_privacy(spec: PrivacySpec) -> PrivacySpent:
    """What these rounds spend. The sampled figure takes about half a second.

    Raises:
        PrivacyError: when dp-accounting is not installed.
    """
    votes = float(spec.cohort_size) if spec.votes is None else spec.votes
    alone = spec.noise_multiplier / 2.0
    together = alone * math.sqrt(votes)
    noise_std = spec.noise_multiplier * spec.clip_norm
    aggregate = _epsilon(together, spec.rounds, spec.delta)
    sampled = _epsilon(together, spec.rounds, spec.delta, (spec.cohort_size, spec.fleet_size))
    return PrivacySpent(
        update=_epsilon(alone, 1, spec.delta),
        device=_epsilon(alone, spec.rounds, spec.delta),
        aggregate=aggregate,
        # Where most of the fleet is asked, the theorem's bound is the weaker one; both hold.
        aggregate_if_uniform=min(aggregate, sampled),
        noise_std=noise_std,
        mean_noise_std=noise_std / math.sqrt(votes),
    )


def effective_votes(weights: Sequence[float]) -> float:
    """How many votes of the same weight would hide the heaviest as well: sum(w^2) / max(w)^2.

    Raises:
        PrivacyError: when there is none, or one is not above zero and finite.
    """
    if not weights or not all(0.0 < weight < math.inf for weight in weights):
        raise PrivacyError("weights of votes: at least one, each above 0 and finite")
    heaviest = max(weights)
    return sum((weight / heaviest) ** 2 for weight in weights)


def _epsilon(multiplier: float, rounds: int, delta: float, sampled: tuple[int, int] | None = None) -> float:
    """Of noise of so many sensitivities, `rounds` times; `sampled`: so many of a fleet of so many."""
    library = _import_accounting()
    event = library.GaussianDpEvent(multiplier)
    if sampled is not None:
        cohort_size, fleet_size = sampled
        event = library.SampledWithoutReplacementDpEvent(fleet_size, cohort_size, event)
    accountant = library.rdp.RdpAccountant(neighboring_relation=library.NeighboringRelation.REPLACE_ONE)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))


def _import_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError as error:
        raise PrivacyError("dp-accounting is not installed: pip install 'edge-daemon[privacy]'") from error
    return dp_accounting
