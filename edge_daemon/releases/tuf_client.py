"""python-tuf's client, bent in three places: it fsyncs, it takes our time, and it says which attack it met.

Imported only where releases are wanted: python-tuf and its cryptography cost memory that others need not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tuf.api import exceptions
from tuf.api.metadata import Root, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from edge_cascade.durable import write_durably
from edge_cascade.errors import first_line
from edge_cascade.signed_releases import METADATA_PATH, ONLINE_ROLE
from edge_daemon.releases.http_fetch import StatusError
from edge_daemon.releases.trusted_time import TrustedTime

ISSUED: Final = "issued"
MAX_ROOT_ROTATIONS: Final = 64
MAX_TARGETS_BYTES: Final = 5_000_000

Stream = Callable[[str], Iterator[bytes]]
"""The content of `<path>` under the fleet's address, piece by piece."""

_FREEZE: Final = "freeze"
_EXPIRED: Final = "expired metadata"
_ROLLBACK: Final = "rollback"
_MIX: Final = "mix-and-match"


class FleetFetcher(FetcherInterface):
    """python-tuf's port to the network, over ours. Lengths are cut by `FetcherInterface` itself."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield from self._stream(url)
        except StatusError as error:
            raise exceptions.DownloadHTTPError(str(error), error.status) from error


class FleetUpdater(Updater):
    """One look at the hub's metadata. What it overrides is private in python-tuf: our tests hold it."""

    def __init__(self, directory: Path, *, root: bytes, stream: Stream, time: TrustedTime) -> None:
        self._time = time
        super().__init__(
            str(directory),
            f"{METADATA_PATH}/",
            fetcher=FleetFetcher(stream),
            config=UpdaterConfig(
                max_root_rotations=MAX_ROOT_ROTATIONS, targets_max_length=MAX_TARGETS_BYTES, max_delegations=4
            ),
            bootstrap=root,
        )
        self._take_time()

    @property
    def targets(self) -> Targets:
        """The targets that the offline role names; only after `refresh`."""
        return self._trusted_set.targets

    def online_targets(self) -> Targets | None:
        """The targets that the online role names; None where nothing is delegated to it.

        Raises:
            RepositoryError, DownloadError: as `refresh`.
        """
        delegations = self.targets.delegations
        if delegations is None or delegations.roles is None or ONLINE_ROLE not in delegations.roles:
            return None
        return self._load_targets(ONLINE_ROLE, Targets.type)

    def _persist_file(self, filename: str, data: bytes) -> None:
        # python-tuf renames without fsync: a power cut would leave empty metadata, and forget the versions
        # that a rollback is known by.
        write_durably(Path(filename), data)

    def _load_root(self) -> None:
        super()._load_root()
        self._time.follow_keys(tuple(sorted(self._trusted_set.root.roles[Timestamp.type].keyids)))
        self._take_time()

    def _load_timestamp(self) -> None:
        super()._load_timestamp()
        timestamp = self._trusted_set.timestamp
        if timestamp.version < self._time.version:
            raise exceptions.BadVersionNumberError(
                f"New timestamp version {timestamp.version} must be >= {self._time.version}"
            )
        self._time.advance(_issued(timestamp), timestamp.version)
        # Against this time the timestamp itself, the snapshot and the targets are looked at from here on.
        self._take_time()
        if self._trusted_set.root.is_expired(self._trusted_set.reference_time):
            raise exceptions.ExpiredMetadataError("Final root.json is expired")

    def _take_time(self) -> None:
        # python-tuf takes the wall clock when it is made. A board's clock may have jumped, then everything
        # has expired, or nothing ever does: what counts is the time that was signed, see `trusted_time`.
        self._trusted_set.reference_time = self._time.now()


def _issued(timestamp: Timestamp) -> datetime | None:
    text = timestamp.unrecognized_fields.get(ISSUED)
    if not isinstance(text, str):
        return None
    try:
        issued = datetime.fromisoformat(text)
    except ValueError:
        return None
    issued = issued if issued.tzinfo is not None else issued.replace(tzinfo=UTC)
    # Nothing is made after it has expired: this would only be meant to bar what others sign.
    return min(issued, timestamp.expires)


def attack_of(error: exceptions.RepositoryError | exceptions.DownloadError) -> str:
    """What may have been tried, as the TUF specification 1.0 calls it in section 1.5.2, and the reason."""
    return f"{_name_of(error)}: {first_line(error)}"


def _name_of(error: Exception) -> str:  # noqa: PLR0911 - one return an attack
    text = str(error)
    match error:
        case exceptions.DownloadLengthMismatchError():
            return "endless data"
        case exceptions.ExpiredMetadataError():
            is_online = text.startswith((Timestamp.type, "snapshot"))
            return _FREEZE if is_online else _EXPIRED
        case exceptions.LengthOrHashMismatchError():
            return _MIX
        case exceptions.UnsignedMetadataError():
            return "wrong keys"
        case exceptions.BadVersionNumberError():
            # Two roles that do not belong together, or one older than what was seen: told apart by the text.
            is_mixed = text.startswith("Expected") and ", got" in text and ".json version" not in text
            return _MIX if is_mixed else _ROLLBACK
        case exceptions.RepositoryError() if "New snapshot is missing" in text:
            return _ROLLBACK
        case exceptions.RepositoryError() if "part of snapshot" in text or "does not contain info" in text:
            return _MIX
        case _:
            return "malformed metadata"


def version_of_root(content: bytes) -> int:
    """The version of a root file, to see that it is one.

    Raises:
        RepositoryError: where it is none.
    """
    from tuf.api.metadata import Metadata

    return int(Metadata[Root].from_bytes(content).signed.version)
