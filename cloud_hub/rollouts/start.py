"""Whether a rollout may be started, and the row that begins it. Functions of the connection.

The command line and REST both come through here; neither needs the running hub's memory.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec.structs import replace
from sqlalchemy import Connection

from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.core.rollout.findings import HealthRules
from cloud_hub.core.rollout.judge import JudgeRules
from cloud_hub.core.rollout.rollout import begin, check_start, rules_of
from cloud_hub.core.rollout.state import SCENE_S, RolloutLimits, RolloutState
from cloud_hub.core.rollout.waves import DEFAULT_WAVES, Wave
from cloud_hub.errors import RolloutError
from cloud_hub.store.acts import note_act
from cloud_hub.store.releases import take_release
from cloud_hub.store.rollouts import (
    devices_of_fleet,
    insert_rollout,
    live_releases,
    mark_release,
    open_rollouts,
    rollouts_done,
)

IsSigned = Callable[[str, str, str], bool]
"""Of a model, the digests of a graph and of a weights part: whether boards would take them."""


def start_rollout(
    connection: Connection,
    release: int,
    *,
    by: str,
    now_ms: int,
    is_signed: IsSigned,
    model: str | None = None,
    waves: Sequence[Wave] = DEFAULT_WAVES,
    group: Mapping[str, str] | None = None,
    limits: RolloutLimits | None = None,
    health: HealthRules | None = None,
    scene_s: int = SCENE_S,
    rules: JudgeRules | None = None,
    same_canaries: bool = False,
) -> str:
    """Begin a rollout of a release to the boards with a group's labels; its id.

    A running hub takes it up within a second or two. With `same_canaries` the same boards are first in
    every rollout of the model. A release that was halted begins anew.

    Raises:
        NotFoundError: when there is no such release.
        RolloutError: when it may not go out, the waves contradict themselves, or another rollout is in
            the way.
    """
    row = take_release(connection, release)
    if model is not None and row["model"] != model:
        raise RolloutError(f"release {release} is one of model {row['model']!r}, not of {model!r}")
    if row["state"] == ReleaseState.RETIRED.value:
        raise RolloutError(f"release {release} is retired for good; make a new one")
    if row["state"] == ReleaseState.COLLECTED.value:
        raise RolloutError(
            f"release {release} was collected, its files are gone; `cloud-hub release add` its bundle again"
        )
    if not is_signed(row["model"], row["graph"].hex(), row["weights"].hex()):
        raise RolloutError(
            f"release {release} is not signed, so no board would take it; `cloud-hub release sign {release}`"
        )
    group = dict(group or {})
    others = [each.state for each in open_rollouts(connection)]
    if problem := check_start(others, row["model"], group):
        raise RolloutError(problem)
    fleet = devices_of_fleet(connection, row["model"])
    common = common_release(connection, row["model"], group, release)
    try:
        state, _ = begin(
            secrets.token_hex(6),
            model=row["model"],
            release=str(release),
            previous=common or _live_release(connection, row["model"], release),
            is_common=common is not None,
            waves=waves,
            fleet=fleet,
            now_s=now_ms / 1000,
            by=by,
            group=group,
            salt=row["model"] if same_canaries else None,
            limits=limits,
            health=health,
            scene_s=scene_s,
            came_from=_came_from(others, row["model"], str(release)),
        )
        check_rules(state, rules or JudgeRules())
    except ValueError as error:
        raise RolloutError(str(error)) from error
    if group and not state.members:
        wanted = ", ".join(f"{key}={value}" for key, value in group.items())
        raise RolloutError(f"no device has the labels {wanted}; `cloud-hub rollout label NAME {wanted}`")
    mark_release(connection, release, ReleaseState.DRAFT)
    # What it asks for first is what its state implies: the hub carries it out on taking it up.
    insert_rollout(connection, state, created_by=by, now_ms=now_ms)
    note_act(
        connection,
        by,
        "rollout.start",
        f"rollout {state.id}",
        f"release {release} of {state.model} for {len(state.members)} devices",
        now_ms=now_ms,
    )
    return state.id


def common_release(connection: Connection, model: str, group: Mapping[str, str], release: int) -> str | None:
    """What was last rolled out to all boards of a group, and is live still."""
    live = [number for number in live_releases(connection, model) if number != release]
    for row in rollouts_done(connection, live):
        if all(group.get(key) == value for key, value in row.state.group.items()):
            return row.state.release
    return None


def _live_release(connection: Connection, model: str, release: int) -> str | None:
    return next((str(number) for number in live_releases(connection, model) if number != release), None)


def _came_from(others: Iterable[RolloutState], model: str, release: str) -> dict[str, str]:
    """What devices ran before a release that another rollout has brought them already."""
    return {
        name: member.before
        for other in others
        if (other.model, other.release) == (model, release)
        for name, member in (*other.members.items(), *other.left.items())
        if member.before
    }


def check_rules(state: RolloutState, rules: JudgeRules) -> None:
    """See that the judge can work in every wave.

    Raises:
        ValueError: naming the wave.
    """
    for index, wave in enumerate(state.waves):
        try:
            rules_of(replace(state, wave=index), rules)
        except ValueError as error:
            raise ValueError(f"waves[{index}] {wave.name!r}: {error}") from error
