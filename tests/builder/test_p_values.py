import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.builder.calibration.p_values import (
    GroupLosses,
    SampleLosses,
    last_passed,
    units_needed,
    upper_bounds,
)

EPSILONS = st.floats(0.001, 0.9)


def binomial(n, k, epsilon):
    return math.comb(n, k) * epsilon**k * (1 - epsilon) ** (n - k)


@pytest.mark.parametrize(("n", "epsilon"), [(1, 0.5), (7, 0.1), (40, 0.03), (200, 0.3)])
def test_the_binomial_p_value_is_the_exact_tail(n, epsilon):
    tails = np.cumsum([binomial(n, k, epsilon) for k in range(n + 1)])
    assert SampleLosses(np.arange(n + 1.0), n).p_values(epsilon) == pytest.approx(tails, rel=1e-9)


@given(st.integers(1, 60), EPSILONS, st.floats(0.001, 0.999))
def test_a_binomial_p_value_is_below_any_level_no_oftener_than_the_level_says(n, epsilon, level):
    p_values = SampleLosses(np.arange(n + 1.0), n).p_values(epsilon)
    chance = sum(binomial(n, k, epsilon) for k in range(n + 1) if p_values[k] <= level)
    assert chance <= level * (1 + 1e-9)


@pytest.mark.parametrize("epsilon", [0.05, 0.3])
@pytest.mark.parametrize("sizes", [(1,) * 7, (3, 1, 2, 2), (1, 5, 5)])
def test_the_capital_won_by_betting_is_one_on_average_at_the_risk_itself(sizes, epsilon):
    """All ways in which groups may be lost whole, with their chances: the expectation of 1 / p is at most 1."""
    sizes = np.array(sizes, float)
    lost = np.array(list(product([0, 1], repeat=len(sizes)))) * sizes
    chance = np.prod(np.where(lost > 0, epsilon, 1 - epsilon), axis=1)
    p_values = GroupLosses(lost, sizes).p_values(epsilon)
    # p stops at 1, so what is lost is not seen: E[1/p] may pass 1 only by what that adds.
    assert (chance[p_values < 1] / p_values[p_values < 1]).sum() <= 1.0
    for level in (0.5, 0.2, 0.05, 0.01):
        assert chance[p_values <= level].sum() <= level


@pytest.mark.parametrize("seed", range(3))
def test_betting_on_unlike_groups_is_wrong_no_oftener_than_the_level_says(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 20, 150).astype(float)
    epsilon, level, tries = 0.05, 0.1, 3_000
    # Large groups are safer than small ones; over samples the risk is just epsilon.
    risks = rng.beta(0.3, 5.0, len(sizes)) / np.sqrt(sizes)
    risks *= epsilon * sizes.sum() / (risks * sizes).sum()
    lost = rng.binomial(sizes.astype(int), np.minimum(risks, 1.0), (tries, len(sizes)))
    wrong = (GroupLosses(lost.astype(float), sizes).p_values(epsilon) <= level).mean()
    assert wrong <= level + 3 * math.sqrt(level * (1 - level) / tries)


def test_groups_that_are_lost_whole_do_not_pass_as_many_independent_samples():
    """100 groups of 50: the naive binomial p-value of 5,000 samples would be certain, and wrong."""
    sizes = np.full(100, 50.0)
    lost = np.zeros((1, 100))
    lost[0, 0] = 50
    epsilon = 0.02
    assert SampleLosses(lost.sum(axis=1), 5_000).p_values(epsilon)[0] < 1e-5
    assert GroupLosses(lost, sizes).p_values(epsilon)[0] > 0.3


def test_a_large_group_weighs_as_much_as_its_samples():
    sizes = np.array([1.0] * 99 + [100.0])
    small, large = np.zeros((1, 100)), np.zeros((1, 100))
    small[0, 0] = 1
    large[0, 99] = 100
    p_small = GroupLosses(small, sizes).p_values(0.3)[0]
    p_large = GroupLosses(large, sizes).p_values(0.3)[0]
    assert p_small < p_large
    assert p_large == 1.0


@given(st.permutations(range(8)), EPSILONS)
def test_the_order_of_groups_does_not_matter(order, epsilon):
    sizes, lost = np.arange(1.0, 9.0), np.array([[0, 1, 0, 2, 0, 0, 3, 0]], float)
    shuffled = GroupLosses(lost[:, list(order)], sizes[list(order)])
    assert shuffled.p_values(epsilon) == pytest.approx(GroupLosses(lost, sizes).p_values(epsilon))


def test_a_group_lost_whole_is_no_error():
    p_values = GroupLosses(np.array([[5.0], [0.0]]), np.array([5.0])).p_values(0.3)
    assert p_values[0] == 1.0
    assert 0 < p_values[1] < 1


@pytest.mark.parametrize(
    ("p_values", "last"),
    [([0.01, 0.01], 1), ([0.01, 0.2, 0.01], 0), ([0.2, 0.01], -1), ([0.05], 0), ([math.nan, 0.0], -1)],
)
def test_the_sequence_stops_at_the_first_failure(p_values, last):
    assert last_passed(np.array(p_values), 0.05) == last


@pytest.mark.parametrize(("losses", "samples"), [(0, 100), (3, 600), (20, 3_000)])
def test_an_upper_bound_is_where_the_test_just_passes(losses, samples):
    counted = SampleLosses(np.array([float(losses)]), samples)
    (bound,) = upper_bounds(counted, 0.05)
    assert counted.p_values(bound)[0] <= 0.05
    assert counted.p_values(bound - 1e-6)[0] > 0.05


def test_the_bound_of_points_grows_with_their_losses():
    lost = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 2, 0]], float)
    for losses in (SampleLosses(lost.sum(axis=1), 12), GroupLosses(lost, np.full(4, 3.0))):
        assert (np.diff(upper_bounds(losses, 0.1)) > 0).all()


def test_what_cannot_pass_has_the_bound_one():
    assert upper_bounds(SampleLosses(np.array([10.0]), 10), 0.05).tolist() == [1.0]


@given(st.floats(0.001, 0.2), st.floats(0.001, 0.2))
def test_as_many_lossless_samples_as_are_needed_pass_and_one_less_does_not(epsilon, level):
    needed = units_needed(epsilon, level, "binomial")
    assert needed == math.ceil(math.log(level) / math.log1p(-epsilon) - 1e-9)
    groups = units_needed(epsilon, level, "betting")
    passes = [
        GroupLosses(np.zeros((1, n)), np.full(n, 7.0)).p_values(epsilon)[0] for n in (groups, groups - 1)
    ]
    assert passes[0] <= level * (1 + 1e-9)
    assert passes[1] >= level * (1 - 1e-9)


@pytest.mark.parametrize("samples", [600, 1_000, 3_000, 10_000])
def test_for_independent_samples_the_binomial_test_passes_whatever_betting_passes(samples):
    """The figures of docs/adr/0012."""
    lost = np.arange(90)
    binomial_p = SampleLosses(lost.astype(float), samples).p_values(0.005)
    units = (np.arange(samples) < lost[:, None]).astype(float)
    betting_p = GroupLosses(units, np.ones(samples)).p_values(0.005)
    assert (binomial_p <= betting_p).all()
    passed = {600: (0, -1), 1_000: (1, 0), 3_000: (8, 5), 10_000: (38, 30)}[samples]
    assert (last_passed(binomial_p, 0.05), last_passed(betting_p, 0.05)) == passed
