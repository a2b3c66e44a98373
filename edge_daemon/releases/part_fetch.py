"""The files of one incomplete bundle, one after the other: taken from disk, as a difference, or from the hub.

Every file is written under a name of its own, checked against its digest, fsynced and renamed into its part;
so what lies there under its name is right, or the disk is not. What was cut goes on where it was, a
difference like a file.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from threading import Event
from typing import Final

from edge_cascade.bundle import MANIFEST, MAX_FILE_BYTES, WEIGHTS, WEIGHTS_BLOB
from edge_cascade.durable import crash_point, sync_directory, write_durably
from edge_cascade.errors import ProtocolError
from edge_cascade.manifest import FileEntry
from edge_cascade.signed_releases import BLOBS_PATH, DELTAS_PATH
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError
from edge_daemon.ports import Wanted
from edge_daemon.releases.bundle_store import remove_now
from edge_daemon.releases.content import files_of, has_digest, read_regular
from edge_daemon.releases.growing_file import GrowingFile, TooLongError
from edge_daemon.releases.http_fetch import HttpFleet, StatusError, UnreachableError

log = logging.getLogger(__name__)

WRONG_BYTES_BEFORE_REFUSAL: Final = 3


class CutDifferenceError(UnreachableError):
    """A try for a difference has brought nothing that the next one could go on from."""


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
        is_begun = self._growing(entry).path.exists()
        return is_begun or has_digest(self._directory / part / name, entry) or self._copy(part, name, entry)

    def _file(self, part: str, name: str, entry: FileEntry) -> None:
        target = self._directory / part / name
        if has_digest(target, entry) or self._copy(part, name, entry):
            return
        for _ in range(WRONG_BYTES_BEFORE_REFUSAL):
            self._download(entry)
            growing = self._growing(entry)
            if has_digest(growing.path, entry):
                self._put(growing, target)
                return
            # Nobody signed these bytes. Whatever they are they say nothing about the release.
            log.warning("%s/%s: came with another digest: fetched again", part, name)
            growing.forget()
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
            source = f"{DELTAS_PATH}/{wanted.model}/{held}/{wanted.weights}"
            try:
                delta = self._read_difference(source, held, entry.size_bytes)
                content = apply_weights(old, delta, max_bytes=entry.size_bytes)
            except (StatusError, ProtocolError, TooLongError) as error:
                log.debug("no difference to %s: %s", held[:12], error)
                continue
            if hashlib.sha256(content).hexdigest() == entry.sha256:
                write_durably(self._directory / WEIGHTS / WEIGHTS_BLOB, content)
                crash_point("download.file")
                return
            log.warning("the difference to %s gives other weights: the whole file is fetched", held[:12])

    def _read_difference(self, source: str, held: str, max_bytes: int) -> bytes:
        growing = GrowingFile(self._directory / f"{held}.delta.partial")
        before = growing.size_bytes
        try:
            self._grow(growing, source, max_bytes)
        except UnreachableError as error:
            if growing.goes_on and growing.size_bytes > before:
                raise
            raise CutDifferenceError(str(error)) from error
        except StatusError as error:
            # Nothing comes after what is here: it was whole when the process ended.
            if error.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
        content = read_regular(growing.path, max_bytes)
        # Before the weights are written: there was room for one of both.
        growing.forget()
        return content or b""

    def _download(self, entry: FileEntry) -> None:
        """Let the partial file grow to its length, from where it is."""
        growing = self._growing(entry)
        if growing.size_bytes == entry.size_bytes > 0:
            return
        if growing.size_bytes > entry.size_bytes:
            growing.forget()
        path = f"{BLOBS_PATH}/{entry.sha256}"
        try:
            self._grow(growing, path, entry.size_bytes)
        except TooLongError as error:
            raise RefusedError(Failure.DOWNLOAD, f"endless data: {error}, which are signed") from error
        except StatusError as error:
            if error.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                growing.forget()
                raise UnreachableError(f"{path}: the hub has less of it than this board") from error
            raise
        if (size_bytes := growing.size_bytes) < entry.size_bytes:
            growing.forget()
            raise UnreachableError(f"{path}: {size_bytes} bytes, {entry.size_bytes} are signed")

    def _grow(self, growing: GrowingFile, source: str, max_bytes: int) -> None:
        growing.grow(self._fleet, source, max_bytes, stop=self._stop, is_open=self._is_open)

    def _put(self, growing: GrowingFile, target: Path) -> None:
        growing.path.replace(target)
        sync_directory(target.parent)
        growing.forget_tag()
        crash_point("download.file")

    def _growing(self, entry: FileEntry) -> GrowingFile:
        return GrowingFile(self._directory / f"{entry.sha256}.partial")
