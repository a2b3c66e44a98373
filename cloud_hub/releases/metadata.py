"""Metadata of The Update Framework as files: the newest version of each role, read and written durably.

One process signs at a time (flock). What is signed, by whom and in which order: see `repository`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from securesystemslib.exceptions import StorageError
from tuf.api.exceptions import DownloadError, RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from cloud_hub.errors import SigningError
from cloud_hub.releases.layout import METADATA
from edge_cascade.durable import write_durably

TIMESTAMP: Final = "timestamp.json"

SignedT = TypeVar("SignedT", Root, Targets, Snapshot, Timestamp)


class MetadataFiles:
    """The metadata below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metadata_directory = directory / METADATA

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone with the directory.

        Raises:
            SigningError: when it cannot be made or locked.
        """
        try:
            self.metadata_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SigningError(f"{error.filename}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def load(self, kind: type[SignedT], role: str) -> Metadata[SignedT]:
        """The newest version of a role.

        Raises:
            SigningError: when there is none, or none that can be read.
        """
        name = TIMESTAMP if role == Timestamp.type else self.name_of(role)
        return parse(self.read(name), kind, role, where=str(self.metadata_directory / name))

    def name_of(self, role: str) -> str:
        """The file of a role's newest version.

        Raises:
            SigningError: when there is none.
        """
        version = self.newest(role)
        if not version:
            raise SigningError(f"{self.directory}: no signed metadata; begin with `cloud-hub keys init`")
        return f"{version}.{role}.json"

    def newest(self, role: str) -> int:
        """A role's newest version; 0 when there is none."""
        names = (path.name for path in self.metadata_directory.glob(f"*.{role}.json"))
        return max((version_of(name) for name in names), default=0)

    def read(self, name: str) -> bytes:
        """A file of metadata.

        Raises:
            SigningError: when it cannot be read.
        """
        path = self.metadata_directory / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise SigningError(f"{path}: {error.strerror or error}") from error

    def write_metadata(self, name: str, content: bytes) -> None:
        """Write a file of metadata.

        Raises:
            SigningError: when the disk does not take it.
        """
        self.write_file(self.metadata_directory / name, content)

    def write_file(self, path: Path, content: bytes) -> None:
        """Write any file of the repository.

        Raises:
            SigningError: when the disk does not take it.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(path, content)
        except OSError as error:
            raise SigningError(f"{path}: {error.strerror or error}") from error


def parse(content: bytes, kind: type[SignedT], role: str, *, where: str) -> Metadata[SignedT]:
    """One role's metadata.

    Raises:
        SigningError: when they cannot be read, or are another role's.
    """
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(content)
    except (RepositoryError, DownloadError, StorageError, ValueError, KeyError) as error:
        raise SigningError(f"{where}: {error}") from error
    if not isinstance(metadata.signed, kind):
        raise SigningError(f"{where}: is {metadata.signed.type}, not {role}")
    return metadata


def version_of(name: str) -> int:
    """The version that a file's name begins with, else 0."""
    version = name.partition(".")[0]
    return int(version) if version.isdecimal() else 0


def sha256(content: bytes) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()
