"""What a follower of rounds hears (events) and what it asks for (effects). Values only; see `rounds`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from edge_cascade.messages import RoundTerms


class Phase(enum.Enum):
    """Where a model's rounds stand."""

    IDLE = "idle"
    OFFERED = "offered"
    FETCHING = "fetching"
    TRAINING = "training"
    APPENDING = "appending"
    """The update is done and not on disk yet."""
    APPENDED = "appended"
    """The spool has it; the hub has not acknowledged it yet."""


class Declined(enum.StrEnum):
    """Why a round is not worked on; a label of `edge_rounds_declined`."""

    MALFORMED = "malformed"
    SIGNATURE = "signature"
    """Not signed by the hub whose key this board knows."""
    UNKNOWN_MODEL = "unknown_model"
    OTHER_GRAPH = "other_graph"
    """The board runs another graph part, or the base is not of its size."""
    NO_TRAIN_STEP = "no_train_step"
    TOO_COSTLY = "too_costly"
    TOO_FEW = "too_few_examples"
    NOT_NOW = "not_now"
    """Bad vitals, another model trains, or the last update is not settled."""
    BAD_BASE = "bad_base"
    FAILED = "training_failed"
    DIVERGED = "diverged"
    """Training by these terms makes the weights worse on the board's own examples."""
    EXPIRED = "expired"
    CLEARED = "cleared"
    REPLACED = "replaced"


# --- events ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offered:
    """An offer for this model that is signed and fits what the board runs."""

    terms: RoundTerms
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Cleared:
    """The topic was emptied: the hub took an offer back, of this model or of another one."""


@dataclass(frozen=True, slots=True)
class Surveyed:
    """The answer to `Survey`. `obstacle`: why the board may not train now, in words."""

    examples: int
    obstacle: str | None
    has_base: bool


@dataclass(frozen=True, slots=True)
class BaseArrived:
    """The training base is here, is the one that the offer names, and is kept."""


@dataclass(frozen=True, slots=True)
class BaseFailed:
    """What came is not the base, or could not be kept."""

    reason: str


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """The training that runs has a result."""


@dataclass(frozen=True, slots=True)
class TrainingFailed:
    """The training that runs has ended without one. `why`: `FAILED`, or `DIVERGED` and so would the next."""

    reason: str
    why: Declined = Declined.FAILED


@dataclass(frozen=True, slots=True)
class UpdateStored:
    """The spool has committed the update."""


@dataclass(frozen=True, slots=True)
class UpdateNotStored:
    """The disk did not take it."""


@dataclass(frozen=True, slots=True)
class UpdateSettled:
    """The update has left the spool: the hub has it, or it was dropped."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Offered
    | Cleared
    | Surveyed
    | BaseArrived
    | BaseFailed
    | TrainingDone
    | TrainingFailed
    | UpdateStored
    | UpdateNotStored
    | UpdateSettled
    | Tick
)

# --- effects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Survey:
    """Count the examples, read the vitals, look for the base; `Surveyed` is the answer."""

    terms: RoundTerms


@dataclass(frozen=True, slots=True)
class RequestBase:
    """Ask the hub for the base, as steps from one that the board holds or from zeros."""

    terms: RoundTerms
    from_zeros: bool


@dataclass(frozen=True, slots=True)
class StartTraining:
    """Train on at most `max_examples`, until `ends_at_s` at the latest."""

    terms: RoundTerms
    max_examples: int
    ends_at_s: float


@dataclass(frozen=True, slots=True)
class StopTraining:
    """End the training that runs, now; nothing is heard of it any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class AppendUpdate:
    """Give the update to the spool. Repeated until it is there."""


@dataclass(frozen=True, slots=True)
class Note:
    """Say and count why a round is not worked on."""

    why: Declined
    detail: str


Effect = Survey | RequestBase | StartTraining | StopTraining | AppendUpdate | Note
