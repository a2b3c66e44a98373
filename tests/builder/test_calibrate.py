import numpy as np
import pytest

from cloud_hub.builder.calibrate import (
    MAX_LOSS,
    Outcomes,
    evaluate_point,
    fit_temperature,
    make_plan,
    select_paying,
)
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE, SAMPLE, OperatingPoint, Plan, Rung
from edge_cascade.scores import head_of_logits

RUNGS = (Rung(0, "int8", SAMPLE, 1.0, 100), Rung(1, "int8", 0, 1.0, 300))


def outcomes_of(count=2_000, seed=0):
    """Two rungs, the second surer, whose logits are the true label plus noise; a full model right in 97 %."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    one_hot = np.eye(4, dtype=np.float32)[labels]
    heads = np.stack(
        [
            head_of_logits((strength * (one_hot * 2 + rng.standard_normal((count, 4)))).astype(np.float32))
            for strength in (1.0, 1.6)
        ]
    )
    full = np.where(rng.random(count) < 0.97, labels, (labels + 1) % 4)
    return Outcomes(heads, full, labels)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_temperature_finds_what_was_put_in(true_temperature):
    rng = np.random.default_rng(1)
    logits = rng.normal(0.0, 2.0, (20_000, 5)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) > rng.random((len(logits), 1))).argmax(axis=1)
    assert fit_temperature(logits * np.float32(true_temperature), labels) == pytest.approx(
        true_temperature, rel=0.05
    )


def test_a_point_counts_uploads_answers_and_work():
    heads = np.array(
        [
            [[0, 0.9, 0, 0.2, 0.1], [1, 0.5, 0, 0.9, 0.5], [2, 0.5, 0, 0.9, 0.5]],
            [[1, 0.9, 0, 0.1, 0.1], [1, 0.9, 0, 0.3, 0.1], [2, 0.5, 0, 0.9, 0.5]],
        ],
        np.float32,
    )
    outcomes = Outcomes(heads, full_labels=np.array([1, 1, 3]), labels=np.array([1, 1, 3]))
    # The first is answered wrongly at rung 0, the second rightly at rung 1, the third is sent.
    assert evaluate_point((0.3, 0.5), RUNGS, outcomes, "margin") == OperatingPoint(
        max_score=(0.3, 0.5),
        upload_share=round(1 / 3, 6),
        accuracy=round(2 / 3, 6),
        mult_adds=round((100 + 400 + 400) / 3, 1),
    )


def test_the_chain_leads_from_escalate_all_to_escalate_nothing():
    outcomes = outcomes_of()
    plan = make_plan("int8", RUNGS, outcomes)
    first, last = plan.points[0], plan.points[-1]
    assert (first.max_score, first.upload_share) == ((ACCEPT_NONE, ACCEPT_NONE), 1.0)
    assert first.accuracy == pytest.approx(outcomes.full_accuracy, abs=1e-6)
    assert (last.max_score[-1], last.upload_share) == (ACCEPT_ALL, 0.0)
    for earlier, later in zip(plan.points, plan.points[1:], strict=False):
        assert later.upload_share <= earlier.upload_share
        assert all(after >= before for before, after in zip(earlier.max_score, later.max_score, strict=True))


def test_the_chosen_point_is_the_smallest_upload_that_keeps_the_full_models_accuracy():
    outcomes = outcomes_of()
    plan = make_plan("int8", RUNGS, outcomes)
    enough = outcomes.full_accuracy - MAX_LOSS
    chosen = plan.points[plan.chosen]
    assert plan.method == "naive"
    assert chosen.accuracy >= enough
    assert chosen.upload_share < 1.0
    assert not [p for p in plan.points if p.accuracy >= enough and p.upload_share < chosen.upload_share]


def test_early_rungs_never_cost_the_devices_own_answers_more_than_allowed():
    outcomes = outcomes_of()
    plan = make_plan("int8", RUNGS, outcomes)
    assert plan.points[-1].accuracy >= outcomes.rung_accuracy[-1] - MAX_LOSS - 1e-6


def plan_with(name, precisions, upload_share):
    point = OperatingPoint((0.5,) * len(precisions), upload_share, 0.9, 100.0)
    rungs = tuple(Rung(0, precision, SAMPLE, 1.0, 100) for precision in precisions)
    return Plan(name, "margin", rungs, (point,), 0, "naive")


def test_a_mixed_plan_is_kept_only_if_it_uploads_less():
    int8, fp32 = plan_with("int8", ["int8"], 0.10), plan_with("fp32", ["fp32"], 0.08)
    better = plan_with("int8-fp32", ["int8", "fp32"], 0.09)
    no_better = plan_with("int8-fp32", ["int8", "fp32"], 0.10)
    assert select_paying([int8, better, fp32]) == ([int8, better, fp32], "int8-fp32")
    assert select_paying([int8, no_better, fp32]) == ([int8, fp32], "int8")
