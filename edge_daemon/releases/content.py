"""What a fetched part may be, and whether what is on disk is what was signed. Reads files, writes none."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from edge_cascade.bundle import (
    GRAPH,
    MANIFEST,
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    WEIGHTS,
    WEIGHTS_BLOB,
    Bundle,
)
from edge_cascade.errors import BundleError
from edge_cascade.manifest import FileEntry, GraphManifest, Norms, WeightsManifest, check_graph
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError
from edge_daemon.ports import Wanted

MAX_FILES: Final = 64

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS: Mapping[str, type[GraphManifest] | type[WeightsManifest]] = {
    GRAPH: GraphManifest,
    WEIGHTS: WeightsManifest,
}


def check_part(manifest: bytes, part: str) -> Mapping[str, FileEntry]:
    """The files that a signed manifest names: before a single one is asked for or a name becomes a path.

    Raises:
        RefusedError: INTEGRITY.
    """
    try:
        decoded = msgspec.json.decode(manifest, type=_KINDS[part])
        if isinstance(decoded, GraphManifest):
            check_graph(decoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, BundleError) as error:
        raise RefusedError(Failure.INTEGRITY, f"{part}/{MANIFEST}: {error}") from error
    if len(decoded.files) > MAX_FILES:
        raise RefusedError(Failure.INTEGRITY, f"{part}/{MANIFEST}: {len(decoded.files)} files")
    for name, entry in decoded.files.items():
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise RefusedError(Failure.INTEGRITY, f"{part}/{MANIFEST}: {name[:80]!r} is no name of a file")
        if not _SHA256.fullmatch(entry.sha256) or not 0 <= entry.size_bytes <= MAX_FILE_BYTES:
            raise RefusedError(
                Failure.INTEGRITY, f"{part}/{MANIFEST}: {name!r} has no digest or too many bytes"
            )
    return decoded.files


def is_intact(directory: Path, wanted: Wanted) -> bool:
    """Whether every file of a bundle on disk has the digest that was signed for it."""
    for part, sha256 in ((GRAPH, wanted.graph), (WEIGHTS, wanted.weights)):
        manifest = read_regular(directory / part / MANIFEST, MAX_MANIFEST_BYTES)
        if manifest is None or hashlib.sha256(manifest).hexdigest() != sha256:
            return False
        for name, entry in check_part(manifest, part).items():
            if not has_digest(directory / part / name, entry):
                return False
    return True


def has_digest(path: Path, entry: FileEntry) -> bool:
    """Whether this is a regular file of this length and digest; no link is followed."""
    content = read_regular(path, entry.size_bytes)
    return content is not None and hashlib.sha256(content).hexdigest() == entry.sha256


def read_regular(path: Path, max_bytes: int) -> bytes | None:
    """A regular file's content; None where there is none, a link, or more than `max_bytes`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        content = file.read(max_bytes + 1)
    return content if len(content) <= max_bytes else None


def files_of(bundle: Path) -> dict[str, Path]:
    """What a bundle on disk claims to hold, by digest; not checked: whoever uses a file does that."""
    found: dict[str, Path] = {}
    for part, kind in _KINDS.items():
        manifest = read_regular(bundle / part / MANIFEST, MAX_MANIFEST_BYTES)
        if manifest is None:
            continue
        try:
            files = msgspec.json.decode(manifest, type=kind).files
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        found[hashlib.sha256(manifest).hexdigest()] = bundle / part / MANIFEST
        found |= {
            entry.sha256: bundle / part / name for name, entry in files.items() if _FILE_NAME.fullmatch(name)
        }
    return found


def bounds_problems_of(bundle: Bundle, directory: Path, norms: Norms | None) -> list[str]:
    """What the online role was not allowed to sign, by the graph's bounds and those it was signed with."""
    from safetensors.numpy import load

    from edge_cascade.bounds import bounds_problems

    blob = read_regular(directory / WEIGHTS / WEIGHTS_BLOB, MAX_FILE_BYTES)
    if blob is None:
        return [f"{WEIGHTS}/{WEIGHTS_BLOB}: gone since it was loaded"]
    problems: list[str] = bounds_problems(bundle.graph, bundle.weights, load(blob), norms)
    return problems
