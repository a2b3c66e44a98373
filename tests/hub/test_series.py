"""Rounds into a candidate."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cloud_hub.core.federation.round_events import Phase
from cloud_hub.core.federation.series import (
    AbortRound,
    AbortSeries,
    CandidateMade,
    CandidateRefused,
    MakeCandidate,
    OpenRound,
    RoundEnded,
    SeriesEnded,
    SeriesPhase,
    SeriesResumed,
    SeriesRules,
    SeriesState,
    next_series,
    open_series,
)

RULES = SeriesRules(rounds=3, max_failures=1)
ENDS = {SeriesPhase.MADE, SeriesPhase.FAILED, SeriesPhase.ABORTED}


def run(*outcomes, rules=RULES):
    """The state after rounds that ended so, and the effects of the last end."""
    state, effects = open_series(rules, first_round=7)
    for outcome in outcomes:
        state, effects = next_series(state, RoundEnded(state.round_number, outcome, "because"))
    return state, effects


def test_a_series_opens_its_first_round():
    assert run() == (SeriesState(RULES, SeriesPhase.RUNNING, 7), (OpenRound(7, 0),))


def test_after_a_committed_round_the_next_is_opened_and_after_the_last_a_candidate_is_made():
    assert run(Phase.COMMITTED)[1] == (OpenRound(8, 0),)
    state, effects = run(*[Phase.COMMITTED] * 3)
    assert effects == (MakeCandidate(),)
    assert next_series(state, CandidateMade()) == (
        replace(state, phase=SeriesPhase.MADE),
        (SeriesEnded(SeriesPhase.MADE, ""),),
    )


@pytest.mark.parametrize("outcome", [Phase.ROLLED_BACK, Phase.ABORTED])
def test_a_failed_round_is_tried_again_under_a_number_of_its_own(outcome):
    assert run(outcome)[1] == (OpenRound(8, 1),)
    state, effects = run(outcome, Phase.COMMITTED)
    assert (effects, state.failures) == ((OpenRound(9, 0),), 0)


def test_failures_in_a_row_end_the_series_with_their_reason():
    state, effects = run(Phase.COMMITTED, Phase.ROLLED_BACK, Phase.ABORTED)
    reason = "2 rounds in a row failed, 1 allowed; the last: because"
    assert effects == (SeriesEnded(SeriesPhase.FAILED, reason),)
    assert (state.phase, state.committed) == (SeriesPhase.FAILED, 1)


def test_a_series_that_stalls_makes_its_candidate_of_what_was_committed():
    state, effects = run(Phase.COMMITTED, Phase.ABORTED, Phase.ROLLED_BACK)
    assert (state.phase, effects) == (SeriesPhase.MAKING, (MakeCandidate(),))
    reason = "2 rounds in a row failed, 1 allowed; the last: because"
    assert next_series(state, CandidateMade())[1] == (SeriesEnded(SeriesPhase.MADE, reason),)


def test_a_series_of_which_nothing_was_committed_fails_also_where_all_was_rolled_back():
    state, effects = run(Phase.ROLLED_BACK, Phase.ROLLED_BACK)
    assert (state.phase, type(effects[0])) == (SeriesPhase.FAILED, SeriesEnded)


def test_failures_that_are_not_in_a_row_do_not():
    state, effects = run(*[Phase.ABORTED, Phase.COMMITTED] * 3)
    assert (state.phase, effects) == (SeriesPhase.MAKING, (MakeCandidate(),))


def test_an_end_heard_twice_or_of_another_round_changes_nothing():
    state, _ = run(Phase.COMMITTED)
    for number in (6, 7, 9):
        assert next_series(state, RoundEnded(number, Phase.COMMITTED, "")) == (state, ())


def test_a_candidate_that_is_refused_fails_the_series():
    state, _ = run(*[Phase.COMMITTED] * 3)
    assert next_series(state, CandidateRefused("no better"))[1] == (
        SeriesEnded(SeriesPhase.FAILED, "no better"),
    )


def test_a_series_that_is_aborted_takes_its_round_with_it():
    state, effects = next_series(run()[0], AbortSeries("not today"))
    assert effects == (AbortRound(7, "not today"), SeriesEnded(SeriesPhase.ABORTED, "not today"))
    assert next_series(state, RoundEnded(7, Phase.ABORTED, "not today")) == (state, ())
    assert next_series(state, SeriesResumed()) == (state, effects)


events = st.one_of(
    st.tuples(st.just("round"), st.integers(-1, 1), st.sampled_from([Phase.COMMITTED, Phase.ROLLED_BACK, Phase.ABORTED])),
    st.sampled_from([CandidateMade(), CandidateRefused("no"), SeriesResumed()]),
)  # fmt: skip


@given(st.integers(1, 4), st.integers(0, 2), st.lists(events, max_size=40))
def test_a_series_ends_once_counts_each_round_once_and_a_restart_asks_for_the_same(
    rounds, max_failures, script
):
    rules = SeriesRules(rounds, max_failures)
    state, effects = open_series(rules, first_round=0)
    ends, outcomes = 0, {}
    for drawn in script:
        event = drawn
        if isinstance(drawn, tuple):
            number = state.round_number + drawn[1]
            event = RoundEnded(number, drawn[2], "")
            if number == state.round_number and state.phase is SeriesPhase.RUNNING:
                outcomes[number] = drawn[2]
        before = state
        state, effects = next_series(state, event)
        assert before.phase not in ENDS or state == before
        ends += before.phase not in ENDS and state.phase in ENDS
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=SeriesState) == state
        if state.phase is not before.phase or effects:
            assert next_series(state, SeriesResumed()) == (state, effects)
    assert ends == (state.phase in ENDS)
    assert state.committed == sum(outcome is Phase.COMMITTED for outcome in outcomes.values()) <= rounds
    assert list(outcomes) == list(range(len(outcomes)))


@pytest.mark.parametrize("rules", [(0, 1), (1, -1)])
def test_rules_out_of_range_are_refused(rules):
    with pytest.raises(ValueError, match="a series of"):
        SeriesRules(*rules)
