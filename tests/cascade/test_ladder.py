import dataclasses

import msgspec
import numpy as np
import pytest

from edge_cascade.backends.onnx import OnnxStage, open_whole_model
from edge_cascade.bundle import load_bundle
from edge_cascade.errors import BackendError, BundleError, HostileFileError
from edge_cascade.gate import select_most_reliable
from edge_cascade.golden import golden_errors
from edge_cascade.ladder import Ladder
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE, OperatingPoint
from edge_cascade.preprocess import normalise
from edge_cascade.scores import HEAD_WIDTH, head_of_logits
from tests import bundles


@pytest.fixture(params=["tiny_bundle", "images_bundle"])
def bundle(request):
    return request.getfixturevalue(request.param)


def samples(bundle, n=60, seed=5):
    """Of many loudnesses and offsets, so that random networks say different things of them."""
    rng = np.random.default_rng(seed)
    one_each = (n, *[1] * len(bundle.graph.input_shape))
    noise = rng.standard_normal((n, *bundle.graph.input_shape))
    x = noise * rng.uniform(0, 20, one_each) + rng.uniform(-20, 20, one_each)
    return x.astype(np.float32)


def with_point(plan, *max_score, must_agree=False):
    """The plan with one operating point of our own."""
    rungs = tuple(msgspec.structs.replace(rung, must_agree=must_agree) for rung in plan.rungs)
    return msgspec.structs.replace(plan, rungs=rungs, points=(OperatingPoint(max_score, 0, 0, 0),), chosen=0)


def median_scores(bundle, plan):
    """Per rung, a threshold that about half of the samples meet."""
    climbs = Ladder(bundle, with_point(plan, *[ACCEPT_NONE] * len(plan.rungs)), OnnxStage).climb_batch(
        samples(bundle)
    )
    return [
        float(np.median([climb.exits[rung].score for climb in climbs])) for rung in range(len(plan.rungs))
    ]


@pytest.mark.parametrize("name", ["int8", "fp32"])
def test_every_plan_reproduces_its_golden_outputs(bundle, name):
    errors = golden_errors(bundle, bundle.plan(name), OnnxStage)
    assert set(errors) == {rung.precision for rung in bundle.plan(name).rungs}
    assert all(error <= bundle.weights.tolerance[precision] for precision, error in errors.items())


@pytest.mark.parametrize("name", ["int8", "fp32"])
@pytest.mark.parametrize("must_agree", [False, True])
def test_a_batch_is_answered_as_its_samples_one_by_one(bundle, name, must_agree):
    plan = bundle.plan(name)
    ladder = Ladder(bundle, with_point(plan, *median_scores(bundle, plan), must_agree=must_agree), OnnxStage)
    x = samples(bundle)
    together = ladder.climb_batch(x)
    alone = [ladder.climb(sample) for sample in x]
    assert len({len(climb.exits) for climb in alone}) > 1
    for one, other in zip(together, alone, strict=True):
        assert (one.accepted, one.answer.rung, one.answer.label) == (
            other.accepted,
            other.answer.rung,
            other.answer.label,
        )
        assert [e.label for e in one.exits] == [e.label for e in other.exits]
        assert np.allclose([e.score for e in one.exits], [e.score for e in other.exits], atol=1e-4)


def test_at_accept_none_every_rung_is_climbed_and_the_best_exit_recalled(bundle):
    plan = with_point(bundle.plan("int8"), *[ACCEPT_NONE] * 3)
    for climb in (Ladder(bundle, plan, OnnxStage).climb(x) for x in samples(bundle, 5)):
        assert len(climb.exits) == 3
        assert not climb.accepted
        assert climb.answer == select_most_reliable(climb.exits)


def test_at_accept_all_only_the_first_rung_runs(bundle):
    plan = with_point(bundle.plan("fp32"), *[ACCEPT_ALL] * 3, must_agree=True)
    assert all(
        len(climb.exits) == 1 for climb in Ladder(bundle, plan, OnnxStage).climb_batch(samples(bundle))
    )


class ScriptedStage:
    """Says what the sample tells it to: its first three values are the labels, the next three the scores."""

    def __init__(self, stage, _feature_shape):
        self.stage = stage.stage
        self.runs = 0

    def bind(self, x, _temperature):
        return ScriptedBound(self, x)

    def run_batch(self, x, _temperature):
        self.runs += len(x)
        values = x.reshape(len(x), -1)
        label, score = values[:, self.stage], values[:, 3 + self.stage]
        return x, np.stack([label, 1 - score, score, score, score], axis=1).astype(np.float32)


class ScriptedBound:
    def __init__(self, stage, x):
        self.stage, self.x, self.features, self.head = stage, x, np.zeros_like(x), None

    def run(self):
        features, self.head = self.stage.run_batch(self.x, 1.0)
        self.features[:] = features


