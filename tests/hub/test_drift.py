"""Many small steps downhill are one large one: a series ends near its best base, whoever pulls."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.core.federation.drift import NEGLIGIBLE, Drifted, bounded_losses, decide_drift
from cloud_hub.core.federation.guard import GuardRules, Kept, decide_guard, describe, figures_of

MAX_DRIFT = GuardRules().max_drift


def walk(rng, *, n, rounds, step, max_drift=MAX_DRIFT, noise=0.1):
    """Bases whose true loss moves by `step` a round, on `n` samples; mean losses that were kept, the first too."""
    base = best = rng.beta(1.0, 4.0, n)
    kept = [float(base.mean())]
    for _ in range(rounds):
        after = np.clip(base + step + noise * rng.standard_normal(n), 0.0, 1.0)
        if decide_drift(best, after, max_drift=max_drift) is None:
            base = after
            kept.append(float(after.mean()))
            best = after if after.mean() <= best.mean() else best
    return kept


def test_the_same_losses_have_not_drifted():
    losses = np.linspace(0.0, 1.0, 50)
    assert decide_drift(losses, losses, max_drift=0.0) is None


def test_what_lies_above_the_best_is_said_in_standard_errors():
    best = np.array([0.1, 0.2, 0.3, 0.4])
    after = best + np.array([0.0, 0.1, 0.2, 0.1])
    error = float(np.std([0.0, 0.1, 0.2, 0.1], ddof=1)) / 2.0
    drifted = decide_drift(best, after, max_drift=0.5)
    assert drifted == Drifted(0.25, pytest.approx(0.35), pytest.approx(0.1 / error))
    assert decide_drift(best, after, max_drift=2.5) is None
    assert describe(drifted) == (
        "drifts away from the best base of the series: loss 0.250 there, 0.350 after, 2.4 standard errors"
    )
    figures = figures_of(drifted, 4, loss=0.35, best_loss=0.25)
    assert (figures.judgement, figures.loss, figures.best_loss) == ("drifted", 0.35, 0.25)


def test_last_digits_that_all_move_one_way_are_no_drift():
    best = np.full(200, 0.2)
    assert decide_drift(best, best + NEGLIGIBLE / 2, max_drift=0.5) is None
    assert decide_drift(best, best + 2 * NEGLIGIBLE, max_drift=0.5) is not None


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=60),
    st.floats(0, 3),
    st.integers(1, 9),
)
def test_nothing_is_kept_that_lies_above_the_best_by_more_than_the_bound(pairs, max_drift, copies):
    best, after = (np.repeat(np.array(column), copies) for column in zip(*pairs, strict=True))
    above = after - best
    bound = max(NEGLIGIBLE, max_drift * above.std(ddof=1) / math.sqrt(above.size))
    assert (decide_drift(best, after, max_drift=max_drift) is None) == (above.mean() <= bound)


@given(st.integers(0, 2**32 - 1), st.integers(50, 400), st.floats(0, 0.02), st.integers(1, 40))
def test_however_many_rounds_pull_down_no_kept_base_leaves_the_best_by_more_than_the_bound(
    seed, n, step, rounds
):
    kept = walk(np.random.default_rng(seed), n=n, rounds=rounds, step=step)
    # Differences of losses in 0..1 deviate by at most about a half from their mean: n / (n - 1) for the sample's.
    widest = max(NEGLIGIBLE, MAX_DRIFT * math.sqrt(n / (n - 1)) / math.sqrt(n))
    assert max(kept) <= min(kept) + widest


def test_a_walk_whose_steps_the_test_of_one_round_does_not_see_is_stopped_by_the_bound():
    """Four samples of 228 lost a round, two won: never significant, and eleven points in fifteen rounds."""
    n, rules = 228, GuardRules(min_samples=50)
    labels = np.zeros(n, np.int64)
    right = np.ones(n, bool)
    right[:30] = False
    best = np.where(right, 0.1, 0.9)
    lost, kept_by_both = 0, 0
    for turn in range(15):
        after = right.copy()
        after[30 + 4 * turn : 34 + 4 * turn] = False
        after[2 * turn % 30 : 2 * turn % 30 + 2] = True
        was, now = (np.where(each, 0, 1)[None].astype(np.int64) for each in (right, after))
        assert isinstance(decide_guard(was, now, labels, rules), Kept)
        kept_by_both += decide_drift(best, np.where(after, 0.1, 0.9), max_drift=MAX_DRIFT) is None
        lost += int(right.sum()) - int(after.sum())
        right = after
    assert (lost >= 25, kept_by_both) == (True, 0)


def test_a_round_as_good_as_the_best_is_rolled_back_as_often_as_is_stated():
    rng, rounds, rate = np.random.default_rng(1), 2000, 0.3085
    count = 0
    for _ in range(rounds):
        samples = rng.beta(1.0, 4.0, (2, 228))
        count += decide_drift(samples[0], samples[1], max_drift=0.5) is not None
    assert abs(count - rate * rounds) <= 3 * math.sqrt(rate * (1 - rate) * rounds)


def test_losses_are_bounded_and_what_is_no_number_is_worst():
    found = bounded_losses(np.array([0.0, 3 * math.log(2), 1e30, math.inf, math.nan]), 3)
    assert found == pytest.approx([0.0, 0.25, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("best", "after"), [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_shapes_that_do_not_fit_are_refused(best, after):
    with pytest.raises(ValueError, match="losses of shapes"):
        decide_drift(np.zeros(best), np.zeros(after), max_drift=0.5)


def test_of_a_single_sample_nothing_is_said():
    assert decide_drift(np.zeros(1), np.ones(1), max_drift=0.0) is None


def test_a_bound_below_nothing_is_refused():
    with pytest.raises(ValueError, match="is below 0"):
        GuardRules(max_drift=-1.0)
