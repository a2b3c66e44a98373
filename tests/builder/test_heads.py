"""Heads at the cuts of a frozen network, down to the stages that a device runs."""

from pathlib import Path

import numpy as np
import pytest

from cloud_hub.builder.graphs import heads
from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.graphs.cuts import Cut, CutPlan, prepare_cuts
from cloud_hub.builder.graphs.heads import plan_heads, train_heads
from cloud_hub.builder.graphs.onnx_graph import run_for
from cloud_hub.builder.graphs.quantise import quantise
from cloud_hub.builder.graphs.staged import is_head_node, logits_name
from cloud_hub.builder.graphs.stages import cut_stages
from cloud_hub.builder.networks.training import Lesson
from cloud_hub.builder.steps import Steps
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import OnnxStage, open_whole_model
from edge_cascade.bundle import StageModel
from edge_cascade.onnx_file import inspect_model
from edge_cascade.scores import head_of_logits
from tests.builder.onnx_models import dense_model, image_model


def classifier_of(model):
    return adopt(model.SerializeToString(), sample_shape=None, role="edge network")


def lesson_of(classifier, count=256):
    x = np.random.default_rng(3).standard_normal((count, *classifier.input_shape)).astype(np.float32)
    logits = open_whole_model(classifier.to_bytes())(x)
    # Random weights have a favourite class; so centred, each is the right one at times.
    teacher = 4 * (logits - logits.mean(axis=0)) / (logits.std(axis=0) + 1e-6)
    return Lesson(x, teacher.argmax(axis=1).astype(np.int64), teacher)


@pytest.fixture
def brief_training(monkeypatch):
    monkeypatch.setattr(heads, "_EPOCHS", range(1, 3))


def staged_of(classifier, directory, lesson=None, names=("r0", "p0")):
    plan = prepare_cuts(classifier, names=list(names))
    lesson = lesson or lesson_of(classifier)
    return train_heads(classifier, plan, lesson, seed=7, share=0.5, steps=Steps(Path(directory)))


def climb(staged, cuts, precision, x):
    """Each stage's head, run one after the other as a device does."""
    for index, cut in enumerate(cuts):
        model = StageModel(index, precision, cut.model, inspect_model(cut.model), cut.weights)
        x, head = OnnxStage(model, staged.feature_shape_of(index)).run_batch(x, 1.0)
        yield head


def plan_of(shape, stage_mult_adds, classes=10, **more):
    whole = CutPlan(
        (Cut("v", shape, stage_mult_adds, 0.5, more.get("channels_last", False), True),), 2 * stage_mult_adds
    )
    (plan,) = plan_heads(whole, classes)
    return plan.kernel, plan.strides, plan.features, plan.hidden


@pytest.mark.parametrize(
    ("shape", "stage_mult_adds", "expected"),
    [
        ((16, 32, 32), 10_000_000, ((8, 8), (8, 8), 256, 128)),
        ((16, 7, 5), 10_000_000, ((4, 2), (1, 1), 16 * 16, 128)),
        ((16, 2, 2), 10_000_000, ((1, 1), (1, 1), 64, 128)),
        ((160, 32, 32), 10_000_000, ((16, 16), (16, 16), 640, 128)),  # a grid of 3 would leave 1,440 features
        ((16, 32, 32), 40_000, ((16, 16), (16, 16), 64, 54)),  # a grid of 4 would cost more than a tenth
        ((16, 32, 32), 1_000, ((32, 32), (32, 32), 16, 0)),  # no room for a hidden layer
        ((8, 100), 10_000_000, ((16,), (12,), 8 * 8, 128)),
        ((64,), 10_000_000, ((), (), 64, 128)),
    ],
)
def test_a_head_is_as_large_as_its_stage_allows(shape, stage_mult_adds, expected):
    assert plan_of(shape, stage_mult_adds) == expected


def test_tokens_are_pooled_over_tokens_not_over_channels():
    assert plan_of((100, 8), 10_000_000, channels_last=True) == ((16,), (12,), 8 * 8, 128)


def test_a_network_that_cannot_be_cut_is_one_stage_and_needs_no_training(tmp_path):
    classifier = classifier_of(dense_model())
    staged = staged_of(classifier, tmp_path, names=())
    assert (staged.stages, staged.feature_shapes, staged.mult_adds) == (1, (), (15,))
    x = np.ones((2, 5), np.float32)
    (head,) = climb(staged, cut_stages(staged), "fp32", x)
    expected = head_of_logits(open_whole_model(classifier.to_bytes())(x), 1.0)
    np.testing.assert_allclose(head, expected, atol=1e-6)


