import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_hub.builder.calibration.chain import (
    MAX_POINTS,
    chain_of_one_threshold,
    chain_of_thresholds,
    optimised_chain,
    point_costs,
    shared_chain,
)
from cloud_hub.builder.calibration.descent import MAX_ACCEPT_SCORE, prepare_search
from cloud_hub.builder.calibration.naive_plan import cheapest_within
from cloud_hub.builder.calibration.outcomes import Outcomes
from cloud_hub.builder.calibration.track import follow, mean_costs, upload_shares
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE, SAMPLE, OperatingPoint, Plan, Rung, check_plan
from tests.builder.measured import heads_of, ladder_of, outcomes_of

MAKERS = (chain_of_thresholds, chain_of_one_threshold)


def choose_on(outcomes):
    return cheapest_within(0.01, outcomes)


def assert_is_a_chain(chain):
    limits = chain.max_scores
    assert 2 <= len(chain) <= MAX_POINTS
    assert (np.diff(limits, axis=0) >= 0).all()
    assert (limits[0] == ACCEPT_NONE).all()
    assert limits[-1, -1] == ACCEPT_ALL
    assert limits[:-1].max() <= MAX_ACCEPT_SCORE
    assert limits[-1, :-1].max(initial=ACCEPT_NONE) <= MAX_ACCEPT_SCORE
    assert (np.diff(limits, axis=0).max(axis=1) > 0).all()


@pytest.mark.parametrize("make", MAKERS)
@given(st.data())
@settings(max_examples=40)
def test_a_chain_of_whatever_samples_is_nested_and_leads_from_all_to_nothing(make, data):
    rungs, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    values = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, float("nan")])
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scores = np.array(data.draw(st.lists(values, min_size=rungs * n, max_size=rungs * n))).reshape(rungs, n)
    outcomes = Outcomes(heads_of(rng.integers(0, 3, (rungs, n)), scores), rng.integers(0, 3, n))
    ladder = tuple(Rung(i, "int8", i - 1, 1.0, 10, data.draw(st.booleans())) for i in range(rungs))
    assert_is_a_chain(make(ladder, "margin", outcomes))


@pytest.mark.parametrize("make", MAKERS)
def test_a_chain_makes_a_plan_that_a_bundle_accepts_and_escalates_all_or_nothing_at_its_ends(make):
    outcomes = outcomes_of(1_500)
    chain = optimised_chain(ladder_of((1, 2, 3)), outcomes, choose_on(outcomes), make=make)
    assert_is_a_chain(chain)
    uploads = upload_shares(follow(chain, outcomes))
    assert (uploads[0], uploads[-1]) == (1.0, 0.0)
    assert (np.diff(uploads) <= 0).all()
    points = tuple(OperatingPoint(tuple(limits), 0.0, 0.0, 0.0) for limits in chain.max_scores.tolist())
    check_plan(Plan("p", chain.score, chain.rungs, points, 0, "naive"), stages=3)


@pytest.mark.parametrize("score", ["margin", "entropy"])
@pytest.mark.parametrize("must_agree", [False, True])
def test_a_chain_is_chosen_among_the_scores_and_the_agreement_rules_that_are_named(score, must_agree):
    outcomes = outcomes_of(400)
    chain = optimised_chain(
        ladder_of((1, 2, 3)), outcomes, choose_on(outcomes), scores=[score], agreements=[must_agree]
    )
    assert chain.score == score
    assert [rung.must_agree for rung in chain.rungs] == [False, must_agree, must_agree]


def test_a_chain_has_places_to_stop_wherever_uploads_are():
    outcomes = outcomes_of(4_000)
    chain = chain_of_thresholds(ladder_of((1, 2, 3)), "margin", outcomes)
    uploads = upload_shares(follow(chain, outcomes))
    assert len(chain) > 40
    assert np.diff(uploads[uploads > 0.01]).min() > -0.06
    few = uploads[(uploads > 0.02) & (uploads < 0.5)]
    assert (few[1:] / few[:-1]).min() > 0.7


def test_a_threshold_for_every_rung_needs_fewer_uploads_than_one_for_all_on_fresh_samples():
    optimise, fresh = outcomes_of(3_000, seed=1), outcomes_of(20_000, seed=2)
    choose = choose_on(fresh)
    least = []
    for make in (optimised_chain, shared_chain):
        chain = make(ladder_of((1, 2, 3)), optimise, choose_on(optimise))
        track = follow(chain, fresh)
        least.append(upload_shares(track)[choose(track)])
    assert least[0] < 0.9 * least[1]


