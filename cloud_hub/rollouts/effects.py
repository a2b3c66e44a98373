"""What a rollout's effects change in the store, each once or twice. Functions of the connection."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import assert_never

from sqlalchemy import Connection

from cloud_hub.core.rollout.events import (
    AskApproval,
    Effect,
    MarkRelease,
    Offer,
    ReleaseState,
    Sample,
    TakeBack,
)
from cloud_hub.core.rollout.state import RolloutState
from cloud_hub.store.acts import BY_RULES, is_noted, note_act
from cloud_hub.store.desired import desire
from cloud_hub.store.rollouts import mark_release, out_of_service, settle_live
from edge_cascade.messages import SHIPPED

log = logging.getLogger(__name__)


def carry_out(
    connection: Connection, rollout: RolloutState, effects: Iterable[Effect], *, now_ms: int
) -> frozenset[str]:
    """Carry out effects, in their order; the boards that have to be told.

    Of a board only the last word counts, so an effect that a later one undoes leaves no trace.
    """
    wanted: defaultdict[str, dict[str, str | int]] = defaultdict(dict)
    effects = list(effects)
    before = {each.release for each in effects if isinstance(each, TakeBack)} | {rollout.common}
    unfit = out_of_service(connection, {release for release in before if release is not None})
    for effect in effects:
        match effect:
            case Offer(device, release):
                wanted[device]["release"] = release
            case TakeBack(device, release):
                # What went before may have been taken out of service meanwhile.
                fit = (each for each in (release, rollout.common) if each is not None and each not in unfit)
                wanted[device]["release"] = next(fit, SHIPPED)
            case Sample(device, sampling):
                wanted[device]["audit_ppm"] = _ppm(0.0 if sampling is None else sampling.audit_rate)
                wanted[device]["scene_s"] = rollout.scene_s
                wanted[device]["shadow_ppm"] = _ppm(0.0 if sampling is None else sampling.shadow_share)
            case MarkRelease(release, state):
                if mark_release(connection, int(release), state):
                    _note(connection, rollout, int(release), state, now_ms=now_ms)
            case AskApproval(wave):
                _ask(connection, rollout, wave, now_ms=now_ms)
            case _:
                assert_never(effect)
    told = desire(connection, rollout.model, wanted) if wanted else frozenset()
    marked = [each for each in effects if isinstance(each, MarkRelease)]
    if marked:
        is_live = marked[-1].state is ReleaseState.LIVE
        settled = settle_live(connection, rollout.model, int(marked[-1].release) if is_live else None)
        for number, state in settled:
            _note(connection, rollout, number, state, now_ms=now_ms)
    return told


def _note(
    connection: Connection, rollout: RolloutState, number: int, state: ReleaseState, *, now_ms: int
) -> None:
    detail = f"rollout {rollout.id}: {rollout.history[-1].what}"
    note_act(connection, BY_RULES, f"release.{state.value}", f"release {number}", detail, now_ms=now_ms)


def _ask(connection: Connection, rollout: RolloutState, wave: int, *, now_ms: int) -> None:
    act, subject, detail = "rollout.ask", f"rollout {rollout.id}", f"wave {rollout.waves[wave].name!r}"
    if is_noted(connection, act, subject, detail):
        return
    note_act(connection, BY_RULES, act, subject, detail, now_ms=now_ms)
    log.warning(
        "rollout waits for approval rollout=%s wave=%s: `cloud-hub rollout approve %s`",
        rollout.id,
        rollout.waves[wave].name,
        rollout.id,
    )


def _ppm(share: float) -> int:
    return round(share * 1_000_000)
