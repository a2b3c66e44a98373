"""The rules of sending, event by event: whole lists of effects, no thread, no clock."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_daemon.core.sending import (
    GREETING_SPREAD_S,
    LONGEST_PAUSE_S,
    POLL_S,
    PUBLISH_TIMEOUT_S,
    REFUSALS_BEFORE_DROP,
    REFUSED_FOR_S,
    SendingLimits,
    SendingState,
    next_due_s,
    next_state,
)
from edge_daemon.core.sending_events import (
    Acked,
    Acknowledge,
    Claim,
    Claimed,
    Connected,
    Defer,
    Disconnected,
    Draining,
    Drop,
    Greeted,
    NothingClaimed,
    NotSent,
    Published,
    Refused,
    Rejected,
    Release,
    Send,
    Tick,
    Waiting,
)
from edge_daemon.core.spooling import DropReason
from tests.device.spooling_cases import BOOT

LIMITS = SendingLimits(max_in_flight=2, max_items=4, max_bytes=1000, linger_s=0.5, ack_timeout_s=10.0)
NOTHING = Waiting(0, 0)
FULL = Claim(4, 1000)
PROBE = Claim(1, 1000)


class Ceiling(random.Random):
    """Full jitter at its longest."""

    def uniform(self, a, b):
        return b


class Course:
    """Feeds events one after another; `feed` returns the effects."""

    def __init__(self):
        self.state = SendingState()
        self.now_s = 100.0

    def feed(self, event, *, after_s=0.0):
        self.now_s += after_s
        self.state, effects = next_state(self.state, event, now_s=self.now_s, limits=LIMITS, rng=Ceiling())
        return effects

    def take_off(self, token, *seqs, is_shared=True, left=NOTHING):
        return self.feed(Claimed(token, BOOT, seqs, is_shared, left))


def connected():
    course = Course()
    assert course.feed(Connected()) == [FULL]
    return course


def idle():
    course = connected()
    course.feed(NothingClaimed())
    return course


def flying(*seqs):
    course = connected()
    assert course.take_off(1, *seqs) == [Send(1, 0, seqs)]
    course.feed(Published(1, 0))
    return course


def test_nothing_is_claimed_while_the_broker_is_away():
    course = Course()
    assert course.feed(Waiting(100, 10**6)) == []
    assert course.feed(Tick(), after_s=1000) == []
    assert next_due_s(course.state, LIMITS) is None


def test_rows_linger_to_fill_a_batch():
    course = idle()
    assert course.feed(Waiting(1, 10)) == []
    assert course.feed(Waiting(2, 20), after_s=0.3) == []
    assert next_due_s(course.state, LIMITS) == 100.5
    assert course.feed(Tick(), after_s=0.2) == [FULL]


def test_a_full_batch_does_not_linger():
    assert idle().feed(Waiting(4, 10)) == [FULL]
    assert idle().feed(Waiting(1, 1000)) == [FULL]


def test_without_a_wake_the_spool_is_asked_now_and_then():
    course = idle()
    assert next_due_s(course.state, LIMITS) == 100.0 + POLL_S
    assert course.feed(Tick(), after_s=POLL_S) == [FULL]


def test_one_claim_is_made_at_a_time():
    course = connected()
    assert course.feed(Waiting(4, 10)) == []


def test_what_is_left_is_claimed_until_the_slots_are_taken():
    course = connected()
    assert course.take_off(1, 1, 2, left=Waiting(4, 10)) == [Send(1, 0, (1, 2)), FULL]
    assert course.take_off(2, 3, 4, left=Waiting(4, 10)) == [Send(2, 0, (3, 4))]
    assert course.feed(Acked(BOOT, (1,))) == [Acknowledge(BOOT, (1,))]
    assert course.feed(Acked(BOOT, (2,))) == [Acknowledge(BOOT, (2,)), FULL]


def test_reports_and_updates_travel_alone():
    course = connected()
    assert course.take_off(1, 7, 8, is_shared=False) == [Send(1, 0, (7,)), Send(1, 1, (8,))]


def test_a_lost_session_gives_every_flight_back():
    course = connected()
    course.take_off(1, 1, 2, left=Waiting(4, 10))
    course.take_off(2, 3)
    assert course.feed(Disconnected()) == [Release(1), Release(2)]
    assert course.state == replace(course.state, flights={}, is_up=False)
    assert course.feed(Connected()) == [FULL]


def test_a_session_lost_during_a_claim_gives_the_batch_back():
    course = connected()
    course.feed(Disconnected())
    assert course.take_off(1, 1, 2) == [Release(1)]


def test_a_missing_acknowledgement_is_noticed_after_the_broker_has_the_frame():
    course = connected()
    course.take_off(1, 1, 2)
    assert next_due_s(course.state, LIMITS) == 100.0 + POLL_S
    course.feed(Published(1, 0), after_s=3)
    assert course.feed(Tick(), after_s=9.9) == []
    assert course.feed(Tick(), after_s=0.1) == [Release(1)]


def test_a_frame_that_never_reaches_the_broker_is_noticed_too():
    course = connected()
    course.take_off(1, 1)
    course.feed(NothingClaimed())
    assert course.feed(Tick(), after_s=PUBLISH_TIMEOUT_S) == [Release(1)]


def test_after_a_failure_it_pauses_and_sends_one_row():
    course = flying(1, 2)
    assert course.feed(Tick(), after_s=10) == [Release(1)]
    assert course.feed(Waiting(4, 1000), after_s=0.9) == []
    assert course.feed(Tick(), after_s=0.1) == [PROBE]


def test_the_pause_doubles_up_to_its_ceiling_and_any_acknowledgement_ends_it():
    course = flying(1)
    pauses = []
    for token in range(1, 14):
        course.feed(Tick(), after_s=10)
        pauses.append(course.state.pause_until_s - course.now_s)
        assert course.feed(Tick(), after_s=pauses[-1]) == [PROBE]
        course.take_off(token + 1, 1)
        course.feed(Published(token + 1, 0))
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, *[LONGEST_PAUSE_S] * 4]
    assert course.feed(Acked(BOOT, (1,))) == [Acknowledge(BOOT, (1,)), FULL]


def test_the_hubs_greeting_shortens_a_long_pause_and_one_row_is_tried_first():
    course = flying(1)
    for token in range(2, 8):
        course.feed(Tick(), after_s=10)
        course.take_off(token, 1)
        course.feed(Tick(), after_s=1000)
    course.feed(Tick(), after_s=course.state.pause_until_s - course.now_s)
    course.take_off(8, 1)
    course.feed(Published(8, 0))
    course.feed(Tick(), after_s=10)
    assert course.state.pause_until_s - course.now_s > 2 * GREETING_SPREAD_S
    assert course.feed(Greeted()) == []
    assert course.state.pause_until_s == course.now_s + GREETING_SPREAD_S
    assert course.feed(Tick(), after_s=GREETING_SPREAD_S) == [PROBE]


def test_what_was_in_the_air_when_the_hub_greeted_is_soon_sent_again():
    course = flying(1)
    assert course.feed(Greeted()) == []
    assert course.feed(Tick(), after_s=GREETING_SPREAD_S) == [Release(1)]
    assert course.feed(Tick(), after_s=course.state.pause_until_s - course.now_s) == [PROBE]


def test_an_acknowledgement_after_the_greeting_is_in_time():
    course = flying(1)
    course.feed(Greeted())
    assert course.feed(Acked(BOOT, (1,))) == [Acknowledge(BOOT, (1,))]
    assert course.state.failures == 0


def test_a_greeting_makes_no_pause_longer_and_starts_none():
    course = idle()
    before = course.state
    course.feed(Greeted())
    assert course.state.pause_until_s == before.pause_until_s


def test_jitter_is_anywhere_below_the_ceiling():
    course = flying(1)
    rng = random.Random(1)
    pauses = {
        round(
            next_state(course.state, Tick(), now_s=200.0, limits=LIMITS, rng=rng)[0].pause_until_s - 200.0, 1
        )
        for _ in range(200)
    }
    assert pauses == {n / 10 for n in range(11)}


def test_while_it_pauses_a_second_failure_makes_it_no_longer():
    course = connected()
    course.take_off(1, 1, left=Waiting(4, 10))
    course.take_off(2, 2)
    course.feed(NotSent(1))
    assert course.state.failures == 1
    course.feed(NotSent(2))
    assert (course.state.failures, course.state.pause_until_s) == (1, 101.0)


def test_a_late_acknowledgement_for_rows_given_back_still_counts():
    course = flying(1, 2)
    course.feed(Tick(), after_s=10)
    assert course.feed(Acked(BOOT, (1, 2))) == [Acknowledge(BOOT, (1, 2)), FULL]


def test_a_duplicate_acknowledgement_changes_nothing():
    course = flying(1, 2)
    course.feed(Acked(BOOT, (1, 2)))
    before = course.state
    assert course.feed(Acked(BOOT, (1, 2))) == [Acknowledge(BOOT, (1, 2))]
    assert course.state == before


def test_rejected_rows_are_dropped_and_the_rest_flies_on():
    course = flying(1, 2, 3)
    assert course.feed(Rejected(BOOT, (2,))) == [Drop(BOOT, 2, DropReason.REJECTED)]
    assert course.state.flights[1].parts[0].seqs == (1, 3)


def test_a_refused_frame_is_split_into_its_rows():
    course = flying(1, 2, 3)
    assert course.feed(Refused(1, 0)) == [Send(1, 1, (1,)), Send(1, 2, (2,)), Send(1, 3, (3,))]
    course.feed(Acked(BOOT, (1, 3)))
    assert course.feed(Refused(1, 2)) == [Defer(BOOT, 2, 60.0)]
    assert course.state.flights == {}


def test_a_row_that_was_refused_alone_never_shares_a_frame_again():
    course = flying(1)
    course.feed(Refused(1, 0))
    course.feed(Acked(BOOT, (99,)))
    assert course.take_off(2, 1, 2, 3) == [Send(2, 0, (2, 3)), Send(2, 1, (1,))]


def test_a_refusal_of_nothing_we_know_is_ignored():
    course = flying(1)
    assert course.feed(Refused(1, 7)) == []
    assert course.feed(Refused(9, 0)) == []


def refuse_alone(course, token, after_s):
    course.feed(Tick(), after_s=after_s)
    course.take_off(token, 1)
    return course.feed(Refused(token, 0))


def test_a_refused_row_is_dropped_only_after_many_refusals_over_a_long_time():
    course = idle()
    delays = []
    for token in range(1, 20):
        (effect,) = refuse_alone(course, token, after_s=400.0)
        delays.append(effect.delay_s)
    assert delays[:8] == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert REFUSALS_BEFORE_DROP < 19
    assert refuse_alone(course, 20, after_s=REFUSED_FOR_S) == [Drop(BOOT, 1, DropReason.REFUSED)]
    assert course.state.suspects == {}


def test_many_refusals_in_a_short_time_drop_nothing():
    course = idle()
    for token in range(1, 3 * REFUSALS_BEFORE_DROP):
        (effect,) = refuse_alone(course, token, after_s=310.0)
        assert isinstance(effect, Defer)


def test_a_hub_that_refuses_everything_gets_single_rows_at_a_slowing_pace():
    course = flying(1, 2, 3, 4)
    course.feed(Refused(1, 0))
    for part in range(1, 5):
        course.feed(Refused(1, part))
    assert (course.state.failures, course.state.flights) == (1, {})
    course.feed(Waiting(1000, 10**6))
    assert course.feed(Tick(), after_s=1.0) == [PROBE]


def test_draining_does_not_linger():
    course = idle()
    course.feed(Waiting(1, 10))
    assert course.feed(Draining()) == [FULL]
    course.feed(NothingClaimed())
    assert course.feed(Waiting(1, 10)) == [FULL]


class SendingMachine(RuleBasedStateMachine):
    """Whatever comes in whatever order: rows in flight are those of the flights, and no row is forgotten."""

    def __init__(self):
        super().__init__()
        self.state = SendingState()
        self.now_s = 0.0
        self.token = 0
        self.aloft = {}
        self.in_spool = set(range(30))
        self.gone = set()
        self.deferred = set()

    def feed(self, event):
        events = [event]
        while events:
            self.state, effects = next_state(
                self.state, events.pop(0), now_s=self.now_s, limits=LIMITS, rng=random.Random(3)
            )
            for effect in effects:
                events += self.do(effect)

    def do(self, effect):
        match effect:
            case Claim():
                seqs = tuple(sorted(self.in_spool - self.deferred))[: effect.max_items]
                if not seqs:
                    return [NothingClaimed()]
                self.token += 1
                self.in_spool -= set(seqs)
                self.aloft[self.token] = set(seqs)
                return [
                    Claimed(self.token, BOOT, seqs, True, Waiting(len(self.in_spool - self.deferred), 100))
                ]
            case Acknowledge():
                self.leave(set(effect.seqs))
                self.gone |= set(effect.seqs)
            case Drop():
                self.leave({effect.seq})
                self.gone.add(effect.seq)
            case Defer():
                self.leave({effect.seq})
                self.in_spool.add(effect.seq)
                self.deferred.add(effect.seq)
            case Release():
                self.in_spool |= self.aloft.pop(effect.token, set())
            case Send():
                assert set(effect.seqs) <= self.aloft[effect.token]
        return []

    def leave(self, seqs):
        self.in_spool -= seqs
        for token in list(self.aloft):
            self.aloft[token] -= seqs
            if not self.aloft[token]:
                del self.aloft[token]

    @rule(event=st.sampled_from([Connected(), Disconnected(), Tick(), Waiting(3, 50), Draining()]))
    def something_happens(self, event):
        self.feed(event)

    @rule(kind=st.sampled_from([Acked, Rejected]), seqs=st.sets(st.integers(0, 29), max_size=5))
    def hub_answers(self, kind, seqs):
        self.feed(kind(BOOT, tuple(sorted(seqs - self.gone))))

    @rule(data=st.data(), kind=st.sampled_from([Refused, Published]))
    def something_happens_to_a_part(self, data, kind):
        for token, flight in self.state.flights.items():
            part = data.draw(st.sampled_from(sorted(flight.parts)))
            self.feed(kind(token, part))
            return

    @rule(seconds=st.floats(0, 500))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.deferred.clear()
        self.feed(Tick())

    @invariant()
    def flights_hold_exactly_what_is_aloft(self):
        flown = {
            token: {seq for part in flight.parts.values() for seq in part.seqs}
            for token, flight in self.state.flights.items()
        }
        assert flown == self.aloft
        assert len(flown) <= LIMITS.max_in_flight

    @invariant()
    def no_row_is_forgotten(self):
        assert self.in_spool | self.gone | set().union(*self.aloft.values()) == set(range(30))


TestSendingMachine = SendingMachine.TestCase
TestSendingMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
