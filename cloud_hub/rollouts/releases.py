"""What people do with a release by number: give it to all boards, halt, retire it. Of the connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
from sqlalchemy import Connection

from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.core.rollout.findings import HealthRules
from cloud_hub.core.rollout.waves import Wave
from cloud_hub.errors import RolloutError
from cloud_hub.rollouts.orders import order
from cloud_hub.rollouts.start import IsSigned, start_rollout
from cloud_hub.store.acts import note_act
from cloud_hub.store.desired import boards_to_run
from cloud_hub.store.releases import get_release, take_release
from cloud_hub.store.rollouts import RolloutRow, mark_release, open_rollouts

AT_ONCE: Final = (Wave("all", share=1.0, soak_s=0.0, max_drop=None),)


def promote(
    connection: Connection,
    release: int,
    *,
    by: str,
    now_ms: int,
    is_signed: IsSigned,
    group: Mapping[str, str] | None = None,
) -> str:
    """Offer a release to all boards at once; the id of the rollout. It waits for nothing but the boards, and
    halts all the same where too many fail.

    Raises:
        NotFoundError: when there is no such release.
        RolloutError: see `start.start_rollout`.
    """
    return start_rollout(
        connection,
        release,
        by=by,
        now_ms=now_ms,
        is_signed=is_signed,
        waves=AT_ONCE,
        group=group,
        health=msgspec.structs.replace(HealthRules(), required=frozenset()),
    )


def halt_release(connection: Connection, release: int, *, by: str, now_ms: int, reason: str = "") -> str:
    """Halt the rollout that takes a release through the fleet; its id.

    Raises:
        NotFoundError: when there is no such release.
        RolloutError: when no rollout does.
    """
    get_release(connection, release)
    for row in _carrying(connection, release):
        order(connection, row.state.id, "halt", by=by, now_ms=now_ms, reason=reason)
        return row.state.id
    raise RolloutError(
        f"no rollout takes release {release} anywhere now; `cloud-hub rollout kill` takes back what is done"
    )


def retire(connection: Connection, release: int, *, by: str, now_ms: int, reason: str = "") -> None:
    """Take a release out of service for good. Repeating it changes nothing.

    Raises:
        NotFoundError: when there is no such release.
        RolloutError: when boards are to run it, or a rollout takes it to some or may take some back to it.
    """
    row = take_release(connection, release)
    problem = _why_needed(connection, row["model"], release, is_live=row["state"] == ReleaseState.LIVE.value)
    if problem is not None:
        raise RolloutError(f"release {release} {problem}")
    if mark_release(connection, release, ReleaseState.RETIRED):
        note_act(connection, by, "release.retire", f"release {release}", reason.strip()[:500], now_ms=now_ms)


def _carrying(connection: Connection, release: int) -> list[RolloutRow]:
    return [
        row
        for row in open_rollouts(connection)
        if row.state.is_widening and row.state.release == str(release)
    ]


def _why_needed(connection: Connection, model: str, release: int, *, is_live: bool) -> str | None:
    """Why a release must stay in service; None where nothing points at it."""
    for row in _carrying(connection, release):
        return f"is on its way by rollout {row.state.id}; `cloud-hub release halt {release}`"
    boards = boards_to_run(connection, model, release)
    if boards or is_live:
        what = f"what {boards} boards are to run" if boards else "live"
        return f"is {what}: roll another one out first, or take it back with `cloud-hub rollout kill`"
    for row in open_rollouts(connection):
        state = row.state
        if state.is_widening and str(release) in state.ways_back:
            return f"is what rollout {state.id} may take boards back to: let it end, or halt it"
    return None
