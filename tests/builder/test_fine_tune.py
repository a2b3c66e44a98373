"""The whole of a user's network learns from the full model, without torch, and only a gain is kept."""

import sys

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper

from cloud_hub.builder import fine_tune as tuning
from cloud_hub.builder.fine_tune import Judges, exit_labels, fine_tune
from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.graphs.cuts import prepare_cuts
from cloud_hub.builder.graphs.heads import train_heads
from cloud_hub.builder.networks import stepwise
from cloud_hub.builder.networks.stepwise import Descent, targets_of, teach_by_steps
from cloud_hub.builder.networks.training import Lesson
from cloud_hub.builder.reports.card import Card
from cloud_hub.builder.steps import Steps
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import OnnxTrainStep, open_whole_model
from edge_cascade.bundle import load_bundle
from tests.builder.models import LEARNED, brought, full_model, images, run_hub
from tests.builder.test_edge_network import edge_model

BRIEF = Descent(epochs=6, batch=32, peak_rate=0.01, share=0.5, seed=1, threads=1)


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def normalised(count, seed):
    found = images(count, seed)
    return ((found.x.astype(np.float32) - 128) / 64).astype(np.float32), found.y.astype(np.int64)


@pytest.fixture(scope="module")
def lesson():
    x, y = normalised(300, 2)
    full = adopt(full_model().SerializeToString(), sample_shape=None, role="full model")
    return Lesson(x, y, open_whole_model(full.to_bytes())(x))


@pytest.fixture(scope="module")
def judges():
    return Judges(*normalised(300, 3))


def with_exits(model, lesson, directory):
    own = adopt(model.SerializeToString(), sample_shape=None, role="edge network")
    plan = prepare_cuts(own, shares=(0.3,), names=None)
    return train_heads(own, plan, lesson, seed=1, share=0.5, steps=Steps(directory), teach=teach_by_steps)


@pytest.fixture(scope="module")
def staged(lesson, tmp_path_factory):
    return with_exits(edge_model(), lesson, tmp_path_factory.mktemp("heads"))


def test_every_exit_gets_better_and_the_figures_say_so(staged, lesson, judges, tmp_path):
    tuned = fine_tune(staged, lesson, BRIEF, judges, Steps(tmp_path))
    assert tuned.taken
    assert all(after > before for before, after in zip(tuned.before, tuned.after, strict=True))
    assert tuned.after[-1] > 0.8 > 0.5 > tuned.before[-1]
    assert tuned.said.startswith(f"exits {100 * tuned.before[0]:.2f}, ")
    assert tuned.said.endswith("after, on 300 held-out samples")
    found = (exit_labels(tuned.staged, judges.x) == judges.y).mean(axis=1)
    np.testing.assert_allclose(found, tuned.after)
    assert exit_labels(staged, judges.x).shape == (2, 300), "the network that was brought is as it was"


