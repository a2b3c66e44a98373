"""What a swap remembers, on disk: the state, for how long daemons have run, where its bundle comes from.

    <directory>/state.json    {"sha256": of the content, "content": Kept}

Replaced whole, by rename, before any effect of a step. A file that is damaged is moved aside and said: the
board then begins with the bundle that it was installed with, and the hub tells it again what it should run.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Final

import msgspec

from edge_cascade.durable import crash_point, sync_directory, write_durably
from edge_daemon.core.swap_state import SwapState
from edge_daemon.ports import Wanted

log = logging.getLogger(__name__)

STATE_FILE: Final = "state.json"
MAX_STATE_BYTES: Final = 2**20
FORMAT: Final = 1


class Kept(msgspec.Struct, frozen=True):
    """`running_s`: for how long a daemon has run on this board, over all its starts.

    `wanted` says what `state.wish` names in full; None for the bundle that the board was installed with.
    """

    state: SwapState
    running_s: float = 0.0
    wanted: Wanted | None = None
    format: int = FORMAT


class _File(msgspec.Struct, frozen=True):
    sha256: str
    content: msgspec.Raw


class DamagedStateError(ValueError):
    """The file is there and is not what was written."""


def read_state(directory: Path) -> Kept | None:
    """What is on disk, None where nothing is. Changes nothing.

    Raises:
        DamagedStateError: saying what is wrong with it.
        OSError: when the disk does not give it.
    """
    path = directory / STATE_FILE
    try:
        with path.open("rb") as file:
            content = file.read(MAX_STATE_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(content) > MAX_STATE_BYTES:
        raise DamagedStateError("too large")
    try:
        whole = msgspec.json.decode(content, type=_File)
        if hashlib.sha256(whole.content).hexdigest() != whole.sha256:
            raise DamagedStateError("its bytes are not those that were written")
        kept = msgspec.json.decode(whole.content, type=Kept)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedStateError(str(error)) from error
    if kept.format != FORMAT:
        raise DamagedStateError(f"format {kept.format}, this version reads {FORMAT}")
    return kept


def load_state(directory: Path) -> Kept | None:
    """The same, where a damaged file is moved aside.

    Raises:
        OSError: when the disk does not give it.
    """
    try:
        return read_state(directory)
    except DamagedStateError as error:
        path = directory / STATE_FILE
        aside = path.with_name(f"{STATE_FILE}.corrupt")
        path.replace(aside)
        log.error("damaged state of releases moved to %s: %s", aside, error)
        return None


def save_state(directory: Path, kept: Kept) -> None:
    """Write it down; once this returns it survives a power cut.

    Raises:
        OSError: when the disk does not take it; what was there before still is.
    """
    content = msgspec.json.encode(kept)
    file = _File(hashlib.sha256(content).hexdigest(), msgspec.Raw(content))
    crash_point("swap.before-state")
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync_directory(directory.parent)
    write_durably(directory / STATE_FILE, msgspec.json.encode(file), mode=0o600)
    crash_point("swap.state-written")
