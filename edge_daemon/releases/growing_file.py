"""A file on its way from the hub: what has come of it survives, and it goes on by Range under the same ETag.

<name>.partial      the bytes from the first on, fsynced now and then
<name>.etag         the strong ETag under which they came; without one it begins anew
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Final

from edge_cascade.durable import crash_point, write_durably
from edge_daemon.errors import ReleaseError
from edge_daemon.releases.content import read_regular
from edge_daemon.releases.http_fetch import HttpFleet, UnreachableError

_SYNC_EVERY_BYTES: Final = 2**20


class PausedError(ReleaseError):
    """The hours are over: go on when they begin again."""


class TooLongError(ReleaseError):
    """More came than there may be; what had come is forgotten."""


class GrowingFile:
    """`path` ends in `.partial`; nobody else writes it. Every method may raise `OSError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tag_file = path.with_suffix(".etag")

    @property
    def size_bytes(self) -> int:
        """What has come."""
        is_ours = self.path.is_file() and not self.path.is_symlink()
        return self.path.lstat().st_size if is_ours else 0

    @property
    def goes_on(self) -> bool:
        """Whether what has come would be asked for no second time."""
        return self.size_bytes > 0 and bool(self._tag())

    def forget(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)
        self.forget_tag()

    def forget_tag(self) -> None:
        """It is whole, and has another name."""
        self._tag_file.unlink(missing_ok=True)

    def grow(
        self, fleet: HttpFleet, source: str, max_bytes: int, *, stop: Event, is_open: Callable[[], bool]
    ) -> None:
        """Fetch `source` from where it is to its end.

        Raises:
            TooLongError, UnreachableError, StatusError, StoppedError, PausedError.
        """
        tag = self._tag()
        start = self.size_bytes if tag else 0
        with fleet.open(source, stop, start=start, etag=tag) as body:
            if body.start not in {0, start}:
                raise UnreachableError(f"{source}: from byte {body.start}, asked from {start}")
            if body.etag != tag or body.start == 0:
                # In this order: a tag never stands beside bytes of another file.
                self.path.unlink(missing_ok=True)
                write_durably(self._tag_file, body.etag.encode("ascii"))
            self._append(body.start, body.chunks, source, max_bytes, is_open)

    def _tag(self) -> str:
        return (read_regular(self._tag_file, 300) or b"").decode("ascii", "replace")

    def _append(
        self, start: int, chunks: Iterator[bytes], source: str, max_bytes: int, is_open: Callable[[], bool]
    ) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.truncate(start)
            file.seek(start)
            size = synced = start
            for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    self.forget()
                    raise TooLongError(f"{source} is longer than {max_bytes} bytes")
                file.write(chunk)
                if size - synced >= _SYNC_EVERY_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    synced = size
                crash_point("download.part")
                if not is_open():
                    raise PausedError(f"{source}: the hours are over after {size} bytes")
            file.flush()
            os.fsync(file.fileno())
