"""One round, from its offer to its end, through any order of events and any crash."""

import math
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from cloud_hub.core.federation.guard import CannotJudge, Kept, Place, Worse
from cloud_hub.core.federation.round_events import (
    ENDS,
    Abort,
    Aggregate,
    Aggregated,
    ClearOffers,
    Commit,
    Committed,
    DeviceCameOnline,
    Ended,
    Failed,
    Judge,
    Judged,
    Phase,
    Resumed,
    RollBack,
    RolledBack,
    SendOffer,
    Tick,
    UpdateCommitted,
)
from cloud_hub.core.federation.rounds import (
    BufferRules,
    RoundRules,
    RoundState,
    next_due_s,
    next_round,
    open_round,
)

RULES = RoundRules(cohort_size=4, quorum=3, grace_s=60.0, deadline_s=3600.0)
BUFFER = BufferRules(buffer_size=3, max_staleness=2, offer_s=1000.0)
COHORT = ("a", "b", "c", "d")
KEPT = Kept(0.9, 0.91, 300)
WORSE = Worse(Place(1), 0.9, 0.5, 1e-9)


def opened(rules=RULES, cohort=COHORT):
    return open_round(rules, cohort, now_s=1000.0)[0]


def after(state, *events, at_s=1001.0):
    """The state after these, and the effects of the last one."""
    effects = ()
    for event in events:
        state, effects = next_round(state, event, now_s=at_s)
    return state, effects


def answered(*devices, rules=RULES, at_s=1001.0):
    return after(opened(rules), *(UpdateCommitted(device) for device in devices), at_s=at_s)[0]


def test_a_round_is_offered_to_its_cohort():
    state, effects = open_round(RULES, COHORT, now_s=1000.0)
    assert effects == (SendOffer(COHORT, 3600.0),)
    assert (state.phase, state.votes, next_due_s(state)) == (Phase.COLLECTING, {}, 4600.0)


def test_an_answer_takes_its_offer_away():
    state, effects = after(opened(), UpdateCommitted("b"))
    assert effects == (ClearOffers(("b",)),)
    assert state.votes == {"b": 0}


def test_a_quorum_waits_for_stragglers_and_closes():
    state = answered("a", "b", "c", at_s=2000.0)
    assert next_due_s(state) == 2060.0
    assert after(state, Tick(), at_s=2059.9) == (state, ())
    state, effects = after(state, Tick(), at_s=2060.0)
    assert effects == (ClearOffers(("d",)), Aggregate({"a": 0, "b": 0, "c": 0}))
    assert (state.phase, next_due_s(state)) == (Phase.AGGREGATING, None)


def test_a_whole_cohort_closes_at_once():
    _, effects = after(answered("d", "a", "b"), UpdateCommitted("c"))
    assert effects == (ClearOffers(("c",)), Aggregate({"d": 0, "a": 0, "b": 0, "c": 0}))
    assert list(effects[1].votes) == ["d", "a", "b", "c"]


def test_the_grace_does_not_reach_beyond_the_deadline():
    assert next_due_s(answered("a", "b", "c", at_s=4590.0)) == 4600.0


def test_no_grace_closes_at_the_quorum():
    rules = RoundRules(4, 3, grace_s=0.0, deadline_s=3600.0)
    assert answered("a", "b", "c", rules=rules).phase is Phase.AGGREGATING


def test_a_round_below_its_quorum_is_aborted_at_the_deadline_with_its_reason():
    state, effects = after(answered("a", "b"), Tick(), at_s=4600.0)
    reason = "2 of 4 asked have answered, quorum 3, after 3600 s"
    assert effects == (ClearOffers(("c", "d")), RollBack(reason))
    state, effects = after(state, RolledBack())
    assert effects == (Ended(Phase.ABORTED, reason),)
    assert (state.phase, state.reason) == (Phase.ABORTED, reason)


def test_the_deadline_is_kept_although_nobody_ticked():
    state, effects = after(answered("a", "b"), UpdateCommitted("c"), at_s=4600.0)
    assert state.phase is Phase.ABORTING
    assert (state.votes, state.late) == ({"a": 0, "b": 0}, 1)
    assert isinstance(effects[-1], RollBack)


def test_a_cohort_smaller_than_the_quorum_is_not_asked():
    state, effects = open_round(RULES, ("a", "b"), now_s=0.0)
    assert effects == (Ended(Phase.ABORTED, "2 devices can be asked, quorum 3"),)
    assert state.phase is Phase.ABORTED


