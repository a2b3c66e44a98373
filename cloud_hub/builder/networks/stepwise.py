"""Trains networks by the graphs that boards learn with, on onnxruntime: no torch.

The graph gives the gradient; what is made of it is AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with
a one-cycle learning rate (Smith and Topin 2019, arXiv 1708.07120), as `training` does in torch: exits behind
features of any size then need no learning rate of their own. One seed, one machine, one number of threads:
the same parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, cos, isfinite, pi
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from cloud_hub.builder.graphs.staged import StagedGraph
from cloud_hub.builder.joined import train_step_of
from cloud_hub.builder.networks.export import export_staged
from cloud_hub.builder.networks.network import Network, initial_parameters
from cloud_hub.builder.networks.training import Floats, Lesson
from cloud_hub.builder.steps import Checkpoint
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import FULL_MODEL_LIMITS, OnnxTrainStep
from edge_cascade.onnx_file import inspect_model
from edge_cascade.scores import softmax
from edge_cascade.train_step import TrainStepModel, read_train_step
from edge_cascade.training import one_hot
from edge_cascade.weights import Weights

HEAD_RATE: Final = 3e-3
"""The peak learning rate of a head that is trained from nothing."""

_WARM_UP: Final = 0.3
_FIRST: Final = 1.0 / 25.0
_LAST: Final = 1e-4
_BETAS: Final = (0.9, 0.999)
_EPSILON: Final = 1e-8
_WEIGHT_DECAY: Final = 1e-2


@dataclass(frozen=True, slots=True)
class Descent:
    """One training run. `share` is that of the full model's probabilities in a target, in 0..1."""

    epochs: int
    batch: int
    peak_rate: float
    share: float
    seed: int
    threads: int = 2

    def rate_of(self, progress: float) -> float:
        """The learning rate when this share of all steps is done: up along a half cosine, then down."""
        if progress < _WARM_UP:
            return self.peak_rate * _between(_FIRST, 1.0, progress / _WARM_UP)
        return self.peak_rate * _between(1.0, _LAST, (progress - _WARM_UP) / (1.0 - _WARM_UP))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + cos(pi * share))


def targets_of(lesson: Lesson, share: float) -> Floats:
    """Targets `(n, classes)`: labels, and a share of the full model's probabilities.

    They are taken as they are, not softened further: the cross-entropy of a step has no temperature of the
    network's own to divide by, and would teach it to be unsure.
    """
    classes = lesson.teacher.shape[1]
    mixed = (1.0 - share) * one_hot(lesson.y, classes) + share * softmax(lesson.teacher)
    return mixed.astype(np.float32)


def step_model_of(model: bytes, staged: StagedGraph) -> TrainStepModel:
    """A train step of a network that was just made, read back."""
    summary = inspect_model(model, FULL_MODEL_LIMITS)
    return read_train_step(
        model, summary, input_shape=staged.input_shape, classes=staged.classes, where="train step"
    )


def descend(
    step: TrainStepModel,
    base: Weights,
    lesson: Lesson,
    descent: Descent,
    *,
    title: str,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Floats]:
    """Train from `base` and return the step's parameters; every finished epoch is kept in `checkpoint`.

    Raises:
        BuildError: when the learning rate is too high for this network.
    """
    run = OnnxTrainStep(step, threads=descent.threads)
    targets = targets_of(lesson, descent.share)
    state = _Adam({name: np.array(base[name], np.float32) for name in step.shapes})
    first = 0 if checkpoint is None else state.resume(checkpoint)
    count = len(lesson.x)
    batches = ceil(count / descent.batch)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=descent.epochs * batches, completed=first * batches)
        for epoch in range(first, descent.epochs):
            order = np.random.default_rng([descent.seed, epoch]).permutation(count)
            for index in range(batches):
                chosen = order[index * descent.batch : (index + 1) * descent.batch]
                weight = np.ones(len(chosen), np.float32)
                loss, gradients = run.gradients(state.weights, lesson.x[chosen], targets[chosen], weight)
                if not isfinite(loss):
                    raise BuildError(
                        f"{title}: the loss became {loss}: give a --learning-rate below {descent.peak_rate:g}"
                    )
                state.descend(gradients, descent.rate_of((epoch + index / batches) / descent.epochs))
                progress.advance(task)
            if checkpoint is not None:
                state.keep(checkpoint, epochs=epoch + 1)
    return state.weights


def teach_by_steps(
    network: Network, lesson: Lesson, *, epochs: int, batch: int, seed: int, share: float, title: str
) -> dict[str, Floats]:
    """A small network from nothing, for features of mean 0 and deviation 1; see `graphs.heads.Teach`."""
    made = initial_parameters(network, np.random.default_rng(seed))
    staged = export_staged(network, made)
    step = step_model_of(train_step_of(staged).model, staged)
    descent = Descent(epochs, batch, HEAD_RATE, share, seed, threads=1)
    return descend(step, made, lesson, descent, title=title)


class _Adam:
    """Parameters that descend, and all that the rule remembers of their gradients."""

    def __init__(self, weights: dict[str, Floats]) -> None:
        self.weights = weights
        self._mean = {name: np.zeros_like(array) for name, array in weights.items()}
        self._square = {name: np.zeros_like(array) for name, array in weights.items()}
        self._steps = 0

    def descend(self, gradients: Weights, rate: float) -> None:
        """One step. Weights decay towards nothing by the rate, apart from the gradient."""
        self._steps += 1
        first, second = (1.0 - beta**self._steps for beta in _BETAS)
        for name, gradient in gradients.items():
            mean, square, weights = self._mean[name], self._square[name], self.weights[name]
            mean += (1.0 - _BETAS[0]) * (gradient - mean)
            square += (1.0 - _BETAS[1]) * (gradient * gradient - square)
            weights *= 1.0 - rate * _WEIGHT_DECAY
            weights -= (rate / first) * mean / (np.sqrt(square / second) + _EPSILON)

    def keep(self, checkpoint: Checkpoint, *, epochs: int) -> None:
        """Write the state after so many finished epochs."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for part, of in (("weights", self.weights), ("mean", self._mean), ("square", self._square)):
            arrays |= {f"{part}/{name}": array for name, array in of.items()}
        checkpoint.save(arrays, {"epochs": epochs, "steps": self._steps})

    def resume(self, checkpoint: Checkpoint) -> int:
        """Take the kept state over; how many epochs are done, 0 where nothing is kept."""
        kept = checkpoint.load()
        if kept is None:
            return 0
        arrays, state = kept
        for part, of in (("weights", self.weights), ("mean", self._mean), ("square", self._square)):
            for name in of:
                of[name] = arrays[f"{part}/{name}"].astype(np.float32)
        self._steps = int(state["steps"])
        return int(state["epochs"])
