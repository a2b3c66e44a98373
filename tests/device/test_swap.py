"""How a board changes its bundle and goes back: event by event, and with the power cut anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from edge_daemon.core.swap import (
    FIRST_BAR_S,
    LONGEST_BAR_S,
    MAX_BARS,
    MAX_CRASHES,
    MAX_ENDS,
    MAX_LAPSED_BARS,
    MAX_POWER_CUTS,
    MAX_RAN,
    next_due_s,
    next_state,
)
from edge_daemon.core.swap_events import (
    FOR_GOOD,
    Abandon,
    Answered,
    CheckSpace,
    Delivered,
    Desired,
    Download,
    Downloaded,
    Failed,
    Failure,
    GiveUp,
    Keep,
    NotServing,
    Report,
    RevertAsked,
    RunTrial,
    Serve,
    Serving,
    SpaceChecked,
    Started,
    Stopping,
    Tick,
    TrialPassed,
    Verified,
    Verify,
)
from edge_daemon.core.swap_state import Bar, End, Phase, SwapLimits, SwapState, serving_after_start
from edge_daemon.releases.state_file import MAX_STATE_BYTES

LIMITS = SwapLimits(
    probation_samples=100, min_probation_s=60.0, max_probation_s=1000.0, max_failed_share=0.02
)
WISH = Desired("r2", "new", 1000)


class Course:
    """Feeds events one after another; `feed` returns the effects. Every state is read back as from a disk."""

    def __init__(self, state=None):
        self.state = state or SwapState("old", release="r1")
        self.now_s = 100.0

    def feed(self, event, *, after_s=0.0):
        self.now_s += after_s
        state, effects = next_state(self.state, event, now_s=self.now_s, limits=LIMITS)
        self.state = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=SwapState)
        assert self.state == state
        return effects


def started(state=None):
    course = Course(state)
    course.feed(Started("boot-a"))
    course.feed(Serving(course.state.live))
    return course


def fetched():
    course = started()
    course.feed(WISH)
    course.feed(SpaceChecked(1, 1000))
    course.feed(Downloaded(1))
    return course


def verified():
    course = fetched()
    course.feed(Verified(1))
    return course


def on_trial():
    course = verified()
    course.feed(TrialPassed(1))
    return course


def on_probation():
    course = on_trial()
    course.feed(Serving("new"))
    return course


def committed():
    course = on_probation()
    course.feed(Answered("new", 100, 0), after_s=60)
    assert course.state.live == "new"
    course.feed(Delivered(1))
    return course


def failure_of(course):
    return course.state.ends[-1].failure


def test_the_way_of_a_good_bundle():
    course = Course()
    assert course.feed(Started("boot-a")) == [Serve("old")]
    assert course.feed(Serving("old")) == [Keep(("old",))]
    assert course.feed(WISH) == [Keep(("old", "new")), CheckSpace(1)]
    assert course.feed(SpaceChecked(1, 1000)) == [Download(1, "r2", "new")]
    assert course.feed(Downloaded(1)) == [Verify(1, "r2", "new")]
    assert course.feed(Verified(1)) == [RunTrial(1, "new", "old")]
    assert course.feed(TrialPassed(1)) == [Serve("new")]
    assert course.feed(Serving("new")) == []
    assert course.feed(Answered("new", 100, 0), after_s=59) == []
    assert course.feed(Answered("new", 1, 0), after_s=1) == [Keep(("new", "old")), Report(1)]
    assert course.state == SwapState(
        "new",
        release="r2",
        previous="old",
        wish=course.state.wish,
        is_wish_settled=True,
        number=1,
        ends=(End(1, "r2", "new", None, "101 samples"),),
        machine_boot="boot-a",
        ran=("old", "new"),
    )
    assert course.feed(Delivered(1)) == []
    assert course.state.ends == ()


def test_what_the_hub_wants_is_told_again_and_again_and_done_once():
    course = fetched()
    assert course.feed(WISH) == []
    course = committed()
    assert course.feed(WISH) == []
    assert course.feed(Tick(), after_s=10**6) == []


def test_a_hub_that_learns_the_size_of_a_release_wants_nothing_new():
    course = committed()
    course.feed(RevertAsked())
    course.feed(Serving("old"))
    assert course.state.is_wish_settled
    before = course.state
    assert course.feed(Desired("r2", "new", 0)) == []
    assert course.feed(WISH) == []
    assert course.state == before


def test_a_wish_for_what_is_live_is_reported_and_nothing_is_done():
    course = started()
    assert course.feed(Desired("r1", "old", 1000)) == [Report(1)]
    assert course.state.ends == (End(1, "r1", "old", None),)


def test_without_room_nothing_is_fetched():
    course = started()
    course.feed(WISH)
    assert course.feed(SpaceChecked(1, 999)) == [Abandon(1), Serve("old"), Report(1)]
    assert course.state.ends == (End(1, "r2", "new", Failure.SPACE, "1000 bytes needed, 999 free"),)
    assert course.feed(Serving("old")) == [Keep(("old",))]


def test_the_third_bundle_on_disk_goes_before_another_is_fetched():
    course = committed()
    assert course.feed(Desired("r3", "newer", 5)) == [Keep(("new", "newer")), CheckSpace(2)]
    assert course.state.previous is None


@pytest.mark.parametrize("failure", sorted(FOR_GOOD))
def test_a_bundle_that_is_not_what_was_signed_or_computes_otherwise_is_never_tried_again(failure):
    course = fetched() if failure is Failure.INTEGRITY else verified()
    assert course.feed(Failed(1, failure)) == [Abandon(1), Serve("old"), Report(1)]
    assert course.state.bars == {"new": Bar(failure, None, 1)}
    assert course.feed(Tick(), after_s=10**9) == []
    assert next_due_s(course.state, LIMITS) is None
    assert course.feed(Desired("r3", "new", 1000)) == [Report(2)]
    assert course.state.ends[-1] == End(2, "r3", "new", Failure.BARRED, f"failed before: {failure}")
    assert course.feed(Tick(), after_s=10**9) == []


def test_other_failures_are_tried_again_after_a_running_time_that_doubles():
    course = started()
    course.feed(WISH)
    waits = []
    for attempt in range(1, 13):
        course.feed(Failed(attempt, Failure.DOWNLOAD))
        until_s = next_due_s(course.state, LIMITS)
        waits.append(until_s - course.now_s)
        assert course.feed(Tick(), after_s=waits[-1] - 1) == []
        assert course.feed(Tick(), after_s=1) == [Keep(("old", "new")), CheckSpace(attempt + 1)]
    assert waits == [min(FIRST_BAR_S * 2**n, LONGEST_BAR_S) for n in range(12)]


def test_a_commit_forgets_that_the_bundle_failed_before():
    course = started()
    course.feed(WISH)
    course.feed(Failed(1, Failure.DOWNLOAD))
    course.feed(Tick(), after_s=FIRST_BAR_S)
    for event in (SpaceChecked(2, 1000), Downloaded(2), Verified(2), TrialPassed(2), Serving("new")):
        course.feed(event)
    course.feed(Answered("new", 100, 0), after_s=60)
    assert (course.state.live, course.state.bars) == ("new", {})


def test_too_many_failed_live_samples_revert_at_once():
    course = on_probation()
    assert course.feed(Answered("new", 20, 2), after_s=1) == []
    assert course.feed(Answered("new", 1, 1), after_s=1) == [Abandon(1), Serve("old"), Report(1)]
    assert course.state.ends == (End(1, "r2", "new", Failure.PROBATION, "3 of 21 samples failed"),)


def test_what_the_old_bundle_answers_is_no_probation():
    course = on_trial()
    assert course.feed(Answered("old", 1000, 1000)) == []
    course.feed(Serving("new"))
    assert course.feed(Answered("old", 1000, 1000), after_s=100) == []
    assert course.state.attempt.samples == 0


def test_a_sensor_that_hardly_speaks_ends_probation_all_the_same():
    course = on_probation()
    assert next_due_s(course.state, LIMITS) == 1100.0
    course.feed(Answered("new", 3, 0))
    assert course.feed(Tick(), after_s=999) == []
    assert course.feed(Tick(), after_s=1) == [Keep(("new", "old")), Report(1)]
    course = on_probation()
    course.feed(Answered("new", 3, 1))
    course.feed(Tick(), after_s=1000)
    assert failure_of(course) is Failure.PROBATION


def test_a_bundle_that_does_not_load_in_the_daemon_leaves_the_old_one_serving():
    course = on_trial()
    assert course.feed(NotServing("new", "no memory")) == [Abandon(1), Serve("old"), Report(1)]
    assert failure_of(course) is Failure.LOAD


@pytest.mark.parametrize("place", [fetched, verified, on_trial, on_probation])
def test_the_third_crash_without_a_boot_in_between_reverts(place):
    course = place()
    for _ in range(MAX_CRASHES):
        course.feed(Started("boot-a"))
        assert course.state.attempt is not None
    assert course.feed(Started("boot-a")) == [Serve("old"), Report(1)]
    assert failure_of(course) is Failure.CRASH
    assert course.state.bars["new"].until_s == course.now_s + FIRST_BAR_S


def test_a_crash_starts_probation_anew_and_a_power_cut_does_not():
    course = on_probation()
    course.feed(Answered("new", 90, 0), after_s=50)
    course.feed(Started("boot-b"))
    course.feed(Serving("new"))
    assert (course.state.attempt.samples, course.state.attempt.probation_since_s) == (90, 100.0)
    course.feed(Started("boot-b"))
    course.feed(Serving("new"), after_s=1)
    assert (course.state.attempt.samples, course.state.attempt.probation_since_s) == (0, 151.0)


def test_power_cuts_do_not_count_as_crashes():
    course = on_probation()
    for n in range(MAX_POWER_CUTS):
        assert course.feed(Started(f"boot-{n}")) == [Serve("new")]
    assert (course.state.attempt.crashes, course.state.attempt.power_cuts) == (0, MAX_POWER_CUTS)


def test_a_bundle_that_takes_the_board_down_again_and_again_is_found_out():
    course = verified()
    for n in range(MAX_POWER_CUTS + 1):
        course.feed(Started(f"boot-{n}"))
    assert failure_of(course) is Failure.POWER


def test_a_stop_that_was_asked_for_is_no_crash():
    course = on_probation()
    for _ in range(3 * MAX_CRASHES):
        assert course.feed(Stopping()) == []
        assert course.feed(Started("boot-a")) == [Serve("new")]
    assert course.state.attempt.crashes == 0


@pytest.mark.parametrize("boot", ["boot-a", "boot-b"])
def test_a_stop_that_the_disk_did_not_take_is_no_crash_and_no_power_cut(boot):
    course = on_probation()
    before = course.state.attempt
    for _ in range(MAX_POWER_CUTS + 1):
        effects = course.feed(Started(boot, was_stopped=True))
        assert effects == [Serve("new")]
        course.feed(Serving("new"))
    assert course.state.attempt == before
    # What comes after it counts as ever.
    for _ in range(MAX_CRASHES + 1):
        course.feed(Started(boot))
    assert failure_of(course) is Failure.CRASH


def test_a_crash_during_a_download_is_nobodys_fault_and_the_download_goes_on():
    course = started()
    course.feed(WISH)
    course.feed(SpaceChecked(1, 1000))
    for _ in range(3 * MAX_CRASHES):
        assert course.feed(Started("boot-a")) == [Serve("old"), Keep(("old", "new")), CheckSpace(1)]
    assert course.feed(SpaceChecked(1, 1000)) == [Download(1, "r2", "new")]


def test_after_a_start_everything_goes_on_where_it_was():
    assert fetched().feed(Started("boot-b")) == [Serve("old"), Verify(1, "r2", "new")]
    assert verified().feed(Started("boot-b")) == [Serve("old"), RunTrial(1, "new", "old")]
    assert on_trial().feed(Started("boot-b")) == [Serve("new")]
    assert on_probation().feed(Started("boot-b")) == [Serve("new")]
    assert committed().feed(Started("boot-b")) == [Serve("new")]


def test_a_report_that_was_not_delivered_is_made_again_and_rolls_nothing_back():
    course = on_probation()
    course.feed(Answered("new", 100, 0), after_s=60)
    for _ in range(3 * MAX_CRASHES):
        assert course.feed(Started("boot-a")) == [Serve("new"), Report(1)]
        assert course.feed(Serving("new")) == [Keep(("new", "old"))]
        assert course.state.live == "new"
    course.feed(Delivered(1))
    assert course.feed(Started("boot-a")) == [Serve("new")]


@pytest.mark.parametrize("place", [fetched, verified, on_trial, on_probation])
def test_another_wish_ends_the_attempt_and_bars_nothing(place):
    course = place()
    assert course.feed(Desired("r3", "newer", 7)) == [
        Abandon(1),
        Serve("old"),
        Report(1),
        Keep(("old", "newer")),
        CheckSpace(2),
    ]
    assert (failure_of(course), course.state.bars) == (Failure.SUPERSEDED, {})
    assert course.feed(Downloaded(1)) == []
    assert course.feed(NotServing("new")) == []
    assert course.state.attempt.number == 2


def test_the_hub_takes_a_release_back_while_it_is_on_probation():
    course = on_probation()
    assert course.feed(Desired("r1", "old", 1000)) == [Abandon(1), Serve("old"), Report(1), Report(2)]
    assert course.state.ends[-1] == End(2, "r1", "old", None)


def test_the_hub_takes_a_committed_release_back_without_a_download():
    course = committed()
    assert course.feed(Desired("r1", "old", 1000)) == [Verify(2, "r1", "old")]
    assert course.feed(Verified(2)) == [RunTrial(2, "old", None)]
    assert course.feed(TrialPassed(2)) == [Serve("old")]
    course.feed(Serving("old"))
    assert course.feed(Answered("old", 100, 0), after_s=60) == [Keep(("old", "new")), Report(2)]
    assert (course.state.live, course.state.release, course.state.previous) == ("old", "r1", "new")


def test_a_bundle_that_proved_itself_here_comes_back_two_steps_without_being_compared():
    course = committed()
    for number, bundle in ((2, "newer"), (3, "new")):
        course.feed(Desired(f"r-{bundle}", bundle, 1000))
        if bundle == "newer":
            course.feed(SpaceChecked(number, 1000))
            course.feed(Downloaded(number))
        course.feed(Verified(number))
        course.feed(TrialPassed(number))
        course.feed(Serving(bundle))
        course.feed(Answered(bundle, 100, 0), after_s=60)
        course.feed(Delivered(number))
    assert course.feed(Desired("r1", "old", 1000)) == [Keep(("new", "old")), CheckSpace(4)]
    course.feed(SpaceChecked(4, 1000))
    course.feed(Downloaded(4))
    assert course.feed(Verified(4)) == [RunTrial(4, "old", None)]


def test_only_the_last_bundles_that_proved_themselves_are_known():
    course = started(SwapState("b0", ran=tuple(f"b{number}" for number in range(MAX_RAN))))
    course.feed(Desired("r", "b0", 1000))
    course.feed(WISH)
    course.feed(SpaceChecked(2, 1000))
    course.feed(Downloaded(2))
    course.feed(Verified(2))
    course.feed(TrialPassed(2))
    course.feed(Serving("new"))
    course.feed(Answered("new", 100, 0), after_s=60)
    assert course.state.ran == (*(f"b{number}" for number in range(2, MAX_RAN)), "b0", "new")


def test_a_damaged_copy_of_the_bundle_before_is_fetched_again_and_not_barred():
    course = committed()
    course.feed(Desired("r1", "old", 1000))
    assert course.feed(Failed(2, Failure.INTEGRITY)) == [Keep(("new",)), CheckSpace(2)]
    assert course.feed(SpaceChecked(2, 1000)) == [Download(2, "r1", "old")]
    course.feed(Downloaded(2))
    again = Course(course.state)
    assert again.feed(Verified(2)) == [RunTrial(2, "old", None)]
    course.feed(Failed(2, Failure.INTEGRITY))
    assert course.state.bars == {"old": Bar(Failure.INTEGRITY, None, 1)}


def test_somebody_at_the_board_goes_back_and_the_hubs_wish_rests_until_it_changes():
    course = committed()
    assert course.feed(RevertAsked()) == [Serve("old"), Report(2)]
    assert course.feed(Serving("old")) == [Keep(("old", "new"))]
    assert course.state.ends == (End(2, "r2", "new", Failure.ASKED),)
    assert course.feed(Tick(), after_s=10**9) == []
    assert course.feed(WISH) == []
    assert course.feed(Desired("r3", "newer", 7)) == [Keep(("old", "newer")), CheckSpace(3)]


def test_somebody_at_the_board_ends_an_attempt():
    course = on_probation()
    assert course.feed(RevertAsked()) == [Abandon(1), Serve("old"), Report(1)]
    assert course.feed(Tick(), after_s=10**9) == []


def test_there_is_nothing_to_go_back_to_on_a_new_board():
    assert started().feed(RevertAsked()) == []


def test_when_the_live_bundle_is_damaged_the_one_before_serves_and_the_live_one_is_fetched_again():
    course = committed()
    course.feed(Started("boot-b"))
    assert course.feed(NotServing("new", "bit rot")) == [
        Keep(("old",)),
        Serve("old"),
        Keep(("old", "new")),
        CheckSpace(2),
    ]


def test_with_nothing_that_serves_the_daemon_gives_up():
    course = started()
    assert course.feed(NotServing("old", "bit rot")) == [GiveUp("bit rot")]
    course = verified()
    course.feed(Started("boot-b"))
    assert course.feed(NotServing("old", "bit rot")) == []
    course.feed(Failed(1, Failure.GOLDEN))
    assert course.feed(NotServing("old", "bit rot")) == [GiveUp("bit rot")]


def test_answers_of_another_attempt_and_answers_that_come_twice_change_nothing():
    for place in (fetched, verified, on_trial, on_probation, committed):
        course = place()
        before = course.state
        for event in (
            SpaceChecked(1, 0),
            Downloaded(1),
            Downloaded(7),
            Verified(7),
            Failed(7, Failure.CRASH),
        ):
            assert course.feed(event) == []
            assert course.state == before
    assert verified().feed(Verified(1)) == []
    assert on_trial().feed(TrialPassed(1)) == []


def test_what_is_remembered_has_an_end():
    course = started()
    for n in range(300):
        course.feed(Desired(f"r{n}", f"b{n}", 1))
        course.feed(Failed(course.state.number, Failure.DOWNLOAD), after_s=2 * FIRST_BAR_S)
    assert len(course.state.ends) == MAX_ENDS
    assert len(course.state.bars) <= MAX_LAPSED_BARS + 2


def test_a_hub_that_offers_bad_bundles_without_end_fills_no_state():
    course = started()
    for n in range(MAX_BARS + 10):
        course.feed(Desired(f"r{n}", f"{n:064x}", 1))
        course.feed(Failed(course.state.number, Failure.INTEGRITY))
    assert list(course.state.bars) == [f"{n:064x}" for n in range(10, MAX_BARS + 10)]
    assert len(msgspec.json.encode(course.state)) < MAX_STATE_BYTES // 4


def test_a_bundle_that_fails_once_more_is_no_longer_among_the_oldest():
    course = started()
    for bundle in ("a", "b", "a"):
        course.feed(Desired("r", bundle, 1), after_s=FIRST_BAR_S)
        course.feed(Failed(course.state.number, Failure.DOWNLOAD))
    assert list(course.state.bars) == ["b", "a"]


@dataclass
class Board:
    """What a power cut spares: the state as last written, bundles on disk."""

    state: SwapState
    disk: set = field(default_factory=set)


FAULTS = {
    "good": None,
    "torn": Failure.INTEGRITY,
    "odd": Failure.GOLDEN,
    "slow": Failure.LATENCY,
    "killer": Failure.CRASH,
    "heavy": Failure.LOAD,
    "flaky": Failure.PROBATION,
}


class SwapMachine(RuleBasedStateMachine):
    """A board whose effects are carried out one at a time, and which may be killed between any two."""

    def __init__(self):
        super().__init__()
        self.board = Board(SwapState("old"), {"old"})
        self.now_s = 0.0
        self.boot = 0
        self.todo = []
        self.serving = None
        self.is_up = False
        self.ended = {}
        self.tried = set()
        self.gave_up = False

    @initialize()
    def power_on(self):
        self.start(is_new_boot=True)

    def start(self, *, is_new_boot):
        self.boot += is_new_boot
        self.todo, self.serving, self.is_up = [], None, True
        self.feed(Started(f"boot-{self.boot}"))

    def feed(self, event):
        before = self.board.state
        state, effects = next_state(before, event, now_s=self.now_s, limits=LIMITS)
        for end in state.ends:
            if end.attempt > before.number or end.attempt not in self.ended:
                # Every attempt ends once, one way.
                assert self.ended.setdefault(end.attempt, end) is end
            assert self.ended[end.attempt] == end
        self.board.state = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=SwapState)
        self.todo += effects
        for effect in effects:
            if isinstance(effect, Download | RunTrial):
                assert not self.bars_for(effect.bundle)

    def bars_for(self, bundle):
        bar = self.board.state.bars.get(bundle)
        return bar is not None and (bar.until_s is None or self.now_s < bar.until_s)

    def carry_out(self, effect):
        fault = FAULTS.get(self.bundle_of(effect))
        attempt = getattr(effect, "attempt", None)
        match effect:
            case Keep():
                self.board.disk &= set(effect.bundles)
            case CheckSpace():
                self.feed(SpaceChecked(attempt, 1000))
            case Download():
                self.board.disk.add(effect.bundle)
                self.feed(Downloaded(attempt))
            case Verify():
                assert effect.bundle in self.board.disk or attempt != self.number()
                self.feed(Failed(attempt, fault) if fault is Failure.INTEGRITY else Verified(attempt))
            case RunTrial():
                is_seen = fault in {Failure.GOLDEN, Failure.LATENCY}
                self.feed(Failed(attempt, fault) if is_seen else TrialPassed(attempt))
            case Serve():
                self.serve(effect.bundle, fault)
            case Report():
                self.feed(Delivered(attempt))
            case GiveUp():
                self.gave_up = True

    def serve(self, bundle, fault):
        if fault is Failure.LOAD or bundle not in self.board.disk:
            self.feed(NotServing(bundle))
        elif fault is Failure.CRASH:
            self.start(is_new_boot=False)
        else:
            self.serving = bundle
            self.feed(Serving(bundle))

    def bundle_of(self, effect):
        return getattr(effect, "bundle", None)

    def number(self):
        attempt = self.board.state.attempt
        return None if attempt is None else attempt.number

    @precondition(lambda self: self.todo)
    @rule()
    def something_is_carried_out(self):
        self.carry_out(self.todo.pop(0))

    @precondition(lambda self: self.todo)
    @rule()
    def everything_is_carried_out(self):
        for _ in range(100):
            if not self.todo:
                return
            self.carry_out(self.todo.pop(0))
        raise AssertionError(f"it never comes to rest: {self.board.state}")

    @precondition(lambda self: len(self.todo) > 1)
    @rule(data=st.data())
    def something_that_takes_no_time_overtakes(self, data):
        # Downloads and children run beside everything else: only their answers come late.
        late = [i for i, each in enumerate(self.todo) if isinstance(each, Download | RunTrial | Report)]
        if late:
            self.todo.append(self.todo.pop(data.draw(st.sampled_from(late))))

    @rule(is_new_boot=st.booleans())
    def it_is_killed(self, is_new_boot):
        self.start(is_new_boot=is_new_boot)

    @rule(bundle=st.sampled_from([*FAULTS, "old"]), n=st.integers(0, 2))
    def the_hub_wants(self, bundle, n):
        self.feed(Desired(f"r{n}-{bundle}", bundle, 1000))

    @rule()
    def somebody_goes_back(self):
        self.feed(RevertAsked())

    @rule(seconds=st.sampled_from([1.0, 70.0, 5000.0]))
    def time_passes(self, seconds):
        self.now_s += seconds
        if self.serving:
            failed = 10 if FAULTS.get(self.serving) is Failure.PROBATION else 0
            self.feed(Answered(self.serving, 50, failed))
        self.feed(Tick())

    @invariant()
    def at_most_two_bundles_are_on_disk_and_the_live_one_is_there(self):
        assert len(self.board.disk) <= 2
        assert self.board.state.live in self.board.disk
        assert serving_after_start(self.board.state) in self.board.disk

    @invariant()
    def only_a_bundle_that_proved_itself_is_live(self):
        assert FAULTS.get(self.board.state.live) is None

    @invariant()
    def once_all_is_done_what_should_serve_serves(self):
        assert not self.gave_up
        if self.is_up and not self.todo:
            assert self.serving == serving_after_start(self.board.state)

    def teardown(self):
        """Left alone for long enough, with what the hub wants for good, it ends there."""
        self.feed(Desired("last", "good", 1000))
        for _ in range(2000):
            if self.board.state.live == "good" and not self.todo and self.serving == "good":
                break
            if self.todo:
                self.carry_out(self.todo.pop(0))
            else:
                self.time_passes(5000.0)
        assert (self.serving, self.board.state.live, self.board.state.attempt) == ("good", "good", None)
        assert self.board.disk <= {"good", self.board.state.previous}


TestSwapMachine = SwapMachine.TestCase
TestSwapMachine.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_state_of_the_disk_is_read_as_it_was_written():
    state = replace(on_probation().state, bars={"x": Bar(Failure.CRASH, 5.0, 2)}, is_stopped=True)
    assert msgspec.json.decode(msgspec.json.encode(state), type=SwapState) == state
    assert state.attempt.phase is Phase.TRIAL
