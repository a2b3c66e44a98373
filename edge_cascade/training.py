"""Local training: epochs of a train step over weighted examples, from a base to new weights. No I/O.

The step is handed in (see `backends.onnx.OnnxTrainStep`); chance is an argument. Device, hub and builder
train by this one loop, so that what they reach can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_cascade.errors import DivergedError, TrainingError
from edge_cascade.weights import FloatArray, Weights

MAX_LOSS_GAIN: Final = 0.1
"""Nats. Descent near an optimum trembles by less; a learning rate that is too high goes far beyond."""


class TrainStep(Protocol):
    """One step of descent, of parameters that it holds itself."""

    def begin(self, base: Weights) -> None:
        """Start from these weights, with empty momentum; the proximal term pulls towards them."""

    def step(
        self,
        x: FloatArray,
        targets: FloatArray,
        sample_weight: FloatArray,
        *,
        learning_rate: float,
        momentum: float,
        proximal: float,
    ) -> float:
        """Descend once on a batch; the loss before it.

        `x` (n, *input_shape) normalised, `targets` (n, classes) rows that sum to one, `sample_weight` (n,).

        Raises:
            BackendError: with the runtime's own words.
        """

    def weights(self) -> dict[str, FloatArray]:
        """The parameters as they are now, copied."""


@dataclass(frozen=True, slots=True)
class Examples:
    """`x` (n, *input_shape) float32 normalised; `targets` (n, classes) float32; `weight` (n,) float32."""

    x: FloatArray
    targets: FloatArray
    weight: FloatArray

    def __len__(self) -> int:
        return len(self.x)

    def take(self, chosen: NDArray[np.intp]) -> Examples:
        """Those with these indices."""
        return Examples(self.x[chosen], self.targets[chosen], self.weight[chosen])


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast. `prox_mu`: FedProx's pull towards the base (Li 2020); 0 is plain descent."""

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    prox_mu: float = 0.0


@dataclass(frozen=True, slots=True)
class Trained:
    """The weights after the last step, and the mean loss of the first and the last epoch."""

    weights: Mapping[str, FloatArray]
    first_loss: float
    last_loss: float


def train(
    step: TrainStep,
    base: Weights,
    examples: Examples,
    schedule: Schedule,
    *,
    rng: np.random.Generator,
    on_batch: Callable[[], None] = lambda: None,
) -> Trained:
    """Train from `base` by mini-batches, shuffled anew each epoch; the last batch of one may be smaller.

    `on_batch` is called before each step; what it raises ends the training.

    Raises:
        BackendError: when a step cannot be run.
        DivergedError: when loss or weights stop being finite.
        TrainingError: without examples.
    """
    if len(examples) == 0:
        raise TrainingError("there is no example to learn from")
    step.begin(base)
    losses: list[float] = []
    for _ in range(schedule.epochs):
        total = 0.0
        for chosen in _batches(len(examples), schedule.batch_size, rng):
            on_batch()
            loss = step.step(
                examples.x[chosen],
                examples.targets[chosen],
                examples.weight[chosen],
                learning_rate=schedule.learning_rate,
                momentum=schedule.momentum,
                proximal=schedule.prox_mu,
            )
            if not np.isfinite(loss):
                raise DivergedError(
                    f"the loss became {loss}: the learning rate {schedule.learning_rate:g} is too high here"
                )
            total += loss * len(chosen)
        losses.append(total / len(examples))
    weights = step.weights()
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise DivergedError(f"parameter {name!r} left the range of float32")
    return Trained(weights, losses[0], losses[-1])


def mean_loss(step: TrainStep, weights: Weights, examples: Examples, *, batch_size: int) -> float:
    """The loss of weights over examples, averaged by sample weight; the step's own parameters are lost.

    Raises:
        BackendError: when the step cannot be run.
    """
    step.begin(weights)
    total, whole = 0.0, 0.0
    for start in range(0, len(examples), batch_size):
        part = slice(start, start + batch_size)
        share = float(examples.weight[part].sum())
        total += share * step.step(
            examples.x[part],
            examples.targets[part],
            examples.weight[part],
            learning_rate=0.0,
            momentum=0.0,
            proximal=0.0,
        )
        whole += share
    return total / whole if whole > 0 else 0.0


def refuse_worse(before: float, after: float) -> None:
    """What a training did to the loss on its own examples; others need not see weights that it ruined.

    Raises:
        DivergedError: when it is worse by more than `MAX_LOSS_GAIN`.
    """
    # Written so that NaN is worse.
    if not after <= before + MAX_LOSS_GAIN:
        raise DivergedError(
            f"the loss on its own examples went from {before:.4g} to {after:.4g}: the learning rate is too "
            "high here"
        )


def one_hot(labels: NDArray[np.integer], classes: int) -> FloatArray:
    """Targets `(n, classes)` for labels `(n,)`."""
    targets = np.zeros((len(labels), classes), np.float32)
    targets[np.arange(len(labels)), labels] = 1.0
    return targets


def softened(labels: NDArray[np.integer], probability: FloatArray, classes: int) -> FloatArray:
    """Targets with `probability` (n,) on the label and the rest spread evenly: all that a head says of it."""
    rest = ((1.0 - probability) / (classes - 1)).astype(np.float32)
    targets = np.repeat(rest[:, np.newaxis], classes, axis=1)
    targets[np.arange(len(labels)), labels] = probability
    return targets


def _batches(count: int, size: int, rng: np.random.Generator) -> list[NDArray[np.intp]]:
    order = rng.permutation(count)
    return [order[start : start + size] for start in range(0, count, size)]