def test_the_last_exit_is_the_classifier_in_every_precision(tmp_path, brief_training):
    pytest.importorskip("torch")
    classifier = classifier_of(image_model())
    lesson = lesson_of(classifier)
    staged = staged_of(classifier, tmp_path)
    assert staged.feature_shapes == ((6, 8, 8), (6, 4, 4))
    x = lesson.x[:32]
    expected = open_whole_model(classifier.to_bytes())(x)
    np.testing.assert_allclose(run_for(staged.model, x, [logits_name(2)])[0], expected, atol=1e-4)

    *_, exact = climb(staged, cut_stages(staged), "fp32", x)
    np.testing.assert_allclose(exact, head_of_logits(expected, 1.0), atol=1e-4)
    quantised = quantise(staged, lesson.x)
    *_, coarse = climb(staged, cut_stages(quantised), "int8", x)
    assert np.mean(coarse[:, 0] == exact[:, 0]) > 0.9


def test_heads_and_the_last_layer_stay_in_float(tmp_path, brief_training):
    pytest.importorskip("torch")
    staged = staged_of(classifier_of(image_model()), tmp_path)
    assert [node.name for node in staged.model.graph.node if is_head_node(node)] == [
        "exit2.fc",
        *("exit0.pool", "exit0.flat", "exit0.dense0", "exit0.relu", "exit0.dense1"),
        *("exit1.pool", "exit1.flat", "exit1.dense0"),
    ]
    assert staged.mult_adds == (10368 + 37 * (24 + 4), 4 * 6, 6912 + 32)


def test_heads_learn_from_features_as_they_come(tmp_path):
    pytest.importorskip("torch")
    classifier = classifier_of(image_model())
    lesson = lesson_of(classifier)
    # A bundle's inputs may be of any size: what standardising them did must be in the weights.
    large = Lesson(lesson.x * 50, lesson.y, lesson.teacher)
    staged = staged_of(classifier, tmp_path, large)
    logits = run_for(staged.model, large.x, [logits_name(1)])[0]
    guessing = np.bincount(lesson.y).max() / len(lesson.y)
    assert np.mean(logits.argmax(axis=1) == lesson.y) > guessing + 0.1


def test_the_same_seed_gives_the_same_heads_and_finished_ones_are_kept(tmp_path, monkeypatch, brief_training):
    pytest.importorskip("torch")
    classifier = classifier_of(image_model())
    first, again = (staged_of(classifier, tmp_path / name).model.SerializeToString() for name in "ab")
    assert first == again
    monkeypatch.setattr(heads, "train_edge", None)
    assert staged_of(classifier, tmp_path / "a").model.SerializeToString() == first


def test_heads_that_were_taught_with_another_softening_are_trained_again(
    tmp_path, monkeypatch, brief_training
):
    pytest.importorskip("torch")
    classifier = classifier_of(image_model())
    sharp = staged_of(classifier, tmp_path).model.SerializeToString()
    monkeypatch.setattr(heads, "SOFTENING", 20.0)
    assert staged_of(classifier, tmp_path).model.SerializeToString() != sharp


@pytest.mark.parametrize("count", [1, 129])
def test_any_number_of_samples_will_do(tmp_path, count, brief_training):
    pytest.importorskip("torch")
    classifier = classifier_of(image_model())
    assert staged_of(classifier, tmp_path, lesson_of(classifier, count)).stages == 3


def test_arrays_that_do_not_fit_are_named(tmp_path):
    pytest.importorskip("torch")
    classifier = classifier_of(image_model())
    good = lesson_of(classifier, 8)
    for lesson, said in (
        (Lesson(good.x[:0], good.y[:0], good.teacher[:0]), "training samples are"),
        (Lesson(good.x[..., :7], good.y, good.teacher), "training samples are"),
        (Lesson(good.x, good.y, good.teacher[:, :2]), "the full model's logits are"),
        (Lesson(good.x, good.y + 4, good.teacher), "numbers in 0..3"),
    ):
        with pytest.raises(BuildError, match=said):
            staged_of(classifier, tmp_path, lesson)
