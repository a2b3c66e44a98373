"""Writes cut stages as TensorFlow Lite files, for boards whose runtime is LiteRT. No I/O.

The float form keeps the arithmetic. The int8 form keeps the scales of the QDQ graph: a uint8 activation with
zero point z is exactly an int8 one with z - 128 (TensorFlow Lite 8-bit quantization specification), weights
are int8 per channel already, biases int32 of scale input times weight. What lies outside of pairs, the heads
above all, stays in float.

Every file is for one sample: `x` and `temperature` in, `head` (1, 5) and, but for the last stage, `features`
out. The first stage takes `x` channels first, as samples come; features go from stage to stage channels
last, see `edge_cascade.tflite_file.channels_last`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from cloud_hub.builder.graphs.staged import LOGITS, StagedGraph, make_model, opset_of
from cloud_hub.builder.graphs.stages import CutStage, with_data
from cloud_hub.builder.litert.head import add_head
from cloud_hub.builder.litert.layout import Layout, Placement, Value
from cloud_hub.builder.litert.nodes import NodeWriter
from cloud_hub.builder.litert.source import Source
from cloud_hub.builder.litert.writer import TfliteGraph
from cloud_hub.errors import BuildError
from edge_cascade.errors import BundleError, first_line
from edge_cascade.manifest import STAGE_FEATURES, STAGE_INPUT, STAGE_TEMPERATURE
from edge_cascade.policy import Precision
from edge_cascade.tflite_file import channels_last, check_stage_tensors, digest_of_weights, inspect_tflite


def litert_files(
    cuts: Mapping[Precision, Sequence[CutStage]], staged: StagedGraph
) -> dict[tuple[int, Precision], bytes]:
    """Every stage at every precision as a .tflite file; all of them or none.

    Raises:
        BuildError: naming the operator that cannot be written; a build then goes without LiteRT.
    """
    return {
        (index, precision): write_stage(cut, staged, index)
        for precision, stages in cuts.items()
        for index, cut in enumerate(stages)
    }


def write_stage(cut: CutStage, staged: StagedGraph, index: int) -> bytes:
    """One cut stage, fp32 or QDQ, as a .tflite file.

    Raises:
        BuildError: naming the operator that cannot be written.
    """
    source = _for_one_sample(cut, staged, index)
    graph = TfliteGraph()
    placement = Placement(graph)
    given = _given(graph, staged.input_shape_of(index), is_sample=index == 0)
    temperature = graph.value(STAGE_TEMPERATURE, (1,))
    values = NodeWriter(graph, placement, Source(source)).write({STAGE_INPUT: given})

    logits = placement.as_first(placement.as_float(values[LOGITS]))
    ends = [add_head(graph, logits.tensor, temperature, staged.classes)]
    if staged.feature_shape_of(index) is not None:
        ends.append(_handed_on(graph, placement, values[STAGE_FEATURES]))
    content = graph.to_bytes([given.tensor, temperature], ends, digest_of_weights(cut.weights))
    _check(content, staged, index)
    return content


def _given(graph: TfliteGraph, shape: tuple[int, ...], *, is_sample: bool) -> Value:
    layout = Layout.FIRST if is_sample or len(shape) not in {2, 3} else Layout.LAST
    stored = shape if layout is Layout.FIRST else channels_last(shape)
    return Value(graph.value(STAGE_INPUT, (1, *stored)), (1, *shape), layout)


def _handed_on(graph: TfliteGraph, placement: Placement, value: Value) -> int:
    real = placement.as_float(value)
    placed = placement.as_last(real) if len(real.shape) in {3, 4} else placement.as_first(real)
    graph.rename(placed.tensor, STAGE_FEATURES)
    return placed.tensor


def _for_one_sample(cut: CutStage, staged: StagedGraph, index: int) -> onnx.GraphProto:
    """The stage up to its logits and features, its weights inside, the batch axis one, every shape known."""
    model = onnx.load_from_string(cut.model)
    graph = model.graph
    outputs = [_one(LOGITS, (staged.classes,))]
    feature_shape = staged.feature_shape_of(index)
    if feature_shape is not None:
        outputs.append(_one(STAGE_FEATURES, feature_shape))
    nodes: list[onnx.NodeProto] = []
    wanted = {value.name for value in outputs}
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            nodes.insert(0, node)
            wanted.update(node.input)
    initializers = [with_data(tensor, cut.weights) for tensor in graph.initializer if tensor.name in wanted]
    inputs = [_one(STAGE_INPUT, staged.input_shape_of(index))]
    whole = make_model(graph.name, nodes, inputs, outputs, initializers, opset=opset_of(model))
    try:
        return onnx.shape_inference.infer_shapes(whole, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise BuildError(
            f"LiteRT: the shapes of stage {index} cannot be told: {first_line(error)}"
        ) from error


def _one(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, *shape])


def _check(content: bytes, staged: StagedGraph, index: int) -> None:
    """Hold what was written against the device's own checks."""
    try:
        check_stage_tensors(
            inspect_tflite(content),
            staged.input_shape_of(index),
            staged.feature_shape_of(index),
            index=index,
            where=f"stage {index}",
        )
    except BundleError as error:
        raise BuildError(f"LiteRT: a device would refuse what was written: {error}") from error
