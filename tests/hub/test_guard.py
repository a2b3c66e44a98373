"""When a round is rolled back, and when a candidate is better."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.core.federation.guard import (
    Better,
    CannotJudge,
    GuardRules,
    Kept,
    Place,
    Worse,
    decide_better,
    decide_guard,
    describe,
    is_better,
    tail_of_coins,
)

RULES = GuardRules(alpha=0.05, max_drop=0.1, min_samples=50)
CLASSES = 10


def truth(n, seed=0):
    return np.random.default_rng(seed).integers(0, CLASSES, n)


def answers(labels, right):
    """What a network says that is right exactly where `right` is true."""
    return np.where(right, labels, (labels + 1) % CLASSES)


def one_exit(labels, right):
    return answers(labels, np.asarray(right, bool))[None]


def judged(lost, won, *, n=200, rules=RULES, decide=decide_guard):
    """One exit that was right on all but `won` samples; all of one class."""
    labels = np.zeros(n, np.int64)
    was = np.arange(n) >= won
    now = np.arange(n) < n - lost
    return decide(one_exit(labels, was), one_exit(labels, now), labels, rules)


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_tail_of_coins_is_the_exact_one(heads, coins):
    exact = Fraction(sum(math.comb(coins, k) for k in range(heads, coins + 1)), 2**coins)
    assert (
        tail_of_coins(heads, coins) == pytest.approx(float(exact), rel=1e-12, abs=0)
        if heads <= coins
        else True
    )


@pytest.mark.parametrize(
    ("heads", "coins", "tail"), [(5, 5, 1 / 32), (0, 0, 1.0), (0, 9, 1.0), (4, 5, 6 / 32), (3, 5, 0.5)]
)
def test_the_tail_of_coins_by_hand(heads, coins, tail):
    assert tail_of_coins(heads, coins) == pytest.approx(tail)


def test_the_tail_of_many_coins_neither_underflows_nor_passes_one():
    assert 0.49 < tail_of_coins(50_000, 100_000) < 0.51
    assert tail_of_coins(100_000, 100_000) == 0.0
    assert tail_of_coins(900, 1000) == pytest.approx(6.7e-162, rel=0.01)
    assert tail_of_coins(1, 100_000) == pytest.approx(1.0, rel=1e-8)


def test_the_same_answers_are_kept():
    labels = truth(100)
    same = np.stack([answers(labels, labels != 3), labels])
    assert decide_guard(same, same, labels, RULES) == Kept(1.0, 1.0, 100)


def test_few_losses_are_noise_and_many_are_not():
    # Two tests, for the one class is tested as well: 2 * 2**-5 is above 0.05, 2 * 2**-6 is not.
    assert judged(5, 0) == Kept(1.0, 0.975, 200)
    assert judged(6, 0) == Worse(Place(0), 1.0, 0.97, pytest.approx(2 * 2.0**-6), (Place(0, 0),))


def test_losses_that_are_won_elsewhere_are_noise():
    assert judged(15, 15) == Kept(0.925, 0.925, 200)


def test_a_drop_above_the_bound_is_not_kept_whatever_the_test_says():
    rules = GuardRules(alpha=1e-9, max_drop=0.1, min_samples=10)
    assert judged(10, 0, n=100, rules=rules) == Kept(1.0, 0.9, 100)
    assert judged(11, 0, n=100, rules=rules) == Worse(Place(0), 1.0, 0.89, pytest.approx(2 * 2.0**-11))


@pytest.mark.parametrize("has", [0, 49])
def test_a_small_holdout_judges_nothing(has):
    labels = truth(has)
    assert decide_guard(labels[None], labels[None], labels, RULES) == CannotJudge(has, 50)
    assert not is_better(labels[None], labels[None], labels, RULES)


def test_a_collapse_to_chance_is_always_caught_with_fifty_samples():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, 50)
        before = answers(labels, rng.random((3, 50)) < 0.85)
        constant = np.full((3, 50), seed % CLASSES)
        for after in (rng.integers(0, CLASSES, (3, 50)), constant):
            assert isinstance(decide_guard(before, after, labels, RULES), Worse)


def test_a_class_that_vanishes_is_caught_within_the_class_although_the_whole_gains():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, 400)
        right = rng.random((2, 400)) < 0.85
        before = answers(labels, right)
        # The others gain about what the one class loses.
        after = answers(labels, np.where(labels == 7, False, right | (rng.random((2, 400)) < 0.5)))
        judgement = decide_guard(before, after, labels, RULES)
        assert isinstance(judgement, Worse)
        assert (judgement.where, judgement.after) == (Place(1, 7), 0.0)


def test_an_early_exit_that_breaks_is_caught_although_the_last_one_is_fine():
    labels = truth(200)
    good = np.stack([answers(labels, np.arange(200) % 5 != 0), labels])
    bad = np.stack([answers(labels, np.arange(200) % 2 != 0), labels])
    judgement = decide_guard(good, bad, labels, RULES)
    assert isinstance(judgement, Worse)
    assert (judgement.where, judgement.also) == (Place(0), ())


def rollbacks(rules, *, n, churn, rounds, seed):
    """How many of so many rounds were rolled back that changed answers but not how good they are.

    Samples come from a known pool: each is answered rightly with the chance of its class and exit before and
    after; a share of `churn` is answered anew, independently of before.
    """
    rng = np.random.default_rng(seed)
    skill = rng.uniform(0.6, 0.98, (3, CLASSES))
    count = 0
    for _ in range(rounds):
        labels = rng.choice(CLASSES, n, p=np.arange(1, CLASSES + 1) / 55)
        was = rng.random((3, n)) < skill[:, labels]
        now = np.where(rng.random((3, n)) < churn, rng.random((3, n)) < skill[:, labels], was)
        count += isinstance(decide_guard(answers(labels, was), answers(labels, now), labels, rules), Worse)
    return count


@pytest.mark.parametrize("churn", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [100, 500])
def test_an_equally_good_round_is_rolled_back_in_at_most_alpha(n, churn):
    rounds, alpha = 500, 0.1
    count = rollbacks(
        GuardRules(alpha, max_drop=1.0, min_samples=50), n=n, churn=churn, rounds=rounds, seed=n
    )
    assert count <= alpha * rounds + 2.33 * math.sqrt(alpha * (1 - alpha) * rounds)


@pytest.mark.parametrize("n", [100, 500])
def test_at_the_defaults_an_equally_good_round_is_rolled_back_in_at_most_alpha_bound_and_all(n):
    count = rollbacks(GuardRules(), n=n, churn=0.3, rounds=500, seed=n)
    assert count <= 0.05 * 500 + 2.33 * math.sqrt(0.05 * 0.95 * 500)


@pytest.mark.parametrize("n", [100, 109, 150, 500])
def test_the_plain_bound_is_hardly_met_by_noise(n):
    rules = GuardRules()
    worst = 0.0
    for changed in range(n // 5 + 1):
        losses = next(b for b in range(changed + 1000) if 2 * b - changed > rules.max_drop * n)
        worst = max(worst, tail_of_coins(losses, changed) if losses <= changed else 0.0)
    assert worst < 1 / 50


def test_a_candidate_is_better_when_it_won_more_than_noise_wins():
    assert judged(0, 4, decide=decide_better) == Kept(0.98, 1.0, 200)
    assert judged(0, 5, decide=decide_better) == Better(0.975, 1.0, pytest.approx(2.0**-5))
    assert judged(0, 5, decide=is_better)
    assert not judged(0, 0, decide=is_better)


def test_a_candidate_that_lost_a_class_is_not_better():
    labels = np.repeat([0, 1], [180, 20])
    before = one_exit(labels, (labels == 1) | (np.arange(200) < 100))
    after = one_exit(labels, labels == 0)
    assert decide_better(before, after, labels, RULES).where == Place(0, 1)
    assert not is_better(before, after, labels, RULES)


def test_a_judgement_reads_as_one_line():
    assert describe(Kept(0.9, 0.91, 300)) == "not worse: 90.0% before, 91.0% after, on 300 samples"
    assert (
        describe(Worse(Place(1, 7), 0.9, 0.1, 1e-6))
        == "worse at exit 1, class 7: 90.0% before, 10.0% after, p 1e-06"
    )
    assert (
        describe(Worse(Place(0), 0.9, 0.8, 0.01, (Place(1),)))
        == "worse at exit 0 and 1 more: 90.0% before, 80.0% after, p 0.01"
    )
    assert describe(Better(0.9, 0.95, 0.01)) == "better: 90.0% before, 95.0% after, p 0.01"
    assert describe(CannotJudge(12, 100)) == "cannot judge: 12 holdout samples, 100 needed"


@pytest.mark.parametrize(
    ("before", "after", "labels"),
    [((2, 60), (3, 60), (60,)), ((2, 60), (2, 60), (61,)), ((60,), (60,), (60,)), ((0, 60), (0, 60), (60,))],
)
def test_shapes_that_do_not_fit_are_refused(before, after, labels):
    with pytest.raises(ValueError, match="labels of shapes"):
        decide_guard(np.zeros(before, np.int64), np.zeros(after, np.int64), np.zeros(labels, np.int64), RULES)


@pytest.mark.parametrize(
    "rules", [{"alpha": 0.0}, {"alpha": math.nan}, {"max_drop": 0.0}, {"max_drop": 1.1}, {"min_samples": 0}]
)
def test_rules_out_of_range_are_refused(rules):
    with pytest.raises(ValueError, match="guard"):
        GuardRules(**rules)