def test_a_cohort_larger_than_the_rules_is_refused():
    with pytest.raises(ValueError, match="the rules say 4"):
        open_round(RULES, (*COHORT, "e"), now_s=0.0)


def test_what_is_no_vote_is_counted_by_what_it_was():
    state = answered("a", "x", "a", "a", "x")
    assert state == replace(answered("a"), foreign=2, repeated=2)
    state = after(answered("a", "b", "c"), UpdateCommitted("d", staleness=1))[0]
    assert state == replace(answered("a", "b", "c"), stale=1)
    closed = answered("a", "b", "c", "d", rules=RoundRules(5, 3, 0.0, 3600.0))
    assert (closed.votes, closed.late) == ({"a": 0, "b": 0, "c": 0}, 1)


def test_a_late_update_is_a_vote_where_the_rules_take_it():
    rules = RoundRules(4, 3, 60.0, 3600.0, max_late=1)
    state = after(opened(rules), UpdateCommitted("a", 2), UpdateCommitted("a", 1), UpdateCommitted("a", 0))[0]
    assert (state.votes, state.stale, state.repeated) == ({"a": 1}, 1, 1)


def test_a_member_that_comes_online_is_offered_the_time_that_is_left():
    assert after(answered("a"), DeviceCameOnline("b"), at_s=1600.0)[1] == (SendOffer(("b",), 3000.0),)
    assert after(answered("a", "b", "c", at_s=2000.0), DeviceCameOnline("d"), at_s=2020.0)[1] == (
        SendOffer(("d",), 40.0),
    )


@pytest.mark.parametrize("device", ["a", "x"])
def test_who_has_answered_or_is_not_asked_gets_no_offer(device):
    assert after(answered("a"), DeviceCameOnline(device))[1] == ()


def test_nobody_is_offered_a_closed_round():
    assert after(answered("a", "b", "c", at_s=2000.0), DeviceCameOnline("d"), at_s=2060.0)[1] == (
        ClearOffers(("d",)),
        Aggregate({"a": 0, "b": 0, "c": 0}),
    )


def aggregating(rules=RULES):
    return answered(*COHORT, rules=rules)


def test_a_round_that_is_kept_is_committed():
    state, effects = after(aggregating(), Aggregated(votes=3, rejected=1))
    assert effects == (Judge(),)
    state, effects = after(state, Judged(KEPT))
    assert effects == (Commit(),)
    state, effects = after(state, Committed())
    assert effects == (Ended(Phase.COMMITTED, "not worse: 90.0% before, 91.0% after, on 300 samples"),)
    assert (state.counted, state.rejected) == (3, 1)


def test_a_round_that_is_worse_is_rolled_back():
    state, effects = after(aggregating(), Aggregated(4, 0), Judged(WORSE))
    reason = "worse at exit 1: 90.0% before, 50.0% after, p 1e-09"
    assert effects == (RollBack(reason),)
    assert after(state, RolledBack())[1] == (Ended(Phase.ROLLED_BACK, reason),)


@pytest.mark.parametrize(("commits", "phase"), [(False, Phase.ROLLING_BACK), (True, Phase.COMMITTING)])
def test_what_cannot_be_judged_is_committed_only_where_the_rules_say_so(commits, phase):
    rules = RoundRules(4, 3, 60.0, 3600.0, commits_unjudged=commits)
    state = after(aggregating(rules), Aggregated(4, 0), Judged(CannotJudge(12, 100)))[0]
    assert (state.phase, state.reason) == (phase, "cannot judge: 12 holdout samples, 100 needed")


def test_a_round_of_which_too_few_votes_stand_screening_is_rolled_back():
    rules = RoundRules(4, 3, 60.0, 3600.0, min_votes=2)
    state, effects = after(aggregating(rules), Aggregated(1, 3))
    assert effects == (RollBack("1 votes stood screening and 3 did not, 2 needed"),)
    assert state.phase is Phase.ROLLING_BACK


@pytest.mark.parametrize("events", [(), (Aggregated(4, 0),)])
def test_a_failure_rolls_back_with_its_reason(events):
    state, effects = after(aggregating(), *events, Failed("tensor 'w' left the range of float32"))
    assert effects == (RollBack("tensor 'w' left the range of float32"),)
    assert state.phase is Phase.ROLLING_BACK


