"""When a release goes to more devices, and when it is taken back. No I/O, no clock, no chance.

A rollout opens its waves one after another. A wave is done when enough of its devices committed, it has
soaked, health was judged well at the end of the soak, quality was judged not worse by the wave's `max_drop`,
and somebody approved of the next one where that is asked for. What is missing is said (`waits_for`), and the
wave waits: nothing is widened for want of evidence. Anything worse, too many failures, or a person halts it,
and every device that was offered the release is offered the one that it was to run before.

The state is written down before the effects are carried out; the hub may be killed between any two of them.
`Resumed` then asks for everything again that the state implies, and every effect may be carried out twice.
Events may come twice, too, and late.

Time is an argument: the hub's wall clock, for a rollout outlives its process. When it jumps back, waits grow
longer, and nothing else happens; a jump forward is told by `Unheard`, for nobody was late in that time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, assert_never

from msgspec.structs import replace

from cloud_hub.core.rollout import judge
from cloud_hub.core.rollout.events import (
    Approved,
    AskApproval,
    Closed,
    Effect,
    Event,
    Halted,
    HealthJudged,
    Heard,
    Judged,
    Killed,
    Lost,
    MarkRelease,
    Offer,
    Paused,
    ReleaseState,
    Removed,
    Reported,
    Resumed,
    Sample,
    Seen,
    Sign,
    TakeBack,
    Tick,
    Unheard,
    Unpaused,
)
from cloud_hub.core.rollout.findings import Health, HealthRules
from cloud_hub.core.rollout.findings import describe as describe_finding
from cloud_hub.core.rollout.members import (
    is_awaited,
    new_member,
    silent_at_s,
    with_signs,
    with_silent,
    with_unheard,
)
from cloud_hub.core.rollout.state import (
    MAX_SCENE_S,
    SCENE_S,
    Entry,
    Member,
    Phase,
    RolloutLimits,
    RolloutState,
    noted,
    tally_of,
)
from cloud_hub.core.rollout.waiting import NeedsApproval, waits_for
from cloud_hub.core.rollout.waves import Device, Wave, has, may_overlap, select_cuts

Step: TypeAlias = tuple[RolloutState, list[Effect]]


def check_start(rollouts: Iterable[RolloutState], model: str, group: Mapping[str, str]) -> str | None:
    """Why a rollout of this model may not start for devices with these labels; None if it may."""
    for other in rollouts:
        if other.is_widening and other.model == model and may_overlap(other.group, group):
            return (
                f"rollout {other.id} of model {model} is {other.phase} for devices with "
                f"{other.group or 'any'} labels: halt it, or wait until it is done"
            )
    return None


def begin(
    rollout_id: str,
    *,
    model: str,
    release: str,
    previous: str | None,
    waves: Sequence[Wave],
    fleet: Iterable[Device],
    now_s: float,
    by: str,
    is_common: bool = False,
    group: Mapping[str, str] | None = None,
    salt: str | None = None,
    limits: RolloutLimits | None = None,
    health: HealthRules | None = None,
    scene_s: int = SCENE_S,
    came_from: Mapping[str, str] | None = None,
) -> Step:
    """A new rollout, with what is to be done first. Only devices of `fleet` with the group's labels count.

    `came_from`: of devices that are to run the release already, what they were to run before it.

    Raises:
        ValueError: when the waves contradict themselves, or `scene_s` is no length of a scene.
    """
    if not 1 <= scene_s <= MAX_SCENE_S:
        raise ValueError(f"scene_s {scene_s} is not in 1..{MAX_SCENE_S}")
    members = [device for device in fleet if has(device, group or {})]
    new = [device for device in members if device.release != release]
    have_it = f", {len(members) - len(new)} of them were to run it before" if len(new) < len(members) else ""
    salt = rollout_id if salt is None else salt
    state = RolloutState(
        id=rollout_id,
        model=model,
        release=release,
        previous=previous,
        group=dict(group or {}),
        waves=tuple(waves),
        cuts=select_cuts(waves, new, salt),
        salt=salt,
        limits=limits or RolloutLimits(),
        started_s=now_s,
        is_common=is_common,
        health_rules=health or HealthRules(),
        scene_s=scene_s,
        history=(Entry(now_s, f"release {release} for {len(members)} devices{have_it}", by),),
    )
    known = {
        device.name: replace(
            new_member(state, device, before=(came_from or {}).get(device.name, "")),
            online_since_s=now_s if device.is_online else None,
        )
        for device in members
    }
    state = replace(state, members=known)
    return _move_on(state, [], now_s)


def next_state(state: RolloutState, event: Event, *, now_s: float) -> Step:  # noqa: PLR0912 - one branch an event
    """What becomes of the rollout, and what is to be done, in this order."""
    effects: list[Effect] = []
    if state.is_closed:
        return state, effects
    match event:
        case Resumed():
            effects = _everything(state)
        case Tick():
            pass
        case Seen() | Lost() | Removed() | Reported():
            state, effects = _heard(state, (event,), now_s)
        case Heard():
            state, effects = _heard(state, event.signs, now_s)
        case Unheard():
            state = with_unheard(state, event.since_s, now_s) if state.is_widening else state
        case Judged():
            state, effects = _judged(state, event.judgement, now_s)
        case HealthJudged():
            state, effects = _health_judged(state, event.health, now_s)
        case Approved():
            if event.wave not in state.approved and 0 <= event.wave < len(state.waves):
                what = f"wave {state.waves[event.wave].name!r} approved"
                state = noted(replace(state, approved=(*state.approved, event.wave)), now_s, what, event.by)
        case Paused():
            if state.phase is Phase.RUNNING:
                state = noted(replace(state, phase=Phase.PAUSED), now_s, "paused", event.by)
        case Unpaused():
            if state.phase is Phase.PAUSED:
                state = noted(replace(state, phase=Phase.RUNNING), now_s, "goes on", event.by)
        case Halted():
            if state.is_widening:
                state, effects = _halt(state, now_s, event.reason, event.by)
        case Killed():
            state, effects = _kill(state, now_s, event)
        case Closed():
            # A rollout that still widens holds its devices: see `check_start`.
            return replace(state, is_closed=not state.is_widening), effects
        case _:
            assert_never(event)
    return _move_on(state, effects, now_s)


def rules_of(state: RolloutState, rules: judge.JudgeRules) -> judge.JudgeRules:
    """The judge's rules for the open wave. One that asks nothing of quality is still watched for worse.

    Raises:
        ValueError: when the rules tolerate as much as the wave's `max_drop`.
    """
    max_drop = state.waves[max(state.wave, 0)].max_drop
    return rules if max_drop is None else dataclasses.replace(rules, max_drop=max_drop)


def next_due_s(state: RolloutState) -> float | None:
    """When a `Tick` is wanted next, None if only events can move anything."""
    if not state.is_widening:
        return None
    due = [silent_at_s(state, each) for each in state.members.values() if is_awaited(each)]
    if state.enough_s is not None:
        due.append(state.enough_s + state.waves[state.wave].soak_s)
    return min(due, default=None)


# --- devices -----------------------------------------------------------------------------------------------


def _heard(state: RolloutState, signs: Sequence[Sign], now_s: float) -> Step:
    known = state.members
    state = with_signs(state, signs, now_s)
    # A dict for its order.
    seen = dict.fromkeys(sign.device.name for sign in signs if isinstance(sign, Seen))
    return state, [effect for name in seen if name not in known for effect in _welcome(state, name)]


# --- verdicts ----------------------------------------------------------------------------------------------


def _judged(state: RolloutState, judgement: judge.Judgement, now_s: float) -> Step:
    if not state.is_widening or state.wave < 0:
        return state, []
    said = judge.describe(judgement)
    match judgement:
        case judge.Halt():
            return _halt(replace(state, quality_said=said), now_s, said, "")
        case judge.Pass(max_drop):
            asked = state.waves[state.wave].max_drop
            passed = asked is not None and max_drop <= asked
            if passed and not state.quality_passed:
                state = noted(state, now_s, said)
            state = replace(state, quality_passed=state.quality_passed or passed, quality_said=said)
        case judge.Undecided():
            # What was passed stays passed: the bet was won at one of its looks.
            state = state if state.quality_passed else replace(state, quality_said=said)
    return state, []


def _health_judged(state: RolloutState, health: Health, now_s: float) -> Step:
    if not state.is_widening or state.wave < 0:
        return state, []
    if health.worse:
        said = "; ".join(describe_finding(each) for each in health.worse)
        return _halt(replace(state, health_said=(said,)), now_s, said, "")
    soaked_s = math.inf if state.enough_s is None else state.enough_s + state.waves[state.wave].soak_s
    if health.lapsing and now_s >= soaked_s + state.health_rules.max_wait_s:
        # Nothing to compare with will come; worse would have shown by itself meanwhile.
        metrics = ", ".join(each.metric for each in health.lapsing)
        health = health.after_waiting()
        if state.healthy_s is None and not health.unknown:
            state = noted(state, now_s, f"not judged, there is nothing to compare with: {metrics}")
    said_all = tuple(describe_finding(each) for each in health.findings)
    healthy_s = None if health.unknown else now_s
    return replace(state, healthy_s=healthy_s, health_said=said_all), []


# --- going on ----------------------------------------------------------------------------------------------


def _move_on(state: RolloutState, effects: list[Effect], now_s: float) -> Step:
    """Whatever follows from the state by itself; in DONE only offers to who comes late, in HALTED nothing."""
    if state.is_widening:
        state = with_silent(state, now_s)
        tally = tally_of(state)
        if tally.failed > math.floor(state.limits.max_failed_share * tally.reached + 1e-9):
            silent = f", {tally.silent} of them silent" if tally.silent else ""
            reason = f"{tally.failed} of {tally.reached} devices failed{silent}"
            state, halting = _halt(state, now_s, reason, "")
            return state, [*effects, *halting]
        state = _with_enough(state, now_s)
    if state.phase is Phase.RUNNING and not waits_for(state, now_s=now_s):
        state, opening = _open_next(state, now_s)
        effects = [*effects, *opening]
    elif state.phase is Phase.RUNNING and state.asked <= state.wave and _needs_approval_only(state, now_s):
        state = replace(state, asked=state.wave + 1)
        effects = [*effects, AskApproval(state.asked)]
    if state.phase in {Phase.RUNNING, Phase.DONE}:
        state, offers = _offers(state, now_s)
        effects = [*effects, *offers]
    return state, effects


def _with_enough(state: RolloutState, now_s: float) -> RolloutState:
    if state.wave < 0 or state.enough_s is not None:
        return state
    tally, limits = tally_of(state), state.limits
    if (
        tally.committed >= 1
        and tally.committed >= limits.min_committed_share * tally.reached - 1e-9
        and tally.reached >= limits.min_reached_share * tally.devices - 1e-9
    ):
        what = f"wave {state.waves[state.wave].name!r} has {tally.committed} of {tally.devices} devices"
        return noted(replace(state, enough_s=now_s), now_s, what)
    return state


def _open_next(state: RolloutState, now_s: float) -> Step:
    following = state.wave + 1
    if following == len(state.waves):
        state = noted(replace(state, phase=Phase.DONE), now_s, "done")
        return state, [MarkRelease(state.release, ReleaseState.LIVE), *_samples(state)]
    before = state.sampling
    state = replace(
        state,
        wave=following,
        opened_s=now_s,
        enough_s=None,
        quality_passed=False,
        quality_said="not judged yet",
        healthy_s=None,
        health_said=("not judged in this wave yet",),
    )
    state = noted(state, now_s, f"wave {state.waves[following].name!r} opened")
    effects: list[Effect] = [MarkRelease(state.release, ReleaseState.CANARY)] if following == 0 else []
    return state, [*effects, *(_samples(state) if state.sampling != before else [])]


def _offers(state: RolloutState, now_s: float) -> Step:
    """Offer to whoever belongs to an open wave and has no offer yet."""
    new = {
        name: replace(
            each, is_offered=True, reached_s=None if each.online_since_s is None else now_s, waited_s=0.0
        )
        for name, each in state.members.items()
        if each.wave <= state.wave and not each.is_offered
    }
    if not new:
        return state, []
    state = replace(state, members={**state.members, **new})
    return state, [effect for name in new for effect in _offer(state, name)]


def _offer(state: RolloutState, name: str) -> list[Effect]:
    offer = Offer(name, state.release)
    return [offer] if state.sampling is None else [offer, Sample(name, state.sampling)]


def _samples(state: RolloutState) -> list[Effect]:
    return [_sample(state, name, each) for name, each in state.members.items() if each.is_offered]


def _sample(state: RolloutState, name: str, member: Member) -> Sample:
    return Sample(name, state.sampling if member.wave <= state.wave else None)


def _needs_approval_only(state: RolloutState, now_s: float) -> bool:
    return all(isinstance(each, NeedsApproval) for each in waits_for(state, now_s=now_s))


# --- going back --------------------------------------------------------------------------------------------


def _halt(state: RolloutState, now_s: float, reason: str, by: str) -> Step:
    state = noted(replace(state, phase=Phase.HALTED), now_s, f"halted: {reason}", by)
    return state, _take_back(state)


def _kill(state: RolloutState, now_s: float, event: Killed) -> Step:
    if state.is_killed:
        return state, []
    # Who had committed has to go back now, whatever was said of it before.
    state = noted(
        replace(state, phase=Phase.HALTED, is_killed=True), now_s, f"killed: {event.reason}", event.by
    )
    return state, _take_back(state)


def _take_back(state: RolloutState) -> list[Effect]:
    mark = ReleaseState.RETIRED if state.is_killed else ReleaseState.HALTED
    return [
        MarkRelease(state.release, mark),
        *(
            TakeBack(name, each.before or state.common)
            for name, each in state.members.items()
            if each.is_offered
        ),
        *_of_the_group(state, *state.members),
        *_samples(state),
    ]


def _welcome(state: RolloutState, name: str) -> list[Effect]:
    """What a new member is told at once."""
    member = state.members.get(name)
    if member is None or not member.is_offered:
        return _of_the_group(state, name)
    # It was gone while the others were told this.
    sample = _sample(state, name, member)
    is_halted = state.phase is Phase.HALTED
    return [TakeBack(name, member.before or state.common), sample] if is_halted else [sample]


def _of_the_group(state: RolloutState, *names: str) -> list[Effect]:
    """Who has no release of its own and no offer gets what the group runs, however long this one takes."""
    if state.common is None:
        return []
    members = ((name, state.members.get(name)) for name in names)
    return [
        TakeBack(name, state.common)
        for name, each in members
        if each is not None and not each.before and not each.is_offered
    ]


def _everything(state: RolloutState) -> list[Effect]:
    """What the state implies, whether it was carried out or not."""
    if state.phase is Phase.HALTED:
        return _take_back(state)
    asked: list[Effect] = [AskApproval(state.asked)] if state.is_widening and state.asked > state.wave else []
    common = _of_the_group(state, *state.members)
    if state.wave < 0:
        return [*common, *asked]
    mark = ReleaseState.LIVE if state.phase is Phase.DONE else ReleaseState.CANARY
    offered = [name for name, each in state.members.items() if each.is_offered]
    return [
        MarkRelease(state.release, mark),
        *common,
        *(Offer(name, state.release) for name in offered),
        *_samples(state),
        *asked,
    ]
