import argparse
import dataclasses
import json
import math
import re
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="the builder needs onnx (the dev extra)")

from cloud_hub.builder import commands_report
from cloud_hub.builder.calibration.outcomes import Outcomes, Walk
from cloud_hub.builder.reports.evaluate import Evaluation, evaluate, work_share
from cloud_hub.builder.reports.inputs import load_samples, read_full_model
from cloud_hub.builder.reports.recheck import binomial_tail, check_certificate, clopper_pearson
from cloud_hub.builder.reports.traffic import PlanRun, Sender
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.ladder import Ladder
from tests.builder.reports import SAMPLES, certificate, digits, save


def run_command(*argv):
    parser = argparse.ArgumentParser()
    commands_report.register(parser.add_subparsers())
    args = parser.parse_args(argv)
    return args.run(args)


def outcomes_of(labels, full, answers, groups=None):
    heads = np.zeros((1, len(full), 5), np.float32)
    heads[0, :, 0] = answers
    return Outcomes(heads, np.array(full), None if labels is None else np.array(labels), groups)


def answered_by_board(outcomes):
    n = len(outcomes)
    return Walk(np.zeros(n, np.intp), outcomes.heads[0, :, 0].astype(np.int64), np.zeros(n))


def test_an_evaluation_says_what_the_boards_own_ladder_does():
    run = digits().run("int8")
    climbs = Ladder(run.bundle, run.plan, OnnxStage, point=5).climb_batch(run.x)
    seen = evaluate(run, 5, Sender())
    assert seen.upload_share == np.mean([not climb.accepted for climb in climbs])
    for figures in seen.rungs:
        answers = [climb.accepted and climb.answer.rung == figures.rung for climb in climbs]
        assert figures.answers == np.mean(answers)
    right = [
        climb.answer.label == label if climb.accepted else full == label
        for climb, label, full in zip(climbs, run.outcomes.labels, run.outcomes.full_labels, strict=True)
    ]
    assert seen.cascade_accuracy == np.mean(right)
    work = [sum(run.plan.rungs[exit_.rung].mult_adds for exit_ in climb.exits) for climb in climbs]
    assert seen.mult_adds == np.mean(work)
    assert seen.compute_share == pytest.approx(np.mean(work) / seen.network_mult_adds)


def test_shares_of_the_answers_add_up():
    run = digits().run(None)
    for point in range(0, len(run.plan.points), 6):
        seen = evaluate(run, point, Sender())
        assert sum(rung.answers for rung in seen.rungs) + seen.upload_share == pytest.approx(1.0)


def test_escalating_all_costs_no_accuracy_and_nothing_uses_no_bytes():
    run = digits().run("int8")
    first, last = evaluate(run, 0, Sender()), evaluate(run, len(run.plan.points) - 1, Sender())
    assert (first.upload_share, first.cascade_accuracy) == (1.0, first.full_accuracy)
    assert (last.upload_share, last.uplink.cascade.up) == (0.0, 0)


def test_without_labels_accuracy_is_agreement_with_the_full_model():
    run = digits().run("int8")
    blind = dataclasses.replace(run, outcomes=dataclasses.replace(run.outcomes, labels=None))
    seen = evaluate(blind, run.plan.chosen, Sender())
    assert (seen.reference, seen.full_accuracy) == ("full model", 1.0)
    assert seen.cascade_accuracy == seen.agreement


def with_certificates(run, *certificates):
    weights = msgspec.structs.replace(run.bundle.weights, certificates=certificates)
    return PlanRun(dataclasses.replace(run.bundle, weights=weights), run.plan, run.x, run.outcomes)


def test_only_certificates_that_cover_the_point_are_checked():
    run = with_certificates(
        digits().run("int8"),
        certificate(last_point=4),
        certificate(kind="disagreement", last_point=10),
        certificate(plan="fp32", last_point=20),
    )
    assert [check.kind for check in evaluate(run, 4, Sender()).checks] == ["loss", "disagreement"]
    assert [check.kind for check in evaluate(run, 5, Sender()).checks] == ["disagreement"]
    assert evaluate(run, 11, Sender()).checks == ()
    assert evaluate(run, 11, Sender()).certified_point == 4


def test_a_disagreement_that_reaches_further_than_the_loss_certifies_no_further_point():
    run = with_certificates(digits().run("int8"), certificate(kind="disagreement", last_point=10))
    assert evaluate(run, 4, Sender()).certified_point == 10


def test_a_loss_needs_labels_to_be_checked():
    outcomes = outcomes_of(None, [0, 1], [0, 0])
    assert check_certificate(certificate(), outcomes, answered_by_board(outcomes)) is None


