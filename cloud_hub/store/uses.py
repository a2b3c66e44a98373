"""What points at releases, as functions of the connection."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, select

from cloud_hub.core.collecting import Held, Uses
from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.store import schema
from cloud_hub.store.rollouts import open_rollouts
from edge_cascade.messages import SHIPPED

_releases = schema.releases


class _Running(msgspec.Struct, frozen=True):
    bundle: str = ""


def registered(connection: Connection) -> list[Held]:
    """Every release."""
    return [
        Held(row.id, row.model, row.bundle.hex(), ReleaseState(row.state), row.created_at_ms / 1000)
        for row in connection.execute(select(_releases))
    ]


def uses_of(connection: Connection) -> Uses:
    """What boards should run and say that they run, and what rollouts that are not closed may lead to."""
    desired = connection.execute(select(schema.desired.c.release).distinct()).scalars()
    names = {name for name in desired if name != SHIPPED}
    for row in open_rollouts(connection):
        state = row.state
        names |= {state.release, state.previous or ""} | {each.before for each in state.members.values()}
    bundles = {
        running.bundle
        for models in connection.execute(select(schema.devices.c.models).distinct()).scalars()
        for running in msgspec.json.decode(models, type=list[_Running])
    }
    return Uses(frozenset(int(name) for name in names - {"", SHIPPED}), frozenset(bundles - {""}))
