"""The rules of rounds, event by event: whole lists of effects, no thread, no clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_daemon.core.rounds import (
    BAD_BASES_A_ROUND,
    BASE_PATIENCE_S,
    CLEARED_GRACE_S,
    LONGEST_OFFER_S,
    LOOK_AGAIN_S,
    OFFER_SPREAD_S,
    REMEMBERED_FAILURES,
    REMEMBERED_ROUNDS,
    SLOW_LINK_BYTES_PER_S,
    STARTS_A_ROUND,
    TRAININGS_A_ROUND,
    RoundLimits,
    RoundsState,
    examples_wanted,
    next_due_s,
    next_state,
)
from edge_daemon.core.rounds_events import (
    AppendUpdate,
    BaseArrived,
    BaseFailed,
    Cleared,
    Declined,
    Note,
    Offered,
    Phase,
    RequestBase,
    StartTraining,
    StopTraining,
    Survey,
    Surveyed,
    Tick,
    TrainingDone,
    TrainingFailed,
    UpdateNotStored,
    UpdateSettled,
    UpdateStored,
)
from edge_daemon.core.vitals import Vitals, VitalsLimits, decide_may_train
from tests.device.rounds_cases import Ceiling, terms

LIMITS = RoundLimits(max_passes=1000)
READY = Surveyed(50, None, has_base=True)
NO_BASE = Surveyed(50, None, has_base=False)
HOT = Surveyed(50, "90 degrees", has_base=True)


class Course:
    """Feeds events one after another; `feed` returns the effects."""

    def __init__(self):
        self.state = RoundsState()
        self.now_s = 100.0

    def feed(self, event, *, after_s=0.0):
        self.now_s += after_s
        self.state, effects = next_state(self.state, event, now_s=self.now_s, limits=LIMITS, rng=Ceiling())
        return effects

    def offered(self, of=None, seconds_left=600.0):
        of = of or terms()
        assert self.feed(Offered(of, seconds_left)) == []
        assert self.feed(Tick(), after_s=OFFER_SPREAD_S) == [Survey(of)]
        return self

    def training(self, of=None):
        of = of or terms()
        self.offered(of)
        assert self.feed(READY) == [StartTraining(of, 100, 700.0)]
        return self


def test_a_board_with_examples_and_base_trains_and_sends_one_update():
    course = Course().training()
    assert course.feed(TrainingDone()) == [AppendUpdate()]
    assert course.feed(UpdateStored()) == []
    assert course.state.phase is Phase.APPENDED
    assert course.feed(UpdateSettled()) == []
    assert (course.state.phase, course.state.voted) == (Phase.IDLE, ("round-1",))


def test_an_offer_that_comes_again_after_the_vote_is_not_taken_up():
    course = Course().training()
    course.feed(TrainingDone())
    course.feed(UpdateStored())
    for _ in range(2):
        assert course.feed(Offered(terms(), 500.0)) == []
        assert course.feed(Tick(), after_s=10.0) == []
    assert course.feed(Cleared()) == []
    assert course.feed(Tick(), after_s=CLEARED_GRACE_S) == []
    assert course.feed(Offered(terms(), 500.0)) == []
    assert next_due_s(course.state) is None


def test_an_offer_that_comes_again_during_training_disturbs_nothing():
    course = Course().training()
    assert course.feed(Offered(terms(), 100.0)) == []
    assert course.state.phase is Phase.TRAINING
    assert course.state.offer.ends_at_s == 202.0


def test_an_offer_that_is_replaced_stops_the_training():
    course = Course().training()
    assert course.feed(Offered(terms("round-2"), 60.0)) == [
        StopTraining("replaced"),
        Note(Declined.REPLACED, "round round-1"),
    ]
    assert course.feed(TrainingDone()) == []
    assert course.state.voted == ()


def test_an_offer_that_is_taken_back_stops_the_training_once_it_does_not_come_again():
    course = Course().training()
    assert course.feed(Cleared()) == []
    assert next_due_s(course.state) == course.now_s + CLEARED_GRACE_S
    assert course.feed(Tick(), after_s=CLEARED_GRACE_S) == [
        StopTraining("cleared"),
        Note(Declined.CLEARED, "round round-1"),
    ]
    assert course.feed(TrainingDone()) == []
    assert course.state.voted == ()


def test_the_end_of_another_models_round_disturbs_no_training():
    course = Course().training()
    assert course.feed(Cleared()) == []
    assert course.feed(Offered(terms(), 500.0), after_s=1.0) == []
    assert course.feed(Tick(), after_s=CLEARED_GRACE_S) == []
    assert course.state.phase is Phase.TRAINING
    assert course.feed(TrainingDone()) == [AppendUpdate()]


def test_nothing_is_begun_for_an_offer_that_is_taken_back():
    course = Course().offered()
    assert course.feed(Cleared()) == []
    assert course.feed(READY) == []
    assert course.feed(Tick(), after_s=CLEARED_GRACE_S / 2) == []
    assert course.feed(Offered(terms(), 500.0)) == [Survey(terms())]


def test_a_training_that_is_always_stopped_is_not_begun_for_ever():
    course = Course().offered()
    for _ in range(STARTS_A_ROUND):
        assert isinstance(course.feed(READY)[0], StartTraining)
        course.feed(Tick(), after_s=LOOK_AGAIN_S)
        course.feed(HOT)
        course.feed(Tick(), after_s=60.0)
    (note,) = course.feed(READY)
    assert note.why is Declined.TOO_COSTLY
    assert course.feed(Offered(terms(), 500.0)) == []
    assert next_due_s(course.state) is None


def test_an_offer_that_expires_stops_the_training():
    course = Course().training()
    assert next_due_s(course.state) == 102.0 + LOOK_AGAIN_S
    assert course.feed(Tick(), after_s=600.0) == [
        StopTraining("expired"),
        Note(Declined.EXPIRED, "round round-1"),
    ]
    assert next_due_s(course.state) is None


def test_an_offer_without_time_left_is_none():
    course = Course()
    assert course.feed(Offered(terms(), 0.0)) == []
    assert course.state.offer is None


def test_no_offer_stands_longer_than_a_week():
    course = Course()
    course.feed(Offered(terms(), float(2**63)))
    assert course.state.offer.ends_at_s == 100.0 + LONGEST_OFFER_S


def test_the_base_is_asked_for_again_with_growing_waits():
    course = Course().offered()
    assert course.feed(NO_BASE) == [RequestBase(terms(), from_zeros=False)]
    patience_s = BASE_PATIENCE_S + 4000 / SLOW_LINK_BYTES_PER_S
    for ceiling_s in (2.0, 4.0, 8.0):
        assert next_due_s(course.state) == pytest.approx(course.now_s + patience_s + ceiling_s)
        due_in_s = next_due_s(course.state) - course.now_s
        assert course.feed(Tick(), after_s=due_in_s) == [RequestBase(terms(), from_zeros=False)]
    assert course.feed(BaseArrived()) == [Survey(terms())]
    assert course.feed(READY) == [StartTraining(terms(), 100, 700.0)]


def test_a_wrong_base_is_asked_for_from_zeros_and_given_up_in_the_end():
    course = Course().offered()
    course.feed(NO_BASE)
    for count in range(1, BAD_BASES_A_ROUND):
        assert course.feed(BaseFailed("x")) == [Note(Declined.BAD_BASE, "x")]
        assert course.feed(Tick(), after_s=2.0**count) == [RequestBase(terms(), from_zeros=True)]
    assert course.feed(BaseFailed("x")) == [Note(Declined.BAD_BASE, "x")]
    assert course.state.phase is Phase.IDLE
    assert course.feed(Offered(terms(), 500.0)) == []
    assert course.feed(Tick(), after_s=100.0) == []


def test_too_few_examples_and_bad_vitals_are_said_once_and_tried_again():
    course = Course().offered()
    few = Surveyed(9, None, has_base=True)
    assert course.feed(few) == [Note(Declined.TOO_FEW, "9 examples, the round asks for 10")]
    assert course.feed(Tick(), after_s=60.0) == [Survey(terms())]
    assert course.feed(few) == []
    assert course.feed(Tick(), after_s=60.0) == [Survey(terms())]
    assert course.feed(HOT) == [Note(Declined.NOT_NOW, "90 degrees")]
    assert course.feed(Tick(), after_s=60.0) == [Survey(terms())]
    assert course.feed(READY) == [StartTraining(terms(), 100, 700.0)]


def test_a_short_offer_is_looked_at_more_often():
    course = Course().offered(seconds_left=16.0 + OFFER_SPREAD_S)
    course.feed(HOT)
    assert next_due_s(course.state) <= course.now_s + 17.2 / 8


def test_a_training_is_stopped_while_vitals_are_bad_and_that_is_no_failure():
    course = Course().training()
    for _ in range(3):
        assert course.feed(Tick(), after_s=LOOK_AGAIN_S) == [Survey(terms())]
        assert course.feed(READY) == []
        assert course.feed(Tick(), after_s=LOOK_AGAIN_S) == [Survey(terms())]
        assert course.feed(HOT) == [StopTraining("90 degrees"), Note(Declined.NOT_NOW, "90 degrees")]
        assert course.feed(Tick(), after_s=60.0) == [Survey(terms())]
        assert course.feed(READY) == [StartTraining(terms(), 100, 700.0)]


def test_a_failed_training_is_tried_twice_a_round_even_across_a_cleared_offer():
    course = Course().training()
    assert course.feed(TrainingFailed("x")) == []
    course.feed(Cleared())
    assert course.feed(Tick(), after_s=CLEARED_GRACE_S) == [Note(Declined.CLEARED, "round round-1")]
    course.offered()
    assert isinstance(course.feed(READY)[0], StartTraining)
    assert course.feed(TrainingFailed("y")) == [Note(Declined.FAILED, "y")]
    assert course.feed(Offered(terms(), 500.0)) == []
    assert next_due_s(course.state) is None
    course.offered(terms("round-2"))


def test_a_training_that_diverged_gives_its_round_up_at_once():
    course = Course().training()
    assert course.feed(TrainingFailed("x", Declined.DIVERGED)) == [Note(Declined.DIVERGED, "x")]
    assert course.feed(Offered(terms(), 500.0)) == []
    assert next_due_s(course.state) is None


def test_an_update_that_the_disk_does_not_take_is_given_again():
    course = Course().training()
    course.feed(TrainingDone())
    assert course.feed(UpdateNotStored()) == []
    assert course.feed(Tick(), after_s=2.0) == [AppendUpdate()]
    assert course.feed(UpdateStored()) == []


def test_an_update_that_is_done_is_sent_though_its_offer_is_gone():
    course = Course().training()
    course.feed(TrainingDone())
    course.feed(UpdateNotStored())
    assert course.feed(Cleared()) == []
    assert course.feed(Tick(), after_s=CLEARED_GRACE_S) == [AppendUpdate()]
    course.feed(UpdateStored())
    assert course.state.phase is Phase.APPENDED


def test_a_new_offer_waits_until_the_last_update_is_stored():
    course = Course().training()
    course.feed(TrainingDone())
    assert course.feed(Offered(terms("round-2"), 60.0)) == []
    assert course.feed(UpdateStored()) == [Survey(terms("round-2"))]


def test_a_round_that_costs_more_than_this_board_gives_is_declined_once():
    course = Course()
    costly = terms(epochs=200)
    (note,) = course.feed(Offered(costly, 60.0))
    assert note.why is Declined.TOO_COSTLY
    assert course.feed(Offered(costly, 60.0)) == []


def test_more_epochs_mean_fewer_examples():
    assert examples_wanted(terms(epochs=20, max_examples=100), LIMITS) == 50
    assert examples_wanted(terms(epochs=2, max_examples=100), LIMITS) == 100


def test_a_settled_update_wakes_what_waited_for_it():
    course = Course().offered()
    course.feed(Surveyed(50, "the last update is not settled", has_base=True))
    assert course.feed(UpdateSettled()) == [Survey(terms())]


def test_what_is_remembered_is_bounded():
    course = Course()
    for number in range(REMEMBERED_ROUNDS + 10):
        course.now_s = 100.0
        course.training(terms(f"r{number}"))
        course.feed(TrainingDone())
        course.feed(UpdateStored())
        course.feed(UpdateSettled())
    assert len(course.state.voted) == REMEMBERED_ROUNDS
    for number in range(REMEMBERED_FAILURES + 10):
        course.feed(Offered(terms(f"c{number}", epochs=500), 60.0))
    assert len(course.state.failures) == REMEMBERED_FAILURES


class Rounds(RuleBasedStateMachine):
    """Any order of events, with a board that does as it is told."""

    def __init__(self):
        super().__init__()
        self.state = RoundsState()
        self.now_s = 0.0
        self.is_training = False
        self.awaits_survey = False
        self.trained_for = None
        self.updates = []
        self.failures = {}
        self.starts = Counter()

    def feed(self, event):
        self.state, effects = next_state(self.state, event, now_s=self.now_s, limits=LIMITS, rng=Ceiling())
        for effect in effects:
            match effect:
                case StartTraining(of):
                    assert not self.is_training
                    assert of.round_id not in self.updates
                    self.is_training, self.trained_for = True, of.round_id
                    self.starts[of.round_id] += 1
                    assert self.starts[of.round_id] <= STARTS_A_ROUND
                case StopTraining():
                    assert self.is_training
                    self.is_training = False
                case Survey():
                    assert not self.awaits_survey
                    self.awaits_survey = True

    @rule(
        of=st.sampled_from([terms(f"r{number}") for number in range(4)]),
        seconds_left=st.sampled_from([0, 1, 30, 1000]),
    )
    def offer(self, of, seconds_left):
        self.feed(Offered(of, seconds_left))

    @rule(
        event=st.sampled_from(
            [Cleared(), BaseArrived(), BaseFailed("x"), UpdateStored(), UpdateNotStored(), UpdateSettled()]
        )
    )
    def anything(self, event):
        self.feed(event)

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.feed(Tick())
        # Else the follower's thread would spin.
        due_s = next_due_s(self.state)
        assert due_s is None or due_s > self.now_s

    @rule(
        examples=st.sampled_from([0, 10, 50]),
        obstacle=st.sampled_from([None, None, "hot"]),
        has_base=st.booleans(),
    )
    @precondition(lambda self: self.awaits_survey)
    def survey(self, examples, obstacle, has_base):
        self.awaits_survey = False
        self.feed(Surveyed(examples, obstacle, has_base))

    @rule()
    @precondition(lambda self: self.is_training)
    def training_is_done(self):
        was = self.state.phase
        self.feed(TrainingDone())
        if was is Phase.TRAINING and self.is_training and self.state.phase is Phase.APPENDING:
            self.updates.append(self.trained_for)
            self.is_training = False

    @rule()
    @precondition(lambda self: self.is_training)
    def training_fails(self):
        self.feed(TrainingFailed("x"))
        if self.is_training:
            self.is_training = False
            self.failures[self.trained_for] = self.failures.get(self.trained_for, 0) + 1

    @invariant()
    def one_update_a_round(self):
        assert len(set(self.updates)) == len(self.updates)

    @invariant()
    def two_failures_a_round(self):
        assert all(count <= TRAININGS_A_ROUND for count in self.failures.values())

    @invariant()
    def training_has_an_offer_that_stands(self):
        assert self.is_training == (self.state.phase is Phase.TRAINING)
        if self.is_training:
            assert self.state.offer is not None

    @invariant()
    def work_is_never_forgotten(self):
        if self.state.phase in {Phase.OFFERED, Phase.FETCHING, Phase.TRAINING, Phase.APPENDING}:
            assert next_due_s(self.state) is not None


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=200, stateful_step_count=40)


GOOD = Vitals(celsius=60.0, other_load=0.2, free_bytes=2**30, on_battery=False, queued=0)
VITALS_LIMITS = VitalsLimits(
    max_celsius=75.0, max_load=0.5, min_free_bytes=200 * 2**20, on_battery=False, max_queued=32
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"celsius": None, "other_load": None, "free_bytes": None, "on_battery": None}, None),
        ({"celsius": 80.0}, "80 degrees, at most 75 are allowed"),
        ({"celsius": float("nan")}, "nan degrees, at most 75 are allowed"),
        ({"other_load": 0.75}, "others use 75% of the cores, at most 50% are allowed"),
        ({"free_bytes": 100 * 2**20}, "100 MiB of memory are free, at least 200 are needed"),
        ({"on_battery": True}, "on battery"),
        ({"queued": 33}, "33 samples wait for their answer, at most 32 may"),
    ],
)
def test_a_board_trains_only_when_its_vitals_allow(changes, expected):
    assert decide_may_train(replace(GOOD, **changes), VITALS_LIMITS) == expected


def test_a_board_that_may_train_on_battery_does():
    limits = replace(VITALS_LIMITS, on_battery=True)
    assert decide_may_train(replace(GOOD, on_battery=True), limits) is None
