"""A multi-exit network as one ONNX graph: what training, a user's model and quantisation have in common.

The graph takes `x` (n, *input_shape), normalised, channels first. For every stage but the last it gives
`stage<i>.features`, for every stage `exit<i>.logits`, all float32 with a free batch axis. Nodes of heads,
the last stage's classifier among them, have names that start with `exit<i>.`: they stay in float when the
rest is quantised. No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

Shape = tuple[int, ...]

INPUT = "x"
LOGITS = "logits"
BATCH = "n"
OPSET = 17
IR_VERSION = 8  # what opset 17 came with: every onnxruntime since 1.12 reads it


@dataclass(frozen=True, slots=True)
class StagedGraph:
    """The graph and what is known of it. Shapes are without the batch axis; `mult_adds` include the head.

    `feature_shapes` has one entry a stage but the last, whose features nobody takes.
    """

    model: onnx.ModelProto
    input_shape: Shape
    classes: int
    feature_shapes: tuple[Shape, ...]
    mult_adds: tuple[int, ...]

    @property
    def stages(self) -> int:
        """How many stages, and exits, there are."""
        return len(self.mult_adds)

    @property
    def parameter_count(self) -> int:
        """How many numbers its float initializers hold."""
        return sum(
            int(onnx.numpy_helper.to_array(tensor).size)
            for tensor in self.model.graph.initializer
            if tensor.data_type == TensorProto.FLOAT
        )

    def input_shape_of(self, stage: int) -> Shape:
        """What a stage is given."""
        return self.input_shape if stage == 0 else self.feature_shapes[stage - 1]

    def feature_shape_of(self, stage: int) -> Shape | None:
        """What a stage hands on; None for the last."""
        return None if stage == self.stages - 1 else self.feature_shapes[stage]


def features_name(stage: int) -> str:
    """The value that holds a stage's features."""
    return f"stage{stage}.features"


def logits_name(stage: int) -> str:
    """The value that holds an exit's logits."""
    return f"exit{stage}.logits"


def is_head_node(node: onnx.NodeProto) -> bool:
    """Whether a node belongs to a head, and so stays in float."""
    return bool(node.name.startswith("exit"))


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that the model is written in."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in {"", "ai.onnx"})


def float_value(name: str, shape: Shape) -> onnx.ValueInfoProto:
    """A float32 graph input or output with a free batch axis."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *shape])


def make_model(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto],
    *,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A model of default-domain operators only, in the oldest IR version that its opset allows."""
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph,
        opset_imports=imports,
        ir_version=max(IR_VERSION, helper.find_min_ir_version_for(imports)),
        producer_name="edge-daemon",
    )
