"""What people order of a rollout: the row that a running hub takes. Functions of the connection."""

from __future__ import annotations

from typing import Final, Literal

from sqlalchemy import Connection

from cloud_hub.core.rollout.state import Phase, RolloutState
from cloud_hub.errors import RolloutError
from cloud_hub.store.acts import note_act
from cloud_hub.store.rollouts import get_rollout, insert_order

OrderKind = Literal["approve", "pause", "resume", "halt", "kill"]

MAX_REASON: Final = 500


def order(
    connection: Connection,
    rollout_id: str,
    kind: OrderKind,
    *,
    by: str,
    now_ms: int,
    reason: str = "",
    wave: int | None = None,
) -> None:
    """Order something of a rollout; a running hub takes it within a second or two.

    `wave` is the index of the wave to approve, by default the next one.

    Raises:
        NotFoundError: when there is no such rollout.
        RolloutError: when it cannot do so any more.
    """
    state = get_rollout(connection, rollout_id).state
    _check(state, kind)
    detail = reason = reason.strip()[:MAX_REASON] or f"{kind} by {by}"
    if kind == "approve":
        wave = state.wave + 1 if wave is None else wave
        if not state.wave < wave < len(state.waves):
            raise RolloutError(
                f"rollout {state.id}: wave {wave} cannot be approved; those to come are "
                f"{', '.join(map(str, range(state.wave + 1, len(state.waves)))) or 'none'}"
            )
        detail = f"wave {state.waves[wave].name!r}"
    insert_order(
        connection,
        rollout_id,
        kind,
        wave=wave if kind == "approve" else None,
        reason=reason,
        ordered_by=by,
        now_ms=now_ms,
    )
    note_act(connection, by, f"rollout.{kind}", f"rollout {rollout_id}", detail, now_ms=now_ms)


def _check(state: RolloutState, kind: OrderKind) -> None:
    if state.is_closed:
        raise RolloutError(
            f"rollout {state.id} is closed: another one of {state.model!r} has its devices now. To take them "
            f"off release {state.release} halt that one and `cloud-hub release promote` an older release"
        )
    if kind == "kill":
        if state.is_killed:
            raise RolloutError(f"rollout {state.id} is killed already")
    elif not state.is_widening:
        done = "`cloud-hub rollout kill` takes it back" if state.phase is Phase.DONE else "start another one"
        raise RolloutError(f"rollout {state.id} is {state.phase}; {done}")
    elif kind == "pause" and state.phase is Phase.PAUSED:
        raise RolloutError(f"rollout {state.id} is paused already")
    elif kind == "resume" and state.phase is Phase.RUNNING:
        raise RolloutError(f"rollout {state.id} is not paused")
