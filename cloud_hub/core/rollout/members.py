"""What a rollout knows of each device: is it there, has it had the offer, how did it answer. No I/O."""

from __future__ import annotations

from msgspec.structs import replace

from cloud_hub.core.rollout.events import Reported
from cloud_hub.core.rollout.state import Member, Outcome, Phase, RolloutState, noted
from cloud_hub.core.rollout.waves import Device, has, wave_of


def with_seen(state: RolloutState, device: Device, now_s: float) -> RolloutState:
    """A device is there, or is known at all; of another group it is none of ours."""
    member = state.members.get(device.name)
    if member is None:
        if not has(device, state.group):
            return state
        # A wave is for good: what its labels say later does not move it.
        member = new_member(state, device)
        state = _with(state, device.name, member)
    if not device.is_online:
        return with_lost(state, device.name, now_s)
    if member.online_since_s is not None:
        return state
    reached_s = now_s if member.is_offered and member.reached_s is None else member.reached_s
    return _with(state, device.name, replace(member, online_since_s=now_s, reached_s=reached_s))


def new_member(state: RolloutState, device: Device) -> Member:
    """A device that nobody has seen yet, in its wave."""
    wave = wave_of(state.cuts, device, state.salt)
    if device.release == state.release:
        # It will not say again what it said when it was first told. Yet what others get it loses with them.
        return Member(wave, is_offered=True, outcome=Outcome.EARLIER)
    return Member(wave, before=device.release)


def with_lost(state: RolloutState, name: str, now_s: float) -> RolloutState:
    """A device went offline: its time to answer stands still."""
    member = state.members.get(name)
    if member is None or member.online_since_s is None:
        return state
    return _with(state, name, replace(member, online_since_s=None, waited_s=_waited_s(member, now_s)))


def with_unheard(state: RolloutState, since_s: float, now_s: float) -> RolloutState:
    """From `since_s` until now no device could answer: none of that time counts."""
    members = {name: _unheard(member, since_s, now_s) for name, member in state.members.items()}
    return replace(state, members=members)


def _unheard(member: Member, since_s: float, now_s: float) -> Member:
    unheard_s = member.unheard_s
    if member.reached_s is not None and is_awaited(member):
        unheard_s += max(now_s - max(since_s, member.reached_s), 0.0)
    waited_s = _waited_s(member, since_s)
    return replace(member, online_since_s=None, waited_s=waited_s, unheard_s=unheard_s)


def _waited_s(member: Member, now_s: float) -> float:
    if member.online_since_s is None or member.reached_s is None:
        return member.waited_s
    return member.waited_s + max(now_s - max(member.online_since_s, member.reached_s), 0.0)


def is_awaited(member: Member) -> bool:
    """Whether it has the offer and owes an answer."""
    return member.reached_s is not None and member.outcome is Outcome.NONE


def silent_at_s(state: RolloutState, member: Member) -> float:
    """When a device that owes an answer will count as failed, if it stays as it is."""
    assert member.reached_s is not None
    vanished_s = member.reached_s + state.limits.vanished_after_s + member.unheard_s
    if member.online_since_s is None:
        return vanished_s
    since_s = max(member.online_since_s, member.reached_s)
    return min(vanished_s, since_s + state.limits.report_within_s - member.waited_s)


def with_report(state: RolloutState, report: Reported, now_s: float) -> RolloutState:
    """A device answered. After a halt, only whether it is back matters."""
    member = state.members.get(report.device)
    if member is None or not member.is_offered:
        return state
    is_ours = report.release == state.release
    if state.phase is Phase.HALTED:
        # Going back is a swap like any other; not having swapped is as good.
        if report.committed is not is_ours:
            return _with(state, report.device, replace(member, outcome=Outcome.BACK, reason=report.reason))
        return state
    if not is_ours:
        return state
    outcome = Outcome.COMMITTED if report.committed else Outcome.REVERTED
    if member.outcome is outcome:
        return state
    if not report.committed:
        state = noted(state, now_s, f"{report.device} reverted: {report.reason}")
    # Who reports had the offer, whether we saw it online or not.
    reached_s = now_s if member.reached_s is None else member.reached_s
    member = replace(member, outcome=outcome, reason=report.reason, reached_s=reached_s)
    return _with(state, report.device, member)


def with_silent(state: RolloutState, now_s: float) -> RolloutState:
    """Devices that have owed an answer for too long count as failed."""
    for name, member in state.members.items():
        if is_awaited(member) and silent_at_s(state, member) <= now_s:
            state = _with(state, name, replace(member, outcome=Outcome.SILENT))
            state = noted(state, now_s, f"{name} counts as failed: no report")
    return state


def _with(state: RolloutState, name: str, member: Member) -> RolloutState:
    return replace(state, members={**state.members, name: member})
