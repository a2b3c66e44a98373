"""What a rollout knows of each device: is it there, has it had the offer, how did it answer. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from msgspec.structs import replace

from cloud_hub.core.rollout.events import Lost, Removed, Reported, Seen, Sign
from cloud_hub.core.rollout.state import Member, Outcome, Phase, RolloutState, noted_all
from cloud_hub.core.rollout.waves import Device, has, wave_of


def with_signs(state: RolloutState, signs: Iterable[Sign], now_s: float) -> RolloutState:
    """What these signs say of the devices, one after another. Costs as much as there are signs.

    A device of another group is none of ours. One that leaves is remembered, if it had the offer: only we
    know what it is to go back to.
    """
    members, left, lines = dict(state.members), dict(state.left), list[str]()
    for sign in signs:
        match sign:
            case Seen(device):
                member = members.get(device.name)
                if member is None and has(device, state.group):
                    # A wave is for good: what its labels say later does not move it.
                    member = _joined(state, device, left.pop(device.name, None))
                if member is not None:
                    members[device.name] = _seen(member, device, now_s)
            case Lost(name):
                if name in members:
                    members[name] = _lost(members[name], now_s)
            case Removed(name):
                gone = members.pop(name, None)
                if gone is not None and gone.is_offered:
                    left[name] = _lost(gone, now_s)
            case Reported(name):
                of = members if name in members else left
                if name in of:
                    before, of[name] = of[name], _reported(state, of[name], sign, now_s)
                    if Outcome.REVERTED is of[name].outcome is not before.outcome:
                        lines.append(f"{name} reverted: {sign.reason}")
            case _:
                assert_never(sign)
    return noted_all(replace(state, members=members, left=left), now_s, lines)


def new_member(state: RolloutState, device: Device, *, before: str = "") -> Member:
    """A device that nobody has seen yet, in its wave.

    `before`: where it is to run the release already, what it was to run before it.
    """
    wave = wave_of(state.cuts, device, state.salt)
    if device.release == state.release:
        # It will not say again what it said when it was first told. Yet what others get it loses with them.
        return Member(wave, is_offered=True, outcome=Outcome.EARLIER, before=before)
    return Member(wave, before=device.release)


def _joined(state: RolloutState, device: Device, known: Member | None) -> Member:
    """A device that is new, or was gone; `known`: what it was when it went."""
    member = new_member(state, device)
    if known is None or not member.is_offered:
        return member
    if known.outcome in {Outcome.NONE, Outcome.SILENT}:
        # Its time to answer begins anew; we would have heard of it if it had done so.
        return replace(known, outcome=Outcome.NONE, reached_s=None, waited_s=0.0, unheard_s=0.0)
    return known


def _seen(member: Member, device: Device, now_s: float) -> Member:
    if not device.is_online:
        return _lost(member, now_s)
    if member.online_since_s is not None:
        return member
    reached_s = now_s if member.is_offered and member.reached_s is None else member.reached_s
    return replace(member, online_since_s=now_s, reached_s=reached_s)


def _lost(member: Member, now_s: float) -> Member:
    """It went offline: its time to answer stands still."""
    if member.online_since_s is None:
        return member
    return replace(member, online_since_s=None, waited_s=_waited_s(member, now_s))


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


def _reported(state: RolloutState, member: Member, report: Reported, now_s: float) -> Member:
    """A device answered. After a halt, only whether it is back matters."""
    if not member.is_offered:
        return member
    is_ours = report.release == state.release
    if state.phase is Phase.HALTED:
        # Going back is a swap like any other; not having swapped is as good.
        is_back = report.committed is not is_ours
        return replace(member, outcome=Outcome.BACK, reason=report.reason) if is_back else member
    outcome = Outcome.COMMITTED if report.committed else Outcome.REVERTED
    if not is_ours or member.outcome is outcome:
        return member
    # Who reports had the offer, whether we saw it online or not.
    reached_s = now_s if member.reached_s is None else member.reached_s
    return replace(member, outcome=outcome, reason=report.reason, reached_s=reached_s)


def with_silent(state: RolloutState, now_s: float) -> RolloutState:
    """Devices that have owed an answer for too long count as failed."""
    silent = {
        name: replace(member, outcome=Outcome.SILENT)
        for name, member in state.members.items()
        if is_awaited(member) and silent_at_s(state, member) <= now_s
    }
    if not silent:
        return state
    lines = [f"{name} counts as failed: no report" for name in silent]
    return noted_all(replace(state, members={**state.members, **silent}), now_s, lines)
