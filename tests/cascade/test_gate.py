import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.gate import ACCEPT, CONTINUE, ESCALATE, Exit, decide_exit, select_most_reliable
from edge_cascade.packing import pack_exits, pack_probabilities, unpack_exits, unpack_probabilities
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE

unit = st.floats(0, 1)


def decide(score, *, max_score=0.3, label=1, earlier=None, is_last=False):
    return decide_exit(score, label, max_score=max_score, earlier_label=earlier, is_last=is_last)


def test_a_score_at_the_threshold_is_accepted():
    assert decide(0.3) is ACCEPT


def test_a_score_above_the_threshold_climbs_on_and_at_the_end_escalates():
    assert decide(0.31) is CONTINUE
    assert decide(0.31, is_last=True) is ESCALATE


def test_a_sure_answer_that_contradicts_the_earlier_one_is_not_accepted():
    assert decide(0.0, earlier=2) is CONTINUE
    assert decide(0.0, earlier=1) is ACCEPT


def test_accept_all_overrides_disagreement():
    assert decide(1.0, max_score=ACCEPT_ALL, earlier=2, is_last=True) is ACCEPT


@given(unit)
def test_accept_none_accepts_nothing(score):
    assert decide(score, max_score=ACCEPT_NONE) is CONTINUE


@pytest.mark.parametrize("max_score", [ACCEPT_NONE, 0.3, ACCEPT_ALL])
def test_gate_never_accepts_a_score_that_is_nan(max_score):
    assert decide(math.nan, max_score=max_score) is CONTINUE
    assert decide(math.nan, max_score=max_score, is_last=True) is ESCALATE


def test_the_most_reliable_exit_has_the_highest_probability_and_the_later_wins_a_tie():
    exits = [Exit(0, 1, 0.6, 0.4), Exit(1, 2, 0.8, 0.2), Exit(2, 3, 0.8, 0.2)]
    assert select_most_reliable(exits) == exits[2]


def test_an_exit_that_is_nan_is_recalled_only_if_there_is_no_other():
    bad = Exit(1, 0, math.nan, math.nan)
    assert select_most_reliable([Exit(0, 1, 0.1, 0.9), bad]) == Exit(0, 1, 0.1, 0.9)
    assert select_most_reliable([bad]) is bad


@given(st.lists(st.builds(Exit, st.integers(0, 15), st.integers(0, 4095), unit, unit), max_size=16))
def test_packed_exits_come_back_to_one_part_in_65535(exits):
    back = unpack_exits(pack_exits(exits))
    assert [(e.rung, e.label) for e in back] == [(e.rung, e.label) for e in exits]
    for ours, theirs in zip(exits, back, strict=True):
        assert abs(ours.probability - theirs.probability) <= 0.5 / 65535 + 1e-12
        assert abs(ours.score - theirs.score) <= 0.5 / 65535 + 1e-12


def test_a_nan_is_packed_as_what_it_means():
    assert unpack_exits(pack_exits([Exit(0, 3, math.nan, math.nan)])) == (Exit(0, 3, 0.0, 1.0),)


@given(st.lists(unit, max_size=20))
def test_packed_probabilities_come_back(values):
    assert unpack_probabilities(pack_probabilities(values)) == pytest.approx(tuple(values), abs=1e-5)
