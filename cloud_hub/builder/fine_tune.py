"""Trains the whole network of a user's ONNX file and its exits, from the full model. No torch, no files.

Whether the result is taken is decided on D_opt, which trained neither network: the samples that the network
brought along was trained on are often the very ones that it is fine-tuned on, so no part of them could judge
the two of them fairly. D_cal is not looked at, so the certificate does not notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from cloud_hub.builder.calibration.outcomes import Floats, Labels
from cloud_hub.builder.collect import chunks
from cloud_hub.builder.graphs.onnx_graph import constants, open_for
from cloud_hub.builder.graphs.staged import StagedGraph, logits_name
from cloud_hub.builder.joined import train_step_of
from cloud_hub.builder.networks.stepwise import Descent, descend, step_model_of
from cloud_hub.builder.networks.training import Lesson
from cloud_hub.builder.steps import Checkpoint, Steps
from cloud_hub.core.federation.guard import GuardRules, Worse, decide_guard
from edge_cascade.weights import Weights


@dataclass(frozen=True, slots=True)
class Judges:
    """Samples that trained nothing: normalised `x` (n, *input_shape), and their labels `(n,)`."""

    x: Floats
    y: Labels


@dataclass(frozen=True, slots=True)
class FineTuned:
    """The network that is taken, and why in one line. Accuracies are each exit's on the judges' samples."""

    staged: StagedGraph
    taken: bool
    said: str
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()


def fine_tune(
    staged: StagedGraph, lesson: Lesson, descent: Descent, judges: Judges, steps: Steps
) -> FineTuned:
    """Train every parameter of a network that has a gradient; the old network where that was no gain.

    Raises:
        BuildError: when the learning rate is too high for this network, or not even its heads can be trained.
    """
    teaching = train_step_of(staged)
    if teaching.frozen_because:
        return FineTuned(
            staged, False, f"its exits alone were trained, not its trunk: {teaching.frozen_because}"
        )
    step = step_model_of(teaching.model, staged)
    known = constants(staged.model.graph)
    base = {name: numpy_helper.to_array(known[name]) for name in step.shapes}
    depends_on = [
        sha256(teaching.model).hexdigest(),
        _digest(base),
        _digest({"x": lesson.x, "y": lesson.y, "teacher": lesson.teacher}),
        str(replace(descent, threads=0)),
    ]

    def compute(checkpoint: Checkpoint) -> dict[str, NDArray[np.generic]]:
        return dict(
            descend(step, base, lesson, descent, title="fine-tuning the network", checkpoint=checkpoint)
        )

    learned = steps.arrays("fine-tuned", depends_on, compute)
    tuned = with_parameters(staged, {name: array.astype(np.float32) for name, array in learned.items()})
    return _judge(staged, tuned, judges)


def with_parameters(staged: StagedGraph, weights: Weights) -> StagedGraph:
    """The same network with other values of the initializers that `weights` names."""
    model = onnx.ModelProto()
    model.CopyFrom(staged.model)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return replace(staged, model=model)


def exit_labels(staged: StagedGraph, x: Floats) -> Labels:
    """What every exit says `(exits, n)` of normalised samples."""
    run = open_for(staged.model, [logits_name(index) for index in range(staged.stages)])
    parts = [np.stack([logits.argmax(axis=1) for logits in run(part)]) for part in chunks(x)]
    return np.concatenate(parts, axis=1).astype(np.int64)


def _judge(old: StagedGraph, tuned: StagedGraph, judges: Judges) -> FineTuned:
    """Taken unless an exit or a class is worse beyond noise, or the exits together are worse at all."""
    was, now = exit_labels(old, judges.x), exit_labels(tuned, judges.x)
    before, after = _accuracies(was, judges.y), _accuracies(now, judges.y)
    judgement = decide_guard(was, now, judges.y, GuardRules(min_samples=1))
    figures = f"exits {_shown(before)} before, {_shown(after)} after, on {len(judges.y)} held-out samples"
    if isinstance(judgement, Worse):
        return FineTuned(old, False, f"not taken, worse at {judgement.where}: {figures}", before, after)
    if sum(after) < sum(before):
        return FineTuned(old, False, f"not taken, worse: {figures}", before, after)
    return FineTuned(tuned, True, figures, before, after)


def _accuracies(labels: Labels, y: Labels) -> tuple[float, ...]:
    return tuple(float(np.mean(each == y)) for each in labels)


def _shown(accuracies: Sequence[float]) -> str:
    return ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies) + " %"


def _digest(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    digest = sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