def climb_script(bundle, labels, scores, *, max_score, must_agree):
    """The climb of one sample, alone and in a batch, which must be the same."""
    plan = with_point(bundle.plan("fp32"), *max_score, must_agree=must_agree)
    x = np.zeros(bundle.graph.input_shape, dtype=np.float32)
    # What normalising takes away again.
    x.reshape(-1)[:6] = (
        np.array([*labels, *scores]) * bundle.graph.preprocess.std[0] + bundle.graph.preprocess.mean[0]
    )
    ladder = Ladder(bundle, plan, ScriptedStage)
    climb = ladder.climb(x)
    assert ladder.climb_batch(np.stack([x, x])) == [climb, climb]
    return [exit_.rung for exit_ in climb.exits], climb.answer.rung, climb.answer.label, climb.accepted


@pytest.mark.parametrize(
    ("labels", "scores", "must_agree", "expected"),
    [
        ((2, 2, 2), (0.25, 0.5, 0.5), False, ([0], 0, 2, True)),
        ((1, 2, 2), (0.5, 0.25, 0.5), False, ([0, 1], 1, 2, True)),
        ((1, 2, 3), (0.5, 0.25, 0.5), True, ([0, 1, 2], 1, 2, False)),
        ((2, 2, 3), (0.5, 0.25, 0.5), True, ([0, 1], 1, 2, True)),
        ((1, 2, 2), (0.5, 0.5, 0.25), True, ([0, 1, 2], 2, 2, True)),
        ((1, 2, 3), (0.5, 0.5, 0.25), True, ([0, 1, 2], 2, 3, False)),
        ((1, 2, 3), (0.5, 0.75, 0.75), False, ([0, 1, 2], 0, 1, False)),
        ((1, 2, 3), (0.75, 0.5, 0.5), False, ([0, 1, 2], 2, 3, False)),
    ],
)
def test_a_climb_follows_thresholds_and_agreement_and_recalls_the_best_exit(
    tiny_bundle, labels, scores, must_agree, expected
):
    found = climb_script(tiny_bundle, labels, scores, max_score=(0.3, 0.3, 0.3), must_agree=must_agree)
    assert found == expected


def test_the_same_stage_runs_again_in_fp32_where_the_plan_says_so(bundle):
    int8 = bundle.plan("int8")
    again = msgspec.structs.replace(int8.rungs[2], precision="fp32", feeds_from=1)
    plan = msgspec.structs.replace(int8, rungs=(*int8.rungs, again))
    climb = Ladder(bundle, with_point(plan, *[ACCEPT_NONE] * 4), OnnxStage).climb(samples(bundle, 1)[0])
    assert [exit_.rung for exit_ in climb.exits] == [0, 1, 2, 3]
    assert climb.exits[2].score != climb.exits[3].score


def test_a_nan_sample_is_never_accepted_and_said_to_have_failed(bundle):
    x = np.full(bundle.graph.input_shape, np.nan, dtype=np.float32)
    plan = with_point(bundle.plan("fp32"), *[ACCEPT_ALL] * 3)
    ladder = Ladder(bundle, plan, OnnxStage)
    for climb in (ladder.climb(x), ladder.climb_batch(x[np.newaxis])[0]):
        assert not climb.accepted
        assert climb.failed


class FailingStage:
    """The real stage, until it is told to fail."""

    def __init__(self, stage, feature_shape):
        self.real = OnnxStage(stage, feature_shape)
        self.fails = stage.stage == 1

    def bind(self, x, temperature):
        bound = self.real.bind(x, temperature)
        return self if self.fails else bound

    features = np.zeros((1, 1), dtype=np.float32)
    head = np.zeros((1, HEAD_WIDTH), dtype=np.float32)

    def run(self):
        raise BackendError("out of memory")


def test_when_a_later_stage_fails_the_exits_seen_still_answer(tiny_bundle):
    plan = with_point(tiny_bundle.plan("fp32"), *[ACCEPT_NONE] * 3)
    plan = msgspec.structs.replace(plan, rungs=(*plan.rungs[:2], msgspec.structs.replace(plan.rungs[2])))
    climb = Ladder(tiny_bundle, plan, FailingStage).climb(samples(tiny_bundle, 1)[0])
    assert climb.failed
    assert not climb.accepted
    assert len(climb.exits) == 1
    assert climb.answer == climb.exits[0]


def test_a_point_that_the_plan_does_not_have_is_refused(tiny_bundle):
    plan = tiny_bundle.plan("fp32")
    with pytest.raises(BundleError, match="points 0 to"):
        Ladder(tiny_bundle, plan, OnnxStage, point=len(plan.points))


def heads_of(bundle, precision, x):
    """Every stage's head, each stage in a session of its own."""
    heads, given = [], normalise(x, bundle.graph.preprocess)
    for index, stage in enumerate(bundle.graph.stages):
        given, head = OnnxStage(bundle.stage_models[index, precision], stage.feature_shape).run_batch(
            given, 1.0
        )
        heads.append(head)
    return heads


