"""Signs, bars and revokes releases of the registry, and writes down who did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.numpy import load
from sqlalchemy import RowMapping

from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.errors import SigningError
from cloud_hub.registry import release_directory
from cloud_hub.releases.repository import SignedRepository
from cloud_hub.store.acts import note_act
from cloud_hub.store.database import Database
from cloud_hub.store.releases import get_release
from edge_cascade.bounds import Tensors, bounds_problems, norms_around
from edge_cascade.bundle import GRAPH, MANIFEST, WEIGHTS, WEIGHTS_BLOB, Bundle, load_bundle
from edge_cascade.errors import BundleError
from edge_cascade.signed_releases import Policy, graph_target, weights_target

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

    from cloud_hub.releases.pending import Progress


@dataclass(frozen=True, slots=True, eq=False)
class _Content:
    """A release as it is to be signed; `graph` and `weights` are the manifests."""

    model: str
    bundle: Bundle
    graph: bytes
    weights: bytes
    tensors: Tensors


@dataclass(frozen=True, slots=True, eq=False)
class ReleaseSigner:
    """Somebody at the registry's releases, at one time; what is done is written down."""

    database: Database
    state_dir: Path
    repository: SignedRepository
    by: str
    now: datetime

    def sign(self, release_id: int, keys: Sequence[Signer]) -> Progress:
        """Sign a release with offline keys; how many are missing still.

        Raises:
            NotFoundError: when there is no such release.
            SigningError: when it is halted or retired, or damaged; see `OfflineChanges.change`.
        """
        content = self._read(release_id)
        progress = self.repository.sign_offline(
            content.model,
            release_id,
            graph=content.graph,
            weights=content.weights,
            keys=keys,
            now=self.now,
            # Where the graph says how far weights may move, its own word holds.
            norms=norms_around(content.tensors) if content.bundle.graph.bounds.norms is None else None,
        )
        self._note("release.sign", release_id, f"offline, {progress.summary()}")
        return progress

    def sign_online(self, release_id: int) -> None:
        """Sign a release's weights with the online key.

        Raises:
            NotFoundError: when there is no such release.
            SigningError: when it is halted or retired, damaged, out of bounds, or its graph is not signed.
        """
        content = self._read(release_id)
        bundle = content.bundle
        problems = bounds_problems(
            bundle.graph,
            bundle.weights,
            content.tensors,
            self.repository.norms_of(content.model, bundle.graph_sha256),
        )
        if problems:
            raise SigningError(
                f"release {release_id} leaves the bounds of its graph: {'; '.join(problems)}; "
                "the offline keys may sign it (--key)"
            )
        self.repository.sign_weights_online(
            content.model, release_id, weights=content.weights, graph_sha256=bundle.graph_sha256, now=self.now
        )
        self._note("release.sign", release_id, "online")

    def set_floor(self, release_id: int, keys: Sequence[Signer]) -> Progress:
        """Have boards refuse releases of the same model that are older than this one.

        Raises:
            NotFoundError: when there is no such release.
            SigningError: see `OfflineChanges.change`.
        """
        model = self._row(release_id)["model"]
        floors = self.repository.policy().security_floor | {model: release_id}
        progress = self.repository.set_policy(Policy(floors), keys=keys, now=self.now)
        self._note("release.floor", release_id, f"{model}, {progress.summary()}")
        return progress

    def revoke(self, release_id: int, keys: Sequence[Signer], *, with_graph: bool, why: str) -> Progress:
        """Take the signature from a release's weights, and from its graph where that is asked for.

        Raises:
            NotFoundError: when there is no such release.
            SigningError: when it is not signed; see `OfflineChanges.change`.
        """
        row = self._row(release_id)
        names = [weights_target(row["model"], row["weights"].hex())]
        if with_graph:
            names.append(graph_target(row["model"], row["graph"].hex()))
        progress = self.repository.revoke(str(release_id), names, keys=keys, now=self.now)
        self._note("release.revoke", release_id, f"{why} ({progress.summary()})")
        return progress

    def _read(self, release_id: int) -> _Content:
        row = self._row(release_id)
        if row["state"] in {ReleaseState.HALTED, ReleaseState.RETIRED}:
            raise SigningError(
                f"release {release_id} is {row['state']}: it was taken back, boards must not take it"
            )
        directory = release_directory(self.state_dir, row["bundle"].hex())
        try:
            bundle = load_bundle(directory)
            graph, weights = ((directory / part / MANIFEST).read_bytes() for part in (GRAPH, WEIGHTS))
            tensors = load((directory / WEIGHTS / WEIGHTS_BLOB).read_bytes())
        except (BundleError, OSError) as error:
            raise SigningError(f"release {release_id}: {error}") from error
        return _Content(row["model"], bundle, graph, weights, tensors)

    def _row(self, release_id: int) -> RowMapping:
        return self.database.run(lambda c: get_release(c, release_id))

    def _note(self, act: str, release_id: int, detail: str) -> None:
        now_ms = round(self.now.timestamp() * 1000)
        self.database.run(lambda c: note_act(c, self.by, act, f"release {release_id}", detail, now_ms=now_ms))
