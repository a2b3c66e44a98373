"""Which client updates count, and what becomes of a device that keeps sending bad ones."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.core.federation.screening import (
    NOT_A_VOTE,
    Accepted,
    NormRule,
    Reason,
    Rejected,
    RoundSpec,
    decide_max_norm,
    measure_norm,
    screen,
    screen_cohort,
)
from cloud_hub.core.federation.standing import (
    FAULTS,
    FIRST_QUARANTINE_ROUNDS,
    MAX_QUARANTINE_ROUNDS,
    Standing,
    is_quarantined,
    next_standing,
)
from cloud_hub.core.federation.update import Layout, Update

BASE, OLD, UNKNOWN = (bytes([i]) * 32 for i in (1, 2, 3))
LAYOUT = Layout((("b", (2,)), ("w", (2, 3))))
SPEC = RoundSpec(BASE, LAYOUT, max_examples=100, older_bases={OLD: 2})


def a_delta(value=1.0):
    return {"w": np.full((2, 3), value, np.float32), "b": np.full(2, value, np.float32)}


def an_update(device="a", num_examples=10, base=BASE, delta=None, **tensors):
    return Update(device, num_examples, base, {**(a_delta() if delta is None else delta), **tensors})


def reasons(*updates, spec=SPEC, **how):
    return [
        None if isinstance(v, Accepted) else v.reason
        for v in screen_cohort(lambda: iter(updates), spec, **how)
    ]


def test_a_good_update_is_accepted_with_its_norm():
    verdict = screen(an_update(), SPEC)
    assert isinstance(verdict, Accepted)
    assert (verdict.norm, verdict.staleness) == (pytest.approx(math.sqrt(8)), 0)


def poisoned(value):
    w = np.ones((2, 3), np.float32)
    w[1, 2] = value
    return w


@pytest.mark.parametrize(
    ("update", "rejected"),
    [
        (an_update(base=UNKNOWN), (Reason.WRONG_BASE, "unknown base 0303030303030303")),
        (an_update(base=OLD), (Reason.STALE, "made 2 rounds ago, at most 0 are taken")),
        (an_update(num_examples=0), (Reason.EXAMPLES, "0 examples, not in 1..100")),
        (an_update(num_examples=-1), (Reason.EXAMPLES, "-1 examples, not in 1..100")),
        (an_update(num_examples=101), (Reason.EXAMPLES, "101 examples, not in 1..100")),
        (an_update(x=np.ones(1, np.float32)), (Reason.KEYS, "unknown tensor 'x'")),
        (an_update(delta={"b": np.ones(2, np.float32)}), (Reason.KEYS, "tensor 'w' is missing")),
        (an_update(delta={}), (Reason.KEYS, "tensor 'b' is missing")),
        (an_update(w=np.ones((3, 2), np.float32)), (Reason.SHAPE, "'w' is (3, 2), expected (2, 3)")),
        # Each of these would be broadcast without a word.
        (an_update(w=np.ones((1, 3), np.float32)), (Reason.SHAPE, "'w' is (1, 3), expected (2, 3)")),
        (an_update(w=np.float32(1)), (Reason.SHAPE, "'w' is (), expected (2, 3)")),
        (an_update(b=np.ones(2)), (Reason.DTYPE, "'b' is float64, expected float32")),
        (an_update(b=np.ones(2, ">f4")), (Reason.DTYPE, "'b' is >f4, expected float32")),
        (an_update(b=np.array([{}, {}])), (Reason.DTYPE, "'b' is object, expected float32")),
        (an_update(w=poisoned(np.nan)), (Reason.NOT_FINITE, "a number is infinite or NaN")),
        (an_update(w=poisoned(np.inf)), (Reason.NOT_FINITE, "a number is infinite or NaN")),
        (an_update(w=poisoned(-np.inf)), (Reason.NOT_FINITE, "a number is infinite or NaN")),
    ],
)
def test_an_update_that_is_not_what_the_round_asked_for_is_rejected_with_its_reason(update, rejected):
    assert screen(update, SPEC) == Rejected("a", *rejected)


def test_the_cap_of_examples_is_itself_allowed():
    assert isinstance(screen(an_update(num_examples=100), SPEC), Accepted)
    assert isinstance(screen(an_update(num_examples=1), SPEC), Accepted)


def test_a_round_that_takes_older_bases_says_how_old_the_vote_is():
    spec = RoundSpec(BASE, LAYOUT, 100, older_bases={OLD: 2}, max_staleness=2)
    verdict = screen(an_update(base=OLD), spec)
    assert isinstance(verdict, Accepted)
    assert verdict.staleness == 2


def test_a_hostile_name_is_cut_and_escaped_in_the_reason():
    verdict = screen(an_update(**{"\x1b[2J\n" + "x" * 500: np.ones(1, np.float32)}), SPEC)
    assert len(verdict.detail) < 120
    assert verdict.detail.isprintable()


def test_a_signalling_nan_is_rejected_without_a_warning():
    signalling = np.array([0x7F800001, 0], np.uint32).view(np.float32)
    assert screen(an_update(b=signalling), SPEC).reason is Reason.NOT_FINITE


def test_the_largest_float32_is_finite_and_has_a_norm():
    assert measure_norm({"w": np.full(100_000, np.finfo(np.float32).max)}) == pytest.approx(
        np.finfo(np.float32).max.astype(float) * math.sqrt(100_000)
    )


@given(st.lists(st.integers(0, 70_000), max_size=3), st.integers(0, 2**32 - 1))
def test_the_norm_is_that_of_all_tensors_together_whatever_the_blocks(sizes, seed):
    rng = np.random.default_rng(seed)
    delta = {str(i): rng.standard_normal(size).astype(np.float32) for i, size in enumerate(sizes)}
    whole = np.concatenate([np.zeros(1), *(array.astype(float) for array in delta.values())])
    assert measure_norm(delta) == pytest.approx(np.linalg.norm(whole), rel=1e-12)


@pytest.mark.parametrize("size", [1, 8191, 8192, 8193, 16_384, 16_385])
def test_the_last_number_counts_in_the_norm_at_every_edge_of_a_block(size):
    array = np.zeros(size, np.float32)
    array[-1] = 3
    assert measure_norm({"w": array, "b": np.float32([4])}) == 5


@given(st.integers(0, 69_999), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_number_that_is_not_finite_is_found_wherever_it_hides(place, value):
    array = np.zeros(70_000, np.float32)
    array[place] = value
    spec = RoundSpec(BASE, Layout((("w", (70_000,)),)), 100)
    assert screen(Update("a", 1, BASE, {"w": array}), spec).reason is Reason.NOT_FINITE


def test_a_device_has_one_vote_and_it_is_the_first():
    assert reasons(an_update("a"), an_update("b"), an_update("a")) == [None, None, Reason.REPEATED]


def test_a_bad_vote_is_a_vote():
    assert reasons(an_update("a", num_examples=0), an_update("a")) == [Reason.EXAMPLES, Reason.REPEATED]


def test_a_late_delivery_does_not_cost_a_device_its_vote():
    assert reasons(an_update("a", base=OLD), an_update("a", base=UNKNOWN), an_update("a")) == [
        Reason.STALE,
        Reason.WRONG_BASE,
        None,
    ]


def test_a_device_in_quarantine_is_not_counted():
    assert reasons(an_update("a"), an_update("b"), quarantined={"a"}) == [Reason.QUARANTINED, None]


def cohort(*values):
    return [an_update(f"d{i}", delta=a_delta(value)) for i, value in enumerate(values)]


def test_a_norm_far_above_the_cohorts_median_is_rejected():
    assert reasons(*cohort(1, 1.1, 0.9, 1, 4.1)) == [None] * 4 + [Reason.NORM]


def test_a_norm_at_the_bound_is_accepted():
    assert reasons(*cohort(1, 1, 1, 1, 4)) == [None] * 5


def test_a_vote_that_was_too_long_is_not_made_up_for_by_a_second():
    updates = [*cohort(1, 1, 1, 1, 1, 50), an_update("d5")]
    assert reasons(*updates) == [None] * 5 + [Reason.NORM, Reason.REPEATED]


def test_a_small_cohort_has_no_median_but_the_absolute_bound_holds():
    assert reasons(*cohort(1, 1, 1, 1000)) == [None] * 4
    bounded = RoundSpec(BASE, LAYOUT, 100, NormRule(max_norm=100.0))
    assert reasons(*cohort(1, 1, 1, 1000), spec=bounded) == [None] * 3 + [Reason.NORM]


def test_devices_that_learned_nothing_do_not_bar_those_that_did():
    assert reasons(*cohort(0, 0, 0, 0, 0, 0, 3)) == [None] * 7


def test_what_is_malformed_has_no_say_in_the_median():
    long = [an_update(f"x{i}", num_examples=0, delta=a_delta(1e6)) for i in range(20)]
    assert reasons(*long, *cohort(1, 1, 1, 1, 1, 50))[20:] == [None] * 5 + [Reason.NORM]


@given(
    st.lists(st.floats(0.5, 1.5), min_size=3, max_size=20),
    st.data(),
)
def test_fewer_than_half_liars_can_neither_bar_honest_norms_nor_raise_the_bound_above_theirs(honest, data):
    liars = data.draw(st.lists(st.floats(1e-9, 1e30), max_size=len(honest) - 1))
    bound = decide_max_norm([*honest, *liars], NormRule(factor=4.0, min_cohort=3))
    assert 4.0 * min(honest) <= bound <= 4.0 * max(honest)


@pytest.mark.parametrize(
    "bad", [{"factor": 0.9}, {"factor": math.nan}, {"max_norm": 0.0}, {"max_norm": math.nan}]
)
def test_a_norm_rule_that_bars_everyone_is_refused(bad):
    with pytest.raises(ValueError, match="norm rule"):
        NormRule(**bad)


def test_screening_holds_one_update_at_a_time():
    numbers = 1 << 18
    spec = RoundSpec(BASE, Layout((("w", (numbers,)),)), 100)

    def read():
        for i in range(50):
            yield Update(f"d{i}", 1, BASE, {"w": np.ones(numbers, np.float32)})

    tracemalloc.start()
    try:
        accepted = sum(isinstance(verdict, Accepted) for verdict in screen_cohort(read, spec))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert accepted == 50
    assert peak < 4 * 4 * numbers


GOOD = screen(an_update(), SPEC)


def rejected(reason):
    return Rejected("a", reason, "")


def after(*verdicts, standing=None, start=0):
    standing = standing or Standing()
    for number, verdict in enumerate(verdicts, start):
        standing = next_standing(standing, verdict, round_number=number)
    return standing


BAD = rejected(Reason.NOT_FINITE)


def test_three_faults_in_a_row_lead_to_quarantine():
    assert after(BAD, BAD) == Standing(points=6)
    standing = after(BAD, BAD, BAD)
    assert standing == Standing(6, 1, 2 + 1 + FIRST_QUARANTINE_ROUNDS)
    assert is_quarantined(standing, round_number=3)
    assert is_quarantined(standing, round_number=standing.barred_until - 1)
    assert not is_quarantined(standing, round_number=standing.barred_until)


def test_good_updates_wear_faults_off():
    assert after(BAD, GOOD, GOOD, GOOD, GOOD) == Standing()


def test_one_fault_in_four_is_borne_with():
    assert after(*([BAD, GOOD, GOOD, GOOD] * 50)).quarantines == 0


def test_one_fault_in_three_is_not():
    assert after(*([BAD, GOOD, GOOD] * 50)).quarantines > 0


@pytest.mark.parametrize("reason", sorted(set(Reason) - FAULTS, key=lambda reason: reason.name))
def test_to_be_late_or_to_repeat_is_no_fault(reason):
    assert after(*[rejected(reason)] * 20) == Standing()


def test_faults_and_what_is_no_vote_do_not_overlap():
    assert not FAULTS & NOT_A_VOTE


@pytest.mark.parametrize("verdict", [GOOD, BAD])
def test_what_arrives_in_quarantine_changes_nothing(verdict):
    standing = Standing(6, 1, 10)
    assert next_standing(standing, verdict, round_number=9) is standing


def test_after_a_quarantine_one_fault_leads_to_one_twice_as_long():
    standing = after(BAD, standing=Standing(6, 1, 10), start=10)
    assert standing == Standing(6, 2, 10 + 1 + 2 * FIRST_QUARANTINE_ROUNDS)


def test_a_quarantine_is_never_longer_than_its_bound():
    assert next_standing(Standing(6, 10**9, 0), BAD, round_number=0).barred_until == 1 + MAX_QUARANTINE_ROUNDS
