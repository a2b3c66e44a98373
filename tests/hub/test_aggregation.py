"""Votes into a step, a step into the next training base."""

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cloud_hub.core.federation.aggregation import (
    GROUP,
    MAX_ERROR,
    AggregationError,
    Say,
    WeightedMean,
    weigh_by_examples,
    weigh_by_staleness,
    weigh_clipped,
)
from cloud_hub.core.federation.robust import TrimmedMean, trim_share, trim_to_median
from cloud_hub.core.federation.screening import Accepted, RoundSpec, measure_norm, screen_cohort
from cloud_hub.core.federation.server import MOMENTUM, SECOND_MOMENT, Adam, Momentum, Plain, ServerState
from cloud_hub.core.federation.strategies import (
    coordinate_median,
    fed_adam,
    fed_avg,
    fed_avg_m,
    fed_buff,
    fed_prox,
    norm_clipped,
    trimmed_mean,
)
from cloud_hub.core.federation.update import Layout, Update

ROOT = bytes(32)
BASE = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float32([10, 20]),
    "s": np.array(5, np.float32),
}
STRATEGIES = {
    "fed_avg": fed_avg,
    "fed_prox": fed_prox,
    "fed_avg_m": fed_avg_m,
    "fed_adam": fed_adam,
    "fed_buff": fed_buff,
    "norm_clipped": lambda: norm_clipped(1.0),
    "coordinate_median": coordinate_median,
    "trimmed_mean": trimmed_mean,
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def a_vote(delta, num_examples=1, staleness=0, device="a"):
    return Accepted(Update(device, num_examples, ROOT, delta), measure_norm(delta), staleness)


def like_base(rng, scale=1.0):
    return {name: (scale * rng.standard_normal(a.shape)).astype(np.float32) for name, a in BASE.items()}


def votes_of(seed, count, **how):
    rng = np.random.default_rng(seed)
    return [a_vote(like_base(rng), int(rng.integers(1, 1000)), device=f"d{i}", **how) for i in range(count)]


def outcome_of(strategy, votes, state=None, base=BASE):
    round_ = strategy.begin(base)
    for vote in votes:
        round_.add(vote)
    return round_.finish(state or ServerState())


def same(weights, expected, rtol=1e-6):
    assert weights.keys() == expected.keys()
    for name, array in weights.items():
        assert (array.dtype, array.shape) == (np.float32, np.shape(expected[name]))
        np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=1e-6)


def mean_of(votes):
    total = sum(vote.update.num_examples for vote in votes)
    return {
        name: sum(vote.update.num_examples * vote.update.delta[name].astype(float) for vote in votes) / total
        for name in BASE
    }


def vector_of(values):
    return a_vote({"w": np.asarray(values, np.float32)})


def combined(combiner, votes):
    for vote in votes:
        combiner.add(vote)
    return combiner.close()


def flat_layout(size):
    return Layout((("w", (size,)),))


@pytest.mark.parametrize("strategy", [fed_avg, fed_prox])
def test_fed_avg_adds_the_mean_by_examples(strategy):
    votes = votes_of(1, 7)
    outcome = outcome_of(strategy(), votes)
    same(outcome.weights, {name: BASE[name] + delta for name, delta in mean_of(votes).items()})
    assert outcome.votes == 7


def test_fed_avg_of_two_by_hand():
    zero = {name: np.zeros_like(a) for name, a in BASE.items()}
    four = {name: np.full_like(a, 4) for name, a in BASE.items()}
    outcome = outcome_of(fed_avg(), [a_vote(zero, 3), a_vote(four, 1)])
    assert outcome.weights["b"].tolist() == [11, 21]
    assert outcome.weights["s"] == 6


def test_momentum_keeps_part_of_the_last_step():
    first, second = votes_of(1, 3), votes_of(2, 3)
    one = outcome_of(fed_avg_m(0.5, beta=0.9), first)
    two = outcome_of(fed_avg_m(0.5, beta=0.9), second, one.state, one.weights)
    d1, d2 = mean_of(first), mean_of(second)
    same(one.weights, {name: BASE[name] + 0.5 * d1[name] for name in BASE})
    same(
        two.weights, {name: one.weights[name] + 0.5 * (0.9 * d1[name] + d2[name]) for name in BASE}, rtol=1e-5
    )


