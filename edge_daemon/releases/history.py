"""What became of releases on this board, for people: one JSON object a line, the newest last. Bounded.

Nothing is decided by it. It is not fsynced: a power cut may take the last lines.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

from edge_cascade.durable import write_durably
from edge_daemon.core.swap_state import SwapState

log = logging.getLogger(__name__)

HISTORY_FILE: Final = "history.jsonl"
MAX_BYTES: Final = 128 * 1024


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """`at` is the wall clock in milliseconds as the board believed it; `running_s` never goes back."""

    at_ms: int
    running_s: float
    what: str
    release: str = ""
    bundle: str = ""
    detail: str = ""


def changes_of(before: SwapState, after: SwapState) -> list[tuple[str, str, str, str]]:
    """What happened from one state to the next: what, its release, its bundle, a detail."""
    changes = []
    was, now = before.attempt, after.attempt
    if now is not None and (was is None or was.number != now.number):
        changes.append(("attempted", now.release, now.bundle, ""))
    elif now is not None and was is not None and now.phase is not was.phase:
        changes.append((str(now.phase), now.release, now.bundle, ""))
    elif now is not None and was is not None and now.probation_since_s != was.probation_since_s:
        changes.append(("on probation", now.release, now.bundle, ""))
    old = set(before.ends)
    changes += [
        (
            "committed" if end.failure is None else f"reverted: {end.failure}",
            end.release,
            end.bundle,
            end.detail,
        )
        for end in after.ends
        if end not in old
    ]
    return changes


def note(directory: Path, entry: Entry) -> None:
    """Add a line; a disk that does not take it is said and lived with."""
    path = directory / HISTORY_FILE
    line = msgspec.json.encode(entry) + b"\n"
    try:
        if path.is_file() and path.stat().st_size + len(line) > MAX_BYTES:
            _, _, younger = path.read_bytes()[-MAX_BYTES // 2 :].partition(b"\n")
            write_durably(path, younger)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("ab") as file:
            file.write(line)
    except OSError as error:
        log.warning("history of releases not written: %s: %s", path, error.strerror)


def read_history(directory: Path) -> list[Entry]:
    """All entries, the oldest first; lines that are damaged are left out.

    Raises:
        OSError: when there is a history that cannot be read.
    """
    try:
        lines = (directory / HISTORY_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        try:
            entries.append(msgspec.json.decode(line, type=Entry))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("damaged line in the history of releases: %s", error)
    return entries
