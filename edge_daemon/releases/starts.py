"""How often in a row no start with the live bundle has lasted: one that proved itself once may crash later.

After an upgrade of the system or of a runtime a bundle may end the process as it is opened, before anything
else runs. So the count is on disk before anything is opened, and goes once the daemon has run for a while.
With an attempt under way a crash counts against that one, in the state of the swap. Power cuts do not count:
the machine has another boot id then.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Final

import msgspec

from edge_cascade.durable import write_durably
from edge_daemon.releases.state_file import STATE_FILE, DamagedStateError, read_state

log = logging.getLogger(__name__)

STARTS_FILE: Final = "starts.json"
MAX_STARTS: Final = 5
"""More that did not last, and the bundle is not opened again by itself."""
LASTED_S: Final = 60.0


class Starts(msgspec.Struct, frozen=True):
    """Starts with one bundle in one life of the machine, this one among them."""

    bundle: str
    machine_boot: str
    count: int


def note_openings(releases: Path, machine_boot: str) -> None:
    """Note that the live bundle of every model is about to be opened, before it is.

    What cannot be read or written is said, and not counted.
    """
    for path in releases.glob(f"*/{STATE_FILE}"):
        directory = path.parent
        try:
            kept = read_state(directory)
            if kept is None or kept.state.attempt is not None:
                continue
            live, before = kept.state.live, _read(directory)
            goes_on = before is not None and (before.bundle, before.machine_boot) == (live, machine_boot)
            count = before.count + 1 if before is not None and goes_on else 1
            content = msgspec.json.encode(Starts(live, machine_boot, count))
            write_durably(directory / STARTS_FILE, content)
        except (OSError, DamagedStateError) as error:
            log.warning("starts with a bundle are not counted directory=%s: %s", directory, error)


def has_not_lasted(directory: Path, bundle: str, machine_boot: str) -> bool:
    """Whether too many starts with this bundle came to nothing."""
    found = _read(directory)
    return (
        found is not None
        and (found.bundle, found.machine_boot) == (bundle, machine_boot)
        and found.count > MAX_STARTS
    )


def note_lasted(directory: Path) -> None:
    """The daemon has run for a while, or has ended as it was asked to."""
    with contextlib.suppress(OSError):
        (directory / STARTS_FILE).unlink(missing_ok=True)


def _read(directory: Path) -> Starts | None:
    try:
        return msgspec.json.decode((directory / STARTS_FILE).read_bytes(), type=Starts)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