def test_momentum_of_none_is_fed_avg():
    votes = votes_of(3, 4)
    same(outcome_of(fed_avg_m(beta=0.0), votes).weights, outcome_of(fed_avg(), votes).weights)


def test_adam_follows_algorithm_two_for_three_rounds():
    rate, b1, b2, tau = 0.1, 0.9, 0.99, 1e-3
    weights, state = dict(BASE), ServerState()
    x = {name: a.astype(float) for name, a in BASE.items()}
    m = {name: np.zeros(a.shape) for name, a in BASE.items()}
    v = {name: np.full(a.shape, tau**2) for name, a in BASE.items()}
    for seed in range(3):
        votes = votes_of(seed, 3)
        outcome = outcome_of(fed_adam(rate, b1, b2, tau), votes, state, weights)
        weights, state = outcome.weights, outcome.state
        for name, delta in mean_of(votes).items():
            m[name] = b1 * m[name] + (1 - b1) * delta
            v[name] = b2 * v[name] + (1 - b2) * delta**2
            x[name] = x[name] + rate * m[name] / (np.sqrt(v[name]) + tau)
        same(weights, x, rtol=1e-5)
    assert {name: vector.shape for name, vector in state.vectors.items()} == {
        MOMENTUM: (9,),
        SECOND_MOMENT: (9,),
    }


def test_adam_stands_still_where_nobody_moved():
    zero = {name: np.zeros_like(a) for name, a in BASE.items()}
    same(outcome_of(fed_adam(), [a_vote(zero)]).weights, BASE)


def test_fed_buff_shrinks_by_age_and_divides_by_the_number_of_votes():
    ones = {name: np.ones_like(a) for name, a in BASE.items()}
    votes = [a_vote(ones, 7, staleness=0), a_vote(ones, 900, staleness=3)]
    same(outcome_of(fed_buff(), votes).weights, {name: a + 0.75 for name, a in BASE.items()})


@pytest.mark.parametrize(("staleness", "scale"), [(0, 1.0), (1, 1 / math.sqrt(2)), (8, 1 / 3)])
def test_a_fresh_update_is_not_shrunk_and_an_old_one_by_the_root(staleness, scale):
    assert weigh_by_staleness(a_vote(BASE, 5, staleness)) == Say(1.0, pytest.approx(scale))


def says(*pairs):
    """Weighs votes one after the other as it is told."""
    following = iter(pairs)
    return lambda vote: Say(*next(following))


def exact_mean(rows, pairs):
    """The mean in fractions without rounding, and the mean size of what was said, for each coordinate."""
    total = sum(Fraction(weight) for weight, _ in pairs)
    means, sizes = [], []
    for column in rows.T.tolist():
        products = [
            Fraction(weight) * Fraction(scale) * Fraction(number)
            for (weight, scale), number in zip(pairs, column, strict=True)
        ]
        means.append(float(sum(products) / total))
        sizes.append(float(sum(map(abs, products)) / total))
    return np.array(means), np.array(sizes)


def test_clipping_shortens_the_long_and_leaves_the_short():
    mean = combined(
        WeightedMean(flat_layout(2), weigh_clipped(5.0)), [vector_of([30, 40]), vector_of([0, 1])]
    )
    assert mean.tolist() == pytest.approx([1.5, 2.5])


def test_clipping_leaves_an_update_of_zero_alone():
    assert combined(WeightedMean(flat_layout(2), weigh_clipped(1.0)), [vector_of([0, 0])]).tolist() == [0, 0]


