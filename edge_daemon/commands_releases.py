"""`edge-daemon history` and `edge-daemon revert`: what releases did on this board, and one step back."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_daemon.config_file import load_config
from edge_daemon.errors import EXIT_OK, ReleaseError

if TYPE_CHECKING:
    from edge_daemon.releases.history import Entry

_DIGEST_DIGITS: Final = 12


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the two commands."""
    history = commands.add_parser("history", help="say what became of releases on this board")
    revert = commands.add_parser("revert", help="have the running daemon go back to the bundle before")
    for parser, run in ((history, _history), (revert, _revert)):
        parser.add_argument(
            "--config", type=Path, required=True, metavar="FILE", help="the TOML configuration"
        )
        parser.add_argument("--model", metavar="MODEL", help="this model alone")
        parser.set_defaults(run=run)


def _history(options: argparse.Namespace) -> int:
    from edge_daemon.releases.history import read_history

    for directory in _directories(options):
        for entry in read_history(directory):
            sys.stdout.write(f"{_line(directory.name, entry)}\n")
    return EXIT_OK


def _revert(options: argparse.Namespace) -> int:
    from edge_daemon.releases.swapper import REVERT_FILE

    directories = list(_directories(options))
    if len(directories) != 1:
        names = ", ".join(directory.name for directory in directories) or "none"
        raise ReleaseError(f"--model: say which one goes back; releases were taken for: {names}")
    (directory,) = directories
    try:
        (directory / REVERT_FILE).touch()
    except OSError as error:
        raise ReleaseError(
            f"{directory / REVERT_FILE}: {error.strerror}; run it as the daemon's user"
        ) from error
    sys.stdout.write(f"{directory.name}: asked; the running daemon goes back, or the next one does\n")
    return EXIT_OK


def _directories(options: argparse.Namespace) -> Iterable[Path]:
    """One for each model that has a state."""
    from edge_daemon.releases.state_file import STATE_FILE

    config = load_config(options.config, os.environ)
    root = Path(config.device.state_dir) / "releases"
    found = sorted(path.parent for path in root.glob(f"*/{STATE_FILE}"))
    if options.model is None:
        return found
    chosen = [directory for directory in found if directory.name == options.model]
    if not chosen:
        names = ", ".join(directory.name for directory in found) or "none"
        raise ReleaseError(f"--model: {options.model!r} has taken no release here; there are: {names}")
    return chosen


def _line(model: str, entry: Entry) -> str:
    at = datetime.fromtimestamp(entry.at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    parts = (at, model, entry.what, f"release {entry.release}", entry.bundle[:_DIGEST_DIGITS], entry.detail)
    return "  ".join(part for part in parts if part)
