"""What is known of one rollout: values that are written down whole after every event. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec
from msgspec.structs import replace

from cloud_hub.core.rollout.findings import HealthRules
from cloud_hub.core.rollout.waves import Cut, Sampling, Wave

MAX_HISTORY: Final = 1000
SCENE_S: Final = 300
MAX_SCENE_S: Final = 65_535


class Phase(StrEnum):
    """Where a rollout stands. It widens in RUNNING only; HALTED and DONE are ends."""

    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"
    DONE = "done"


class Outcome(StrEnum):
    """What became of a device's offer."""

    NONE = "none"
    """Not offered, or offered and not answered."""
    EARLIER = "earlier"
    """It was to run the release before, and may have answered long ago: counts for nothing until it does."""
    COMMITTED = "committed"
    REVERTED = "reverted"
    SILENT = "silent"
    """It had the offer and time enough, and has not said a word: counts as failed."""
    BACK = "back"
    """It runs the release before this one again."""


class RolloutLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a wave has had enough answers, and when it has had too many bad ones. Shares are in 0..1.

    Of the devices that were offered the release and were online since: more than `max_failed_share` reverted
    or silent halts the rollout (rounded down, so one failed canary does); at least `min_committed_share`
    committed is enough, if they are at least `min_reached_share` of all devices of the waves opened so far.

    A device is silent after `report_within_s` online without a report, or `vanished_after_s` after it was
    first online with the offer, wherever it is since. One that was never online since is neither. Time in
    which the hub could hear nobody does not count.
    """

    max_failed_share: float = 0.1
    min_committed_share: float = 0.9
    min_reached_share: float = 0.5
    report_within_s: float = 6 * 3600.0
    vanished_after_s: float = 3 * 86400.0

    def __post_init__(self) -> None:
        shares = (self.max_failed_share, self.min_committed_share, self.min_reached_share)
        if not all(0.0 <= share <= 1.0 for share in shares):
            raise ValueError(f"rollout: one of the shares {shares} is not in 0..1")
        if self.max_failed_share + self.min_committed_share > 1.0 + 1e-9:
            raise ValueError(
                f"rollout: max_failed_share {self.max_failed_share} and min_committed_share "
                f"{self.min_committed_share} are more than 1 together: it would neither halt nor go on"
            )
        if not 0.0 < self.report_within_s <= self.vanished_after_s:
            raise ValueError(
                f"rollout: report_within_s {self.report_within_s} must be above 0 and at most "
                f"vanished_after_s {self.vanished_after_s}"
            )


class Member(msgspec.Struct, frozen=True):
    """A device in this rollout. `online_since_s` is None while it is offline.

    `before` is the release that it was to run when it became a member, empty where that was none.

    `reached_s` is when it was first online with the offer; `waited_s` how long it has been online since,
    up to `online_since_s`; `unheard_s` how long nobody could have heard it since.
    """

    wave: int
    online_since_s: float | None = None
    is_offered: bool = False
    reached_s: float | None = None
    waited_s: float = 0.0
    unheard_s: float = 0.0
    outcome: Outcome = Outcome.NONE
    reason: str = ""
    before: str = ""


class Entry(msgspec.Struct, frozen=True):
    """A line of the rollout's history; `by` is empty where the rules decided."""

    at_s: float
    what: str
    by: str = ""


class RolloutState(msgspec.Struct, frozen=True):
    """One rollout. `wave` is the last one opened, -1 before the first; times are the hub's wall clock.

    `previous` is what the release is compared with; `is_common`: it was rolled out to the whole group. A
    device goes back to what it was to run itself. One that was to run nothing belongs to what is common.

    `enough_s` is when the open wave had enough answers: its soak counts from there. `quality_passed` and
    `healthy_s` (when health was last judged, and found well) are of the open wave. `asked` is the last
    wave for which approval was asked. `left` are devices that had the offer and are no longer of the fleet:
    they count for nothing, and who comes back is to go back to what it ran before.
    """

    id: str
    model: str
    release: str
    previous: str | None
    group: dict[str, str]
    waves: tuple[Wave, ...]
    cuts: tuple[Cut, ...]
    salt: str
    limits: RolloutLimits
    started_s: float
    is_common: bool = False
    health_rules: HealthRules = HealthRules()
    scene_s: int = SCENE_S
    phase: Phase = Phase.RUNNING
    is_closed: bool = False
    is_killed: bool = False
    wave: int = -1
    opened_s: float = 0.0
    enough_s: float | None = None
    quality_passed: bool = False
    quality_said: str = "not judged yet"
    healthy_s: float | None = None
    health_said: tuple[str, ...] = ("not judged yet",)
    approved: tuple[int, ...] = ()
    asked: int = -1
    members: dict[str, Member] = {}
    left: dict[str, Member] = {}
    history: tuple[Entry, ...] = ()

    @property
    def is_widening(self) -> bool:
        """Whether it holds its model and group: no other rollout may start there."""
        return self.phase in {Phase.RUNNING, Phase.PAUSED}

    @property
    def common(self) -> str | None:
        """What a device of the group should run that has no release of its own; None: what it came with."""
        return self.previous if self.is_common else None

    @property
    def ways_back(self) -> frozenset[str]:
        """The releases that devices may be taken back to."""
        known = (*self.members.values(), *self.left.values())
        return frozenset({self.previous or "", *(each.before for each in known)}) - {""}

    @property
    def sampling(self) -> Sampling | None:
        """What the open wave wants of its devices."""
        return self.waves[self.wave].sampling if self.wave >= 0 and self.is_widening else None


class Tally(msgspec.Struct, frozen=True):
    """Devices of the waves opened so far, but those that were to run the release before. `reached` were
    online with the offer; `failed` of them.
    """

    devices: int
    reached: int
    committed: int
    failed: int
    silent: int


def tally_of(state: RolloutState) -> Tally:
    """Count the devices of the waves opened so far."""
    members = [
        each
        for each in state.members.values()
        if each.wave <= state.wave and each.outcome is not Outcome.EARLIER
    ]
    reached = [each for each in members if each.reached_s is not None]
    outcomes = [each.outcome for each in reached]
    silent = outcomes.count(Outcome.SILENT)
    return Tally(
        len(members),
        len(reached),
        outcomes.count(Outcome.COMMITTED),
        outcomes.count(Outcome.REVERTED) + silent,
        silent,
    )


def is_of_earlier_ones(state: RolloutState) -> bool:
    """Whether all devices of the waves opened so far were to run the release before."""
    opened = [each for each in state.members.values() if each.wave <= state.wave]
    return bool(opened) and all(each.outcome is Outcome.EARLIER for each in opened)


def noted(state: RolloutState, now_s: float, what: str, by: str = "") -> RolloutState:
    """The state with a line more in its history; the oldest one goes when there are too many."""
    return replace(state, history=(*state.history, Entry(now_s, what, by))[-MAX_HISTORY:])


def noted_all(state: RolloutState, now_s: float, lines: Iterable[str]) -> RolloutState:
    """The same for any number of lines."""
    return replace(state, history=(*state.history, *(Entry(now_s, line) for line in lines))[-MAX_HISTORY:])