@pytest.mark.parametrize(
    ("state", "cleared"),
    [
        (answered("a"), (ClearOffers(("b", "c", "d")),)),
        (aggregating(), ()),
        (after(aggregating(), Aggregated(4, 0))[0], ()),
    ],
)
def test_a_round_can_be_aborted_until_it_is_judged(state, cleared):
    state, effects = after(state, Abort("not today"))
    assert effects == (*cleared, RollBack("not today"))
    assert after(state, RolledBack())[1] == (Ended(Phase.ABORTED, "not today"),)


@pytest.mark.parametrize("judgement", [KEPT, WORSE])
def test_a_round_that_is_judged_cannot_be_aborted(judgement):
    state = after(aggregating(), Aggregated(4, 0), Judged(judgement))[0]
    assert after(state, Abort("too late")) == (state, ())


# --- buffers -----------------------------------------------------------------------------------------------


def test_a_buffer_closes_when_it_is_full_whoever_answers_and_however_long_it_takes():
    state, effects = open_round(BUFFER, ("a", "b"), now_s=0.0)
    assert effects == (SendOffer(("a", "b"), 1000.0),)
    state, effects = next_round(state, DeviceCameOnline("z"), now_s=500_000.0)
    assert effects == (SendOffer(("z",), 1000.0),)
    state = after(
        state, UpdateCommitted("a", 2), UpdateCommitted("q", 3), UpdateCommitted("z"), at_s=900_000.0
    )[0]
    state, effects = next_round(state, UpdateCommitted("y", 1), now_s=2e6)
    assert effects == (ClearOffers(("y",)), ClearOffers(("b",)), Aggregate({"a": 2, "z": 0, "y": 1}))
    state = after(state, UpdateCommitted("b"), UpdateCommitted("a"), at_s=2e6)[0]
    assert (state.stale, state.late, state.repeated) == (1, 1, 1)


def test_an_offer_of_a_buffer_that_ran_out_is_made_anew():
    state = after(opened(BUFFER), UpdateCommitted("a"))[0]
    assert next_due_s(state) == 2000.0
    assert after(state, Tick(), at_s=1999.0)[1] == ()
    state, effects = after(state, Tick(), at_s=2000.0)
    assert effects == (SendOffer(("b", "c", "d"), 1000.0),)
    assert next_due_s(state) == 3000.0


def test_a_buffer_waits_for_its_first_device():
    state, effects = open_round(BUFFER, (), now_s=0.0)
    assert (state.phase, effects) == (Phase.COLLECTING, ())


# --- restarts ----------------------------------------------------------------------------------------------


def test_a_restart_asks_again_for_what_the_phase_asks_for():
    state = answered("a")
    assert after(state, Resumed(), at_s=1100.0)[1] == (
        ClearOffers(("a",)),
        SendOffer(("b", "c", "d"), 3500.0),
    )
    state = answered("a", "b", "c", at_s=2000.0)
    state = after(state, Tick(), at_s=2060.0)[0]
    assert after(state, Resumed())[1] == (
        ClearOffers(("a", "b", "c")),
        ClearOffers(("d",)),
        Aggregate({"a": 0, "b": 0, "c": 0}),
    )
    for event, effect in [(Aggregated(4, 0), Judge()), (Judged(KEPT), Commit()), (Committed(), Ended(Phase.COMMITTED, "not worse: 90.0% before, 91.0% after, on 300 samples"))]:  # fmt: skip
        state = after(state, event)[0]
        assert after(state, Resumed({"d": 0}), at_s=1e9) == (state, (effect,))


def test_a_restart_counts_what_was_committed_and_not_heard_of_even_after_the_deadline():
    state, effects = after(answered("a"), Resumed({"a": 0, "b": 0, "x": 0, "c": 0}), at_s=9999.0)
    assert (state.votes, state.foreign, state.repeated) == ({"a": 0, "b": 0, "c": 0}, 1, 0)
    assert effects[-1] == Aggregate(state.votes)


def test_a_restart_counts_what_came_after_closing_as_nothing():
    state = answered("a", "b", "c", at_s=2000.0)
    state = after(state, Tick(), at_s=2060.0)[0]
    assert after(state, Resumed({"a": 0, "b": 0, "c": 0, "d": 0}))[0] == state


def test_a_restart_after_the_deadline_aborts_what_has_no_quorum():
    state, effects = after(answered("a"), Resumed({"a": 0}), at_s=9999.0)
    assert state.phase is Phase.ABORTING
    assert effects[:2] == (ClearOffers(("a",)), ClearOffers(("b", "c", "d")))


