import numpy as np
import pytest

from cloud_hub.builder.calibration.naive_plan import MAX_LOSS, cheapest_within, make_plan, select_paying
from cloud_hub.builder.calibration.outcomes import losses, walk
from cloud_hub.builder.calibration.paying import is_less, select_default
from cloud_hub.builder.calibration.track import Chain, follow
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE, SAMPLE, OperatingPoint, Plan, Rung
from tests.builder.measured import ladder_of, outcomes_of

RUNGS = ladder_of((1, 2, 3))


def test_the_naive_plan_uploads_least_within_the_risk_it_was_given_on_its_own_samples():
    outcomes = outcomes_of(2_000)
    plan = make_plan("int8", RUNGS, outcomes, 0.005)
    chosen = plan.points[plan.chosen]
    assert plan.method == "naive"
    assert 0.0 < chosen.upload_share < 1.0
    risks = [
        losses(outcomes, walk(outcomes, plan.rungs, plan.score, point.max_score)).mean()
        for point in plan.points
    ]
    assert risks[plan.chosen] <= 0.005
    assert all(risk > 0.005 for risk in risks[plan.chosen + 1 :])


def test_the_naive_plan_leads_from_escalate_all_to_escalate_nothing():
    outcomes = outcomes_of(1_000)
    plan = make_plan("int8", RUNGS, outcomes)
    first, last = plan.points[0], plan.points[-1]
    assert (set(first.max_score), first.upload_share) == ({ACCEPT_NONE}, 1.0)
    assert first.accuracy == pytest.approx(outcomes.full_accuracy, abs=1e-6)
    assert (last.max_score[-1], last.upload_share) == (ACCEPT_ALL, 0.0)
    assert plan.points[plan.chosen].accuracy >= outcomes.full_accuracy - MAX_LOSS - 1e-6


def test_without_true_labels_the_naive_plan_counts_disagreements():
    outcomes = outcomes_of(1_000, labelled=False)
    plan = make_plan("int8", RUNGS, outcomes, 0.02)
    walked = walk(outcomes, plan.rungs, plan.score, plan.points[plan.chosen].max_score)
    assert 0 < (walked.label != outcomes.full_labels).mean() <= 0.02


def test_a_handful_of_samples_still_gives_a_plan():
    plan = make_plan("int8", RUNGS, outcomes_of(3))
    assert 0 <= plan.chosen < len(plan.points)


def test_escalate_all_is_chosen_where_every_answer_costs_something():
    outcomes = outcomes_of(200)
    heads = outcomes.heads.copy()
    heads[:, :, 0] = (outcomes.full_labels + 1) % 10
    wrong = type(outcomes)(heads, outcomes.full_labels, outcomes.full_labels)
    chain_plan = make_plan("int8", RUNGS, wrong)
    assert chain_plan.points[chain_plan.chosen].upload_share > 0.99


def test_the_cheapest_point_within_a_risk_is_the_last():
    outcomes = outcomes_of(1_000)
    plan = make_plan("int8", RUNGS, outcomes)
    chain = Chain(plan.rungs, plan.score, np.array([point.max_score for point in plan.points]))
    assert cheapest_within(1.0, outcomes)(follow(chain, outcomes)) == len(chain) - 1


def plan_with(name, precisions, upload_share):
    point = OperatingPoint((0.5,) * len(precisions), upload_share, 0.9, 100.0)
    rungs = tuple(Rung(0, precision, SAMPLE, 1.0, 100) for precision in precisions)
    return Plan(name, "margin", rungs, (point,), 0, "naive")


def test_a_mixed_plan_is_kept_only_if_it_uploads_less():
    int8, fp32 = plan_with("int8", ["int8"], 0.10), plan_with("fp32", ["fp32"], 0.095)
    better = plan_with("int8-fp32", ["int8", "fp32"], 0.08)
    no_better = plan_with("int8-fp32", ["int8", "fp32"], 0.095)
    assert select_paying([int8, better, fp32]) == ([int8, better, fp32], "int8-fp32")
    assert select_paying([int8, no_better, fp32]) == ([int8, fp32], "int8")


def test_a_plan_is_the_default_over_the_first_only_if_it_uploads_a_tenth_and_two_thousandths_less():
    assert is_less(0.08, 0.10)
    assert not is_less(0.095, 0.10)
    assert not is_less(0.005, 0.0069)
    plans = [plan_with("int8", ["int8"], 0.10), plan_with("fp32", ["fp32"], 0.099)]
    assert select_default(plans, [None, None]) == "int8"


def test_of_plans_that_upload_about_the_same_the_one_that_was_measured_to_be_faster_is_the_default():
    plans = [
        plan_with("int8", ["int8"], 0.10),
        plan_with("int8-fp32", ["int8", "fp32"], 0.2),
        plan_with("fp32", ["fp32"], 0.099),
    ]
    assert select_default(plans, [300.0, 10.0, 200.0]) == "fp32"
    assert select_default(plans, [100.0, 10.0, 200.0]) == "int8"
    assert select_default(plans, [None, None, 200.0]) == "int8"
