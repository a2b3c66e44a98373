"""What a round hears (events) and what it asks for (effects). Values only; see `rounds` for the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from cloud_hub.core.federation.guard import Judgement


class Phase(Enum):
    """Where a round stands. The last three are its ends."""

    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    JUDGING = "judging"
    COMMITTING = "committing"
    ROLLING_BACK = "rolling_back"
    ABORTING = "aborting"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"


ENDS: Final = frozenset({Phase.COMMITTED, Phase.ROLLED_BACK, Phase.ABORTED})


# --- events ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UpdateCommitted:
    """An update of this device is in the store. `staleness`: its training base is so many rounds old."""

    device: str
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class DeviceCameOnline:
    """A device is there. For a `BufferRules` round: one that may be asked (`cohort.select_eligible`)."""

    device: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The hub has started again. `committed`: whose updates are in the store, in their order, and how stale.

    Those that the state has counted already may be among them.
    """

    committed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Abort:
    """A person, or the series, wants no more of this round."""

    reason: str


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The next base is in the store: `votes` were counted, `rejected` did not stand screening."""

    votes: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Judged:
    """What the guard says of it."""

    judgement: Judgement


@dataclass(frozen=True, slots=True)
class Failed:
    """The votes gave no result, or it could not be judged; trying again would not help."""

    reason: str


@dataclass(frozen=True, slots=True)
class Committed:
    """`Commit` is done."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """`RollBack` is done."""


Event = (
    UpdateCommitted
    | DeviceCameOnline
    | Tick
    | Resumed
    | Abort
    | Aggregated
    | Judged
    | Failed
    | Committed
    | RolledBack
)


# --- effects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Put the offer before these devices, retained, good for so long."""

    devices: tuple[str, ...]
    seconds_left: float


@dataclass(frozen=True, slots=True)
class ClearOffers:
    """Take the offer away from these devices."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Screen and combine the updates of these devices, in this order, and say `Aggregated` or `Failed`.

    `votes` says how stale each one's update is. The order is part of the result.
    """

    votes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Judge:
    """Hold what was aggregated against its base and the series' best; say `Judged` or `Failed`."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Make what was aggregated the training base, and the rule's state with it; say `Committed`."""


@dataclass(frozen=True, slots=True)
class RollBack:
    """Drop what was aggregated, if there is any; base and the rule's state stand. Say `RolledBack`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The round is over: tell the series."""

    outcome: Phase
    reason: str


Effect = SendOffer | ClearOffers | Aggregate | Judge | Commit | RollBack | Ended
