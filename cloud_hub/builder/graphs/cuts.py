"""Where a classifier can be cut into stages: its single-tensor cuts, what lies before each, and a proposal.

A cut is a value that everything behind it follows from, and that has the batch first. Costs are
multiply-adds of convolutions, matrix products and recurrent layers, for one sample; all else counts as
nothing. Shapes come from running the model on two batches: no operator is too new for that. No files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import onnx

from cloud_hub.builder.graphs.adopt import Classifier
from cloud_hub.builder.graphs.onnx_graph import (
    NOTHING,
    Array,
    attribute_of,
    constants,
    consumers,
    producers,
    run_for,
)
from cloud_hub.builder.graphs.staged import INPUT, LOGITS, Shape
from cloud_hub.builder.networks.family import EXIT_SHARES
from cloud_hub.errors import BuildError

_MIN_STAGE_SHARE = 0.05  # a stage below it saves less than its own head costs
_TIE_SHARE = 0.05  # cuts this near to each other do the same work, as far as a proposal goes

_RECURRENT_GATES = {"LSTM", "GRU", "RNN"}
# What belongs to the operator before it: a cut in front of these would hand on what nobody wants to see.
_FINISHING = {
    "BatchNormalization",
    "Celu",
    "Clip",
    "Elu",
    "Erf",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "InstanceNormalization",
    "LayerNormalization",
    "LeakyRelu",
    "Mish",
    "PRelu",
    "Relu",
    "Selu",
    "Sigmoid",
    "Softplus",
    "Swish",
    "Tanh",
}


@dataclass(frozen=True, slots=True)
class Cut:
    """A value at which a network can be cut.

    `shape` is without the batch axis, `mult_adds` what lies before it and `share` the same as a part of the
    whole. `channels_last` says that the last axis holds the channels. `is_finished` is False where a bias,
    a normalisation or an activation comes next.
    """

    name: str
    shape: Shape
    mult_adds: int
    share: float
    channels_last: bool
    is_finished: bool


@dataclass(frozen=True, slots=True)
class CutPlan:
    """The cuts of a network in its order, and what all of it costs; stages are one more than cuts."""

    cuts: tuple[Cut, ...]
    mult_adds: int

    @property
    def stage_mult_adds(self) -> tuple[int, ...]:
        """What each stage costs without its head."""
        edges = (0, *[cut.mult_adds for cut in self.cuts], self.mult_adds)
        return tuple(after - before for before, after in pairwise(edges))


@dataclass(frozen=True, slots=True)
class Costs:
    """Shapes without the batch axis of the values that have it first, and multiply-adds node by node."""

    shapes: Mapping[str, Shape]
    mult_adds: tuple[int, ...]

    @property
    def total(self) -> int:
        """Multiply-adds of the whole network for one sample."""
        return sum(self.mult_adds)


def measure_costs(classifier: Classifier) -> Costs:
    """Shapes and multiply-adds of every node, in the graph's order."""
    graph = classifier.model.graph
    names = [output for node in graph.node for output in node.output if output]
    seen = [_run_all(classifier, size, names) for size in (2, 3)]
    shapes = {
        name: two.shape[1:]
        for name, two, three in zip(names, *seen, strict=True)
        if _is_batched(two, three) and two.dtype == np.float32
    }
    shapes[INPUT] = classifier.input_shape
    known = constants(graph)
    weights = {name: tuple(tensor.dims) for name, tensor in known.items()}
    # Where the batch stands elsewhere, as in a recurrent layer, one sample's part is what a third one adds.
    sizes = {name: three.size - two.size for name, two, three in zip(names, *seen, strict=True)}
    sizes[INPUT] = prod(classifier.input_shape)
    last_axis = {name: two.shape[-1] if two.shape else 1 for name, two in zip(names, seen[0], strict=True)}
    last_axis[INPUT] = classifier.input_shape[-1]
    return Costs(shapes, tuple(_mult_adds(node, weights, sizes, last_axis) for node in graph.node))


def _run_all(classifier: Classifier, size: int, names: Sequence[str]) -> list[Array]:
    return run_for(classifier.model, np.full((size, *classifier.input_shape), 0.5, np.float32), names)


def _is_batched(two: Array, three: Array) -> bool:
    return two.ndim > 0 and len(two) == 2 and len(three) == 3 and two.shape[1:] == three.shape[1:]


def _mult_adds(
    node: onnx.NodeProto,
    weights: Mapping[str, Shape],
    sizes: Mapping[str, int],
    last_axis: Mapping[str, int],
) -> int:
    match node.op_type:
        case "Conv":
            weight = weights.get(node.input[1], ())
            return sizes[node.output[0]] * prod(weight[1:])
        case "ConvTranspose":
            weight = weights.get(node.input[1], ())
            return sizes[node.input[0]] * prod(weight[1:])
        case "Gemm" if attribute_of(node, "transA", 0) == 0:
            return sizes[node.output[0]] * last_axis.get(node.input[0], 0)
        case "MatMul":
            width = weights[node.input[0]][-1] if node.input[0] in weights else last_axis[node.input[0]]
            return sizes[node.output[0]] * width
        case op_type if op_type in _RECURRENT_GATES:
            # Every step multiplies its input by W and its state by R; their last axes are the two widths.
            steps = sizes[node.input[0]] // last_axis[node.input[0]]
            return steps * sum(prod(weights.get(name, ())) for name in node.input[1:3])
        case _:
            return 0


