"""A release's way through the fleet, event by event, and with the hub killed anywhere."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cloud_hub.core.rollout.events import (
    Approved,
    AskApproval,
    Closed,
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
    TakeBack,
    Tick,
    Unpaused,
)
from cloud_hub.core.rollout.findings import Fine, Health, HealthRules, Metric, Unknown, Worse
from cloud_hub.core.rollout.judge import Halt, JudgeRules, Pass, Undecided
from cloud_hub.core.rollout.rollout import begin, check_start, next_due_s, next_state, rules_of
from cloud_hub.core.rollout.state import (
    MAX_HISTORY,
    Outcome,
    Phase,
    RolloutLimits,
    RolloutState,
    Tally,
    tally_of,
)
from cloud_hub.core.rollout.waiting import (
    NeedsApproval,
    NeedsHealth,
    NeedsQuality,
    NeedsReports,
    Soaks,
    describe,
    waits_for,
)
from cloud_hub.core.rollout.waves import Device, Sampling, Wave

MUCH = Sampling(audit_rate=0.1, shadow_share=0.5)
WAVES = (
    Wave("canary", count=1, soak_s=100.0, max_drop=0.05, sampling=MUCH),
    Wave("half", share=0.5, soak_s=200.0),
    Wave("all", share=1.0, soak_s=300.0, needs_approval=True),
)
LIMITS = RolloutLimits(report_within_s=1000.0, vanished_after_s=5000.0)
FLEET = [Device(f"d{n}", release="old") for n in range(10)]
WELL = Health((Fine(Metric.LATENCY, 1.0, 9),))
SICK = Health((Worse(Metric.LATENCY, 2.0, 1.3, 9),))
BLIND = Health((Unknown(Metric.LATENCY, 0, 9, 0, holds_back=True),))
NEW = Health((Unknown(Metric.LATENCY, 0, 1, 0, holds_back=True, lapses=True),))
PASS = Pass(0.01, 25.0, 3000, 100)
HALT = Halt("worse: 30 lost and 5 won, 1 points", 40.0, 2500, 35)
UNDECIDED = Undecided(700, 0.01, 300, 12)


class Course:
    """Feeds events one after another; `feed` returns the effects. Every state is read back as stored."""

    def __init__(self, fleet=FLEET, waves=WAVES, **more):
        self.now_s = 1000.0
        self.state, self.first = begin(
            "r", model="m", release="new", previous="old", waves=waves, fleet=fleet,
            now_s=self.now_s, by="ann", limits=LIMITS, **more,
        )  # fmt: skip

    def feed(self, event, *, after_s=0.0):
        self.now_s += after_s
        state, effects = next_state(self.state, event, now_s=self.now_s)
        self.state = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=RolloutState)
        assert self.state == state
        return effects

    def members(self, wave):
        return [name for name, each in self.state.members.items() if each.wave == wave]

    def commit(self, wave):
        return [effect for name in self.members(wave) for effect in self.feed(Reported(name, "new", True))]

    def pass_wave(self):
        """Everything that the open wave waits for; the effects of the last event."""
        self.commit(self.state.wave)
        self.feed(Judged(PASS))
        return self.feed(HealthJudged(WELL), after_s=self.state.waves[self.state.wave].soak_s)

    @property
    def waits(self):
        return waits_for(self.state, now_s=self.now_s)


def in_half():
    course = Course()
    course.pass_wave()
    assert course.state.wave == 1
    return course


def done():
    course = in_half()
    course.feed(Approved("bob", 2))
    course.pass_wave()
    course.pass_wave()
    assert course.state.phase is Phase.DONE
    return course


def test_it_begins_with_one_canary_that_shows_more_than_others():
    course = Course()
    (canary,) = course.members(0)
    assert course.first == [
        MarkRelease("new", ReleaseState.CANARY),
        Offer(canary, "new"),
        Sample(canary, MUCH),
    ]


def test_a_wave_waits_until_everything_is_there_and_says_what_is_missing():
    course = Course()
    quality = NeedsQuality("not judged yet")
    assert course.waits == [NeedsReports(0, 1, 1), quality]
    assert course.commit(0) == []
    assert course.waits == [Soaks(100.0), NeedsHealth(("not judged in this wave yet",)), quality]
    course.feed(HealthJudged(WELL), after_s=99)
    assert course.waits == [Soaks(1.0), NeedsHealth(("latency fine: x1.00 on 9 boards",)), quality]
    course.feed(HealthJudged(BLIND), after_s=1)
    course.feed(Judged(UNDECIDED))
    assert course.waits == [
        NeedsHealth(("latency unknown: comparable on 0 of 9 boards",)),
        NeedsQuality("cannot be judged to 1 points yet: 12 of 300 pairs tell; about 700 more are needed"),
    ]
    assert course.feed(Judged(PASS)) == []
    effects = course.feed(HealthJudged(WELL))
    half = course.members(1)
    assert len(half) == 4
    # The canary shows no more than others once the wave that wanted it is over.
    assert effects == [Sample(course.members(0)[0], None), *(Offer(name, "new") for name in half)]


def test_what_has_nothing_to_be_compared_with_is_waited_for_only_so_long():
    course = Course(health=HealthRules(max_wait_s=500.0))
    course.commit(0)
    course.feed(Judged(PASS))
    course.feed(HealthJudged(NEW), after_s=599)
    assert course.waits == [NeedsHealth(("latency unknown: comparable on 0 of 1 boards",))]
    course.feed(HealthJudged(NEW), after_s=1)
    assert course.state.wave == 1
    said = [entry.what for entry in course.state.history]
    assert said[-2:] == [
        "not judged, there is nothing to compare with: latency",
        "wave 'half' opened",
    ]


def test_what_boards_stopped_reporting_is_waited_for_without_end():
    course = Course(health=HealthRules(max_wait_s=500.0))
    course.commit(0)
    course.feed(Judged(PASS))
    course.feed(HealthJudged(Health((*NEW.findings, *BLIND.findings))), after_s=10**6)
    assert course.state.wave == 0
    assert course.waits == [
        NeedsHealth(
            (
                "latency not judged: comparable on 0 of 1 boards",
                "latency unknown: comparable on 0 of 9 boards",
            )
        )
    ]


def test_quality_has_to_pass_by_what_the_wave_asks():
    course = Course()
    course.commit(0)
    course.feed(Judged(Pass(0.1, 25.0, 300, 10)))
    assert any(isinstance(each, NeedsQuality) for each in course.waits)
    course.feed(Judged(Pass(0.05, 25.0, 300, 10)))
    course.feed(Judged(UNDECIDED))
    assert not any(isinstance(each, NeedsQuality) for each in course.waits)


def test_a_pass_in_one_wave_is_asked_for_again_in_the_next():
    course = in_half()
    assert any(isinstance(each, NeedsQuality) for each in course.waits)


def test_a_wave_may_ask_nothing_of_quality_and_is_halted_by_it_all_the_same():
    waves = (Wave("canary", count=1, max_drop=None, soak_s=0.0), Wave("all", share=1.0))
    course = Course(waves=waves)
    course.commit(0)
    course.feed(HealthJudged(WELL))
    assert course.state.wave == 1
    course = Course(waves=waves)
    course.feed(Judged(HALT))
    assert course.state.phase is Phase.HALTED


def test_the_rules_of_the_judge_are_those_of_the_wave():
    rules = JudgeRules(alpha=0.01, beta=0.02, max_drop=0.03)
    assert rules_of(Course().state, rules) == JudgeRules(alpha=0.01, beta=0.02, max_drop=0.05)
    free = (Wave("all", share=1.0, max_drop=None),)
    assert rules_of(Course(waves=free).state, rules) == rules


def test_approval_is_asked_for_once_when_nothing_else_is_missing():
    course = in_half()
    course.commit(1)
    course.feed(Judged(PASS))
    assert course.feed(HealthJudged(WELL), after_s=200) == [AskApproval(2)]
    assert course.waits == [NeedsApproval("all")]
    assert course.feed(Tick(), after_s=10**6) == []
    assert AskApproval(2) in course.feed(Resumed())
    effects = course.feed(Approved("bob", 2))
    assert effects == [Offer(name, "new") for name in course.members(2)]
    assert course.feed(Approved("bob", 2)) == []
    assert [entry.by for entry in course.state.history if "approved" in entry.what] == ["bob"]


def test_the_first_wave_may_need_approval_too():
    course = Course(waves=(Wave("all", share=1.0, needs_approval=True),))
    assert course.first == [AskApproval(0)]
    assert course.feed(Resumed()) == [AskApproval(0)]
    assert course.feed(Approved("bob", 0))[0] == MarkRelease("new", ReleaseState.CANARY)


def test_after_the_last_wave_the_release_is_live_and_who_comes_late_gets_it():
    course = done()
    assert course.feed(Resumed())[0] == MarkRelease("new", ReleaseState.LIVE)
    assert course.feed(Seen(Device("late"))) == [Offer("late", "new")]
    assert course.feed(Seen(Device("late"))) == []
    assert next_due_s(course.state) is None


def test_a_device_that_joins_gets_the_release_when_its_wave_is_open():
    course = in_half()
    offered = {n: course.feed(Seen(Device(f"late-{n}"))) for n in range(20)}
    for n, effects in offered.items():
        wave = course.state.members[f"late-{n}"].wave
        assert effects == ([Offer(f"late-{n}", "new")] if wave <= 1 else [])
    assert {bool(effects) for effects in offered.values()} == {True, False}


def test_only_the_group_is_offered_anything():
    fleet = [Device(f"d{n}", {"site": "a" if n < 5 else "b"}) for n in range(10)]
    course = Course(fleet, (Wave("all", share=1.0),), group={"site": "a"})
    assert {effect.device for effect in course.first[1:]} == {f"d{n}" for n in range(5)}
    assert course.feed(Seen(Device("x", {"site": "b"}))) == []
    assert course.feed(Seen(Device("y", {"site": "a"}))) == [Offer("y", "new")]


def test_one_failed_canary_halts():
    course = Course()
    (canary,) = course.members(0)
    effects = course.feed(Reported(canary, "new", False, "golden"))
    assert effects == [MarkRelease("new", ReleaseState.HALTED), TakeBack(canary, "old"), Sample(canary, None)]
    assert course.state.history[-1].what == "halted: 1 of 1 devices failed"
    assert course.state.members[canary].reason == "golden"


def test_a_few_failures_are_borne_and_more_halt():
    fleet = [Device(f"d{n}") for n in range(40)]
    course = Course(fleet, (Wave("all", share=1.0),))
    for n in range(4):
        course.feed(Reported(f"d{n}", "new", False, "crash"))
    assert course.state.phase is Phase.RUNNING
    for n in range(4, 40):
        course.feed(Reported(f"d{n}", "new", True))
    assert course.state.enough_s is not None
    course.feed(Reported("d39", "new", False, "crash"))
    assert course.state.phase is Phase.HALTED


def test_a_device_that_has_the_offer_and_never_reports_counts_as_failed():
    course = Course()
    assert next_due_s(course.state) == 2000.0
    assert course.feed(Tick(), after_s=999) == []
    course.feed(Tick(), after_s=1)
    assert course.state.phase is Phase.HALTED
    assert course.state.history[-1].what == "halted: 1 of 1 devices failed, 1 of them silent"


def test_time_offline_is_no_silence_until_it_is_very_long():
    course = Course()
    (canary,) = course.members(0)
    course.feed(Lost(canary), after_s=900)
    course.feed(Tick(), after_s=3000)
    course.feed(Seen(Device(canary)))
    assert course.feed(Tick(), after_s=99) == []
    course.feed(Lost(canary))
    assert next_due_s(course.state) == 6000.0
    course.feed(Tick(), after_s=1000)
    assert course.state.phase is Phase.RUNNING
    course.feed(Tick(), after_s=1001)
    assert course.state.phase is Phase.HALTED


def test_a_device_that_was_never_there_is_no_failure():
    fleet = [Device(f"d{n}", is_online=n >= 3) for n in range(10)]
    course = Course(fleet, (Wave("all", share=1.0, soak_s=0.0),))
    for n in range(3, 10):
        course.feed(Reported(f"d{n}", "new", True))
    course.feed(Tick(), after_s=10**6)
    course.feed(Judged(PASS))
    course.feed(HealthJudged(WELL))
    assert course.state.phase is Phase.DONE
    # It has the offer, and takes it as it comes back.
    assert Offer("d0", "new") in course.first
    course.feed(Seen(Device("d0")))
    course.feed(Reported("d0", "new", True))
    assert tally_of(course.state).committed == 8


def test_too_few_reached_devices_are_not_enough():
    fleet = [Device(f"d{n}", is_online=n < 4) for n in range(10)]
    course = Course(fleet, (Wave("all", share=1.0),))
    for n in range(4):
        course.feed(Reported(f"d{n}", "new", True))
    assert course.waits[0] == NeedsReports(4, 4, 10)
    course.feed(Seen(Device("d4")))
    course.feed(Reported("d4", "new", True))
    assert course.state.enough_s is not None


def test_a_late_report_of_a_silent_device_counts_after_all():
    fleet = [Device(f"d{n}") for n in range(10)]
    course = Course(fleet, (Wave("all", share=1.0),))
    for n in range(1, 10):
        course.feed(Reported(f"d{n}", "new", True))
    course.feed(Tick(), after_s=1000)
    assert tally_of(course.state).silent == 1
    course.feed(Reported("d0", "new", True))
    assert (tally_of(course.state).silent, tally_of(course.state).committed) == (0, 10)


def test_worse_quality_or_health_takes_everything_back():
    for event, said in (
        (Judged(HALT), "halted: worse: 30 lost and 5 won, 1 points; 35 of 2500 pairs tell, e-value 40"),
        (HealthJudged(SICK), "halted: latency worse: x2.00 on 9 boards, limit x1.30"),
    ):
        course = in_half()
        course.commit(1)
        effects = course.feed(event)
        assert {effect.device for effect in effects if isinstance(effect, TakeBack)} == {
            *course.members(0), *course.members(1)
        }  # fmt: skip
        assert course.state.history[-1].what == said
        assert course.feed(Judged(PASS)) == []
        assert course.feed(Seen(Device("late"))) == []


def test_every_device_goes_back_to_what_it_was_to_run_itself():
    fleet = [Device(f"d{n}", release=release) for n, release in enumerate(("own", "", "new"))]
    course = Course(fleet, waves=(Wave("all", share=1.0),), is_common=True)
    course.feed(Seen(Device("late", release="other")))
    taken = {
        each.device: each.release
        for each in course.feed(Halted("ann", "enough"))
        if isinstance(each, TakeBack)
    }
    assert taken == {"d0": "own", "d1": "old", "d2": "old", "late": "other"}


def test_a_device_without_a_release_gets_what_the_group_runs_until_it_is_offered_more():
    course = Course(is_common=True)
    late = {0: [], 1: [], 2: []}
    for n in range(30):
        effects = course.feed(Seen(Device(f"late{n}")))
        late[course.state.members[f"late{n}"].wave].append(effects)
    assert all(effects == [TakeBack(effects[0].device, "old")] for effects in late[1] + late[2])
    assert all(type(effects[-2]) is Offer for effects in late[0])
    assert {each.release for each in course.feed(Resumed()) if isinstance(each, TakeBack)} == {"old"}
    course.feed(Halted("ann", "enough"))
    assert course.feed(Seen(Device("later"))) == [TakeBack("later", "old")]
    assert course.feed(Seen(Device("later"))) == []


def test_the_length_of_a_scene_has_bounds():
    for scene_s in (0, 65_536):
        with pytest.raises(ValueError, match="scene_s"):
            Course(scene_s=scene_s)


def test_a_halted_rollout_knows_who_is_back():
    course = in_half()
    first, second, *_ = course.members(1)
    course.feed(Halted("ann", "enough"))
    course.feed(Reported(first, "new", True))
    assert course.state.members[first].outcome is Outcome.NONE
    course.feed(Reported(first, "old", True))
    course.feed(Reported(second, "new", False, "superseded"))
    assert {course.state.members[name].outcome for name in (first, second)} == {Outcome.BACK}
    assert course.state.history[-1].by == "ann"


def test_a_pause_offers_nothing_and_goes_on_where_it_was():
    course = Course()
    course.feed(Paused("ann"))
    assert course.pass_wave() == []
    assert course.state.wave == 0
    effects = course.feed(Unpaused("ann"))
    assert [effect.device for effect in effects if isinstance(effect, Offer)] == course.members(1)


def test_what_is_worse_halts_a_paused_rollout_too():
    course = Course()
    course.feed(Paused("ann"))
    course.feed(Judged(HALT))
    assert course.state.phase is Phase.HALTED


def test_the_kill_switch_works_after_the_rollout_is_done():
    course = done()
    assert course.feed(Halted("ann", "too late")) == []
    effects = course.feed(Killed("ann", "a recall"))
    assert effects[0] == MarkRelease("new", ReleaseState.RETIRED)
    assert [effect.device for effect in effects if isinstance(effect, TakeBack)] == list(course.state.members)
    assert course.feed(Killed("ann", "again")) == []
    assert course.feed(Resumed()) == effects


def test_what_was_halted_may_still_be_killed():
    course = Course()
    course.feed(Halted("ann", "enough"))
    assert course.feed(Killed("ann", "a recall"))[0] == MarkRelease("new", ReleaseState.RETIRED)


def test_once_closed_it_asks_for_nothing_any_more():
    running = Course()
    running.feed(Closed())
    assert not running.state.is_closed
    for course in (done(), Course()):
        course.feed(Halted("ann", "enough"))
        course.feed(Closed())
        for event in (Resumed(), Seen(Device("late")), Killed("ann", "x"), Tick()):
            assert course.feed(event) == []


def test_after_a_start_of_the_hub_everything_is_asked_for_again():
    course = in_half()
    offers = [Offer(name, "new") for name, each in course.state.members.items() if each.wave <= 1]
    samples = [Sample(offer.device, None) for offer in offers]
    assert course.feed(Resumed()) == [MarkRelease("new", ReleaseState.CANARY), *offers, *samples]
    effects = course.feed(Halted("ann", "enough"))
    assert course.feed(Resumed()) == effects


def test_events_that_come_twice_change_nothing():
    course = in_half()
    name = course.members(1)[0]
    for event in (
        Reported(name, "new", True),
        Lost(name),
        Seen(Device(name)),
        Removed("nobody"),
        Lost("nobody"),
    ):
        course.feed(event)
        before = course.state
        assert course.feed(event) == []
        assert course.state == before
    assert course.feed(Reported("nobody", "new", True)) == []
    assert course.feed(Reported(name, "other", False)) == []


def test_a_removed_device_counts_no_more():
    course = Course()
    (canary,) = course.members(0)
    course.feed(Removed(canary))
    assert tally_of(course.state).devices == 0
    assert course.feed(Tick(), after_s=10**6) == []
    assert course.state.wave == 0


def test_an_empty_fleet_waits_for_somebody():
    course = Course([])
    assert course.first == [MarkRelease("new", ReleaseState.CANARY)]
    assert course.feed(Seen(Device("first"))) == [Offer("first", "new"), Sample("first", MUCH)]


def test_one_rollout_at_a_time_for_a_model_and_group():
    running, halted = Course(group={"site": "a"}, fleet=[]).state, Course()
    halted.feed(Halted("ann", "enough"))
    assert check_start([running, halted.state], "m", {"site": "b"}) is None
    assert check_start([running], "other", {}) is None
    assert "rollout r of model m is running" in check_start([running], "m", {})
    assert check_start([halted.state], "m", {}) is None


def test_the_history_says_who_did_what_and_has_an_end():
    course = done()
    assert [(entry.what, entry.by) for entry in course.state.history][:3] == [
        ("release new for 10 devices", "ann"),
        ("wave 'canary' opened", ""),
        ("wave 'canary' has 1 of 1 devices", ""),
    ]
    course = Course()
    for _ in range(MAX_HISTORY):
        course.feed(Paused("ann"))
        course.feed(Unpaused("ann"))
    assert len(course.state.history) == MAX_HISTORY


def test_what_is_waited_for_reads_as_one_line():
    assert [
        describe(each)
        for each in (
            NeedsReports(3, 4, 10),
            Soaks(59.2),
            NeedsHealth(("a", "b")),
            NeedsQuality("c"),
            NeedsApproval("all"),
        )
    ] == [
        "reports: 3 committed of 4 reached of 10 devices",
        "soaking for 60 s more",
        "health: a; b",
        "quality: c",
        "approval of wave 'all'",
    ]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_failed_share": 1.5},
        {"max_failed_share": 0.2, "min_committed_share": 0.9},
        {"report_within_s": 0.0},
        {"report_within_s": 10.0, "vanished_after_s": 5.0},
    ],
)
def test_limits_out_of_range_are_refused(limits):
    with pytest.raises(ValueError, match="rollout"):
        RolloutLimits(**limits)


def a_sign(name):
    return st.one_of(
        st.builds(
            Seen,
            st.builds(Device, name, is_online=st.booleans(), release=st.sampled_from(["", "old", "new"])),
        ),
        st.builds(Lost, name),
        st.builds(Removed, name),
        st.builds(Reported, name, st.sampled_from(["old", "new"]), st.booleans(), st.just("golden")),
    )


@given(
    signs=st.lists(a_sign(st.sampled_from(["d0", "d1", "d2", "late-1"])), max_size=12),
    is_halted=st.booleans(),
)
def test_what_is_heard_at_one_time_is_what_is_heard_one_after_another(signs, is_halted):
    # Where nothing follows from it: any share may fail, and a paused rollout opens no wave.
    course = Course(fleet=FLEET[:3], waves=(Wave("all", share=1.0),))
    course.state = msgspec.structs.replace(
        course.state, limits=RolloutLimits(max_failed_share=1.0, min_committed_share=0.0)
    )
    course.feed(Halted("ann", "noise") if is_halted else Paused("ann"))
    together, effects = next_state(course.state, Heard(tuple(signs)), now_s=course.now_s)
    for sign in signs:
        course.feed(sign)
    assert (together.members, together.left) == (course.state.members, course.state.left)
    assert {each.device for each in effects} <= {each.device.name for each in signs if isinstance(each, Seen)}


def test_in_which_order_devices_that_answer_at_one_time_are_named_decides_nothing():
    course = Course(
        fleet=[Device(f"d{n}", is_online=False) for n in range(10)], waves=(Wave("all", share=1.0),)
    )
    reports = tuple(Reported(f"d{n}", "new", n > 0, "golden" if not n else "") for n in range(10))
    # Nobody was seen with the offer: the first one alone would be one of one.
    course.feed(Heard(reports))
    assert course.state.phase is Phase.RUNNING
    assert tally_of(course.state) == Tally(10, 10, 9, 1, 0)


def test_a_device_that_was_gone_goes_back_to_what_it_ran_before():
    course = in_half()
    (canary,) = course.members(0)
    course.feed(Removed(canary))
    assert canary not in course.state.members
    course.feed(Halted("ann", "noise"))
    assert course.feed(Seen(Device(canary, release="new"))) == [TakeBack(canary, "old"), Sample(canary, None)]


def test_a_device_that_was_gone_shows_what_the_open_wave_wants_of_it():
    course = Course()
    (canary,) = course.members(0)
    course.feed(Removed(canary))
    assert course.feed(Seen(Device(canary, release="new"))) == [Sample(canary, MUCH)]


def test_what_a_device_answered_before_it_was_gone_counts_again_and_so_does_what_it_says_meanwhile():
    course = in_half()
    half = course.members(1)
    course.feed(Reported(half[0], "new", True))
    course.feed(Removed(half[0]))
    course.feed(Removed(half[1]))
    course.feed(Removed(half[2]))
    assert tally_of(course.state) == Tally(2, 2, 1, 0, 0)
    course.feed(Reported(half[1], "new", True))
    course.feed(Heard(tuple(Seen(Device(name, release="new")) for name in half[:3])))
    assert tally_of(course.state) == Tally(5, 5, 3, 0, 0)
    assert course.state.left == {}


def test_the_time_to_answer_of_a_device_that_was_gone_begins_anew():
    course = Course()
    (canary,) = course.members(0)
    course.feed(Removed(canary), after_s=900)
    course.feed(Seen(Device(canary, release="new")), after_s=6000)
    course.feed(Tick(), after_s=999)
    assert course.state.phase is Phase.RUNNING
    course.feed(Tick(), after_s=1)
    assert course.state.history[-1].what == "halted: 1 of 1 devices failed, 1 of them silent"


def test_a_canary_that_was_gone_opens_no_wave_unjudged():
    course = Course()
    (canary,) = course.members(0)
    course.feed(Removed(canary))
    course.feed(Seen(Device(canary, release="new")))
    course.feed(Tick(), after_s=500)
    assert course.waits == [NeedsReports(0, 1, 1), NeedsQuality("not judged yet")]


def test_a_device_that_got_the_release_by_another_rollout_goes_back_to_what_it_ran_before_that():
    fleet = [Device("d0", release="new"), Device("d1", release="new"), Device("d2", release="old")]
    course = Course(
        fleet=fleet, waves=(Wave("all", share=1.0),), came_from={"d0": "older", "d2": "no matter"}
    )
    back = course.feed(Halted("ann", "noise"))
    assert [each for each in back if isinstance(each, TakeBack)] == [
        TakeBack("d0", "older"),
        TakeBack("d1", None),
        TakeBack("d2", "old"),
    ]
    assert course.state.ways_back == {"older", "old"}


def test_a_state_of_before_devices_were_remembered_is_read():
    state = Course().state
    written = msgspec.json.decode(msgspec.json.encode(state))
    del written["left"]
    assert msgspec.json.decode(msgspec.json.encode(written), type=RolloutState) == state


class RolloutMachine(RuleBasedStateMachine):
    """A hub that is killed between any two effects, and a world that does what it is asked."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.todo = []
        self.desired = {}
        self.sampling = {}
        self.mark = None
        self.seen = {device.name for device in FLEET}
        self.passed = False
        self.well_s = None

    @initialize(online=st.lists(st.booleans(), min_size=10, max_size=10))
    def it_begins(self, online):
        fleet = [
            msgspec.structs.replace(device, is_online=there)
            for device, there in zip(FLEET, online, strict=True)
        ]
        self.state, self.todo = begin(
            "r", model="m", release="new", previous="old", waves=WAVES, fleet=fleet,
            now_s=self.now_s, by="ann", limits=LIMITS, is_common=True,
        )  # fmt: skip

    def feed(self, event):
        before = self.state
        state, effects = next_state(before, event, now_s=self.now_s)
        self.state = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=RolloutState)
        self.todo += effects
        if event == Judged(PASS):
            self.passed = True
        if event == HealthJudged(WELL):
            self.well_s = self.now_s
        assert self.state.wave in {before.wave, before.wave + 1}
        if self.state.wave > before.wave >= 0 or self.state.phase is Phase.DONE is not before.phase:
            self.check_that_everything_was_there(before)
            self.passed, self.well_s = False, None
        if self.state.phase is Phase.PAUSED and event != Resumed():
            assert not any(isinstance(effect, Offer) for effect in effects)
        if before.phase is Phase.HALTED:
            assert self.state.phase is Phase.HALTED
            assert not any(isinstance(effect, Offer) for effect in effects)

    def check_that_everything_was_there(self, before):
        assert before.phase in {Phase.RUNNING, Phase.PAUSED}
        enough_s = self.now_s if before.enough_s is None else before.enough_s
        soaked_s = enough_s + WAVES[before.wave].soak_s
        assert self.passed
        assert self.well_s is not None
        assert soaked_s <= self.well_s <= self.now_s
        assert before.wave + 1 != 2 or 2 in self.state.approved

    def carry_out(self):
        match self.todo.pop(0):
            case Offer(device, release) | TakeBack(device, release):
                self.desired[device] = release
            case Sample(device, sampling):
                self.sampling[device] = sampling
            case MarkRelease(_, mark):
                self.mark = mark

    @precondition(lambda self: self.todo)
    @rule()
    def something_is_carried_out(self):
        self.carry_out()

    @rule()
    def everything_is_carried_out(self):
        while self.todo:
            self.carry_out()

    @rule()
    def the_hub_is_killed(self):
        self.todo = []
        self.feed(Resumed())

    @rule(seconds=st.sampled_from([1.0, 150.0, 350.0, 2000.0]))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.feed(Tick())

    @rule(
        name=st.sampled_from([*(device.name for device in FLEET), "late-1", "late-2"]), online=st.booleans()
    )
    def somebody_comes_or_goes(self, name, online):
        self.seen.add(name)
        self.feed(Seen(self.device(name)) if online else Lost(name))

    def device(self, name):
        """As the roster has it."""
        return Device(name, release=self.desired.get(name, "" if name.startswith("late") else "old"))

    @rule(name=st.sampled_from([*(device.name for device in FLEET), "late-1"]), returns=st.booleans())
    def somebody_is_of_the_fleet_no_more(self, name, returns):
        # Effects are carried out, or lost with the hub, before it hears of anything else.
        self.everything_is_carried_out()
        before = self.state.members.get(name)
        self.feed(Removed(name))
        if returns and before is not None:
            self.feed(Seen(self.device(name)))
            self.everything_is_carried_out()
            # Who was to run nothing got what the group runs, and is to run that now.
            assert self.state.members[name].before == before.before or not before.is_offered

    @rule(share_failed=st.sampled_from([0, 0, 0, 0, 1]), committed=st.booleans(), together=st.booleans())
    def boards_report(self, share_failed, committed, together):
        reports = []
        for n, (name, member) in enumerate(self.state.members.items()):
            if self.desired.get(name) == "new" and member.online_since_s is not None:
                reports.append(Reported(name, "new", not (share_failed and n % 3 == 0)))
            elif self.desired.get(name) == "old":
                reports.append(Reported(name, "old", committed))
        for each in [Heard(tuple(reports))] if together else reports:
            self.feed(each)

    @rule(
        event=st.sampled_from(
            [Judged(PASS), Judged(UNDECIDED), HealthJudged(WELL), HealthJudged(BLIND), Approved("bob", 2)]
        )
    )
    def something_is_found(self, event):
        self.feed(event)

    @rule(
        event=st.sampled_from(
            [Judged(HALT), HealthJudged(SICK), Halted("a", "x"), Killed("a", "x"), Paused("a"), Unpaused("a")]
        ),
        often=st.integers(0, 5),
    )
    def something_rare_happens(self, event, often):
        if not often:
            self.feed(event)

    @rule()
    def a_wave_goes_well(self):
        self.everything_is_carried_out()
        for name, member in list(self.state.members.items()):
            if member.is_offered and member.online_since_s is not None:
                self.feed(Reported(name, "new", True))
        self.feed(Judged(PASS))
        self.now_s += 350.0
        self.feed(HealthJudged(WELL))

    @invariant()
    def once_all_is_done_every_device_should_run_what_the_state_says(self):
        if not hasattr(self, "state") or self.todo:
            return
        members = self.state.members
        offered = {name for name, each in members.items() if each.is_offered}
        for name, member in members.items():
            is_new = name in offered and self.state.phase is not Phase.HALTED
            assert self.desired.get(name, member.before) == ("new" if is_new else "old")
        assert {name for name, each in self.sampling.items() if each and name in members} == (
            offered if self.state.sampling else set()
        )

    @invariant()
    def an_open_wave_has_offers_for_all_its_devices_and_a_closed_one_for_none(self):
        if hasattr(self, "state"):
            for member in self.state.members.values():
                if self.state.phase in {Phase.RUNNING, Phase.DONE}:
                    assert member.is_offered is (member.wave <= self.state.wave)
                else:
                    assert not member.is_offered or member.wave <= self.state.wave

    @invariant()
    def it_is_done_only_when_enough_devices_are_and_too_many_failures_halt(self):
        if hasattr(self, "state") and self.state.is_widening:
            tally = tally_of(self.state)
            assert tally.failed <= LIMITS.max_failed_share * tally.reached


TestRolloutMachine = RolloutMachine.TestCase
TestRolloutMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