@given(arrays(np.float32, (4, 5), elements=st.floats(-1e6, 1e6, width=32)), st.floats(0.125, 100))
def test_a_clipped_mean_is_never_longer_than_the_bound(rows, bound):
    step = combined(WeightedMean(flat_layout(5), weigh_clipped(bound)), map(vector_of, rows))
    assert np.linalg.norm(step) <= bound * (1 + MAX_ERROR)


@pytest.mark.parametrize("size", [1, 32_767, 32_768, 32_769, 65_537])
def test_the_mean_is_numpys_at_every_edge_of_a_block(size):
    rows = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
    votes = [a_vote({"w": row}, count) for row, count in zip(rows, (1, 50, 2**28), strict=True)]
    step = combined(WeightedMean(flat_layout(size), weigh_by_examples), votes)
    expected = np.average(rows.astype(float), axis=0, weights=[1, 50, 2**28])
    size = np.average(np.abs(rows.astype(float)), axis=0, weights=[1, 50, 2**28])
    assert (np.abs(step - expected) <= MAX_ERROR * size).all()


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 131_073])
def test_every_number_counts_once_at_every_edge_of_a_block_and_of_a_group(size):
    votes = [a_vote({"w": np.full(size, i, np.float32)}) for i in range(2 * GROUP + 1)]
    assert (combined(WeightedMean(flat_layout(size), weigh_by_examples), votes) == GROUP).all()


votes_and_weights = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        arrays(np.float32, (n, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
        st.lists(st.integers(1, 2**31 - 1), min_size=n, max_size=n),
        st.permutations(range(n)),
    )
)


@given(votes_and_weights)
def test_the_mean_lies_between_the_least_and_the_greatest_vote(drawn):
    rows, counts, _ = drawn
    votes = [a_vote({"w": row}, count) for row, count in zip(rows, counts, strict=True)]
    mean = combined(WeightedMean(flat_layout(4), weigh_by_examples), votes)
    slack = MAX_ERROR * np.abs(rows.astype(float)).max(axis=0) + 2.0**-100
    assert (mean >= rows.min(axis=0) - slack).all()
    assert (mean <= rows.max(axis=0) + slack).all()


@given(votes_and_weights)
def test_the_order_of_votes_moves_the_mean_within_the_stated_error_only(drawn):
    rows, counts, order = drawn
    votes = [a_vote({"w": row}, count) for row, count in zip(rows, counts, strict=True)]
    one = combined(WeightedMean(flat_layout(4), weigh_by_examples), votes)
    other = combined(WeightedMean(flat_layout(4), weigh_by_examples), [votes[i] for i in order])
    size = np.average(np.abs(rows.astype(float)), axis=0, weights=counts)
    assert (np.abs(one - other) <= 2 * MAX_ERROR * size + 2.0**-100).all()


def test_the_same_votes_in_the_same_order_give_the_same_bits():
    votes = votes_of(8, 40)
    one, other = (combined(WeightedMean(Layout.of(BASE), weigh_by_examples), votes) for _ in range(2))
    assert one.tobytes() == other.tobytes()


float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
pairs_of = st.tuples(st.floats(2.0**-200, 2.0**200), st.floats(-1, 1) | st.floats(2.0**-60, 1) | st.just(0.0))


@given(
    st.integers(1, 2 * GROUP + 3).flatmap(
        lambda n: st.tuples(
            arrays(np.float32, (n, 3), elements=float32s), st.lists(pairs_of, min_size=n, max_size=n)
        )
    )
)
def test_the_mean_is_the_exact_one_within_the_stated_error_whatever_weights_and_numbers(drawn):
    rows, pairs = drawn
    step = combined(WeightedMean(flat_layout(3), says(*pairs)), map(vector_of, rows))
    expected, size = exact_mean(rows, pairs)
    assert (np.abs(step - expected) <= MAX_ERROR * size + 2.0**-100).all()


