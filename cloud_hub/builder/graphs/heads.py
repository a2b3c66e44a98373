"""Gives a classifier early exits: small heads at its cuts, trained on the frozen network.

A head pools its features to a small grid, flattens them and answers through one hidden layer, or through none
where its stage is too cheap for that. It learns from the labels and from the classifier's own logits; the
network before it stays as it came. The last exit is the classifier itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cloud_hub.builder.graphs.adopt import Classifier
from cloud_hub.builder.graphs.cuts import Cut, CutPlan
from cloud_hub.builder.graphs.onnx_graph import constants, open_for, prune, rename_values, set_outputs
from cloud_hub.builder.graphs.staged import (
    INPUT,
    LOGITS,
    Shape,
    StagedGraph,
    features_name,
    float_value,
    logits_name,
    make_model,
    opset_of,
)
from cloud_hub.builder.networks.network import Dense, Flatten, Network, Relu, Stage
from cloud_hub.builder.networks.training import SOFTENING, Distillation, Lesson, Schedule, train_edge
from cloud_hub.builder.steps import Steps
from cloud_hub.errors import BuildError

Floats = NDArray[np.float32]
_COST_SHARE = 0.1  # of its own stage's work, at most for a head with a hidden layer
_GRIDS = {1: (8, 4, 2, 1), 2: (4, 3, 2, 1)}  # by spatial axes; more of them are pooled to one value
_HIDDEN = range(32, 129)
_MAX_FEATURES = 1152  # of a sample at one exit: 50,000 samples stay at 230 MB
_CHUNK = 256
_STEPS = 4000
_EPOCHS = range(10, 61)
_BATCH = 128
_PARAMETRIC = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """A head before training: blocks that are averaged, what they leave, and the hidden width (0: none).

    Blocks overlap where the grid does not divide the map, so that nothing of it is left out.
    """

    cut: Cut
    kernel: Shape
    strides: Shape
    features: int
    hidden: int
    mult_adds: int


def plan_heads(cut_plan: CutPlan, classes: int) -> list[HeadPlan]:
    """One head a cut, each as large as its stage's cost allows."""
    stages = cut_plan.stage_mult_adds
    return [_plan_head(cut, stages[index], classes) for index, cut in enumerate(cut_plan.cuts)]


