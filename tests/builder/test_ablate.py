import dataclasses
import json

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnx", reason="the builder needs onnx (the dev extra)")

from cloud_hub.builder.calibration.outcomes import Outcomes, walk
from cloud_hub.builder.calibration.track import follow, upload_shares
from cloud_hub.builder.reports.ablate import (
    AS_BUILT,
    Ablation,
    Promise,
    Variant,
    ablate,
    chain_of_last_rung,
    standard_variants,
)
from cloud_hub.builder.reports.traffic import PlanRun, Sender
from cloud_hub.errors import BuildError, CertificateError
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE
from edge_cascade.scores import SCORE_COLUMN
from tests.builder.reports import SAMPLES, digits
from tests.builder.test_evaluate import run_command

PROMISE = Promise(epsilon=0.02, delta=0.05, splits=2)


def synthetic(samples=1600, seed=0, groups=None):
    """Three rungs, each better than the one before; scores that know something of what is wrong."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, samples)
    hardness = rng.random(samples)
    heads = np.zeros((3, samples, 5), np.float32)
    for rung, skill in enumerate((0.75, 0.88, 0.94)):
        wrong = hardness > skill
        heads[rung, :, 0] = np.where(wrong, (labels + 1) % 10, labels)
        score = np.clip(hardness - skill + 0.5 + rng.normal(0, 0.1, samples), 0, 0.98)
        heads[rung, :, 1] = 1 - score / 2
        for column in SCORE_COLUMN.values():
            heads[rung, :, column] = score
    full = np.where(hardness > 0.98, (labels + 2) % 10, labels)
    bundle = digits().bundle
    x = np.zeros((samples, *bundle.graph.input_shape), np.float32)
    return PlanRun(bundle, bundle.plan("int8"), x, Outcomes(heads, full, labels, groups))


def variants_of(run, **changes):
    arguments = {"other_plans": {}, "uncalibrated": run.outcomes, "variants": {}}
    return standard_variants(run, **(arguments | changes))


@pytest.fixture(scope="module")
def ablation():
    run = synthetic()
    return ablate(run, variants_of(run), PROMISE, Sender())


def test_the_rows_name_what_was_switched_off(ablation):
    assert [row.name for row in ablation.rows] == [
        AS_BUILT,
        "no early exit",
        "one threshold for all rungs",
        "agreement never asked for",
        "agreement always asked for",
        "score margin",
        "score max_prob",
        "score entropy",
        "no temperatures",
        "no test: promises nothing",
    ]
    assert [row.name for row in ablation.rows if not row.is_tested] == ["no test: promises nothing"]
    assert (ablation.kind, ablation.samples, ablation.splits) == ("loss", 800, 2)


def test_every_tested_row_keeps_its_loss_near_the_promise(ablation):
    for row in ablation.rows:
        if row.is_tested:
            assert row.risk <= PROMISE.epsilon
            assert 0.0 < row.upload_share < 1.0
        assert row.upload_range[0] <= row.upload_share <= row.upload_range[1]


def test_without_early_exit_all_the_work_is_done_for_every_sample(ablation):
    by_name = {row.name: row for row in ablation.rows}
    assert by_name["no early exit"].compute_share == pytest.approx(1.0)
    assert by_name[AS_BUILT].compute_share < 0.9


def test_rows_respect_what_they_may_choose(ablation):
    by_name = {row.name: row for row in ablation.rows}
    assert by_name["score entropy"].score == "entropy"
    assert not by_name["agreement never asked for"].must_agree
    assert by_name["agreement always asked for"].must_agree


def test_the_same_data_give_the_same_rows(ablation):
    run = synthetic()
    again = ablate(run, variants_of(run)[:1], PROMISE, Sender())
    assert again.rows == ablation.rows[:1]


def test_the_chain_of_the_last_rung_never_lets_another_answer():
    run = synthetic(400)
    chain = chain_of_last_rung(run.plan.rungs, "margin", run.outcomes)
    assert (chain.max_scores[:, :-1] == ACCEPT_NONE).all()
    assert (chain.max_scores[0, -1], chain.max_scores[-1, -1]) == (ACCEPT_NONE, ACCEPT_ALL)
    assert upload_shares(follow(chain, run.outcomes))[-1] == 0.0
    for limits in chain.max_scores[:: len(chain) // 4].tolist():
        walked = walk(run.outcomes, chain.rungs, "margin", limits)
        assert set(walked.rung.tolist()) <= {-1, 2}


def test_other_plans_and_other_networks_are_rows_of_their_own():
    run = synthetic()
    other = synthetic(seed=1)
    variants = variants_of(
        run,
        other_plans={"fp32": (run.plan.rungs, other.outcomes)},
        variants={"no distillation": other.outcomes},
    )
    named = {variant.name: variant for variant in variants}
    assert named["plan fp32"].outcomes is other.outcomes
    assert named["no distillation"].rungs == run.plan.rungs


def test_a_network_of_one_rung_has_no_exits_to_switch_off():
    run = synthetic(400)
    alone = msgspec.structs.replace(run.plan, rungs=run.plan.rungs[:1])
    outcomes = dataclasses.replace(run.outcomes, heads=run.outcomes.heads[:1])
    names = [variant.name for variant in variants_of(PlanRun(run.bundle, alone, run.x, outcomes))]
    assert "no early exit" not in names
    assert names[0] == AS_BUILT


def test_halves_share_no_group():
    groups = np.repeat(np.arange(200), 8)
    run = synthetic(groups=groups)
    seen = []

    def remember(rungs, score, outcomes):
        seen.append(set(outcomes.groups.tolist()))
        return chain_of_last_rung(rungs, score, outcomes)

    variant = Variant("one", run.plan.rungs, run.outcomes, make_chain=remember)
    ablate(run, [variant], Promise(0.2, 0.05, splits=1), Sender())
    assert all(len(each) == 100 for each in seen)


def test_too_little_data_is_said_with_how_much_is_needed():
    run = synthetic(400)
    with pytest.raises(CertificateError, match="needs at least 598 samples, it has 200") as caught:
        ablate(run, variants_of(run), Promise(0.005, 0.05), Sender())
    assert "\n" not in str(caught.value)


def test_unlabelled_data_are_compared_by_disagreement():
    run = synthetic()
    blind = dataclasses.replace(run, outcomes=dataclasses.replace(run.outcomes, labels=None))
    result = ablate(blind, variants_of(blind)[:1], Promise(0.05, 0.05, splits=1), Sender())
    assert result.kind == "disagreement"
    assert result.rows[0].accuracy >= 0.95


def test_the_command_compares_the_shipped_plans(capsys):
    options = ["--data", str(SAMPLES), "--epsilon", "0.015", "--splits", "1"]
    assert run_command("ablate", "digits", *options, "--json") == 0
    captured = capsys.readouterr()
    result = msgspec.json.decode(captured.out, type=Ablation)
    assert {"plan fp32", "no temperatures"} <= {row.name for row in result.rows}
    assert json.loads(captured.out)["epsilon"] == 0.015


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--epsilon", "5"], "--epsilon 5.0 is not between 0 and 1"),
        (["--delta", "0"], "--delta 0.0 is not between 0 and 1"),
        (["--splits", "0"], "--splits 0: 1 to 100 draws"),
    ],
)
def test_a_promise_that_cannot_be_is_refused(options, complaint):
    with pytest.raises(BuildError, match=complaint):
        run_command("ablate", "digits", "--data", str(SAMPLES), *options)
