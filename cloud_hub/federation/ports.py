"""What a series asks of the rest of the hub: a candidate of its weights, a vote of the hub's own. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from edge_cascade.training import Schedule
from edge_cascade.weights import Weights


@dataclass(frozen=True, slots=True)
class LineageRound:
    """A round that was committed, and how many votes it counted."""

    round_id: str
    number: int
    base: bytes
    result: bytes
    votes: int


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a candidate's weights come from. `settings` is the JSON of `SeriesSettings`.

    The guard has seen holdout cases with ids up to `window_start`; a certificate needs later ones.
    """

    series: int
    first_base: bytes
    rounds: tuple[LineageRound, ...]
    settings: str
    window_start: int


@dataclass(frozen=True, slots=True)
class Registered:
    """The candidate is a draft of this name."""

    release: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """It cannot be made yet; it is tried again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Declined:
    """It is no better than what is live, or could not be certified; trying again would not help."""

    reason: str


CandidateOutcome: TypeAlias = Registered | Waiting | Declined


class MakeCandidate(Protocol):
    """Re-quantises, certifies and registers weights. May be asked twice: the same series has one draft."""

    def __call__(
        self, series_id: int, model: str, base_digest: bytes, weights: Weights, lineage: Lineage
    ) -> CandidateOutcome:
        """Make the candidate of a series.

        Raises:
            HubError: as `Declined`, but a `StoreError`: as `Waiting`.
        """


@dataclass(frozen=True, slots=True, eq=False)
class HubVote:
    """What the hub itself learned from uploaded cases: a float32 delta against the base."""

    delta: Weights
    num_examples: int


class TrainHub(Protocol):
    """Trains on the uploaded cases of a model whose use is TRAIN, by the boards' own loop."""

    def __call__(
        self,
        model: str,
        base: Weights,
        schedule: Schedule,
        *,
        max_examples: int,
        soft_share: float,
        seed: int,
    ) -> HubVote | None:
        """The hub's vote; None when there is nothing to learn from.

        Raises:
            HubError, CascadeError: then the round goes on without it.
        """
