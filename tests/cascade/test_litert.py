"""LiteRT behind the port of stages: it answers as onnxruntime does, and refuses in one line."""

import contextlib
import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.backends import litert
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.bundle import load_bundle
from edge_cascade.errors import BackendError, BundleError, HostileFileError
from edge_cascade.golden import golden_errors
from edge_cascade.ladder import Ladder
from edge_cascade.shipped import find_bundle
from edge_cascade.tflite_file import Limits, TensorSummary, TfliteSummary, inspect_tflite
from tests.cascade.litert_bundles import add_files, files_of, with_litert


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return with_litert(tiny_bundle)


@pytest.fixture(scope="module")
def content(bundle):
    return bundle.stage_models[1, "int8"].litert.content


@pytest.fixture
def runtime():
    """Skips where LiteRT is not installed."""
    return pytest.importorskip("ai_edge_litert")


def samples(bundle, count=30):
    return np.random.default_rng(4).standard_normal((count, *bundle.graph.input_shape)).astype(np.float32) * 3


@pytest.mark.usefixtures("runtime")
class TestRunning:
    def test_golden_vectors_hold_on_litert_in_every_plan(self, bundle):
        for plan in bundle.weights.plans:
            for precision, error in golden_errors(bundle, plan, litert.LitertStage).items():
                assert error <= bundle.weights.tolerance[precision]

    @pytest.mark.parametrize("name", ["digits", "vibration"])
    def test_shipped_bundles_compute_on_litert_what_they_do_on_onnxruntime(self, name):
        bundle = with_litert(load_bundle(find_bundle(name)))
        for plan in bundle.weights.plans:
            errors = golden_errors(bundle, plan, litert.LitertStage)
            assert max(errors.values()) < 1e-4

    def test_a_ladder_climbs_alike_on_both_runtimes(self, bundle):
        x = samples(bundle)
        for plan in bundle.weights.plans:
            ours, theirs = (
                Ladder(bundle, plan, open_stage, point=0) for open_stage in (litert.LitertStage, OnnxStage)
            )
            for sample in x:
                one, other = ours.climb(sample), theirs.climb(sample)
                assert [exit_.label for exit_ in one.exits] == [exit_.label for exit_ in other.exits]
                np.testing.assert_allclose(
                    [exit_.score for exit_ in one.exits], [exit_.score for exit_ in other.exits], atol=1e-4
                )

    def test_a_batch_says_what_its_samples_say_alone(self, bundle):
        plan = bundle.weights.plans[0]
        ladder = Ladder(bundle, plan, litert.LitertStage, point=len(plan.points) // 2)
        x = samples(bundle)
        assert ladder.climb_batch(x) == [ladder.climb(sample) for sample in x]

    def test_each_binding_keeps_its_temperature(self, bundle):
        stage = litert.LitertStage(bundle.stage_models[0, "fp32"], bundle.graph.stages[0].feature_shape)
        x = samples(bundle, 1)
        cold, hot = stage.bind(x, 0.5), stage.bind(x, 5.0)
        for bound in (cold, hot, cold):
            bound.run()
        assert cold.head[0, 1] > hot.head[0, 1]

    def test_nan_in_the_sample_is_nan_in_every_score(self, bundle):
        stage = litert.LitertStage(bundle.stage_models[0, "fp32"], bundle.graph.stages[0].feature_shape)
        x = np.full((1, *bundle.graph.stages[0].input_shape), np.nan, np.float32)
        _, head = stage.run_batch(x, 1.0)
        _, expected = OnnxStage(
            bundle.stage_models[0, "fp32"], bundle.graph.stages[0].feature_shape
        ).run_batch(x, 1.0)
        np.testing.assert_array_equal(np.isnan(head[0, 1:]), np.isnan(expected[0, 1:]))

    def test_features_of_the_other_runtime_are_refused(self, bundle):
        shape = bundle.graph.stages[0].feature_shape
        features, _ = OnnxStage(bundle.stage_models[0, "fp32"], shape).run_batch(samples(bundle, 2), 1.0)
        stage = litert.LitertStage(bundle.stage_models[1, "fp32"], bundle.graph.stages[1].feature_shape)
        with pytest.raises(
            BackendError, match=r"stage 1 in fp32: is given \(1, 8, 64\), takes \(1, 1, 64, 8\)"
        ):
            stage.run_batch(features, 1.0)

    def test_weights_of_another_release_are_told_from_the_file_s_own(self, bundle):
        stage = bundle.stage_models[0, "fp32"]
        newer = {
            name: array * 2 if array.dtype.kind == "f" else array for name, array in stage.weights.items()
        }
        with pytest.raises(BackendError, match=r"stage 0 in fp32: its LiteRT file was made of other weights"):
            litert.LitertStage(dataclasses.replace(stage, weights=newer), None)

    def test_the_runtime_s_own_words_are_one_line(self, bundle, monkeypatch):
        def refuse(**_):
            raise ValueError("Didn't find op for builtin opcode 'CONV_2D' version '9'\nat node 3")

        monkeypatch.setattr(litert, "_find_interpreter", lambda: refuse)
        with pytest.raises(BackendError, match=r"^stage 0 in fp32: LiteRT refused it: [^\n]+ version '9'$"):
            litert.LitertStage(bundle.stage_models[0, "fp32"], None)

    def test_nothing_is_written_to_stderr(self):
        code = "from edge_cascade.backends.litert import _find_interpreter as f; print(f().__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("Interpreter\n", "")


def test_without_a_runtime_the_error_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setattr(litert, "RUNTIMES", ("no_such_runtime.interpreter", "json"))
    litert._find_interpreter.cache_clear()
    with pytest.raises(
        BackendError,
        match=r"no LiteRT runtime works here \(no_such_runtime: No module named 'no_such_runtime'; json: .*\); "
        r"pip install 'edge-daemon\[litert\]'",
    ):
        litert.LitertStage(bundle.stage_models[2, "fp32"], None)
    litert._find_interpreter.cache_clear()


def test_a_bundle_without_litert_files_is_told_so(tiny_bundle):
    stage = dataclasses.replace(tiny_bundle.stage_models[0, "int8"], litert=None)
    with pytest.raises(
        BackendError, match=r"stage 0 in int8: the bundle holds no LiteRT file for it; use the"
    ):
        litert.LitertStage(stage, (1,))


def test_the_probe_is_a_model_of_one_operator():
    x, y = (TensorSummary(name, "float32", (1,)) for name in "xy")
    assert inspect_tflite(litert.PROBE) == TfliteSummary((x,), (y,), ("RELU",), "probe")


class TestReading:
    @pytest.fixture
    def bundle_dir(self, tiny_model_dir, tmp_path):
        return shutil.copytree(tiny_model_dir / "bundle", tmp_path / "bundle")

    def test_a_bundle_on_disk_brings_its_litert_files(self, bundle_dir, tiny_bundle):
        files = files_of(tiny_bundle)
        add_files(bundle_dir, files)
        read = load_bundle(bundle_dir).stage_models
        assert {key: stage.litert.content for key, stage in read.items()} == files

    def test_a_file_of_another_stage_is_refused(self, bundle_dir, tiny_bundle):
        files = files_of(tiny_bundle)
        add_files(bundle_dir, files | {(1, "int8"): files[0, "int8"]})
        with pytest.raises(BundleError, match=r"stage1\.int8\.tflite: takes \{'x': .*\}, expected"):
            load_bundle(bundle_dir)

    def test_a_hostile_file_is_refused_whatever_runtime_is_used(self, bundle_dir, tiny_bundle):
        add_files(bundle_dir, files_of(tiny_bundle) | {(0, "fp32"): b"\xff\xff\xff\x7fTFL3"})
        with pytest.raises(HostileFileError, match="LiteRT file"):
            load_bundle(bundle_dir)


class TestHostileFiles:
    def test_what_is_no_tflite_file_is_told_so(self):
        for data in (b"", b"TFL3", b"\0" * 100):
            with pytest.raises(BundleError, match="identifier TFL3"):
                inspect_tflite(data)

    def test_a_file_above_the_limits_is_not_read(self, content):
        with pytest.raises(HostileFileError, match=r"\d+ bytes, more than 100"):
            inspect_tflite(content, Limits(max_bytes=100))
        with pytest.raises(HostileFileError, match="more parts than any stage"):
            inspect_tflite(content, Limits(max_reads=100))

    @given(cut=st.integers(0, 10_000))
    def test_a_truncated_file_is_refused(self, content, cut):
        with pytest.raises(BundleError):
            inspect_tflite(content[: cut % len(content)])

    @given(flips=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1, max_size=4))
    def test_any_bytes_are_read_or_refused(self, content, flips):
        spoilt = bytearray(content)
        for place, value in flips:
            spoilt[place % len(spoilt)] = value
        with contextlib.suppress(BundleError):
            assert inspect_tflite(bytes(spoilt)).inputs

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda m: setattr(m, "version", 2), "schema version 2"),
            (lambda m: m.subgraphs.append(m.subgraphs[0]), "subgraphs: 2 of them, more than 1"),
            (lambda m: setattr(m, "metadata", [_schema().MetadataT()]), "has slot 6, which no stage needs"),
            (lambda m: setattr(m.operatorCodes[0], "customCode", b"FlexAdd"), "has slot 1, which no stage needs"),
            (lambda m: _code(m, 32), "the operator 32 is not one that a stage may use"),
            (lambda m: setattr(m.operatorCodes[0], "builtinCode", 200), "runtimes differ in which they read"),
            (lambda m: setattr(m.buffers[1], "offset", 4096), "has slot 1, which no stage needs"),
            (lambda m: setattr(m.buffers[1], "data", [1, 2, 3]), "3 bytes of data, its shape needs"),
            (lambda m: setattr(_tensor(m), "buffer", 999), "buffer 999 of"),
            (lambda m: setattr(_tensor(m), "shape", [1, 2**30]), "has more than"),
            (lambda m: setattr(_tensor(m), "shape", [1, -1]), r"shape \[1, -1\]"),
            (lambda m: setattr(_tensor(m), "type", 5), "type 5 is not one that a stage may use"),
            (lambda m: setattr(_tensor(m), "isVariable", True), "has slot 5, which no stage needs"),
            (lambda m: setattr(_quantised(m).quantization, "scale", [0.0]), "a scale that is not positive"),
            (lambda m: setattr(_quantised(m).quantization, "zeroPoint", [-32640]), r"a zero point outside of -128\.\.127"),
            (lambda m: setattr(_split(m).builtinOptions, "numSplits", 13), r"\(SPLIT\): makes 2 tensors"),
            (lambda m: setattr(_conv(m), "inputs", _conv(m).inputs[:1]), r"\(CONV_2D\): takes 1 tensors"),
            (lambda m: setattr(_conv(m), "inputs", list(_conv(m).inputs[:1]) * 3), "has to be a constant"),
            (lambda m: setattr(_dequantise(m), "inputs", [_conv(m).inputs[1]]), "has a scale per channel"),
            (lambda m: setattr(_quantised(m).quantization, "scale", [1.0] * 7), "7 scales and"),
            (lambda m: setattr(_node(m), "inputs", [999]), r"inputs: \[999\] of \d+ tensors"),
            (lambda m: setattr(_node(m), "opcodeIndex", 999), "operator code 999"),
            (lambda m: setattr(_node(m), "inputs", [m.subgraphs[0].outputs[0]]), "before it is made"),
            (lambda m: setattr(_node(m), "outputs", [m.subgraphs[0].inputs[0]]), "is a constant or made already"),
            (lambda m: setattr(_conv(m), "builtinOptionsType", 5), "carries the options of another operator"),
            (lambda m: setattr(_conv(m).builtinOptions, "strideW", 0), "stride_w is 0"),
            (lambda m: setattr(_conv(m), "builtinOptions", None), "has no options"),
            (lambda m: m.subgraphs[0].operators.pop(), "an output that no operator makes"),
        ],
    )  # fmt: skip
    def test_what_no_honest_file_needs_is_named(self, content, change, complaint):
        schema = _schema()
        flatbuffers = pytest.importorskip("flatbuffers")
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content))
        change(model)
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        with pytest.raises(BundleError, match=complaint):
            inspect_tflite(bytes(builder.Output()))


def _schema():
    return pytest.importorskip("ai_edge_litert.schema_py_generated")


def _code(model, number):
    model.operatorCodes[0].builtinCode = model.operatorCodes[0].deprecatedBuiltinCode = number


def _tensor(model):
    return model.subgraphs[0].tensors[0]


def _quantised(model):
    return next(tensor for tensor in model.subgraphs[0].tensors if tensor.type == 9)


def _node(model):
    return model.subgraphs[0].operators[0]


def _conv(model):
    return next(node for node in model.subgraphs[0].operators if node.builtinOptionsType == 1)


def _split(model):
    return next(node for node in model.subgraphs[0].operators if node.builtinOptionsType == 35)


def _dequantise(model):
    return next(node for node in model.subgraphs[0].operators if node.builtinOptionsType == 38)