@pytest.mark.parametrize("count", [GROUP, GROUP + 1, 400])
@pytest.mark.parametrize(
    "weights",
    [[1e-6, 1e3], [1e3, 1e-6], [1e-6] * 15 + [1e3], [2**31 - 1, 1], [1e-30, 1, 1e30], [1 / 3]],
    ids=str,
)
def test_the_error_stays_within_its_bound_for_mixed_magnitudes_and_does_not_grow_with_the_votes(
    weights, count
):
    rng = np.random.default_rng(count)
    sizes = 10.0 ** rng.choice([-6, 3], (count, 1))
    rows = (sizes * rng.standard_normal((count, 500))).astype(np.float32)
    pairs = [(float(weights[i % len(weights)]), 1.0) for i in range(count)]
    step = combined(WeightedMean(flat_layout(500), says(*pairs)), map(vector_of, rows))
    by = [weight for weight, _ in pairs]
    expected = np.average(rows.astype(np.longdouble), axis=0, weights=by)
    size = np.average(np.abs(rows.astype(float)), axis=0, weights=by)
    assert (np.abs(step - expected) <= MAX_ERROR * size).all()


def test_votes_that_do_not_cancel_are_as_exact_as_single_precision_is():
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.5, 1, (400, 1000)).astype(np.float32)
    counts = rng.integers(1, 1000, 400)
    votes = [a_vote({"w": row}, int(count)) for row, count in zip(rows, counts, strict=True)]
    step = combined(WeightedMean(flat_layout(1000), weigh_by_examples), votes)
    expected = np.average(rows.astype(float), axis=0, weights=counts)
    assert (np.abs(step / expected - 1) < 2.0**-23).all()


def test_the_largest_numbers_do_not_overflow_in_any_group():
    top = float(np.finfo(np.float32).max)
    rows = np.full((3 * GROUP, 2), [top, -top], np.float32)
    pairs = [(weight, 1.0) for weight in (1.0, 2.0**15, 2.0**31) * GROUP]
    step = combined(WeightedMean(flat_layout(2), says(*pairs)), map(vector_of, rows))
    assert step.tolist() == pytest.approx([top, -top], rel=MAX_ERROR)


def test_a_vote_scaled_to_nothing_counts_as_a_vote_for_staying():
    combiner = WeightedMean(flat_layout(1), says((1.0, 0.0), (3.0, 1.0), (4.0, 0.0)))
    assert combined(combiner, map(vector_of, [[100], [8], [100]])).tolist() == [3]
    assert combined(WeightedMean(flat_layout(1), says((1.0, 0.0))), [vector_of([7])]).tolist() == [0]


@given(votes_and_weights, st.sampled_from([trim_to_median, trim_share(0.3)]))
def test_the_order_of_votes_does_not_touch_the_robust_ones_at_all(drawn, trim):
    rows, _, order = drawn
    one = combined(TrimmedMean(flat_layout(4), trim, 8), map(vector_of, rows))
    other = combined(TrimmedMean(flat_layout(4), trim, 8), map(vector_of, rows[list(order)]))
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_the_median_is_numpys_over_several_blocks(count):
    rows = np.random.default_rng(count).standard_normal((count, 300_000)).astype(np.float32)
    step = combined(TrimmedMean(flat_layout(300_000), trim_to_median, 9), map(vector_of, rows))
    np.testing.assert_allclose(step, np.median(rows.astype(float), axis=0), rtol=1e-15)


def test_the_trimmed_mean_is_that_of_the_sorted_middle():
    rows = np.random.default_rng(0).standard_normal((10, 1000)).astype(np.float32)
    step = combined(TrimmedMean(flat_layout(1000), trim_share(0.2), 10), map(vector_of, rows))
    np.testing.assert_allclose(step, np.sort(rows.astype(float), axis=0)[2:8].mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("share", "votes", "trimmed"), [(0.29, 100, 29), (0.1, 30, 3), (0.49, 2, 0), (0.0, 9, 0)]
)
def test_the_share_is_rounded_down_to_whole_votes(share, votes, trimmed):
    assert trim_share(share)(votes) == trimmed


