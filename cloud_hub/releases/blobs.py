"""The files of released bundles by their SHA-256, where they lie: nothing is copied. No HTTP.

What a manifest says of a file was checked when its release was registered; a board checks it again. Paths are
made of names that a manifest holds, never of what somebody asks for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from cloud_hub.registry import BUNDLE, RELEASES
from cloud_hub.releases.layout import BLOBS
from cloud_hub.rollouts.settings import TUF
from edge_cascade.bundle import GRAPH, MANIFEST, WEIGHTS, WEIGHTS_BLOB
from edge_cascade.durable import write_durably
from edge_cascade.errors import ProtocolError
from edge_cascade.manifest import FileEntry
from edge_cascade.weights_delta import MAGIC, encode_weights

log = logging.getLogger(__name__)

DELTAS: Final = "deltas"
"""In the state directory: differences that were asked for, by the weights parts that they lead between."""
MAX_DELTAS: Final = 64
"""That are kept, those that were asked for last."""
MAX_DELTA_BYTES: Final = 512 * 2**20
"""Of all that are kept; the last one is kept whatever its size."""
MAX_WRITING_S: Final = 86400.0
"""What is half written for so long is of a process that died."""


class _Files(msgspec.Struct, frozen=True):
    files: dict[str, FileEntry]


@dataclass(frozen=True, slots=True)
class KeptDelta:
    """A difference on disk; of no bytes where the whole blob is as short."""

    path: Path
    sha256: str
    size_bytes: int


class ReleaseBlobs:
    """Finds files in a state directory. Any thread may ask."""

    def __init__(self, state_dir: Path, shipped: Iterable[Path] = ()) -> None:
        """`shipped`: the bundles that boards were installed with, which the first difference leads from."""
        self._releases = state_dir / RELEASES
        self._policies = state_dir / TUF / BLOBS
        self._deltas = state_dir / DELTAS
        self._shipped = tuple(shipped)
        self._gate = threading.Lock()
        self._seen: frozenset[str] | None = None
        self._paths: dict[str, Path] = {}
        self._weights: dict[str, Path] = {}
        self._making: dict[str, threading.Lock] = {}

    def find(self, sha256: str) -> Path | None:
        """Where the file of this digest lies, None where there is none."""
        with self._gate:
            self._look_again()
            return self._paths.get(sha256)

    def delta(self, held: str, wanted: str) -> bytes | None:
        """What leads from one weights part's blob to another's, by the parts' digests; None where nothing
        does, or the whole blob is as short. The first who asks waits until it is made.
        """
        ways = self._ways(held, wanted)
        if ways is None:
            return None
        name = f"{held}.{wanted}"
        with self._gate:
            making = self._making.setdefault(name, threading.Lock())
        with making:
            kept = self._kept_delta(name)
            made = None if kept is None else _read(kept)
            if made is None:
                made = _make_delta(*ways)
                if made is not None:
                    self._keep_delta(name, made)
        with self._gate:
            self._making.pop(name, None)
        return made or None

    def kept_delta(self, held: str, wanted: str) -> KeptDelta | None:
        """What `delta` has on disk. Reads all of it, a little at a time."""
        path = None if self._ways(held, wanted) is None else self._kept_delta(f"{held}.{wanted}")
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                return KeptDelta(path, hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
        except OSError:
            return None

    def weights_parts(self) -> frozenset[str]:
        """The digests of the weights parts that are here."""
        with self._gate:
            self._look_again()
            return frozenset(self._weights)

    def _ways(self, held: str, wanted: str) -> tuple[Path, Path] | None:
        """The files of both parts, where both are here and not the same."""
        with self._gate:
            self._look_again()
            before, after = self._weights.get(held), self._weights.get(wanted)
        return None if before is None or after is None or held == wanted else (before, after)

    def _kept_delta(self, name: str) -> Path | None:
        path = self._deltas / name
        try:
            with path.open("rb") as file:
                begins = file.read(len(MAGIC))
            # What is asked for stays.
            os.utime(path)
        except OSError:
            return None
        # What another version of the hub has written in another way is made anew.
        return path if begins in {b"", MAGIC} else None

    def _keep_delta(self, name: str, content: bytes) -> None:
        """An empty file says that the whole blob is as short."""
        try:
            self._deltas.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(self._deltas / name, content)
            _tidy(self._deltas)
        except OSError as error:
            log.warning("difference of weights not kept, it is made anew each time: %s", error)

    def _look_again(self) -> None:
        """Read the manifests of releases that came or went since."""
        names = frozenset(path.parent.name for path in self._releases.glob(f"[0-9a-f]*/{BUNDLE}"))
        if names != self._seen:
            self._paths, self._weights = {}, {}
            self._seen = names
            for directory in (*self._shipped, *(self._releases / name / BUNDLE for name in sorted(names))):
                for sha256, path in self._files_of(directory):
                    self._paths[sha256] = path
        # A policy's file is named by its digest.
        self._paths.update((path.name, path) for path in self._policies.glob("[0-9a-f]*"))

    def _files_of(self, bundle: Path) -> Iterator[tuple[str, Path]]:
        for part in (GRAPH, WEIGHTS):
            path = bundle / part / MANIFEST
            try:
                content = path.read_bytes()
                files = msgspec.json.decode(content, type=_Files).files
            except OSError as error:
                log.warning("release cannot be served now path=%s reason=%s", path, error)
                # Too many open files, a disk that hangs: the next who asks may have better luck.
                self._seen = None
                continue
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                log.warning("release cannot be served path=%s reason=%s", path, error)
                continue
            digest = hashlib.sha256(content).hexdigest()
            yield digest, path
            for name, entry in files.items():
                if Path(name).name == name:
                    yield entry.sha256, bundle / part / name
            if part == WEIGHTS:
                self._weights[digest] = bundle / part / WEIGHTS_BLOB


def prune_deltas(state_dir: Path) -> None:
    """Remove the differences that lead to releases that are gone.

    Raises:
        OSError: as it came.
    """
    _tidy(state_dir / DELTAS)
    known = ReleaseBlobs(state_dir).weights_parts()
    for path in (state_dir / DELTAS).glob("[0-9a-f]*"):
        if path.name.partition(".")[2] not in known:
            path.unlink(missing_ok=True)


def _tidy(deltas: Path) -> None:
    """Remove the differences that are too many or too large together, and what was never finished."""
    # By the clock of the files; the latest first.
    kept = sorted(((_asked_at(path), path) for path in deltas.glob("[0-9a-f]*")), reverse=True)
    size_bytes = 0
    for index, (_, path) in enumerate(kept):
        size_bytes += _size_of(path)
        if index >= MAX_DELTAS or (index and size_bytes > MAX_DELTA_BYTES):
            path.unlink(missing_ok=True)
    for path in deltas.glob(".*.tmp"):
        if _asked_at(path) < time.time() - MAX_WRITING_S:
            path.unlink(missing_ok=True)


def _make_delta(before: Path, after: Path) -> bytes | None:
    """Empty where the whole blob is as short; None where it could not be made now."""
    try:
        held, wanted = before.read_bytes(), after.read_bytes()
        made = encode_weights(held, wanted)
    except OSError as error:
        log.warning("no difference of weights from=%s to=%s reason=%s", before, after, error)
        return None
    except ProtocolError as error:
        log.warning("no difference of weights from=%s to=%s reason=%s", before, after, error)
        return b""
    return made if len(made) < len(wanted) else b""


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _asked_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
