"""What every board should run, whatever became of the broker's messages. Functions of the connection."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, Select, func, select

from cloud_hub.core.rollout.state import SCENE_S
from cloud_hub.store import schema
from edge_cascade.messages import SHIPPED, DesiredModel, DesiredState

_desired = schema.desired
_releases = schema.releases

_NOTHING: Final = bytes(32)

_DEVICES_A_QUERY: Final = 500
"""A statement has so many variables at most (SQLite: 32,766)."""

_CHANGES: Final = ("release", "audit_ppm", "shadow_ppm", "scene_s", "revision")


def desire(
    connection: Connection, model: str, wanted: Mapping[str, Mapping[str, str | int]]
) -> frozenset[str]:
    """Change what boards should do with a model: columns by device. The devices for which that is news.

    A row that is new begins with what the board was shipped with.
    """
    revisions: dict[str, int] = {}
    held: dict[str, dict[str, Any]] = {}
    names = sorted(wanted)
    for start in range(0, len(names), _DEVICES_A_QUERY):
        asked = names[start : start + _DEVICES_A_QUERY]
        for row in connection.execute(select(_desired).where(_desired.c.device.in_(asked))).mappings():
            revisions[row["device"]] = max(revisions.get(row["device"], 0), row["revision"])
            if row["model"] == model:
                held[row["device"]] = dict(row)
    rows = []
    for device, changes in sorted(wanted.items()):
        before = held.get(device)
        fresh = {"release": SHIPPED, "audit_ppm": 0, "shadow_ppm": 0, "scene_s": SCENE_S}
        after: dict[str, Any] = {**fresh, **(before or {}), "device": device, "model": model, **changes}
        if after != before:
            rows.append({**after, "revision": revisions.get(device, 0) + 1})
    schema.upsert(connection, _desired, rows, update=_CHANGES)
    return frozenset(str(row["device"]) for row in rows)


def desired_devices(connection: Connection) -> list[str]:
    """Every board of which anything is desired."""
    return list(connection.execute(select(_desired.c.device).distinct()).scalars())


def boards_to_run(connection: Connection, model: str, release: int) -> int:
    """How many boards are to run a release, those whose account was revoked apart."""
    query = select(func.count()).where(
        _desired.c.model == model,
        _desired.c.release == str(release),
        _desired.c.device.not_in(revoked_devices()),
    )
    return connection.execute(query).scalar_one()


def revoked_devices() -> Select[tuple[str]]:
    """The names of boards that will not come back, as a query."""
    accounts = schema.accounts
    return select(accounts.c.name).where(accounts.c.role == "device", accounts.c.revoked_at_ms.is_not(None))


def desired_states(connection: Connection, devices: Collection[str]) -> dict[str, DesiredState]:
    """What each of these boards should become; nothing for those of which nothing is desired.

    How large a release is on a board's disk is left at 0. A release that is not in the registry any more
    leaves its model out: the board goes on with what it runs.
    """
    query = select(_desired).where(_desired.c.device.in_(sorted(devices)))
    query = query.order_by(_desired.c.device, _desired.c.model)
    rows = connection.execute(query).mappings().all()
    numbers = {int(row["release"]) for row in rows if row["release"] != SHIPPED}
    found = connection.execute(select(_releases).where(_releases.c.id.in_(sorted(numbers)))).mappings()
    releases = {row["id"]: row for row in found}
    states: dict[str, DesiredState] = {}
    for row in rows:
        state = states.setdefault(row["device"], DesiredState(row["device"], 0, []))
        models = list(state.models)
        if row["release"] == SHIPPED:
            models.append(_model_of(row, _NOTHING, _NOTHING, _NOTHING))
        elif (release := releases.get(int(row["release"]))) is not None:
            models.append(_model_of(row, release["bundle"], release["graph"], release["weights"]))
        states[row["device"]] = DesiredState(row["device"], max(state.revision, row["revision"]), models)
    return states


def _model_of(row: RowMapping, bundle: bytes, graph: bytes, weights: bytes) -> DesiredModel:
    return DesiredModel(
        model=row["model"],
        release=row["release"],
        bundle=bundle,
        graph=graph,
        weights=weights,
        audit_ppm=row["audit_ppm"],
        shadow_ppm=row["shadow_ppm"],
        scene_s=row["scene_s"],
    )
