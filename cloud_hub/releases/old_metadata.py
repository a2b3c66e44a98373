"""Removes signed metadata that no board can come to any more. Nothing is signed here.

A board reads the timestamp first and then the versions that it leads to, within minutes; so versions go once
another has been there for a day. Those of `root` stay: a board that slept for years walks through them all.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Final

from tuf.api.metadata import Snapshot, Targets

from cloud_hub.releases.layout import BLOBS
from cloud_hub.releases.metadata import MetadataFiles, parse, version_of
from edge_cascade.signed_releases import ONLINE_ROLE, POLICY_TARGET

KEPT_S: Final = 86400.0


def remove_old_metadata(directory: Path, *, now_s: float) -> int:
    """Remove old versions of all roles but `root`, and policies that no other names; how many files.

    Raises:
        SigningError: when what stays cannot be read.
        OSError: as it came.
    """
    files = MetadataFiles(directory)
    with files.held():
        gone = [
            path
            for role in (Targets.type, ONLINE_ROLE, Snapshot.type)
            for path in _replaced(files.metadata_directory, role, before_s=now_s - KEPT_S)
        ]
        for path in gone:
            path.unlink(missing_ok=True)
        # Whoever was killed while publishing a policy writes it again.
        named = _policies_named(files)
        unnamed = [path for path in (directory / BLOBS).glob("[0-9a-f]*") if path.name not in named]
        for path in unnamed:
            path.unlink(missing_ok=True)
    return len(gone) + len(unnamed)


def _replaced(metadata: Path, role: str, *, before_s: float) -> list[Path]:
    """Versions whose next one was written before then."""
    versions = sorted(metadata.glob(f"*.{role}.json"), key=lambda path: version_of(path.name))
    return [old for old, new in pairwise(versions) if new.stat().st_mtime < before_s]


def _policies_named(files: MetadataFiles) -> set[str]:
    named = set()
    for path in files.metadata_directory.glob(f"*.{Targets.type}.json"):
        targets = parse(files.read(path.name), Targets, Targets.type, where=str(path)).signed.targets
        if POLICY_TARGET in targets:
            named.add(targets[POLICY_TARGET].hashes["sha256"])
    return named