def test_the_descent_finds_the_best_of_all_thresholds_where_all_can_be_tried():
    """Two rungs, few samples: every pair of candidate thresholds is priced by the search's own numbers."""
    outcomes = outcomes_of(300, (1.2, 2.0), seed=3)
    search = prepare_search(ladder_of((1, 2)), "margin", outcomes)
    found = search.frontier()
    counts = [range(0, len(limits), 4) for limits in search.candidates]
    for price, places in zip(np.geomspace(1e-3, 1.0, 24), found, strict=True):
        tried = min(cost_of(search, (i, j), price) for i in counts[0] for j in counts[1])
        assert cost_of(search, places, price) <= tried * 1.02 + 1e-9


def cost_of(search, places, price):
    first, risk = search.first, search.risk
    late = np.where(first[1] <= places[1], risk[1] + price * 0.01 * search.compute[1], price * 1.01)
    return np.where(first[0] <= places[0], risk[0] + price * 0.01 * search.compute[0], late).sum()


def test_the_score_that_says_something_is_chosen():
    outcomes = outcomes_of(2_000)
    heads = outcomes.heads.copy()
    noise = np.random.default_rng(0).random((2, *heads.shape[:2]))
    heads[:, :, 2], heads[:, :, 4] = noise
    told = Outcomes(heads, outcomes.full_labels, outcomes.labels)
    assert optimised_chain(ladder_of((1, 2, 3)), told, choose_on(told)).score == "margin"
    heads = heads.copy()
    heads[:, :, [2, 3]] = heads[:, :, [3, 2]]
    told = Outcomes(heads, outcomes.full_labels, outcomes.labels)
    assert optimised_chain(ladder_of((1, 2, 3)), told, choose_on(told)).score == "entropy"


def test_rungs_must_agree_where_that_saves_uploads_and_only_there():
    rng = np.random.default_rng(4)
    n = 2_000
    truth = rng.integers(0, 3, n)
    scores = rng.random((2, n)) * 0.8 + 0.1
    # The second rung errs only where the first says something else, and its score does not tell.
    second = np.where(rng.random(n) < 0.1, (truth + 1) % 3, truth)
    first = np.where(second == truth, truth, (truth + 2) % 3)
    scores[0] = 0.95
    telling = Outcomes(heads_of([first, second], scores), truth, truth)
    chain = optimised_chain(ladder_of((1, 2)), telling, choose_on(telling))
    assert [rung.must_agree for rung in chain.rungs] == [False, True]
    # A first rung that guesses vetoes most of what a perfect second one says.
    guessing = Outcomes(heads_of([rng.integers(0, 3, n), truth], scores), truth, truth)
    chain = optimised_chain(ladder_of((1, 2)), guessing, choose_on(guessing))
    assert [rung.must_agree for rung in chain.rungs] == [False, False]


def test_of_two_points_that_upload_the_same_the_one_that_computes_less_costs_less():
    outcomes = outcomes_of(500)
    chain = chain_of_thresholds(ladder_of((1, 2, 3)), "margin", outcomes)
    track = follow(chain, outcomes)
    work = mean_costs(track, [100, 200, 300])
    expected = upload_shares(track) + 0.01 * work / 600
    assert point_costs(chain.rungs, track) == pytest.approx(expected)


def test_measured_microseconds_replace_multiply_adds_where_every_rung_has_them():
    outcomes = outcomes_of(500)
    plain, timed = ladder_of((1, 2, 3)), ladder_of((1, 2, 3), costs=(900.0, 50.0, 50.0))
    assert prepare_search(plain, "margin", outcomes).compute == pytest.approx([1 / 6, 1 / 2, 1])
    assert prepare_search(timed, "margin", outcomes).compute == pytest.approx([0.9, 0.95, 1])
    partly = (*timed[:2], Rung(2, "int8", 1, 1.0, 300))
    assert prepare_search(partly, "margin", outcomes).compute == pytest.approx([1 / 6, 1 / 2, 1])


def test_scores_that_crowd_above_zero_keep_their_thresholds_apart():
    scores = np.linspace(1e-9, 1e-7, 400)[None]
    n = scores.shape[1]
    outcomes = Outcomes(heads_of(np.zeros((1, n)), scores), np.zeros(n, int))
    chain = chain_of_thresholds((Rung(0, "int8", SAMPLE, 1.0, 1),), "margin", outcomes)
    assert len(chain) > 30


def test_the_same_samples_give_the_same_chain():
    outcomes = outcomes_of(800)
    chains = [optimised_chain(ladder_of((1, 2, 3)), outcomes, choose_on(outcomes)) for _ in range(2)]
    assert (chains[0].max_scores == chains[1].max_scores).all()
