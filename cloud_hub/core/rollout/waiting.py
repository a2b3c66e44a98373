"""What a wave still waits for: said, never skipped. No I/O, no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from cloud_hub.core.rollout.state import RolloutState, is_of_earlier_ones, tally_of


@dataclass(frozen=True, slots=True)
class NeedsReports:
    """Too few devices were reached, or too few of those committed."""

    committed: int
    reached: int
    devices: int


@dataclass(frozen=True, slots=True)
class Soaks:
    """The wave has answers enough and runs on for a while."""

    left_s: float


@dataclass(frozen=True, slots=True)
class NeedsHealth:
    """Health was not judged at the end of the soak, or cannot be."""

    said: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NeedsQuality:
    """Quality cannot be judged yet."""

    said: str


@dataclass(frozen=True, slots=True)
class NeedsApproval:
    """Somebody has to let this wave open."""

    wave: str


Waiting: TypeAlias = NeedsReports | Soaks | NeedsHealth | NeedsQuality | NeedsApproval


def waits_for(state: RolloutState, *, now_s: float) -> list[Waiting]:
    """What the next wave (or, after the last, the end) waits for; nothing once it may open."""
    waiting: list[Waiting] = []
    following = state.wave + 1
    # Where nobody is new nothing will be reported.
    if state.wave >= 0 and not is_of_earlier_ones(state):
        wave = state.waves[state.wave]
        if state.enough_s is None:
            tally = tally_of(state)
            waiting.append(NeedsReports(tally.committed, tally.reached, tally.devices))
        else:
            soaked_s = state.enough_s + wave.soak_s
            if now_s < soaked_s:
                waiting.append(Soaks(soaked_s - now_s))
            if state.healthy_s is None or state.healthy_s < soaked_s:
                waiting.append(NeedsHealth(state.health_said))
        if wave.max_drop is not None and not state.quality_passed:
            waiting.append(NeedsQuality(state.quality_said))
    if (
        following < len(state.waves)
        and state.waves[following].needs_approval
        and following not in state.approved
    ):
        waiting.append(NeedsApproval(state.waves[following].name))
    return waiting


def describe(waiting: Waiting) -> str:
    """One line for a person."""
    match waiting:
        case NeedsReports(committed, reached, devices):
            return f"reports: {committed} committed of {reached} reached of {devices} devices"
        case Soaks(left_s):
            return f"soaking for {math.ceil(left_s)} s more"
        case NeedsHealth(said):
            return f"health: {'; '.join(said)}"
        case NeedsQuality(said):
            return f"quality: {said}"
        case NeedsApproval(wave):
            return f"approval of wave {wave!r}"