def _plan_head(cut: Cut, stage_mult_adds: int, classes: int) -> HeadPlan:
    channels, *extents = _channels_first(cut)
    plain: HeadPlan | None = None
    for grid in _GRIDS.get(len(extents), (1,)):
        cells = [min(grid, extent) for extent in extents]
        strides = tuple(extent // count for extent, count in zip(extents, cells, strict=True))
        kernel = tuple(
            extent - (count - 1) * stride
            for extent, count, stride in zip(extents, cells, strides, strict=True)
        )
        features = channels * prod(cells)
        plain = HeadPlan(cut, kernel, strides, features, 0, features * classes)
        hidden = min(_HIDDEN[-1], int(stage_mult_adds * _COST_SHARE) // (features + classes))
        if hidden in _HIDDEN and features <= _MAX_FEATURES:
            return HeadPlan(cut, kernel, strides, features, hidden, hidden * (features + classes))
    assert plain is not None
    return plain


def _channels_first(cut: Cut) -> Shape:
    return (cut.shape[-1], *cut.shape[:-1]) if cut.channels_last else cut.shape


class Teach(Protocol):
    """Trains a small network from nothing on standardised features; its parameters by name."""

    __name__: str

    def __call__(
        self,
        network: Network,
        lesson: Lesson,
        *,
        epochs: int,
        batch: int,
        seed: int,
        share: float,
        title: str,
    ) -> dict[str, Floats]:
        """`share` is that of the teacher's answers, in 0..1; `title` is shown meanwhile."""


def teach_by_torch(
    network: Network, lesson: Lesson, *, epochs: int, batch: int, seed: int, share: float, title: str
) -> dict[str, Floats]:
    """Implements `Teach` with torch.

    Raises:
        BuildError: without torch.
    """
    if importlib.util.find_spec("torch") is None:
        raise BuildError("early exits are trained with torch: pip install 'edge-daemon[build]'")
    return train_edge(
        network,
        lesson.x,
        lesson.y,
        schedule=Schedule(epochs=epochs, seed=seed, batch=batch, threads=1),
        distillation=Distillation(share, SOFTENING, exit_weights=(1.0,)),
        teacher_logits=lesson.teacher,
        title=title,
    )


def train_heads(
    classifier: Classifier,
    cut_plan: CutPlan,
    lesson: Lesson,
    *,
    seed: int,
    share: float,
    steps: Steps,
    teach: Teach = teach_by_torch,
) -> StagedGraph:
    """The classifier with a trained head at every cut.

    `share` is that of the teacher's answers in the loss, in 0..1. The same arguments give the same heads on
    one machine; what `steps` holds of them already is not trained again.

    Raises:
        BuildError: without samples or without what `teach` needs, or when arrays do not fit each other.
    """
    plans = plan_heads(cut_plan, classifier.classes)
    if not plans:
        return _assemble(classifier, cut_plan, plans, {})
    _check_lesson(classifier, lesson)
    depends_on = [
        sha256(classifier.to_bytes()).hexdigest(),
        str(plans),
        [
            sha256(np.ascontiguousarray(array).data).hexdigest()
            for array in (lesson.x, lesson.y, lesson.teacher)
        ],
        seed,
        share,
        [_STEPS, *_EPOCHS[:: len(_EPOCHS) - 1], _BATCH, SOFTENING],
        teach.__name__,
    ]
    trained = steps.arrays(
        "heads",
        depends_on,
        lambda _: dict(_train_all(classifier, plans, lesson, seed=seed, share=share, teach=teach)),
    )
    return _assemble(
        classifier, cut_plan, plans, {name: array.astype(np.float32) for name, array in trained.items()}
    )


def _check_lesson(classifier: Classifier, lesson: Lesson) -> None:
    x, y, classes = lesson.x, lesson.y, classifier.classes
    if len(x) == 0 or x.shape[1:] != classifier.input_shape:
        raise BuildError(
            f"training samples are {x.shape}, the edge network takes (n, *{classifier.input_shape})"
        )
    if lesson.teacher.shape != (len(x), classes):
        raise BuildError(f"the full model's logits are {lesson.teacher.shape}, not ({len(x)}, {classes})")
    if y.shape != (len(x),) or y.min() < 0 or y.max() >= classes:
        raise BuildError(f"labels are {y.shape}, not ({len(x)},) numbers in 0..{classes - 1}")


# --- features


def _extract(classifier: Classifier, plans: Sequence[HeadPlan], x: Floats) -> list[Floats]:
    """Pooled features `(n, features)` of every head, read in one pass."""
    model = onnx.ModelProto()
    model.CopyFrom(classifier.model)
    names = [f"exit{index}.pooled" for index in range(len(plans))]
    for index, plan in enumerate(plans):
        model.graph.node.extend(_pooling(plan, index, plan.cut.name, names[index]))
    set_outputs(model.graph, names)
    prune(model.graph)
    run = open_for(model, names)
    found = [np.empty((len(x), plan.features), np.float32) for plan in plans]
    for start in range(0, len(x), _CHUNK):
        for target, part in zip(found, run(x[start : start + _CHUNK]), strict=True):
            target[start : start + len(part)] = part
    return found


def _pooling(plan: HeadPlan, index: int, given: str, result: str) -> Iterator[onnx.NodeProto]:
    """Nodes from a cut's value to `result` (n, features); every name begins with the exit's."""
    prefix = f"exit{index}"
    if plan.cut.channels_last:
        axes = len(plan.cut.shape)
        perm = [0, axes, *range(1, axes)]
        yield helper.make_node("Transpose", [given], [f"{prefix}.first"], name=f"{prefix}.first", perm=perm)
        given = f"{prefix}.first"
    if any(size > 1 for size in plan.kernel):
        yield helper.make_node(
            "AveragePool",
            [given],
            [f"{prefix}.pool"],
            name=f"{prefix}.pool",
            kernel_shape=list(plan.kernel),
            strides=list(plan.strides),
        )
        given = f"{prefix}.pool"
    yield helper.make_node("Flatten", [given], [result], name=f"{prefix}.flat", axis=1)


# --- training


def _train_all(
    classifier: Classifier,
    plans: Sequence[HeadPlan],
    lesson: Lesson,
    *,
    seed: int,
    share: float,
    teach: Teach,
) -> Iterator[tuple[str, Floats]]:
    """Weights and biases of every head, by the names that they have in the graph."""
    for index, (plan, features) in enumerate(zip(plans, _extract(classifier, plans, lesson.x), strict=True)):
        trained = _train(plan, features, lesson, seed=seed + index, share=share, teach=teach)
        for name, array in trained.items():
            yield f"exit{index}.{name}", array


def _train(
    plan: HeadPlan, features: Floats, lesson: Lesson, *, seed: int, share: float, teach: Teach
) -> dict[str, Floats]:
    """One head's, for features as the graph gives them."""
    classes = lesson.teacher.shape[1]
    # Some channels are never active; they must stay at nothing, not be divided by nothing.
    spread = features.std(axis=0, dtype=np.float64)
    spread[spread < 1e-6] = 1.0
    mean = features.mean(axis=0, dtype=np.float64)
    scaled = ((features - mean) / spread).astype(np.float32)

    batch = min(_BATCH, len(features))
    epochs = min(max(_STEPS * batch // len(features), _EPOCHS[0]), _EPOCHS[-1])
    body = (Dense(plan.hidden), Relu()) if plan.hidden else (Flatten(),)
    trained = teach(
        Network((plan.features,), classes, (Stage(body, (Dense(classes),)),)),
        Lesson(scaled, lesson.y, lesson.teacher),
        epochs=epochs,
        batch=batch,
        seed=seed,
        share=share,
        title=f"head behind {plan.cut.name}",
    )
    dense = ("stage0.dense0", "exit0.dense0") if plan.hidden else ("exit0.dense0",)
    weights = {
        f"dense{index}.{short}": trained[f"{name}.{short}"]
        for index, name in enumerate(dense)
        for short in ("weight", "bias")
    }
    first = weights["dense0.weight"].astype(np.float64) / spread
    weights["dense0.weight"] = first.astype(np.float32)
    weights["dense0.bias"] = (weights["dense0.bias"] - first @ mean).astype(np.float32)
    return weights


# --- the staged graph


def _assemble(
    classifier: Classifier,
    cut_plan: CutPlan,
    plans: Sequence[HeadPlan],
    weights: Mapping[str, Floats],
) -> StagedGraph:
    model = onnx.ModelProto()
    model.CopyFrom(classifier.model)
    graph = model.graph
    last = len(plans)
    _name_last_head(graph, last)
    features = [features_name(index) for index in range(last)]
    rename_values(
        graph,
        {LOGITS: logits_name(last)}
        | {plan.cut.name: name for plan, name in zip(plans, features, strict=True)},
    )
    nodes = list(graph.node)
    initializers = [
        *graph.initializer,
        *(numpy_helper.from_array(array, name) for name, array in sorted(weights.items())),
    ]
    outputs = []
    for index, plan in enumerate(plans):
        nodes.extend(_head_nodes(plan, index))
        outputs.append(float_value(features[index], plan.cut.shape))
        outputs.append(float_value(logits_name(index), (classifier.classes,)))
    outputs.append(float_value(logits_name(last), (classifier.classes,)))
    heads = [*(plan.mult_adds for plan in plans), 0]
    staged = make_model(
        "multi-exit",
        nodes,
        [float_value(INPUT, classifier.input_shape)],
        outputs,
        initializers,
        opset=opset_of(classifier.model),
    )
    return StagedGraph(
        model=staged,
        input_shape=classifier.input_shape,
        classes=classifier.classes,
        feature_shapes=tuple(plan.cut.shape for plan in plans),
        mult_adds=tuple(stage + head for stage, head in zip(cut_plan.stage_mult_adds, heads, strict=True)),
    )


def _name_last_head(graph: onnx.GraphProto, last: int) -> None:
    """The last layer with weights, and all behind it, stay in float when the rest is quantised."""
    known = constants(graph)
    layers = [
        index
        for index, node in enumerate(graph.node)
        if node.op_type in _PARAMETRIC and known.keys() & set(node.input)
    ]
    for node in graph.node[layers[-1] if layers else 0 :]:
        node.name = f"exit{last}.{node.name}"


def _head_nodes(plan: HeadPlan, index: int) -> Iterator[onnx.NodeProto]:
    prefix = f"exit{index}"
    yield from _pooling(plan, index, features_name(index), f"{prefix}.pooled")
    given = f"{prefix}.pooled"
    if plan.hidden:
        yield _dense(prefix, "dense0", given, f"{prefix}.hidden")
        yield helper.make_node("Relu", [f"{prefix}.hidden"], [f"{prefix}.relu"], name=f"{prefix}.relu")
        yield _dense(prefix, "dense1", f"{prefix}.relu", logits_name(index))
    else:
        yield _dense(prefix, "dense0", given, logits_name(index))


def _dense(prefix: str, name: str, given: str, result: str) -> onnx.NodeProto:
    parameters = [f"{prefix}.{name}.weight", f"{prefix}.{name}.bias"]
    return helper.make_node("Gemm", [given, *parameters], [result], name=f"{prefix}.{name}", transB=1)
