import numpy as np
import onnx
import pytest

from cloud_hub.builder.graphs.quantise import quantise
from cloud_hub.builder.graphs.staged import features_name, logits_name
from cloud_hub.builder.graphs.stages import cut_stages
from cloud_hub.builder.networks.export import export_staged
from edge_cascade.backends.onnx import OnnxStage, onnxruntime
from edge_cascade.bundle import StageModel
from edge_cascade.onnx_file import inspect_model
from edge_cascade.scores import head_of_logits
from tests.builder.networks import IMAGE, SIGNAL, inputs_of, parameters_of

TEMPERATURE = 1.7


def staged_graph(network, precision):
    whole = export_staged(network, parameters_of(network))
    return whole if precision == "fp32" else quantise(whole, inputs_of(network, 64, seed=2))


def outputs_of_whole(whole, x):
    session = onnxruntime.InferenceSession(
        whole.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def climb(staged, precision, x):
    """Features and head of each stage, run one after the other as a device does."""
    for index, cut in enumerate(cut_stages(staged)):
        summary = inspect_model(cut.model)
        stage = OnnxStage(
            StageModel(index, precision, cut.model, summary, cut.weights),
            staged.feature_shape_of(index),
        )
        features, head = stage.run_batch(x, TEMPERATURE)
        yield features, head
        x = features


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("network", [SIGNAL, IMAGE], ids=["1-D", "2-D"])
def test_stages_run_one_after_the_other_equal_the_whole_graph(network, precision):
    whole = staged_graph(network, precision)
    x = inputs_of(network, 9)
    expected = outputs_of_whole(whole, x)
    for index, (features, head) in enumerate(climb(whole, precision, x)):
        if features is not None:
            np.testing.assert_allclose(features, expected[features_name(index)], rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            head, head_of_logits(expected[logits_name(index)], TEMPERATURE), rtol=0, atol=3e-6
        )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_weight_is_external_and_only_shapes_are_inline(precision):
    for cut in cut_stages(staged_graph(SIGNAL, precision)):
        summary = inspect_model(cut.model)
        assert {spec.dtype for spec in summary.inline} == {"int64"}
        assert {spec.name: (spec.dtype, spec.shape) for spec in summary.external} == {
            name: (array.dtype.name, array.shape) for name, array in cut.weights.items()
        }
        assert {value.name for value in summary.inputs} == {"x", "temperature"}


def test_only_the_last_stage_has_no_features():
    cuts = cut_stages(staged_graph(SIGNAL, "fp32"))
    outputs = [{value.name for value in inspect_model(cut.model).outputs} for cut in cuts]
    assert outputs == [{"head", "features"}, {"head", "features"}, {"head"}]


def test_int8_keeps_convolutions_in_int8_and_heads_in_float():
    cuts = cut_stages(staged_graph(SIGNAL, "int8"))
    for index, cut in enumerate(cuts):
        assert cut.weights[f"stage{index}.conv0.weight_quantized"].dtype == np.int8
        assert cut.weights[f"stage{index}.conv0.bias_quantized"].dtype == np.int32
        assert cut.weights[f"exit{index}.dense0.weight"].dtype == np.float32
        first = onnx.load_from_string(cut.model).graph.node
        assert next(node.op_type for node in first if "x" in node.input) == "QuantizeLinear"


def test_int8_stays_close_to_fp32():
    x = inputs_of(SIGNAL, 64, seed=2)
    exact, coarse = (outputs_of_whole(staged_graph(SIGNAL, precision), x) for precision in ("fp32", "int8"))
    for name, values in exact.items():
        assert np.abs(coarse[name] - values).max() < 0.1 * np.abs(values).max(), name


def test_head_scores_stay_within_0_and_1_at_the_extremes():
    network = IMAGE
    parameters = parameters_of(network)
    flat = {name: np.zeros_like(array) if "exit0" in name else array for name, array in parameters.items()}
    sure = flat | {"exit0.dense0.bias": np.array([0, 200, 0, 0], np.float32)}
    x = inputs_of(network, 3)
    _, undecided = next(climb(export_staged(network, flat), "fp32", x))
    _, certain = next(climb(export_staged(network, sure), "fp32", x))
    np.testing.assert_allclose(undecided[0], [0.0, 0.25, 1.0, 1.0, 0.75], atol=1e-6)
    assert undecided[:, 2:].max() <= 1.0
    np.testing.assert_array_equal(certain[0], [1.0, 1.0, 0.0, 0.0, 0.0])


def test_the_runtime_fuses_every_int8_convolution_also_at_the_cuts(tmp_path):
    # Signed activations, or another pair at the cut, leave the last convolution of a stage in float32.
    for cut in cut_stages(staged_graph(SIGNAL, "int8")):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(a)) for a in cut.weights.values()]
        options.add_external_initializers(list(cut.weights), values)
        onnxruntime.InferenceSession(cut.model, options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
        op_types = [node.op_type for node in optimised.graph.node]
        assert "QLinearConv" in op_types
        assert not {"Conv", "FusedConv"} & set(op_types)
