"""Bundles that were fetched, on disk: whole under their id, or on their way under `<id>.part`. No network.

    releases/<model>/bundles/<id>/{graph,weights}/     whole: every file was checked and fsynced before
    releases/<model>/bundles/<id>/proven               its signatures were checked on this board, see `prove`
    releases/<model>/bundles/<id>.part/                on its way; `<sha256>.partial` is a file on its way
    releases/<model>/bundles/<id>.gone/                being removed

A name appears last and goes first, by one rename each: after a power cut a bundle is whole or not there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from edge_cascade.bundle import GRAPH, WEIGHTS
from edge_cascade.durable import crash_point, sync_directory, write_durably
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError

RESERVE_BYTES: Final = 16 * 2**20
"""Left free for everything else that writes on this disk."""
PROVEN: Final = "proven"

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_BUNDLE = re.compile(r"[0-9a-f]{64}")


class BundleStore:
    """The bundles of all models below `root`, one thread a model. Makes nothing until it is asked to."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def directory_of(self, model: str, bundle: str) -> Path:
        """Where the bundle is, or would be.

        Raises:
            RefusedError: for names that are none, whoever sent them.
        """
        if not _MODEL.fullmatch(model) or not _BUNDLE.fullmatch(bundle):
            raise RefusedError(Failure.DOWNLOAD, f"no name of a bundle: model {model!r}, bundle {bundle!r}")
        return self._root / model / "bundles" / bundle

    def has(self, model: str, bundle: str) -> bool:
        """Whether it is there, whole."""
        directory = self.directory_of(model, bundle)
        return directory.is_dir() and not directory.is_symlink()

    def room_for(self, model: str, bundle: str) -> int:
        """Bytes that a bundle may take: what is free, and what of it is here already, whole or interrupted.

        Raises:
            OSError: as it came.
        """
        existing = self._root
        while not existing.exists():
            existing = existing.parent
        status = os.statvfs(existing)
        begun = _size_of(self.part_of(model, bundle)) + _size_of(self.directory_of(model, bundle))
        return max(status.f_bavail * status.f_frsize - RESERVE_BYTES, 0) + begun

    def keep(self, model: str, bundles: Iterable[str]) -> None:
        """Remove every other bundle of the model, and what is left of other downloads.

        Raises:
            OSError: as it came.
        """
        kept = {self.directory_of(model, bundle) for bundle in bundles}
        kept |= {directory.with_name(f"{directory.name}.part") for directory in kept}
        home = self._root / model / "bundles"
        for entry in sorted(home.iterdir()) if home.is_dir() else []:
            if entry not in kept:
                _remove(entry)

    def part_of(self, model: str, bundle: str) -> Path:
        """Where an incomplete bundle grows."""
        directory = self.directory_of(model, bundle)
        return directory.with_name(f"{directory.name}.part")

    def begin(self, model: str, bundle: str) -> Path:
        """The directory of an incomplete bundle, with its two parts; what an earlier try left is still there.

        Raises:
            OSError: as it came.
        """
        part = self.part_of(model, bundle)
        for directory in (part, part / GRAPH, part / WEIGHTS):
            if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
                directory.unlink()
            directory.mkdir(parents=True, exist_ok=True)
        # The way down to it must survive too, or the whole bundle is lost with a directory above.
        for above in (part.parent, part.parent.parent, self._root, self._root.parent):
            sync_directory(above)
        return part

    def finish(self, model: str, bundle: str) -> None:
        """Give a complete bundle its name; all its files are fsynced already.

        Raises:
            OSError: as it came.
        """
        part = self.part_of(model, bundle)
        for entry in part.iterdir():
            if entry.name not in {GRAPH, WEIGHTS}:
                remove_now(entry)
        # fsync before rename: a power cut must never leave half a bundle under its name
        for directory in (part / GRAPH, part / WEIGHTS, part):
            sync_directory(directory)
        part.rename(self.directory_of(model, bundle))
        sync_directory(part.parent)
        crash_point("download.whole")

    def drop(self, model: str, bundle: str) -> None:
        """Remove a bundle that turned out to be damaged.

        Raises:
            OSError: as it came.
        """
        _remove(self.directory_of(model, bundle))

    def prove(self, model: str, bundle: str) -> None:
        """Remember that its signatures were good here once: a return to it asks for none, see `Downloader`.

        Raises:
            OSError: as it came.
        """
        write_durably(self.directory_of(model, bundle) / PROVEN, b"")

    def is_proven(self, model: str, bundle: str) -> bool:
        """Whether `prove` was said of it."""
        return (self.directory_of(model, bundle) / PROVEN).is_file()


def _size_of(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


def _remove(entry: Path) -> None:
    if entry.is_symlink() or not entry.is_dir():
        entry.unlink(missing_ok=True)
        return
    if entry.suffix == ".gone":
        remove_now(entry)
        return
    # Renamed first: a power cut while files go must not leave half a bundle under its name.
    gone = entry.with_name(f"{entry.name}.gone")
    if gone.exists():
        remove_now(gone)
    entry.rename(gone)
    sync_directory(gone.parent)
    remove_now(gone)


def remove_now(entry: Path) -> None:
    """Remove a file, a link or a whole directory; no link is followed."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
