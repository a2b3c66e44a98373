"""What points at releases, as functions of the connection."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, func, select

from cloud_hub.core.collecting import Held, Uses
from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.store import schema
from cloud_hub.store.rollouts import open_rollouts
from edge_cascade.messages import SHIPPED

_releases = schema.releases
_reports = schema.swap_reports


class _Running(msgspec.Struct, frozen=True):
    bundle: str = ""


class _Lineage(msgspec.Struct, frozen=True):
    parent: str = ""


def registered(connection: Connection) -> list[Held]:
    """Every release. Until the end of the transaction no rollout of any of them begins elsewhere."""
    return [
        Held(
            row.id,
            row.model,
            row.bundle.hex(),
            ReleaseState(row.state),
            row.created_at_ms / 1000,
            _parent_of(row.lineage),
        )
        for row in connection.execute(select(_releases).order_by(_releases.c.id).with_for_update())
    ]


def weights_of_nothing(connection: Connection) -> list[tuple[str, str, str]]:
    """Model, bundle and weights part of what is collected or retired, where no other release has the part."""
    without = (ReleaseState.COLLECTED.value, ReleaseState.RETIRED.value)
    needed = select(_releases.c.weights).where(_releases.c.state.not_in(without))
    query = select(_releases).where(_releases.c.state.in_(without), _releases.c.weights.not_in(needed))
    return [(row.model, row.bundle.hex(), row.weights.hex()) for row in connection.execute(query)]


def uses_of(connection: Connection) -> Uses:
    """What boards should run, what they last said that they run, and where open rollouts may lead."""
    desired = connection.execute(select(schema.desired.c.release).distinct()).scalars()
    names = {name for name in desired if name != SHIPPED}
    for row in open_rollouts(connection):
        names |= {row.state.release} | row.state.ways_back
    bundles = {
        running.bundle
        for models in connection.execute(select(schema.devices.c.models).distinct()).scalars()
        for running in msgspec.json.decode(models, type=list[_Running])
    }
    newest = select(func.max(_reports.c.id)).group_by(_reports.c.device, _reports.c.model)
    serving = connection.execute(select(_reports.c.serving).where(_reports.c.id.in_(newest)).distinct())
    bundles |= {bundle.hex() for bundle in serving.scalars()}
    return Uses(frozenset(int(name) for name in names - {SHIPPED}), frozenset(bundles - {""}))


def _parent_of(lineage: str) -> str:
    try:
        return msgspec.json.decode(lineage, type=_Lineage).parent
    except msgspec.MsgspecError:
        return ""
