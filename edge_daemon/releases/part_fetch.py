"""The files of one incomplete bundle, one after the other: taken from disk, as a difference, or from the hub.

Every file is written under a name of its own, checked against its digest, fsynced and renamed into its part;
so what lies there under its name is right, or the disk is not.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Final

from edge_cascade.bundle import MANIFEST, MAX_FILE_BYTES, WEIGHTS, WEIGHTS_BLOB
from edge_cascade.durable import crash_point, sync_directory, write_durably
from edge_cascade.errors import ProtocolError
from edge_cascade.manifest import FileEntry
from edge_cascade.signed_releases import BLOBS_PATH, DELTAS_PATH
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError, ReleaseError
from edge_daemon.ports import Wanted
from edge_daemon.releases.bundle_store import remove_now
from edge_daemon.releases.content import files_of, has_digest, read_regular
from edge_daemon.releases.http_fetch import HttpFleet, StatusError, UnreachableError

log = logging.getLogger(__name__)

WRONG_BYTES_BEFORE_REFUSAL: Final = 3
_SYNC_EVERY_BYTES: Final = 2**20


class PausedError(ReleaseError):
    """The hours are over: go on when they begin again."""


class CutDifferenceError(UnreachableError):
    """A difference did not come through. It begins anew with every try, which a file does not."""


class PartFetch:
    """Files into `directory` (`<id>.part`), which nobody else writes. Every method may raise `OSError`."""

    def __init__(
        self,
        fleet: HttpFleet,
        directory: Path,
        held: Sequence[Path],
        *,
        stop: Event,
        is_open: Callable[[], bool],
        takes_differences: bool = True,
    ) -> None:
        self._fleet = fleet
        self._directory = directory
        self._held = [(bundle, files_of(bundle)) for bundle in held]
        self._stop = stop
        self._is_open = is_open
        self._takes_differences = takes_differences

    def manifest(self, part: str, sha256: str, size_bytes: int) -> bytes:
        """A part's manifest, of the length and digest that were signed.

        Raises:
            RefusedError, UnreachableError, StatusError, StoppedError, PausedError.
        """
        entry = FileEntry(sha256, size_bytes)
        self._file(part, MANIFEST, entry)
        content = read_regular(self._directory / part / MANIFEST, size_bytes)
        if content is None:
            raise UnreachableError(f"{part}/{MANIFEST}: gone from the disk")
        return content

    def files(self, part: str, entries: Mapping[str, FileEntry]) -> None:
        """All files of a part. Raises as `manifest`."""
        for stray in (self._directory / part).iterdir():
            # Left by a power cut, or by somebody else: no file of this part.
            if stray.name not in entries and stray.name != MANIFEST:
                remove_now(stray)
        for name, entry in entries.items():
            self._file(part, name, entry)

    def weights(self, wanted: Wanted, entries: Mapping[str, FileEntry]) -> None:
        """All files of the weights part, its blob as a difference if there is one. Raises as `manifest`."""
        blob = entries.get(WEIGHTS_BLOB)
        is_far = blob is not None and not self._is_near(WEIGHTS, WEIGHTS_BLOB, blob)
        if blob is not None and is_far and self._takes_differences:
            self._difference(wanted, blob)
        self.files(WEIGHTS, entries)

    def _is_near(self, part: str, name: str, entry: FileEntry) -> bool:
        is_begun = self._partial(entry).exists()
        return is_begun or has_digest(self._directory / part / name, entry) or self._copy(part, name, entry)

    def _file(self, part: str, name: str, entry: FileEntry) -> None:
        target = self._directory / part / name
        if has_digest(target, entry) or self._copy(part, name, entry):
            return
        for _ in range(WRONG_BYTES_BEFORE_REFUSAL):
            self._download(entry)
            partial = self._partial(entry)
            if has_digest(partial, entry):
                self._put(partial, target)
                return
            # Nobody signed these bytes. Whatever they are they say nothing about the release.
            log.warning("%s/%s: came with another digest: fetched again", part, name)
            self._forget(entry)
        raise RefusedError(
            Failure.DOWNLOAD,
            f"wrong bytes: {part}/{name} came with another digest than was signed, every time",
        )

    def _copy(self, part: str, name: str, entry: FileEntry) -> bool:
        """Take it from a bundle on disk. A copy, no link: one bad block must not damage both bundles."""
        for _, files in self._held:
            path = files.get(entry.sha256)
            content = None if path is None else read_regular(path, entry.size_bytes)
            if content is not None and hashlib.sha256(content).hexdigest() == entry.sha256:
                write_durably(self._directory / part / name, content)
                crash_point("download.file")
                return True
        return False

    def _difference(self, wanted: Wanted, entry: FileEntry) -> None:
        """Try to make the weights from those of a bundle on disk; where there is none, the file will do."""
        for bundle, _ in self._held:
            manifest = read_regular(bundle / WEIGHTS / MANIFEST, MAX_FILE_BYTES)
            old = read_regular(bundle / WEIGHTS / WEIGHTS_BLOB, MAX_FILE_BYTES)
            if manifest is None or old is None:
                continue
            from edge_cascade.weights_delta import apply_weights

            held = hashlib.sha256(manifest).hexdigest()
            try:
                delta = self._read(f"{DELTAS_PATH}/{wanted.model}/{held}/{wanted.weights}", entry.size_bytes)
                content = apply_weights(old, delta, max_bytes=entry.size_bytes)
            except UnreachableError as error:
                raise CutDifferenceError(str(error)) from error
            except (StatusError, ProtocolError) as error:
                log.debug("no difference to %s: %s", held[:12], error)
                continue
            if hashlib.sha256(content).hexdigest() == entry.sha256:
                write_durably(self._directory / WEIGHTS / WEIGHTS_BLOB, content)
                crash_point("download.file")
                return
            log.warning("the difference to %s gives other weights: the whole file is fetched", held[:12])

    def _read(self, path: str, max_bytes: int) -> bytes:
        content = bytearray()
        with self._fleet.open(path, self._stop) as body:
            for chunk in body.chunks:
                content += chunk
                if len(content) > max_bytes:
                    raise ProtocolError(f"{path}: longer than the file itself")
        return bytes(content)

    def _download(self, entry: FileEntry) -> None:
        """Let the partial file grow to its length, from where it is."""
        partial = self._partial(entry)
        tag_file = partial.with_suffix(".etag")
        start = partial.lstat().st_size if partial.is_file() and not partial.is_symlink() else 0
        tag = (read_regular(tag_file, 300) or b"").decode("ascii", "replace")
        if start == entry.size_bytes and start:
            return
        if start > entry.size_bytes or not tag:
            start = 0
        path = f"{BLOBS_PATH}/{entry.sha256}"
        try:
            with self._fleet.open(path, self._stop, start=start, etag=tag) as body:
                if body.start not in {0, start}:
                    raise UnreachableError(f"{path}: from byte {body.start}, asked from {start}")
                if body.etag != tag or body.start == 0:
                    # In this order: a tag never stands beside bytes of another file.
                    partial.unlink(missing_ok=True)
                    write_durably(tag_file, body.etag.encode("ascii"))
                self._grow(partial, body.start, body.chunks, entry, path)
        except StatusError as error:
            if error.status == 416:
                self._forget(entry)
                raise UnreachableError(f"{path}: the hub has less of it than this board") from error
            raise

    def _grow(self, partial: Path, start: int, chunks: Iterator[bytes], entry: FileEntry, path: str) -> None:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.truncate(start)
            file.seek(start)
            size = synced = start
            for chunk in chunks:
                size += len(chunk)
                if size > entry.size_bytes:
                    self._forget(entry)
                    raise RefusedError(
                        Failure.DOWNLOAD, f"endless data: {path} is longer than the {entry.size_bytes} signed"
                    )
                file.write(chunk)
                if size - synced >= _SYNC_EVERY_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    synced = size
                crash_point("download.part")
                if not self._is_open():
                    raise PausedError(f"{path}: the hours are over after {size} bytes")
            file.flush()
            os.fsync(file.fileno())
        if size < entry.size_bytes:
            self._forget(entry)
            raise UnreachableError(f"{path}: {size} bytes, {entry.size_bytes} are signed")

    def _put(self, partial: Path, target: Path) -> None:
        partial.replace(target)
        sync_directory(target.parent)
        partial.with_suffix(".etag").unlink(missing_ok=True)
        crash_point("download.file")

    def _forget(self, entry: FileEntry) -> None:
        partial = self._partial(entry)
        partial.unlink(missing_ok=True)
        partial.with_suffix(".etag").unlink(missing_ok=True)

    def _partial(self, entry: FileEntry) -> Path:
        return self._directory / f"{entry.sha256}.partial"