def test_many_losses_contradict_a_certificate_and_few_do_not():
    labels = np.zeros(1000, np.int64)
    for wrong, contradicts in ((5, False), (9, False), (10, True)):
        outcomes = outcomes_of(labels, labels, np.arange(1000) < wrong)
        check = check_certificate(certificate(), outcomes, answered_by_board(outcomes))
        assert (check.observed, check.samples, check.risk) == (wrong, 1000, wrong / 1000)
        assert check.contradicts is contradicts
        assert check.p_value == pytest.approx(
            sum(math.comb(1000, k) * 0.005**k * 0.995 ** (1000 - k) for k in range(wrong, 60)), rel=1e-6
        )
        assert ("do not contradict" in check.sentence) is not contradicts
    assert check.sentence == (
        "loss in 10 of 1,000 samples (1.00 %, 95 % interval 0.48 % to 1.83 %), promised at most 0.50 %: the "
        "data contradict the certificate: they are unlike those it was measured on, or it is one of the few that "
        "do not hold (p = 0.031)"
    )


def test_grouped_samples_are_said_to_be_no_independent_evidence():
    outcomes = outcomes_of([0] * 4, [0] * 4, [0] * 4, groups=np.array([0, 0, 1, 1]))
    check = check_certificate(certificate(), outcomes, answered_by_board(outcomes))
    assert "take interval and p as a hint" in check.sentence


def test_clopper_pearson_gives_the_textbook_intervals():
    assert clopper_pearson(0, 10, 0.05) == pytest.approx((0.0, 1 - 0.025**0.1), abs=1e-9)
    assert clopper_pearson(10, 10, 0.05) == pytest.approx((0.025**0.1, 1.0), abs=1e-9)
    assert clopper_pearson(5, 10, 0.05) == pytest.approx((0.187086, 0.812914), abs=1e-6)
    assert clopper_pearson(3, 3500, 0.05) == pytest.approx((0.0001768, 0.0025030), abs=1e-6)


@given(st.integers(0, 40), st.integers(1, 40), st.floats(0, 1))
def test_the_binomial_tail_is_the_sum_of_its_terms(observed, samples, share):
    terms = [math.comb(samples, k) * share**k * (1 - share) ** (samples - k) for k in range(samples + 1)]
    assert binomial_tail(observed, samples, share) == pytest.approx(sum(terms[observed:]), abs=1e-9)


@given(st.integers(1, 300), st.data())
def test_the_interval_holds_what_was_seen(samples, data):
    observed = data.draw(st.integers(0, samples))
    low, high = clopper_pearson(observed, samples, 0.05)
    assert 0.0 <= low <= observed / samples <= high <= 1.0


def test_the_command_prints_tables(capsys):
    assert run_command("evaluate", "digits", "--data", str(SAMPLES), "--plan", "int8", "--rate", "5") == 0
    printed = capsys.readouterr().out
    assert "hub: full model" in printed
    assert "raw uint8" in printed


def test_json_is_all_that_is_printed_and_reads_back(capsys):
    assert run_command("evaluate", "digits", "--data", str(SAMPLES), "--point", "3", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    seen = msgspec.json.decode(captured.out, type=Evaluation)
    assert (seen.point, seen.samples) == (3, len(digits().data))
    assert json.loads(captured.out)["uplink"]["raw_dtype"] == "uint8"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--point", "99"], r"plan '.*' has points 0 to \d+, not 99"),
        (["--rate", "0"], "--rate 0.0 is no number of samples a second"),
        (["--full", "absent.onnx"], "absent.onnx: No such file or directory: name it with --full"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(options, complaint):
    with pytest.raises(BuildError, match=complaint) as caught:
        run_command("evaluate", "digits", "--data", str(SAMPLES), *options)
    assert "\n" not in str(caught.value)


def test_without_the_build_extra_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [name for name in sys.modules if name.startswith("cloud_hub.builder.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BuildError, match=re.escape("needs onnx: pip install 'edge-daemon[build]'")):
        run_command("evaluate", "digits", "--data", str(SAMPLES))


def test_another_full_model_is_refused(tmp_path):
    other = tmp_path / "other.onnx"
    other.write_bytes(b"no model")
    with pytest.raises(BuildError, match="is not the full model that the bundle was measured against"):
        read_full_model(other, digits().bundle.graph)


def test_samples_take_the_bundles_shape_and_its_labels_order(tmp_path):
    graph = msgspec.structs.replace(digits().bundle.graph, labels=("b", "c", "a"))
    path = save(tmp_path / "some.npz", x=np.zeros((3, 8, 8), np.uint8), y=np.array(["a", "b", "c"]))
    data = load_samples(path, graph)
    assert data.x.shape == (3, 1, 8, 8)
    assert data.y.tolist() == [2, 0, 1]


def test_labels_that_the_bundle_does_not_know_are_refused(tmp_path):
    graph = msgspec.structs.replace(digits().bundle.graph, labels=("b", "c", "d"))
    path = save(tmp_path / "some.npz", x=np.zeros((3, 8, 8), np.uint8), y=np.array(["a", "b", "c"]))
    with pytest.raises(BuildError, match="the label 'a' is none of the bundle's"):
        load_samples(path, graph)


def test_a_network_without_multiply_adds_does_all_of_its_work():
    assert work_share(0.0, 0) == 1.0
    assert work_share(30.0, 120) == 0.25
