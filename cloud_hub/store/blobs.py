"""Where tensors and updates lie: packs, named by their content, written before any row names them.

`FolderBlobs` keeps `<sha256>` in `<directory>/<first two digits>/`. A crash between the pack and its row
leaves an orphan, which nothing names and `remove_orphans` deletes at the next start. A pack is removed only
after the rows that named it, and never while somebody may be about to name it again.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Protocol

from cloud_hub.errors import NotFoundError, StoreUnavailableError
from edge_cascade.durable import sync_directory, write_durably

_PACK_NAME = re.compile(r"[0-9a-f]{64}")


class Blobs(Protocol):
    """Immutable packs of bytes."""

    def put(self, pack: bytes) -> str:
        """Keep a pack durably; its name. The same bytes have the same name.

        Raises:
            StoreUnavailableError: when it cannot be written now.
        """
        ...

    def get(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of a pack.

        Raises:
            NotFoundError: when there is no such pack, or it is shorter.
            StoreUnavailableError: when it cannot be read now.
        """
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Delete packs whose rows are gone, but those that were put again since the start.

        Raises:
            StoreUnavailableError: when one cannot be removed; it goes at the next start.
        """
        ...

    def remove_orphans(self, named: Container[str]) -> int:
        """Delete the packs that nothing names; how many. Only while nobody writes."""
        ...


class FolderBlobs:
    """Packs as files below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._gate = threading.Lock()
        # Whoever puts a pack that is there already is about to name it: only a start can tell if it did.
        self._put_again: set[str] = set()

    def put(self, pack: bytes) -> str:
        """See `Blobs.put`."""
        name = hashlib.sha256(pack).hexdigest()
        path = self._path(name)
        try:
            with self._gate:
                is_there = path.exists()
                if is_there:
                    self._put_again.add(name)
            if not is_there:
                self._make_fan_out(path.parent)
                write_durably(path, pack, mode=0o600)
        except OSError as error:
            raise StoreUnavailableError(f"blobs: {error.strerror or error} ({path.parent})") from error
        return name

    def get(self, name: str, offset: int, length: int) -> bytes:
        """See `Blobs.get`."""
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                content = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except FileNotFoundError as error:
            raise NotFoundError(f"pack {name} is missing") from error
        except OSError as error:
            raise StoreUnavailableError(f"blobs: {error.strerror or error} ({name})") from error
        if len(content) != length:
            raise NotFoundError(f"pack {name} ends before byte {offset + length}")
        return content

    def remove(self, names: Iterable[str]) -> None:
        """See `Blobs.remove`."""
        for name in names:
            with self._gate:
                if name in self._put_again:
                    continue
                try:
                    self._path(name).unlink(missing_ok=True)
                except OSError as error:
                    raise StoreUnavailableError(f"blobs: {error.strerror or error} ({name})") from error

    def remove_orphans(self, named: Container[str]) -> int:
        """See `Blobs.remove_orphans`. Half-written files of a killed process go as well."""
        removed = 0
        try:
            for path in self._directory.glob("[0-9a-f][0-9a-f]/*"):
                if path.name.startswith(".") or (_PACK_NAME.fullmatch(path.name) and path.name not in named):
                    path.unlink()
                    removed += 1
        except OSError as error:
            raise StoreUnavailableError(f"blobs: {error.strerror or error} ({self._directory})") from error
        return removed

    def _path(self, name: str) -> Path:
        if not _PACK_NAME.fullmatch(name):
            raise NotFoundError(f"{name!r} names no pack")
        return self._directory / name[:2] / name

    def _make_fan_out(self, folder: Path) -> None:
        if folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A new directory is an entry of its parent: without this a power cut may lose it with the pack.
        sync_directory(self._directory)
        sync_directory(self._directory.parent)