@settings(max_examples=50)
@given(st.integers(3, 21), st.sampled_from([0.1, 0.2, 0.4, None]), st.data())
def test_a_stated_share_of_liars_cannot_leave_the_honest_range(count, share, data):
    trim = trim_to_median if share is None else trim_share(share)
    liars = trim(count)
    lies = data.draw(arrays(np.float32, (liars, 3), elements=st.floats(-(2.0**126), 2.0**126, width=32)))
    honest = np.random.default_rng(count).standard_normal((count - liars, 3)).astype(np.float32)
    step = combined(TrimmedMean(flat_layout(3), trim, count), map(vector_of, [*lies, *honest]))
    assert (step >= honest.min(axis=0) - 1e-12).all()
    assert (step <= honest.max(axis=0) + 1e-12).all()


def test_a_plain_mean_does_leave_it():
    step = combined(WeightedMean(flat_layout(1), weigh_by_examples), map(vector_of, [[1], [1], [1], [1e9]]))
    assert step[0] > 1e8


def test_a_robust_round_refuses_more_votes_than_its_buffer_holds():
    combiner = TrimmedMean(flat_layout(1), trim_to_median, 2)
    combiner.add(vector_of([1]))
    combiner.add(vector_of([3]))
    with pytest.raises(AggregationError, match="more than 2 votes"):
        combiner.add(vector_of([100]))
    assert combiner.close().tolist() == [2]


@pytest.mark.parametrize(
    "say",
    [
        Say(0.0),
        Say(-1.0),
        Say(math.nan),
        Say(math.inf),
        Say(1.0, math.nan),
        Say(1e200),
        Say(1e-200),
        Say(1.0, 1e200),
    ],
)
def test_a_weight_that_is_none_is_refused_and_changes_nothing(say):
    combiner = WeightedMean(flat_layout(1), says((1.0,), (say.weight, say.scale), (1.0,)))
    combiner.add(vector_of([1]))
    with pytest.raises(AggregationError, match="no vote"):
        combiner.add(vector_of([100]))
    combiner.add(vector_of([3]))
    assert (combiner.votes, combiner.close().tolist()) == (2, [2])


@every_strategy
def test_a_round_without_votes_has_no_result(strategy):
    with pytest.raises(AggregationError, match="no vote"):
        strategy().begin(BASE).finish(ServerState())


@every_strategy
def test_a_round_is_finished_once(strategy):
    round_ = strategy().begin(BASE)
    round_.add(votes_of(0, 1)[0])
    round_.finish(ServerState())
    with pytest.raises(AggregationError, match="closed"):
        round_.finish(ServerState())
    with pytest.raises(AggregationError, match="closed"):
        round_.add(votes_of(0, 1)[0])


@every_strategy
def test_a_vote_of_another_model_is_refused_before_anything_is_counted(strategy):
    round_ = strategy().begin(BASE)
    # The first tensors fit; the last would be broadcast.
    with pytest.raises(AggregationError, match="expected"):
        round_.add(a_vote({**BASE, "w": np.full((1, 3), 99, np.float32)}))
    good = votes_of(5, 1)
    round_.add(good[0])
    same(round_.finish(ServerState()).weights, outcome_of(strategy(), good).weights, rtol=0)


@every_strategy
def test_a_round_changes_neither_base_nor_state_nor_votes(strategy):
    votes = votes_of(4, 5)
    state = outcome_of(strategy(), votes).state
    kept = [
        {name: a.copy() for name, a in every.items()}
        for every in (BASE, state.vectors, votes[0].update.delta)
    ]
    outcome_of(strategy(), votes, state)
    for before, now in zip(kept, (BASE, state.vectors, votes[0].update.delta), strict=True):
        assert all((before[name] == now[name]).all() for name in before)


@every_strategy
def test_a_base_that_came_back_in_another_order_gives_the_same_result(strategy):
    votes = votes_of(6, 4)
    state = outcome_of(strategy(), votes).state
    other = dict(reversed(list(BASE.items())))
    same(
        outcome_of(strategy(), votes, state, other).weights,
        outcome_of(strategy(), votes, state).weights,
        rtol=0,
    )


