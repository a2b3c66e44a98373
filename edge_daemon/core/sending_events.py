"""What sending hears (events) and what it asks for (effects). Values only; see `sending` for the rules."""

from __future__ import annotations

from dataclasses import dataclass

from edge_daemon.core.spooling import DropReason

# --- events ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker is there."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The broker is gone, and with it whatever was on the way."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """So much lies in the spool and is not in flight."""

    rows: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """The spool gave a batch. `is_shared`: its rows may share a frame."""

    token: int
    boot: bytes
    seqs: tuple[int, ...]
    is_shared: bool
    left: Waiting


@dataclass(frozen=True, slots=True)
class NothingClaimed:
    """The spool had nothing to give, or could not be read."""


@dataclass(frozen=True, slots=True)
class Published:
    """The broker has a part."""

    token: int
    part: int


@dataclass(frozen=True, slots=True)
class NotSent:
    """A part did not get to the hub's door: the session is full or down, or the broker has it for nobody."""

    token: int


@dataclass(frozen=True, slots=True)
class Acked:
    """The hub has committed these, now or before."""

    boot: bytes
    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Greeted:
    """The hub is there again; so it told every board at this moment."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The hub will never take these."""

    boot: bytes
    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The hub could not read this part's frame, or no frame that the broker takes can hold it."""

    token: int
    part: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The daemon is stopping: do not linger."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Connected
    | Disconnected
    | Waiting
    | Claimed
    | NothingClaimed
    | Published
    | NotSent
    | Acked
    | Greeted
    | Rejected
    | Refused
    | Draining
    | Tick
)


# --- effects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """Ask the spool for a batch, and say `Claimed` or `NothingClaimed`."""

    max_items: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Send:
    """Publish these rows of a flight as one frame."""

    token: int
    part: int
    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Tell the spool that the hub has these."""

    boot: bytes
    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Tell the spool to give a row up, counted."""

    boot: bytes
    seq: int
    reason: DropReason


@dataclass(frozen=True, slots=True)
class Defer:
    """Tell the spool to offer a row again only after a while."""

    boot: bytes
    seq: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class Release:
    """Give what is left of a flight back to the spool."""

    token: int


Effect = Claim | Send | Acknowledge | Drop | Defer | Release