@pytest.mark.parametrize(
    ("state", "closes_s"),
    [(answered("a"), 5.0 + 3600.0), (answered("a", "b", "c", at_s=3000.0), 5.0 + 60.0)],
)
def test_a_clock_that_was_set_back_meanwhile_keeps_no_round_open_longer_than_its_rules(state, closes_s):
    resumed, _ = after(state, Resumed(dict(state.votes)), at_s=5.0)
    assert (resumed.phase, resumed.closes_s) == (Phase.COLLECTING, closes_s)


class Hub:
    """A hub that can be killed: what is not in `stored` and the world is lost with it."""

    def __init__(self, rules, cohort, judgement, *, stores_all):
        self.now_s = 0.0
        self.judgement = judgement
        self.stores_all = stores_all
        self.updates, self.offers = {}, set()
        self.bases, self.aggregated, self.ends, self.phases = 0, None, [], []
        self.state, self.pending = open_round(rules, cohort, now_s=0.0)
        self.stored = None
        self.store()

    def store(self):
        self.stored = msgspec.msgpack.encode(self.state)
        self.phases.append(self.state.phase)

    def feed(self, event):
        before = self.state
        self.state, effects = next_round(self.state, event, now_s=self.now_s)
        self.pending = (*self.pending, *effects)
        if self.stores_all or (self.state.phase, self.state.cohort) != (before.phase, before.cohort):
            self.store()

    def kill(self):
        self.state = msgspec.msgpack.decode(self.stored, type=RoundState)
        self.pending = ()
        self.feed(Resumed(dict(self.updates)))

    def work(self, effects=1_000_000, *, say_last=True):
        """Carry out so many effects; the hub may die before it says that the last one is done."""
        while self.pending and effects:
            effects -= 1
            effect, *rest = self.pending
            self.pending = tuple(rest)
            event = self.carry_out(effect)
            if event is not None and (effects or say_last):
                self.feed(event)

    def carry_out(self, effect):
        match effect:
            case SendOffer(devices, seconds_left):
                assert seconds_left > 0
                self.offers |= set(devices)
            case ClearOffers(devices):
                self.offers -= set(devices)
            case Aggregate(votes):
                assert self.aggregated in (None, dict(votes)), "another result than before the crash"
                self.aggregated = dict(votes)
                return Aggregated(len(votes), 0)
            case Judge():
                assert self.aggregated
                return Judged(self.judgement)
            case Commit():
                # Known by its round: twice is once.
                self.bases = 1
                return Committed()
            case RollBack():
                assert self.bases == 0
                return RolledBack()
            case Ended(outcome):
                self.ends.append(outcome)
        return None

    def act(self, action):
        match action:
            case ("update", device, staleness):
                self.updates.setdefault(device, staleness)
                self.feed(UpdateCommitted(device, staleness))
            case ("online", device):
                self.feed(DeviceCameOnline(device))
            case ("wait", seconds):
                self.now_s += seconds
                self.feed(Tick())
            case ("abort",):
                self.feed(Abort("enough"))
            case ("work",):
                self.work()
            case ("kill", effects, say_last):
                self.work(effects, say_last=say_last)
                self.kill()

    def run_out(self):
        """Time passes, and everybody answers in the end."""
        self.work()
        for device in ("a", "b", "c", "d", "e"):
            if isinstance(self.state.rules, BufferRules):
                self.act(("update", device, 0))
            self.act(("wait", 1000.0))
            self.work()


device = st.sampled_from("abcdex")
actions = [
    st.tuples(st.just("update"), device, st.integers(0, 2)),
    st.tuples(st.just("update"), device, st.just(0)),
    st.tuples(st.just("online"), device),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 1.0, 30.0, 60.0, 500.0])),
    st.tuples(st.just("work")),
]
kill = st.tuples(st.just("kill"), st.integers(0, 6), st.booleans())
echo = st.tuples(
    st.just("echo"), st.sampled_from([Aggregated(4, 0), Judged(KEPT), Judged(WORSE), Committed(), RolledBack(), Failed("no")])
)  # fmt: skip
rules_of = st.one_of(
    st.tuples(st.integers(1, 5), st.sampled_from([0.0, 60.0]), st.integers(0, 1)).map(
        lambda r: RoundRules(5, r[0], r[1], 1000.0, max_late=r[2])
    ),
    st.integers(1, 5).map(lambda size: BufferRules(size, 1, 700.0)),
)
judgements = st.sampled_from([KEPT, WORSE, CannotJudge(1, 2)])
CHAIN = {
    Phase.COLLECTING: {Phase.AGGREGATING, Phase.ABORTING},
    Phase.AGGREGATING: {Phase.JUDGING, Phase.ABORTING, Phase.ROLLING_BACK},
    Phase.JUDGING: {Phase.COMMITTING, Phase.ABORTING, Phase.ROLLING_BACK},
    Phase.COMMITTING: {Phase.COMMITTED},
    Phase.ROLLING_BACK: {Phase.ROLLED_BACK},
    Phase.ABORTING: {Phase.ABORTED},
}


