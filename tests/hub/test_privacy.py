"""What noisy updates give away."""

import math
import sys
from dataclasses import replace

import pytest

from cloud_hub.core.federation.privacy import (
    PrivacyError,
    PrivacySpec,
    effective_votes,
    measure_privacy,
)

SPEC = PrivacySpec(clip_norm=0.5, noise_multiplier=8.0, cohort_size=20, fleet_size=200, rounds=20, delta=1e-5)


def exact_epsilon(multiplier, delta):
    """Of the Gaussian mechanism, by its analytic form (Balle and Wang 2018, theorem 8)."""

    def below(x):
        return math.erfc(-x / math.sqrt(2.0)) / 2.0

    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2.0
        spent = below(0.5 / multiplier - middle * multiplier)
        spent -= math.exp(middle) * below(-0.5 / multiplier - middle * multiplier)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


def zcdp_epsilon(multiplier, delta):
    """Of the Gaussian mechanism by Renyi divergences in the plainest form (Mironov 2017, proposition 3)."""
    return min(
        order / (2 * multiplier**2) + math.log(1 / delta) / (order - 1) for order in (1 + i / 100 for i in range(1, 30_000))
    )  # fmt: skip


def test_one_update_costs_what_the_gaussian_mechanism_costs_at_twice_the_clip_norm():
    # sigma / sensitivity = 4; tight: 0.926 (Balle and Wang 2018), Mironov's plain bound: 1.231.
    spent = measure_privacy(SPEC).update
    assert exact_epsilon(4.0, 1e-5) == pytest.approx(0.926, abs=1e-3)
    assert zcdp_epsilon(4.0, 1e-5) == pytest.approx(1.231, abs=1e-3)
    assert 0.926 <= spent <= 1.10 * 0.926


@pytest.mark.parametrize("multiplier", [1.0, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("rounds", [1, 20, 400])
def test_unsampled_figures_lie_between_the_exact_and_the_plain_one(multiplier, rounds):
    # Gaussian mechanisms compose to one of less noise, so the exact figure is known for all rounds together.
    spent = measure_privacy(replace(SPEC, noise_multiplier=multiplier, rounds=rounds))
    for epsilon, noise in [
        (spent.update, multiplier / 2),
        (spent.device, multiplier / 2 / math.sqrt(rounds)),
        (spent.aggregate, multiplier / 2 * math.sqrt(20 / rounds)),
    ]:
        assert epsilon <= zcdp_epsilon(noise, 1e-5) + 1e-9
        if epsilon < 150:
            assert epsilon >= exact_epsilon(noise, 1e-5)


def test_the_figures_are_ordered():
    spent = measure_privacy(SPEC)
    assert spent.update < spent.device
    assert spent.aggregate < spent.device
    assert spent.aggregate_if_uniform < spent.aggregate


def test_a_cohort_of_the_whole_fleet_gains_nothing_by_sampling():
    spent = measure_privacy(replace(SPEC, fleet_size=20))
    assert spent.aggregate_if_uniform == spent.aggregate


def test_a_claim_of_sampling_is_never_worse_than_none():
    spent = measure_privacy(replace(SPEC, cohort_size=19, fleet_size=20))
    assert spent.aggregate_if_uniform == spent.aggregate


@pytest.mark.parametrize(
    ("name", "values", "grows"),
    [
        ("noise_multiplier", [1.0, 2.0, 4.0, 20.0], False),
        ("rounds", [1, 5, 20, 100], True),
        ("delta", [1e-7, 1e-6, 1e-5, 1e-3], False),
        ("fleet_size", [20, 50, 200, 10_000], False),
        ("votes", [1.0, 5.0, 15.0, 20.0], False),
    ],
)
def test_epsilon_moves_with_each_number_in_its_direction(name, values, grows):
    spent = [measure_privacy(replace(SPEC, **{name: value})) for value in values]
    for figure in ("update", "device", "aggregate", "aggregate_if_uniform"):
        epsilons = [getattr(each, figure) for each in spent]
        assert epsilons == sorted(epsilons, reverse=not grows)
    sampled = [each.aggregate_if_uniform for each in spent]
    assert len(set(sampled)) == len(sampled)


def test_the_clip_norm_sets_the_noise_and_not_epsilon():
    small, large = (measure_privacy(replace(SPEC, clip_norm=norm)) for norm in (0.5, 5.0))
    assert (small.noise_std, large.noise_std) == (4.0, 40.0)
    assert small.mean_noise_std == pytest.approx(4.0 / math.sqrt(20))
    assert small.aggregate == large.aggregate


def test_fewer_votes_than_were_asked_hide_each_other_less():
    assert measure_privacy(replace(SPEC, votes=15.0)).aggregate > measure_privacy(SPEC).aggregate
    one = measure_privacy(replace(SPEC, votes=1.0))
    assert one.aggregate == one.device


def test_unequal_weights_hide_like_fewer_votes():
    assert effective_votes([3.0] * 7) == pytest.approx(7.0)
    assert effective_votes([1e6, 1.0, 1.0]) == pytest.approx(1.0)
    assert effective_votes([2.0, 1.0, 1.0]) == pytest.approx(1.5)


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, math.nan], [math.inf]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(PrivacyError, match="weights"):
        effective_votes(weights)


@pytest.mark.parametrize(
    "change",
    [
        {"clip_norm": 0.0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"cohort_size": 0},
        {"fleet_size": 19},
        {"rounds": 0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"votes": 21.0},
        {"votes": math.nan},
    ],
)
def test_a_number_out_of_range_is_refused(change):
    with pytest.raises(PrivacyError):
        replace(SPEC, **change)


def test_a_missing_library_is_named_with_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(PrivacyError, match=r"pip install 'edge-daemon\[privacy\]'"):
        measure_privacy(SPEC)
