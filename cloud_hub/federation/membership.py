"""Who of the fleet may be asked in a series' rounds, and who was. Functions of the connection."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection

from cloud_hub.core.federation.cohort import Eligible
from cloud_hub.federation.settings import SeriesSettings
from cloud_hub.store.members import (
    FleetDevice,
    Member,
    MemberState,
    bundles_of_graph,
    fleet_of,
    note_asked,
    save_members,
)

MAX_ABSENCE_MS: Final = 14 * 86_400_000
"""A board that was not seen for so long is not asked."""


@dataclass(slots=True)
class Facts:
    """What is known of a series; base and window move with its rounds."""

    id: int
    model: str
    bundle_id: str
    graph: bytes
    settings: SeriesSettings
    first_base: bytes
    base: bytes
    window_start: int


def ask(connection: Connection, model: str, round_id: str, number: int, devices: Collection[str]) -> None:
    """Make devices members of a round that is offered to them."""
    save_members(connection, round_id, [Member(device, MemberState.ASKED) for device in devices])
    note_asked(connection, model, devices, number)


def eligible_of(
    connection: Connection, facts: Facts, names: Collection[str] | None, now_ms: int
) -> list[Eligible]:
    """The fleet, or those of these names, as the rules for cohorts see it."""
    bundles = {facts.bundle_id, *bundles_of_graph(connection, facts.graph)}

    def eligible(device: FleetDevice) -> Eligible:
        runs_it = device.bundles.get(facts.model) in bundles
        is_there = device.online or device.last_seen_ms > now_ms - MAX_ABSENCE_MS
        return Eligible(device.name, device.online, runs_it and is_there, device.standing, device.last_round)

    return [eligible(device) for device in fleet_of(connection, facts.model, names)]
