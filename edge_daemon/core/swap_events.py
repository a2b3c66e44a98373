"""What a swap hears (events) and what it asks for (effects). Values only; see `swap` for the rules.

Answers carry the number of the attempt that asked, so that a late one is known for what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Failure(StrEnum):
    """Why an attempt ended without the new bundle."""

    SPACE = "space"
    """The disk has no room for a second bundle."""
    DOWNLOAD = "download"
    """It could not be fetched: gone, refused, too long."""
    INTEGRITY = "integrity"
    """Digests, signature or format are not what was signed."""
    GOLDEN = "golden"
    """It computes something else here than where it was built."""
    CRASH = "crash"
    """It killed its trial, or the daemon."""
    POWER = "power"
    """The board lost power in its trial so often that the bundle may be the cause."""
    LATENCY = "latency"
    MEMORY = "memory"
    LOAD = "load"
    """The runtime did not take it in the running daemon."""
    PROBATION = "probation"
    """Too many live samples failed."""
    BARRED = "barred"
    """It failed here before: not tried."""
    SUPERSEDED = "superseded"
    """Something else was wanted before it was committed."""
    ASKED = "asked"
    """Somebody at the board asked for the bundle before it."""


FOR_GOOD = frozenset({Failure.INTEGRITY, Failure.GOLDEN})
"""Trying again cannot help: the same bytes on the same board."""


# --- events ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The daemon started. `machine_boot` is the kernel's boot id: it changes with power, not with a crash.

    `was_stopped`: the one before was asked to end, whether or not the disk took its state then.
    """

    machine_boot: str
    was_stopped: bool = False


@dataclass(frozen=True, slots=True)
class Stopping:
    """Somebody asked the daemon to stop: its end is no crash."""


@dataclass(frozen=True, slots=True)
class Desired:
    """What the hub wants this board to run; `size_bytes` is what the bundle takes on disk."""

    release: str
    bundle: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RevertAsked:
    """Somebody at the board wants the bundle before this one."""


@dataclass(frozen=True, slots=True)
class SpaceChecked:
    """So much room there is for this bundle: what is free, and what is already there of it."""

    attempt: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Downloaded:
    """The bundle's files are there and fsynced."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Verified:
    """Digests and signature are right, the files harmless."""

    attempt: int


@dataclass(frozen=True, slots=True)
class TrialPassed:
    """The child process ran it: golden outputs, latency and memory are fine."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A step of an attempt failed for good; what may be tried again was tried again."""

    attempt: int
    failure: Failure
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    """This bundle answers from now on; the one before is drained and closed."""

    bundle: str


@dataclass(frozen=True, slots=True)
class NotServing:
    """This bundle could not be brought to answer; whatever served before still does, if anything did."""

    bundle: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """Live samples that this bundle answered since the last such event; `failed` of them badly or late."""

    bundle: str
    samples: int
    failed: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """The report of this attempt is safely on its way (in the spool, committed)."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Started
    | Stopping
    | Desired
    | RevertAsked
    | SpaceChecked
    | Downloaded
    | Verified
    | TrialPassed
    | Failed
    | Serving
    | NotServing
    | Answered
    | Delivered
    | Tick
)


# --- effects: each may be carried out twice without harm ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keep:
    """Remove every bundle from the disk that is not one of these, and every half download of others."""

    bundles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckSpace:
    """Say `SpaceChecked`."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Download:
    """Fetch a bundle, going on where a download was cut; say `Downloaded` or `Failed`."""

    attempt: int
    release: str
    bundle: str


@dataclass(frozen=True, slots=True)
class Verify:
    """Check what is on disk; say `Verified` or `Failed`."""

    attempt: int
    release: str
    bundle: str


@dataclass(frozen=True, slots=True)
class RunTrial:
    """Run it in a child process; say `TrialPassed` or `Failed`.

    `against` is the bundle that it is compared with; None: it answered here before, and need only run.
    """

    attempt: int
    bundle: str
    against: str | None


@dataclass(frozen=True, slots=True)
class Serve:
    """Build this bundle beside the one that serves, flip, drain, close; say `Serving` or `NotServing`.

    When it serves already, say so.
    """

    bundle: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop whatever runs for this attempt: download, verification, child process."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the hub how an attempt ended, through the spool; say `Delivered`. Failing to is no matter."""

    attempt: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No bundle on this board can be brought to answer: the daemon ends, saying why."""

    detail: str


Effect = Keep | CheckSpace | Download | Verify | RunTrial | Serve | Abandon | Report | GiveUp
