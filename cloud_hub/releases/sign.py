"""Signs a release of the registry, and writes down who did."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.numpy import load

from cloud_hub.errors import SigningError
from cloud_hub.registry import release_directory
from cloud_hub.releases.repository import SignedRepository
from cloud_hub.store.acts import note_act
from cloud_hub.store.database import Database
from cloud_hub.store.releases import ReleaseState, get_release
from edge_cascade.bounds import bounds_problems, norms_around
from edge_cascade.bundle import GRAPH, MANIFEST, WEIGHTS, WEIGHTS_BLOB, load_bundle
from edge_cascade.errors import BundleError

if TYPE_CHECKING:
    from securesystemslib.signer import Signer


def sign_release(
    database: Database,
    state_dir: Path,
    repository: SignedRepository,
    release_id: int,
    *,
    keys: Sequence[Signer],
    by: str,
    now: datetime,
) -> None:
    """Sign a release with the offline `keys`, or its weights with the online one where there are none.

    Raises:
        NotFoundError: when there is no such release.
        SigningError: when it is halted or retired, damaged, out of bounds, or the keys do not do.
    """
    row = database.run(lambda c: get_release(c, release_id))
    if row["state"] in {ReleaseState.HALTED, ReleaseState.RETIRED}:
        raise SigningError(
            f"release {release_id} is {row['state']}: it was taken back, boards must not take it"
        )
    directory = release_directory(state_dir, row["bundle"].hex())
    try:
        bundle = load_bundle(directory)
        graph, weights = ((directory / part / MANIFEST).read_bytes() for part in (GRAPH, WEIGHTS))
        tensors = load((directory / WEIGHTS / WEIGHTS_BLOB).read_bytes())
    except (BundleError, OSError) as error:
        raise SigningError(f"release {release_id}: {error}") from error
    if keys:
        # Where the graph says how far weights may move, its own word holds.
        norms = norms_around(tensors) if bundle.graph.bounds.norms is None else None
        repository.sign_offline(
            row["model"], release_id, graph=graph, weights=weights, keys=keys, now=now, norms=norms
        )
    else:
        problems = bounds_problems(
            bundle.graph,
            bundle.weights,
            tensors,
            repository.norms_of(row["model"], bundle.graph_sha256),
        )
        if problems:
            raise SigningError(
                f"release {release_id} leaves the bounds of its graph: {'; '.join(problems)}; "
                "the offline keys may sign it (--key)"
            )
        repository.sign_weights_online(
            row["model"], release_id, weights=weights, graph_sha256=bundle.graph_sha256, now=now
        )
    detail = "offline" if keys else "online"
    now_ms = round(now.timestamp() * 1000)
    database.run(lambda c: note_act(c, by, "release.sign", f"release {release_id}", detail, now_ms=now_ms))
