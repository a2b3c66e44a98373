"""Releases, and how far the holdout of a model has been looked at, as functions of the connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, select, update

from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.errors import NotFoundError
from cloud_hub.store import schema

_releases = schema.releases
_marks = schema.holdout_marks


def insert_release(connection: Connection, values: Mapping[str, Any]) -> int:
    """Keep a release and return its id. The same bundle has one release, the same series too.

    One that was collected is a draft again, and as young as a new one.
    """
    schema.insert_if_absent(connection, _releases, [values])
    query = select(_releases.c.id).where(_releases.c.bundle == values["bundle"])
    found = connection.execute(query).scalar()
    if found is None:
        found = connection.execute(
            select(_releases.c.id).where(_releases.c.series == values["series"])
        ).scalar_one()
    connection.execute(
        update(_releases)
        .where(_releases.c.bundle == values["bundle"], _releases.c.state == ReleaseState.COLLECTED.value)
        .values(
            state=ReleaseState.DRAFT.value,
            created_at_ms=values["created_at_ms"],
            created_by=values["created_by"],
        )
    )
    return int(found)


def list_releases(
    connection: Connection, *, model: str | None = None, before: int | None = None, limit: int | None = None
) -> Sequence[RowMapping]:
    """Releases, the newest first."""
    query = select(_releases).order_by(_releases.c.id.desc()).limit(limit)
    if model is not None:
        query = query.where(_releases.c.model == model)
    if before is not None:
        query = query.where(_releases.c.id < before)
    return connection.execute(query).mappings().all()


def get_release(connection: Connection, release_id: int) -> RowMapping:
    """One release.

    Raises:
        NotFoundError: when there is none of this id.
    """
    row = connection.execute(select(_releases).where(_releases.c.id == release_id)).mappings().first()
    if row is None:
        raise NotFoundError(f"there is no release {release_id}; `cloud-hub release list` shows them")
    return row


def take_release(connection: Connection, release_id: int) -> RowMapping:
    """One release: until the end of the transaction nobody else takes one of its model out of service, or
    begins a rollout of any.

    Raises:
        NotFoundError: when there is none of this id.
    """
    model = select(_releases.c.model).where(_releases.c.id == release_id).scalar_subquery()
    # In the order of `uses.registered`: two that lock rows in one order cannot wait for each other.
    query = select(_releases.c.id).where(_releases.c.model == model).order_by(_releases.c.id)
    connection.execute(query.with_for_update())
    return get_release(connection, release_id)


def registered_bundles(connection: Connection) -> set[str]:
    """The bundle ids of all releases, hexadecimal."""
    return {bundle.hex() for bundle in connection.execute(select(_releases.c.bundle)).scalars()}


def release_of_series(connection: Connection, series: int) -> RowMapping | None:
    """The release that a series of rounds has become."""
    return connection.execute(select(_releases).where(_releases.c.series == series)).mappings().first()


def looked_at(connection: Connection, model: str) -> int:
    """The highest id of a holdout case that a guard or a certificate of this model may have looked at."""
    query = select(_marks.c.looked_at).where(_marks.c.model == model)
    return connection.execute(query).scalar() or 0


def look_at_holdout(connection: Connection, model: str, *, upto_id: int) -> None:
    """Note that cases with ids up to this have been looked at. The mark only moves forward."""
    schema.insert_if_absent(connection, _marks, [{"model": model, "looked_at": 0}])
    connection.execute(
        update(_marks).where(_marks.c.model == model, _marks.c.looked_at < upto_id).values(looked_at=upto_id)
    )


def take_fresh(connection: Connection, model: str, *, after_id: int, upto_id: int) -> bool:
    """Note cases above `after_id` as looked at; False if somebody else has looked at some of them."""
    schema.insert_if_absent(connection, _marks, [{"model": model, "looked_at": 0}])
    taken = connection.execute(
        update(_marks)
        .where(_marks.c.model == model, _marks.c.looked_at <= after_id)
        .values(looked_at=upto_id)
    )
    return taken.rowcount == 1