def find_cuts(classifier: Classifier) -> CutPlan:
    """Every place where one value carries all that comes after; the input and the logits are none."""
    graph = classifier.model.graph
    costs = measure_costs(classifier)
    known = constants(graph)
    readers = consumers(graph)
    last_use = {name: index for index, node in enumerate(graph.node) for name in node.input}
    live = {INPUT}
    found: list[Cut] = []
    done = 0
    for index, (node, mult_adds) in enumerate(zip(graph.node, costs.mult_adds, strict=True)):
        done += mult_adds
        live.update(output for output in node.output if last_use.get(output, -1) > index)
        live -= {name for name in node.input if last_use[name] <= index}
        crossing = live - known.keys() - {NOTHING}
        if len(crossing) != 1 or not crossing.issubset(costs.shapes):
            continue
        (name,) = crossing
        if name not in {INPUT, LOGITS, *(cut.name for cut in found)}:
            finished = not any(_is_finishing(reader, known) for reader in readers[name])
            share = done / max(1, costs.total)
            last = _is_channels_last(graph, name, costs.shapes[name])
            found.append(Cut(name, costs.shapes[name], done, share, last, finished))
    return CutPlan(tuple(found), costs.total)


def _is_finishing(node: onnx.NodeProto, known: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether it only completes the layer before it: a bias, a scale, a normalisation, an activation."""
    adds_constant = node.op_type in {"Add", "Sub", "Mul", "Div"} and not known.keys().isdisjoint(node.input)
    return adds_constant or node.op_type in _FINISHING


def _is_channels_last(graph: onnx.GraphProto, name: str, shape: Shape) -> bool:
    """Whether the nearest layer before it mixes the last axis, as transformers do; convolutions the first."""
    if len(shape) < 2:
        return False
    made = producers(graph)
    pending, seen = [name], set()
    for current in pending:
        node = made.get(current)
        if node is None or current in seen:
            continue
        seen.add(current)
        if node.op_type == "Transpose" and attribute_of(node, "perm", [0, 1])[-1] == 1:
            return not _is_channels_last(graph, node.input[0], shape)
        if node.op_type in {"Conv", "ConvTranspose", "BatchNormalization"}:
            return False
        if node.op_type in {"MatMul", "Gemm", "LayerNormalization", *_RECURRENT_GATES}:
            return True
        pending.extend(node.input)
    return False


def prepare_cuts(
    classifier: Classifier,
    *,
    shares: Sequence[float] = EXIT_SHARES,
    names: Sequence[str] | None = None,
) -> CutPlan:
    """The cuts nearest to these shares of the work, in 0..1 and ascending, or those that the user names.

    A network with fewer good places gets fewer exits; one without any gets one.

    Raises:
        BuildError: for a name that is no cut, with those that are.
    """
    plan = find_cuts(classifier)
    if names is not None:
        return CutPlan(_named(plan, names), plan.mult_adds)
    chosen: list[Cut] = []
    for share in shares:
        cut = _nearest(plan, share, chosen)
        if cut is not None:
            chosen.append(cut)
    return CutPlan(tuple(chosen), plan.mult_adds)


def _named(plan: CutPlan, names: Sequence[str]) -> tuple[Cut, ...]:
    known = {cut.name: cut for cut in plan.cuts}
    for name in names:
        if name not in known:
            finished = [cut.name for cut in plan.cuts if cut.is_finished]
            candidates = ", ".join(finished or known) or "none of its values"
            raise BuildError(f"it cannot be cut at {name!r}, but at {candidates}")
        if known[name].share >= 1.0:
            raise BuildError(f"nothing is left to compute behind the cut {name!r}: choose an earlier one")
    return tuple(cut for cut in plan.cuts if cut.name in names)


def _nearest(plan: CutPlan, share: float, chosen: Sequence[Cut]) -> Cut | None:
    """Of the cuts about as near to `share` as the nearest, a finished and then a small one."""
    after = chosen[-1].share + _MIN_STAGE_SHARE if chosen else _MIN_STAGE_SHARE
    candidates = [cut for cut in plan.cuts if after <= cut.share <= 1 - _MIN_STAGE_SHARE]
    if not candidates:
        return None
    nearest = min(abs(cut.share - share) for cut in candidates)
    tied = [cut for cut in candidates if abs(cut.share - share) <= nearest + _TIE_SHARE]
    return min(tied, key=lambda cut: (not cut.is_finished, prod(cut.shape), abs(cut.share - share)))


def cut_table(plan: CutPlan) -> list[tuple[str, str, str]]:
    """Name, shape and share of the work of every cut, as text for a table."""
    return [(cut.name, "x".join(map(str, cut.shape)), f"{cut.share:.1%}") for cut in plan.cuts]