def test_the_same_seed_gives_the_same_network_and_an_interrupted_run_goes_on(
    staged, lesson, judges, tmp_path, monkeypatch
):
    whole = fine_tune(staged, lesson, BRIEF, judges, Steps(tmp_path / "whole"))
    rates = []
    rate_of = Descent.rate_of

    def until_the_fourth_epoch(self, progress):
        rates.append(progress)
        if progress >= 0.5:
            raise KeyboardInterrupt
        return rate_of(self, progress)

    steps = Steps(tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(Descent, "rate_of", until_the_fourth_epoch)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(staged, lesson, BRIEF, judges, steps)
    seen = []
    monkeypatch.setattr(Descent, "rate_of", lambda self, at: seen.append(at) or rate_of(self, at))
    resumed = fine_tune(staged, lesson, BRIEF, judges, steps)
    assert min(seen) == 0.5
    assert resumed.staged.model == whole.staged.model
    seen.clear()
    fine_tune(staged, lesson, BRIEF, judges, steps)
    assert seen == []


def test_what_is_no_gain_is_not_taken(staged, lesson, judges, tmp_path, monkeypatch):
    def spoil(step, base, *_, **__):
        return {name: -array for name, array in base.items()}

    monkeypatch.setattr(tuning, "descend", spoil)
    tuned = fine_tune(staged, lesson, BRIEF, judges, Steps(tmp_path))
    assert not tuned.taken
    assert tuned.staged is staged
    assert tuned.said.startswith("not taken, worse")


def test_an_operator_without_a_gradient_is_named_and_the_exits_alone_learn(lesson, judges, tmp_path):
    model = edge_model()
    relu = next(node for node in model.graph.node if node.name == "first.relu")
    relu.CopyFrom(helper.make_node("Elu", relu.input, relu.output, name="first.elu"))
    staged = with_exits(model, lesson, tmp_path)
    tuned = fine_tune(staged, lesson, BRIEF, judges, Steps(tmp_path))
    assert not tuned.taken
    assert tuned.staged is staged
    assert tuned.said.startswith("its exits alone were trained, not its trunk: ")
    assert "Elu" in tuned.said


def test_a_learning_rate_that_runs_away_says_what_to_give(staged, lesson, judges, tmp_path):
    wild = Descent(epochs=3, batch=32, peak_rate=1e30, share=0.5, seed=1)
    with pytest.raises(BuildError, match=r"fine-tuning .*: give a --learning-rate below 1e\+30"):
        fine_tune(staged, lesson, wild, judges, Steps(tmp_path))


def test_a_cycle_rises_falls_and_ends_above_nothing():
    descent = Descent(epochs=10, batch=1, peak_rate=1.0, share=0.0, seed=0)
    rates = [descent.rate_of(at / 100) for at in range(100)]
    assert max(rates) == rates[30] == 1.0
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert 0.0 < rates[-1] < 0.01
    assert rates[0] == pytest.approx(0.04)


def test_targets_are_labels_with_a_share_of_the_full_models_word():
    lesson = Lesson(
        np.zeros((1, 1), np.float32), np.array([1]), np.log([[0.5, 0.25, 0.25]], dtype=np.float32)
    )
    np.testing.assert_allclose(targets_of(lesson, 0.4), [[0.2, 0.7, 0.1]], rtol=1e-5)


def test_the_gradient_is_what_a_step_would_go(staged, lesson):
    model = stepwise.step_model_of(tuning.train_step_of(staged).model, staged)
    run = OnnxTrainStep(model)
    known = {t.name: onnx.numpy_helper.to_array(t) for t in staged.model.graph.initializer}
    x, targets = lesson.x[:32], targets_of(lesson, 0.5)[:32]
    weight = np.ones(32, np.float32)
    loss, gradients = run.gradients(known, x, targets, weight)
    assert gradients.keys() == model.shapes.keys()
    run.begin(known)
    again = run.step(x, targets, weight, learning_rate=0.125, momentum=0.9, proximal=1.0)
    assert loss == again
    for name, array in run.weights().items():
        np.testing.assert_allclose(array, known[name] - np.float32(0.125) * gradients[name], atol=1e-6)


def test_a_build_fine_tunes_what_was_brought_and_says_so(tmp_path, capsys):
    onnx.save(edge_model(), tmp_path / "own.onnx")
    command = ["build", "--full", brought().full, "--data", brought().data, "--edge", tmp_path / "own.onnx"]
    quick = (*LEARNED, "--epsilon", "0.03", "--plans", "int8", "--uncertified")
    epochs = ("--fine-tune", "--epochs", "20", "--batch", "16", "--learning-rate", "0.01")
    assert run_hub(*command, "--out", tmp_path / "out", *quick, *epochs) == 0
    said = capsys.readouterr().err
    assert "fine-tuning the whole network" in said
    assert "held-out samples" in said
    card = msgspec.json.decode((tmp_path / "out" / "report.json").read_bytes(), type=Card)
    assert card.made_by["network"] == "own.onnx with 3 exits, fine-tuned"
    assert card.made_by["training"] == "20 epochs, learning rate 0.01, distillation 0.5, seed 0"
    assert card.made_by["fine-tuning"].startswith("exits ")
    assert load_bundle(tmp_path / "out" / "bundle").train_step is not None


def test_without_fine_tuning_exits_still_ask_for_torch(tmp_path, capsys):
    onnx.save(edge_model(), tmp_path / "own.onnx")
    command = ["build", "--full", brought().full, "--data", brought().data, "--edge", tmp_path / "own.onnx"]
    assert run_hub(*command, "--out", tmp_path / "out", *LEARNED, "--uncertified") == BuildError.exit_code
    assert "early exits are trained with torch" in capsys.readouterr().err
