"""The files of released bundles by their SHA-256, where they lie: nothing is copied. No HTTP.

What a manifest says of a file was checked when its release was registered; a board checks it again. Paths are
made of names that a manifest holds, never of what somebody asks for.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from cloud_hub.registry import BUNDLE, RELEASES
from cloud_hub.releases.layout import BLOBS
from cloud_hub.rollouts.settings import TUF
from edge_cascade.bundle import GRAPH, MANIFEST, WEIGHTS, WEIGHTS_BLOB
from edge_cascade.errors import ProtocolError
from edge_cascade.manifest import FileEntry
from edge_cascade.weights_delta import encode_weights

log = logging.getLogger(__name__)

MAX_DELTAS: Final = 32
"""Differences that are kept in memory, the newest."""


class _Files(msgspec.Struct, frozen=True):
    files: dict[str, FileEntry]


class ReleaseBlobs:
    """Finds files in a state directory. Any thread may ask."""

    def __init__(self, state_dir: Path) -> None:
        self._releases = state_dir / RELEASES
        self._policies = state_dir / TUF / BLOBS
        self._gate = threading.Lock()
        self._seen: frozenset[str] = frozenset()
        self._paths: dict[str, Path] = {}
        self._weights: dict[str, Path] = {}
        self._deltas: dict[tuple[str, str], bytes] = {}

    def find(self, sha256: str) -> Path | None:
        """Where the file of this digest lies, None where there is none."""
        with self._gate:
            self._look_again()
            return self._paths.get(sha256)

    def delta(self, held: str, wanted: str) -> bytes | None:
        """What leads from one weights part's blob to another's, by the parts' digests; None where nothing
        does, or the whole blob is as short.
        """
        with self._gate:
            self._look_again()
            if (held, wanted) not in self._deltas:
                made = self._make_delta(held, wanted)
                self._deltas = dict([*self._deltas.items(), ((held, wanted), made)][-MAX_DELTAS:])
            return self._deltas[held, wanted] or None

    def _make_delta(self, held: str, wanted: str) -> bytes:
        paths = self._weights.get(held), self._weights.get(wanted)
        if None in paths or held == wanted:
            return b""
        try:
            before, after = (path.read_bytes() for path in paths if path is not None)
            made = encode_weights(before, after)
        except (OSError, ProtocolError) as error:
            log.warning("no difference of weights held=%s wanted=%s reason=%s", held[:12], wanted[:12], error)
            return b""
        return made if len(made) < len(after) else b""

    def _look_again(self) -> None:
        """Read the manifests of releases that came or went since."""
        names = frozenset(path.parent.name for path in self._releases.glob(f"[0-9a-f]*/{BUNDLE}"))
        if names != self._seen:
            self._paths, self._weights = {}, {}
            for name in names:
                for sha256, path in self._files_of(self._releases / name / BUNDLE):
                    self._paths[sha256] = path
            self._seen = names
        # A policy's file is named by its digest.
        self._paths.update((path.name, path) for path in self._policies.glob("[0-9a-f]*"))

    def _files_of(self, bundle: Path) -> Iterator[tuple[str, Path]]:
        for part in (GRAPH, WEIGHTS):
            path = bundle / part / MANIFEST
            try:
                content = path.read_bytes()
                files = msgspec.json.decode(content, type=_Files).files
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                log.warning("release cannot be served path=%s reason=%s", path, error)
                continue
            digest = hashlib.sha256(content).hexdigest()
            yield digest, path
            for name, entry in files.items():
                if Path(name).name == name:
                    yield entry.sha256, bundle / part / name
            if part == WEIGHTS:
                self._weights[digest] = bundle / part / WEIGHTS_BLOB
