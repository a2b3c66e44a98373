"""What a rollout hears (events) and what it asks for (effects). Values only; see `rollout` for the rules."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cloud_hub.core.rollout.findings import Health
from cloud_hub.core.rollout.judge import Judgement
from cloud_hub.core.rollout.waves import Device, Sampling

# --- events ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resumed:
    """The hub was started again: effects of the last event may not have been carried out."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A device is there: a new one, one that came back, or one whose `is_online` is told."""

    device: Device


@dataclass(frozen=True, slots=True)
class Lost:
    """A device went offline."""

    device: str


@dataclass(frozen=True, slots=True)
class Unheard:
    """No device could be heard from this time until now: the hub, its broker or its store was away."""

    since_s: float


@dataclass(frozen=True, slots=True)
class Removed:
    """A device is no longer of the fleet."""

    device: str


@dataclass(frozen=True, slots=True)
class Reported:
    """A device says how a swap ended: `committed` to this release, or reverted from it and why."""

    device: str
    release: str
    committed: bool
    reason: str = ""


Sign = Seen | Lost | Removed | Reported


@dataclass(frozen=True, slots=True)
class Heard:
    """What was heard of many devices at one time: all of it counts before anything follows from it."""

    signs: tuple[Sign, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """What the pairs say, to the open wave's `max_drop` (see `rules_of` in `rollout`)."""

    judgement: Judgement


@dataclass(frozen=True, slots=True)
class HealthJudged:
    """What the boards' vitals say."""

    health: Health


@dataclass(frozen=True, slots=True)
class Approved:
    """A person lets a wave open (its index)."""

    by: str
    wave: int


@dataclass(frozen=True, slots=True)
class Paused:
    """A person stops the widening; what was offered goes on."""

    by: str


@dataclass(frozen=True, slots=True)
class Unpaused:
    """A person lets the widening go on."""

    by: str


@dataclass(frozen=True, slots=True)
class Halted:
    """A person takes the release back."""

    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Killed:
    """A person takes the release back for good, even after the rollout is done: the kill switch."""

    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """Another rollout of this model has these devices now: ask for nothing any more."""


Event = (
    Resumed
    | Tick
    | Seen
    | Lost
    | Unheard
    | Removed
    | Reported
    | Heard
    | Judged
    | HealthJudged
    | Approved
    | Paused
    | Unpaused
    | Halted
    | Killed
    | Closed
)


# --- effects: each may be carried out twice without harm ---------------------------------------------------


class ReleaseState(StrEnum):
    """Where a release stands in the registry."""

    DRAFT = "draft"
    CANARY = "canary"
    LIVE = "live"
    SUPERSEDED = "superseded"
    """Was live, and no board is to run it any more; boards may be taken back to it."""
    HALTED = "halted"
    RETIRED = "retired"
    COLLECTED = "collected"
    """Its files are gone, for nothing pointed at it."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Make the release what this device should run."""

    device: str
    release: str


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Make this release, an older one, what the device should run; None: what it was shipped with."""

    device: str
    release: str | None


@dataclass(frozen=True, slots=True)
class Sample:
    """Have this device show so much; None: as much as its configuration says."""

    device: str
    sampling: Sampling | None


@dataclass(frozen=True, slots=True)
class MarkRelease:
    """Write the release's state into the registry."""

    release: str
    state: ReleaseState


@dataclass(frozen=True, slots=True)
class AskApproval:
    """Tell people that this wave (its index) waits for one of them."""

    wave: int


Effect = Offer | TakeBack | Sample | MarkRelease | AskApproval
