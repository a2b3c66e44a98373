import msgspec
import numpy as np
import pytest

from cloud_hub.builder import collect as collecting
from cloud_hub.builder.calibration.naive_plan import make_plan
from cloud_hub.builder.calibration.outcomes import Outcomes, walk
from cloud_hub.builder.collect import (
    StageRuns,
    chunks,
    collect,
    full_labels,
    full_logits,
    in_chunks,
    off_the_wire,
    received,
    stages_of_bundle,
)
from cloud_hub.builder.samples.data import Dataset
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.errors import BackendError
from edge_cascade.ladder import Ladder
from edge_cascade.manifest import Preprocess, Wire
from edge_cascade.policy import SAMPLE
from edge_cascade.scores import LABEL, SCORE_COLUMN

STEPS = ((0, "int8", SAMPLE), (1, "int8", 0), (2, "int8", 1), (2, "fp32", 1))


@pytest.fixture
def x(tiny_bundle):
    samples = np.random.default_rng(1).standard_normal((300, 1, 128)).astype(np.float32) * 3 + 1
    return received(samples, tiny_bundle.graph.preprocess, tiny_bundle.graph.wire)


@pytest.fixture
def stages(tiny_bundle):
    return stages_of_bundle(tiny_bundle)


def test_what_is_received_went_through_the_wire_and_then_was_normalised():
    samples = np.array([[10.0, -1.0, 0.3], [0.1, 0.2, 0.0]], np.float32)
    wire = Wire("int8", 1.0)
    assert off_the_wire(samples, wire).tolist() == [[10.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
    assert received(samples, Preprocess((2.0,), (4.0,)), wire).tolist() == [[2.0, -0.75, -0.5], [-0.5] * 3]


def test_each_sample_gets_a_scale_of_its_own_where_the_wire_names_none():
    loud_and_quiet = np.array([[127.0, 1.0], [1.27, 0.01]], np.float32)
    assert np.allclose(off_the_wire(loud_and_quiet, Wire("int8")), loud_and_quiet)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 600])
def test_chunks_are_the_batch_in_its_order(count):
    x = np.arange(count * 2, dtype=np.float32).reshape(count, 2)
    parts = list(chunks(x))
    assert max(map(len, parts)) <= 256
    assert np.array_equal(np.concatenate(parts), x)
    assert np.array_equal(in_chunks(lambda chunk: chunk + 1, x), x + 1)


def test_the_full_models_answers_are_those_of_its_largest_logits(tiny_model_dir, x):
    full = (tiny_model_dir / "full.onnx").read_bytes()
    logits = full_logits(full, x)
    assert logits.shape == (300, 4)
    labels = full_labels(full, x)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, logits.argmax(axis=1))


def test_a_full_model_for_other_samples_is_refused_in_the_runtimes_words(tiny_model_dir):
    with pytest.raises(BackendError, match="full model"):
        full_labels((tiny_model_dir / "full.onnx").read_bytes(), np.zeros((2, 1, 64), np.float32))


def test_every_stage_runs_once_however_many_rungs_it_feeds(stages, x, monkeypatch):
    opened = []

    class Counted(OnnxStage):
        def __init__(self, stage, feature_shape):
            opened.append((stage.stage, stage.precision))
            super().__init__(stage, feature_shape)

    monkeypatch.setattr(collecting, "OnnxStage", Counted)
    climbed = []
    runs = StageRuns(stages, x, on_rung=lambda: climbed.append(1))
    rungs, heads = runs.calibrate(STEPS, np.zeros(len(x), np.int64), np.arange(50))
    # Features at temperature 1 for the fit, then every rung's head; stage 1's features feed both last rungs.
    assert [key for key in opened if key[0] == 2] == [(2, "int8"), (2, "fp32")]
    assert opened.count((0, "int8")) == opened.count((1, "int8")) == 2
    assert heads.shape == (4, 300, 5)
    assert len(climbed) == len(rungs) == 4


def test_calibration_reads_no_other_rows_than_those_it_is_given(stages, x):
    reference = np.random.default_rng(2).integers(0, 4, len(x))
    rows = np.arange(100)
    rungs, _ = StageRuns(stages, x).calibrate(STEPS, reference, rows)
    changed, others = reference.copy(), x.copy()
    changed[100:] = (changed[100:] + 1) % 4
    others[100:] = 0.0
    assert StageRuns(stages, others).calibrate(STEPS, changed, rows)[0] == rungs
    changed[:100] = (changed[:100] + 1) % 4
    assert StageRuns(stages, x).calibrate(STEPS, changed, rows)[0] != rungs


def test_a_temperature_moves_scores_and_no_label(stages, x, tiny_bundle):
    rungs = tiny_bundle.plan("int8").rungs
    hotter = [msgspec.structs.replace(rung, temperature=3 * rung.temperature) for rung in rungs]
    runs = StageRuns(stages, x)
    heads, hot = runs.climb(rungs), runs.climb(hotter)
    assert np.array_equal(heads[:, :, LABEL], hot[:, :, LABEL])
    column = SCORE_COLUMN["max_prob"]
    assert (hot[:, :, column] > heads[:, :, column]).all()


@pytest.fixture
def plan_of(tiny_bundle, stages, x):
    """A plan of the bundle, or one that climbs the last stage in both precisions."""

    def make(name):
        if name != "int8-fp32":
            return tiny_bundle.plan(name)
        answers = np.random.default_rng(3).integers(0, 4, len(x))
        rungs, heads = StageRuns(stages, x).calibrate(STEPS, answers, np.arange(len(x)))
        return make_plan(name, rungs, Outcomes(heads, answers))

    return make


@pytest.mark.parametrize("name", ["int8", "fp32", "int8-fp32"])
@pytest.mark.parametrize("point", [0, 1, -2, -1])
def test_collected_outcomes_walk_as_the_boards_ladder_climbs(
    tiny_bundle, tiny_model_dir, plan_of, name, point
):
    plan = plan_of(name)
    place = point % len(plan.points)
    samples = np.random.default_rng(4).standard_normal((300, 1, 128)).astype(np.float32) * 3 + 1
    outcomes = collect(tiny_bundle, plan, Dataset(samples), (tiny_model_dir / "full.onnx").read_bytes())
    walked = walk(outcomes, plan.rungs, plan.score, plan.points[place].max_score)
    # A board answers from what its sensor gives; only the hub sees what the wire made of it.
    climbs = Ladder(tiny_bundle, plan, OnnxStage, point=place).climb_batch(samples)
    assert [climb.answer.rung if climb.accepted else SAMPLE for climb in climbs] == walked.rung.tolist()
    for climb, label in zip(climbs, walked.label, strict=True):
        assert not climb.accepted or climb.answer.label == label


def test_the_full_model_answers_what_came_over_the_wire_and_the_board_what_the_sensor_gave(
    tiny_bundle, tiny_model_dir
):
    full = (tiny_model_dir / "full.onnx").read_bytes()
    samples = np.random.default_rng(5).standard_normal((200, 1, 128)).astype(np.float32) * 3 + 1
    sent = off_the_wire(samples, tiny_bundle.graph.wire)
    plan = tiny_bundle.plan("fp32")
    given, received = (collect(tiny_bundle, plan, Dataset(x), full) for x in (samples, sent))
    assert np.array_equal(given.full_labels, received.full_labels)
    assert not np.array_equal(given.heads, received.heads)
