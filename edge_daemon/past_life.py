"""Whether the start before this one ended in a crash: a file that a clean stop renames.

`running` holds the kernel's boot id. A power cut leaves it as well, but the machine has another boot id then:
that is no fault of the daemon's. A board that cannot write the file never counts a crash. `stopped` is what a
clean stop makes of it, which a full disk allows.

The state of a swap has a boot id of its own. What counts against a bundle must be written in one piece with
the attempt that it counts against: with two files, a crash between two writes would count for nobody, or for
the next bundle. This one is for people and for health, and is there on boards that take no releases. It only
ever speaks for a bundle: where the disk took no state at the stop, `stopped` says that there was one.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Final

from edge_cascade.durable import write_durably

log = logging.getLogger(__name__)

RUNNING_FILE: Final = "running"
STOPPED_FILE: Final = "stopped"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def read_machine_boot() -> str:
    """The kernel's boot id, which changes with power and not with a crash; empty where it has none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError as error:
        log.warning("no boot id, a power cut counts as a crash: %s", error)
        return ""


def was_stopped(state_dir: Path) -> bool:
    """Whether the daemon before this one ended as it was asked to; to be asked before `note_start`."""
    return (state_dir / STOPPED_FILE).is_file()


def note_start(state_dir: Path, machine_boot: str) -> bool:
    """Note that the daemon runs; whether the one before it crashed."""
    path = state_dir / RUNNING_FILE
    try:
        crashed = path.read_text(encoding="ascii").strip() == machine_boot
    except (OSError, UnicodeDecodeError):
        crashed = False
    # Taken back first, which a full disk allows: what ends from here on is a stop or a crash of its own.
    with contextlib.suppress(OSError):
        (state_dir / STOPPED_FILE).replace(path)
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        write_durably(path, f"{machine_boot}\n".encode())
    except OSError as error:
        log.warning("crashes will not be counted: %s: %s", path, error.strerror)
    return crashed


def note_stop(state_dir: Path) -> None:
    """Note that the daemon ended as it was asked to."""
    try:
        (state_dir / RUNNING_FILE).replace(state_dir / STOPPED_FILE)
    except (FileNotFoundError, NotADirectoryError):
        # Nobody could write that it runs.
        return
    except OSError as error:
        log.warning("this stop will count as a crash: %s", error)
