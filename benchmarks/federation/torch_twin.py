"""The same network and the same step of descent in torch, eager, as a user would write it. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from cloud_hub.builder.networks.network import (
    AveragePool,
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    MaxPool,
    Network,
    PlacedLayer,
    Relu,
)
from edge_cascade.weights import FloatArray, Weights


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread within."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchStep:
    """Implements `training.TrainStep`. Examples weigh the same; there is no proximal term."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._weights: dict[str, Any] = {}
        self._descent: Any = None

    def begin(self, base: Weights) -> None:
        """See `TrainStep.begin`."""
        self._weights = {name: torch.tensor(array, requires_grad=True) for name, array in base.items()}
        self._descent = None

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
        """See `TrainStep.step`."""
        del sample_weight, proximal
        if self._descent is None:
            self._descent = torch.optim.SGD(self._weights.values(), lr=learning_rate, momentum=momentum)
        loss = self._loss(torch.from_numpy(x), torch.from_numpy(targets.argmax(axis=1)))
        self._descent.zero_grad()
        loss.backward()
        self._descent.step()
        return float(loss.item())

    def weights(self) -> dict[str, FloatArray]:
        """See `TrainStep.weights`."""
        return {name: np.array(weight.detach().numpy()) for name, weight in self._weights.items()}

    def _loss(self, x: Any, labels: Any) -> Any:
        """Exits count by their depth, as in `cloud_hub.builder.joined.train_step_of`."""
        total: Any = 0.0
        exits = len(self._network.stages)
        for index, (body, head) in enumerate(zip(self._network.bodies, self._network.heads, strict=True)):
            for placed in body:
                x = self._through(placed, x)
            logits = x
            for placed in head:
                logits = self._through(placed, logits)
            total = total + (index + 1) / exits * functional.cross_entropy(logits, labels)
        return total

    def _through(self, placed: PlacedLayer, x: Any) -> Any:
        weight, bias = (self._weights.get(f"{placed.name}.{short}") for short in ("weight", "bias"))
        is_image = x.dim() == 4
        match placed.layer:
            case Conv(kernel=kernel, stride=stride, groups=groups):
                convolve: Any = functional.conv2d if is_image else functional.conv1d
                return convolve(x, weight, bias, stride=stride, padding=kernel // 2, groups=groups)
            case Dense():
                return functional.linear(x, weight, bias)
            case Relu():
                return functional.relu(x)
            case MaxPool(size=size):
                return (functional.max_pool2d if is_image else functional.max_pool1d)(x, size)
            case AveragePool(size=size):
                return (functional.avg_pool2d if is_image else functional.avg_pool1d)(x, size)
            case GlobalAveragePool():
                return x.flatten(2).mean(2)
            case Flatten():
                return x.flatten(1)