@every_strategy
def test_a_result_out_of_range_is_refused(strategy):
    huge = {name: np.full_like(a, np.finfo(np.float32).max) for name, a in BASE.items()}
    long = {name: np.full_like(a, 3e38) for name, a in BASE.items()}
    if strategy in (STRATEGIES["fed_adam"], STRATEGIES["norm_clipped"]):
        # These bound each step: the base's own size swallows it.
        base, votes = (
            {**huge, "s": np.array(np.inf, np.float32)},
            [a_vote(like_base(np.random.default_rng(0)))],
        )
    else:
        base, votes = huge, [a_vote(long)]
    with pytest.raises(AggregationError, match="left the range of float32"):
        outcome_of(strategy(), votes, base=base)


@pytest.mark.parametrize("rule", [Momentum(), Adam()])
def test_a_state_that_left_float32_is_refused_and_not_kept(rule):
    with pytest.raises(AggregationError, match="state left the range"):
        rule.apply(np.full(3, 1e300 if isinstance(rule, Momentum) else 1e38), ServerState())


@pytest.mark.parametrize("strategy", [fed_avg_m, fed_adam])
def test_a_state_of_another_model_is_refused(strategy):
    state = ServerState({MOMENTUM: np.zeros(1, np.float32)})
    with pytest.raises(AggregationError, match="the model has 9 numbers"):
        outcome_of(strategy(), votes_of(0, 1), state)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Plain(0.0),
        lambda: Plain(math.nan),
        lambda: Momentum(beta=1.0),
        lambda: Momentum(beta=math.nan),
        lambda: Adam(beta_2=-0.1),
        lambda: Adam(tau=0.0),
        lambda: weigh_clipped(0.0),
        lambda: weigh_clipped(math.nan),
        lambda: trim_share(0.5),
        lambda: trim_share(math.nan),
        lambda: coordinate_median(max_votes=0),
    ],
)
def test_a_parameter_out_of_range_is_refused(build):
    with pytest.raises(ValueError):  # noqa: PT011 - each says its own
        build()


def test_nan_never_reaches_the_accumulator():
    rng = np.random.default_rng(0)
    updates = []
    for i in range(30):
        delta = like_base(rng)
        if i % 3 == 0:
            delta["w"][1, 1] = (np.nan, np.inf, -np.inf)[i % 9 // 3]
        updates.append(Update(f"d{i}", 5, ROOT, delta))
    spec = RoundSpec(ROOT, Layout.of(BASE), 100)
    votes = [v for v in screen_cohort(lambda: iter(updates), spec) if isinstance(v, Accepted)]
    outcome = outcome_of(fed_avg(), votes)
    assert outcome.votes == 20
    same(outcome.weights, {name: BASE[name] + delta for name, delta in mean_of(votes).items()})


MODEL_NUMBERS = 1 << 18  # 1 MB


def peak_models(strategy, state, count):
    base = {"w": np.zeros((512, 512), np.float32)}
    tracemalloc.start()
    try:
        round_ = strategy.begin(base)
        for i in range(count):
            round_.add(a_vote({"w": np.full((512, 512), i, np.float32)}))
        outcome = round_.finish(state)
        return outcome, tracemalloc.get_traced_memory()[1] / (4 * MODEL_NUMBERS)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("strategy", "models"),
    [(fed_avg(), 5.5), (norm_clipped(1.0), 5.5), (fed_buff(), 5.5), (fed_avg_m(), 7), (fed_adam(), 11)],
)
def test_a_hundred_votes_take_the_memory_of_a_few_models(strategy, models):
    state = peak_models(strategy, ServerState(), 1)[0].state
    outcome, peak = peak_models(strategy, state, 100)
    assert outcome.votes == 100
    assert peak < models


@pytest.mark.parametrize("strategy", [coordinate_median(20), trimmed_mean(0.2, 20)])
def test_a_robust_round_takes_its_buffer_and_little_more(strategy):
    assert peak_models(strategy, ServerState(), 20)[1] < 20 + 6