def check_end(hub, rules):
    state = hub.state
    assert state.phase in ENDS
    assert set(hub.ends) == {state.phase}
    steps = [(a, b) for a, b in pairwise(hub.phases) if a is not b]
    assert all(b in CHAIN[a] for a, b in steps), "an end was left, or a phase passed over"
    assert sum(b in ENDS for _, b in steps) == 1
    assert not hub.offers
    assert (hub.bases == 1) == (state.phase is Phase.COMMITTED)
    if hub.aggregated is not None:
        least = rules.quorum if isinstance(rules, RoundRules) else rules.buffer_size
        assert len(hub.aggregated) >= least
        assert hub.aggregated == state.votes
    assert all(staleness <= 1 for staleness in state.votes.values())


@settings(max_examples=300, deadline=None)
@given(
    rules_of, judgements, st.booleans(), st.lists(st.one_of(*actions, kill, st.just(("abort",))), max_size=40)
)
def test_a_round_ends_exactly_once_through_any_order_of_events_and_crashes(
    rules, judgement, stores_all, script
):
    hub = Hub(rules, "abcde", judgement, stores_all=stores_all)
    for action in script:
        hub.act(action)
    hub.run_out()
    check_end(hub, rules)


@given(rules_of, st.lists(st.one_of(*actions, kill, echo), max_size=40))
def test_a_round_keeps_to_its_phases_whatever_it_is_told(rules, script):
    hub = Hub(rules, "abcde", KEPT, stores_all=True)
    for action in script:
        if action[0] == "echo":
            hub.feed(action[1])
        elif action[0] == "kill":
            hub.kill()
        elif action[0] != "work":
            hub.act(action)
    assert all(a is b or b in CHAIN[a] for a, b in pairwise(hub.phases))


@settings(max_examples=300, deadline=None)
@given(rules_of, judgements, st.lists(st.one_of(*actions, kill), max_size=40))
def test_crashes_change_nothing_of_the_outcome(rules, judgement, script):
    killed, calm = (Hub(rules, "abcde", judgement, stores_all=True) for _ in range(2))
    for action in script:
        killed.act(action)
        if action[0] != "kill":
            calm.act(action)
    for hub in (killed, calm):
        hub.run_out()
        check_end(hub, rules)
    assert killed.state.phase is calm.state.phase
    assert list(killed.state.votes.items()) == list(calm.state.votes.items())
    assert killed.state.reason == calm.state.reason


def test_a_state_survives_its_bytes():
    for rules in (RULES, BUFFER):
        state = answered("a", "b", rules=rules)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=RoundState) == state
        assert msgspec.json.decode(msgspec.json.encode(state), type=RoundState) == state


@pytest.mark.parametrize(
    "build",
    [
        lambda: RoundRules(4, 5, 0.0, 1.0),
        lambda: RoundRules(4, 0, 0.0, 1.0),
        lambda: RoundRules(4, 3, -1.0, 1.0),
        lambda: RoundRules(4, 3, math.nan, 1.0),
        lambda: RoundRules(4, 3, 0.0, 0.0),
        lambda: RoundRules(4, 3, 0.0, math.inf),
        lambda: RoundRules(4, 3, 0.0, 1.0, max_late=-1),
        lambda: RoundRules(4, 3, 0.0, 1.0, min_votes=4),
        lambda: BufferRules(0, 1),
        lambda: BufferRules(3, -1),
        lambda: BufferRules(3, 1, offer_s=0.0),
        lambda: BufferRules(3, 1, min_votes=0),
    ],
)
def test_rules_that_contradict_each_other_are_refused(build):
    with pytest.raises(ValueError):  # noqa: PT011 - each says its own
        build()
