"""Whom this board believes: a bundle's parts are looked up in TUF metadata, nothing else vouches for them.

A graph part must be named by the offline role `targets` itself: the online role may name what it likes, no
delegation reaches it. A weights part may be named by either, and whoever asks learns by which: what the
online role alone has signed must keep to the bounds of its graph (see `edge_cascade.signed_releases`).

The security floor binds a weights part by the number of its release; where the online role alone has signed
it, its graph part too. Else a stolen online key could set new numbers on top of an old graph.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from edge_cascade.bundle import MAX_MANIFEST_BYTES
from edge_cascade.durable import write_durably
from edge_cascade.manifest import Norms
from edge_cascade.signed_releases import (
    BLOBS_PATH,
    CUSTOM,
    METADATA_PATH,
    POLICY_TARGET,
    PartNote,
    Policy,
    graph_target,
    read_note,
    weights_target,
)
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import ConfigError, RefusedError
from edge_daemon.ports import Clock
from edge_daemon.releases.http_fetch import DENIED, StatusError, UnreachableError
from edge_daemon.releases.trusted_time import TrustedTime
from edge_daemon.releases.turns import turn

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile

    from edge_daemon.releases.tuf_client import FleetUpdater, Stream

MAX_POLICY_BYTES: Final = 65536
StoppableStream = Callable[[str, threading.Event], Iterator[bytes]]
_TIME_FILE: Final = "trusted_time.json"
_POLICY_FILE: Final = "policy.json"


@dataclass(frozen=True, slots=True)
class Authorised:
    """Both parts are signed. The sizes are those of their manifests; `is_online_only` asks for the bounds.

    `norms` belong to them where the graph's manifest states none.
    """

    release: int
    graph_size: int
    weights_size: int
    is_online_only: bool
    norms: Norms | None = None


class Trust:
    """The metadata of one hub in `directory`, from the trust root in `root`. Threads take turns."""

    def __init__(self, directory: Path, *, root: bytes, stream: StoppableStream, clock: Clock) -> None:
        self._directory = directory
        self._root = root
        self._stream = stream
        self._time = TrustedTime(directory / _TIME_FILE, clock)
        self._gate = threading.Lock()

    def authorise(
        self, model: str, release: str, graph: str, weights: str, stop: threading.Event
    ) -> Authorised:
        """Ask the hub for its newest metadata, and look both parts (digests in hex) up in them.

        Raises:
            RefusedError: DOWNLOAD, naming the attack or who did not sign: tomorrow it may be otherwise.
            UnreachableError: the hub is away.
            StatusError: it does not let this board in, or does not have the policy that it names.
            StoppedError: `stop` was set.
        """
        with turn(self._gate, stop):
            return self._authorise(lambda path: self._stream(path, stop), model, release, graph, weights)

    def authorise_from_disk(self, model: str, release: str, graph: str, weights: str) -> Authorised:
        """The same by the metadata that are on this board already.

        Raises:
            RefusedError: as `authorise`.
        """
        try:
            with turn(self._gate):
                return self._authorise(self._read_back, model, release, graph, weights)
        except (UnreachableError, StatusError) as error:
            raise RefusedError(Failure.DOWNLOAD, f"metadata are not on disk: {error}") from error

    def _authorise(self, stream: Stream, model: str, release: str, graph: str, weights: str) -> Authorised:
        from tuf.api import exceptions

        from edge_daemon.releases.tuf_client import attack_of

        try:
            updater = self._refreshed(stream)
            found = _look_up(updater, model, release, graph, weights)
            policy = self._policy(updater.targets.targets.get(POLICY_TARGET), stream)
        except exceptions.DownloadHTTPError as error:
            if error.status_code in DENIED:
                raise StatusError(METADATA_PATH, error.status_code) from error
            raise UnreachableError(str(error)) from error
        except (exceptions.RepositoryError, exceptions.DownloadError) as error:
            raise RefusedError(Failure.DOWNLOAD, attack_of(error)) from error
        authorised, graph_release = found
        _check_floor(authorised, graph_release, policy.security_floor.get(model, 0), release)
        return authorised

    def _refreshed(self, stream: Stream) -> FleetUpdater:
        from edge_daemon.releases.tuf_client import FleetUpdater

        self._directory.mkdir(parents=True, exist_ok=True)
        updater = FleetUpdater(self._directory, root=self._root, stream=stream, time=self._time)
        updater.refresh()
        self._time.keep()
        return updater

    def _policy(self, target: TargetFile | None, stream: Stream) -> Policy:
        if target is None:
            return Policy()
        path = self._directory / _POLICY_FILE
        digest = target.hashes.get("sha256", "")
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != digest:
            content = _whole(stream, f"{BLOBS_PATH}/{digest}", min(target.length, MAX_POLICY_BYTES))
            if hashlib.sha256(content).hexdigest() != digest:
                raise UnreachableError(f"{POLICY_TARGET}: not the bytes that were signed")
            write_durably(path, content)
        try:
            return msgspec.json.decode(content, type=Policy)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise RefusedError(Failure.DOWNLOAD, f"{POLICY_TARGET} as signed: {error}") from error

    def _read_back(self, path: str) -> Iterator[bytes]:
        """Serve python-tuf from its own files: no newer root, and the timestamp that it has."""
        name = path.removeprefix(f"{METADATA_PATH}/")
        if name != "timestamp.json":
            raise StatusError(path, 404)
        try:
            yield (self._directory / name).read_bytes()
        except OSError as error:
            raise StatusError(path, 404) from error


def read_root(path: Path) -> bytes:
    """The trust root of the configuration.

    Raises:
        ConfigError: in one line.
    """
    from tuf.api.exceptions import RepositoryError

    from edge_daemon.releases.tuf_client import version_of_root

    try:
        content = path.read_bytes()
        version_of_root(content)
    except OSError as error:
        raise ConfigError(f"releases.root: {path}: {error.strerror}") from error
    except RepositoryError as error:
        raise ConfigError(
            f"releases.root: {path}: no root metadata of TUF ({type(error).__name__})"
        ) from error
    return content


def _look_up(
    updater: FleetUpdater, model: str, release: str, graph: str, weights: str
) -> tuple[Authorised, int]:
    offline = updater.targets.targets
    graph_file = offline.get(graph_target(model, graph))
    if graph_file is None:
        online = updater.online_targets()
        by = "the online role alone" if online and graph_target(model, graph) in online.targets else "nobody"
        raise RefusedError(
            Failure.DOWNLOAD,
            f"release {release!r}: its graph {graph[:12]} is signed by {by}; offline keys must",
        )
    name = weights_target(model, weights)
    weights_file = offline.get(name)
    is_online_only = weights_file is None
    if weights_file is None:
        # Walks the delegations: a role that was not given this name is not asked.
        weights_file = updater.get_targetinfo(name)
    if weights_file is None:
        raise RefusedError(
            Failure.DOWNLOAD, f"release {release!r}: its weights {weights[:12]} are signed by nobody"
        )
    graph_note = _note(graph_file, graph)
    note = _note(weights_file, weights)
    if note.graph != graph:
        raise RefusedError(
            Failure.DOWNLOAD,
            f"mix-and-match: weights {weights[:12]} are signed for graph {note.graph[:12]}, not {graph[:12]}",
        )
    authorised = Authorised(
        note.release, graph_file.length, weights_file.length, is_online_only, graph_note.norms
    )
    return authorised, graph_note.release


def _note(target: TargetFile, sha256: str) -> PartNote:
    if target.hashes.get("sha256") != sha256 or not 0 < target.length <= MAX_MANIFEST_BYTES:
        raise RefusedError(
            Failure.DOWNLOAD, f"{target.path}: signed with another digest, or longer than a manifest may be"
        )
    try:
        return read_note(target.unrecognized_fields.get(CUSTOM))
    except msgspec.ValidationError as error:
        raise RefusedError(Failure.DOWNLOAD, f"{target.path}: signed without its note: {error}") from error


def _check_floor(authorised: Authorised, graph_release: int, floor: int, release: str) -> None:
    numbers = {"weights": authorised.release}
    if authorised.is_online_only:
        numbers["graph"] = graph_release
    for part, number in numbers.items():
        if number < floor:
            raise RefusedError(
                Failure.DOWNLOAD,
                f"release {release!r}: its {part} are of release {number}, below the security floor {floor}",
            )


def _whole(stream: Stream, path: str, max_bytes: int) -> bytes:
    content = bytearray()
    for chunk in stream(path):
        content += chunk
        if len(content) > max_bytes:
            raise RefusedError(
                Failure.DOWNLOAD, f"endless data: {path} is longer than the {max_bytes} signed"
            )
    return bytes(content)