class TestWeights:
    """A weights part is handed to sessions in memory; nothing of the old ones may remain."""

    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    @pytest.mark.parametrize("dimensions", [1, 2])
    def test_new_weights_in_the_old_graph_equal_a_fresh_build(self, tmp_path, precision, dimensions):
        old = load_bundle(bundles.build(tmp_path / "old", dimensions=dimensions, seed=1) / "bundle")
        new = load_bundle(bundles.build(tmp_path / "new", dimensions=dimensions, seed=2) / "bundle")
        x = samples(old)
        before = heads_of(old, precision, x)
        # The graphs of both builds hold no weight, so either may carry either's weights.
        swapped = dataclasses.replace(
            old,
            stage_models={
                key: dataclasses.replace(model, weights=new.stage_models[key].weights)
                for key, model in old.stage_models.items()
            },
        )
        fresh, after = heads_of(new, precision, x), heads_of(swapped, precision, x)
        for old_head, new_head, fresh_head in zip(before, after, fresh, strict=True):
            assert np.array_equal(new_head, fresh_head)
            assert not np.array_equal(new_head, old_head)

    def test_int8_scales_and_zero_points_are_among_the_weights(self, images_bundle):
        names = images_bundle.stage_models[1, "int8"].weights
        kinds = {array.dtype.name for array in names.values()}
        assert {"int8", "int32", "float32"} <= kinds
        assert [name for name in names if name.endswith("_scale")]
        assert [name for name in names if name.endswith("_zero_point")]
        for model in images_bundle.stage_models.values():
            assert {spec.dtype for spec in model.summary.inline} <= {"int64"}

    def test_a_session_keeps_its_weights_when_the_arrays_it_was_given_change(self, tiny_bundle):
        model = tiny_bundle.stage_models[0, "fp32"]
        weights = {name: array.copy() for name, array in model.weights.items()}
        stage = OnnxStage(
            dataclasses.replace(model, weights=weights), tiny_bundle.graph.stages[0].feature_shape
        )
        x = samples(tiny_bundle)
        before = stage.run_batch(x, 1.0)[1].copy()
        for array in weights.values():
            array.fill(0)
        assert np.array_equal(stage.run_batch(x, 1.0)[1], before)

    def test_no_file_is_looked_for(self, tiny_bundle, tmp_path, monkeypatch):
        (tmp_path / "weights").write_bytes(b"\xff" * 10_000_000)
        monkeypatch.chdir(tmp_path)
        x = samples(tiny_bundle)
        assert np.isfinite(heads_of(tiny_bundle, "fp32", x)[0]).all()
        model = tiny_bundle.stage_models[0, "fp32"]
        partly = dict(list(model.weights.items())[1:])
        with pytest.raises(BundleError, match=r"weight '.*' is missing"):
            dataclasses.replace(model, weights=partly)

    def test_a_weight_of_another_shape_or_type_is_refused(self, tiny_bundle):
        model = tiny_bundle.stage_models[0, "fp32"]
        name, array = next(iter(model.weights.items()))
        for wrong in (array.astype(np.float64), array[..., np.newaxis]):
            with pytest.raises(BundleError, match="the graph needs float32"):
                dataclasses.replace(model, weights={**model.weights, name: wrong})


class TestWholeModel:
    def test_the_full_model_gives_logits(self, tiny_model_dir, tiny_bundle):
        run = open_whole_model((tiny_model_dir / "full.onnx").read_bytes())
        logits = run(samples(tiny_bundle, 3))
        assert logits.shape == (3, 4)
        assert head_of_logits(logits).shape == (3, HEAD_WIDTH)

    def test_damage_is_refused_with_a_reason(self, tiny_model_dir):
        content = (tiny_model_dir / "full.onnx").read_bytes()
        for damaged in (b"", b"hello", content[: len(content) // 2]):
            with pytest.raises(BundleError):
                open_whole_model(damaged)

    def test_a_stage_is_no_full_model(self, tiny_bundle):
        with pytest.raises(BackendError, match="full model takes"):
            open_whole_model(tiny_bundle.stage_models[0, "fp32"].model)

    def test_a_wrong_shape_is_an_error_of_ours(self, tiny_model_dir):
        run = open_whole_model((tiny_model_dir / "full.onnx").read_bytes())
        with pytest.raises(BackendError, match="full model"):
            run(np.zeros((1, 7, 128), dtype=np.float32))


def test_hostile_files_are_refused_before_the_runtime_sees_them(tiny_model_dir):
    with pytest.raises(HostileFileError):
        open_whole_model((tiny_model_dir / "full.onnx").read_bytes() + b"\xca\x01\x02hi")
