"""Trains a network in torch and hands its parameters back as numpy. The only module that imports torch.

The full model learns by cross-entropy. The device's network learns all its exits jointly (BranchyNet,
Teerapittayanon et al. 2016, arXiv 1709.01686) from the labels and from the full model's softened answers
(Hinton et al. 2015, arXiv 1503.02531). One seed, one machine, one number of threads: the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, assert_never

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from cloud_hub.builder.networks.network import (
    BATCH_NORM_EPSILON,
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
from cloud_hub.builder.networks.training_state import TrainingState
from cloud_hub.builder.steps import Checkpoint

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Augment = Callable[[Floats, np.random.Generator], Floats]

SOFTENING: Final = 2.0
"""Divides both sides' logits where the full model teaches (Hinton et al. 2015, arXiv 1503.02531)."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a network learns from: normalised `x`, labels `y` (n,), the full model's logits (n, classes)."""

    x: Floats
    y: Labels
    teacher: Floats


@dataclass(frozen=True, slots=True)
class Schedule:
    """One training run: AdamW with a one-cycle learning rate (Smith and Topin 2019, arXiv 1708.07120)."""

    epochs: int
    seed: int
    batch: int = 128
    peak_rate: float = 3e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    threads: int = 2


@dataclass(frozen=True, slots=True)
class Distillation:
    """How the device's network heeds the full model: `share` of the loss, both softened by `temperature`.

    `exit_weights`: what each exit's loss counts, first exit first.
    """

    share: float
    temperature: float
    exit_weights: tuple[float, ...]


def train_full(
    network: Network,
    x: Floats,
    y: Labels,
    *,
    schedule: Schedule,
    augment: Augment | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Floats]:
    """Train a network of one stage by cross-entropy on normalised inputs `(n, *shape)` and labels `(n,)`."""
    from torch.nn.functional import cross_entropy

    model = _prepare(network, schedule)

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor, _: NDArray[np.intp]) -> torch.Tensor:
        return cross_entropy(model(inputs)[-1], labels, label_smoothing=schedule.label_smoothing)

    _fit(model, loss_of, x, y, schedule=schedule, augment=augment, checkpoint=checkpoint, title="full model")
    return _parameters(model)


def train_edge(
    network: Network,
    x: Floats,
    y: Labels,
    *,
    schedule: Schedule,
    distillation: Distillation,
    teacher_logits: Floats,
    augment: Augment | None = None,
    checkpoint: Checkpoint | None = None,
    title: str = "edge network",
) -> dict[str, Floats]:
    """Train all exits jointly on labels and on the full model's `(n, classes)` logits of the plain inputs."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

    model = _prepare(network, schedule)
    soften = distillation.temperature
    targets = softmax(torch.from_numpy(teacher_logits) / soften, dim=1)

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor, chosen: NDArray[np.intp]) -> torch.Tensor:
        target = targets[torch.from_numpy(chosen)]
        total = torch.zeros(())
        for weight, logits in zip(distillation.exit_weights, model(inputs), strict=True):
            hard = cross_entropy(logits, labels, label_smoothing=schedule.label_smoothing)
            soft = kl_div(log_softmax(logits / soften, dim=1), target, reduction="batchmean") * soften**2
            total = total + weight * ((1.0 - distillation.share) * hard + distillation.share * soft)
        return total

    _fit(model, loss_of, x, y, schedule=schedule, augment=augment, checkpoint=checkpoint, title=title)
    return _parameters(model)


def predict(network: Network, parameters: Mapping[str, Floats], x: Floats) -> list[Floats]:
    """Every exit's logits `(n, classes)` of normalised inputs."""
    import torch

    model = _Model(network)
    model.load(parameters)
    model.module.eval()
    with torch.no_grad():
        chunks = (torch.from_numpy(x[start : start + 512]) for start in range(0, len(x), 512))
        parts = [[logits.numpy() for logits in model(chunk)] for chunk in chunks]
    return [np.concatenate(logits) for logits in zip(*parts, strict=True)]


# Where a convolution's parameters are once it stands in a Sequential with its normalisation.
_NORMALISED = {
    "weight": "0.weight",
    "bias": "0.bias",
    "gamma": "1.weight",
    "beta": "1.bias",
    "mean": "1.running_mean",
    "variance": "1.running_var",
}


class _Model:
    """A network's layers in torch, callable to all exits' logits."""

    def __init__(self, network: Network) -> None:
        from torch.nn import ModuleDict, Sequential

        self.network = network
        self.bodies = [Sequential(*map(_module, body)) for body in network.bodies]
        self.heads = [Sequential(*map(_module, head)) for head in network.heads]
        self.module = ModuleDict(
            {f"stage{index}": body for index, body in enumerate(self.bodies)}
            | {f"exit{index}": head for index, head in enumerate(self.heads)}
        )

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        logits = []
        for body, head in zip(self.bodies, self.heads, strict=True):
            x = body(x)
            logits.append(head(x))
        return logits

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and running statistics under the names that `PlacedLayer` gives them."""
        placed = [*self.network.bodies, *self.network.heads]
        for layers, modules in zip(placed, [*self.bodies, *self.heads], strict=True):
            for layer, module in zip(layers, modules, strict=True):
                tensors = module.state_dict()
                shapes = layer.parameter_shapes
                for name in shapes:
                    yield f"{layer.name}.{name}", tensors[_NORMALISED[name] if "gamma" in shapes else name]

    def load(self, parameters: Mapping[str, Floats]) -> None:
        """Take numpy parameters; state_dict tensors share memory with the module."""
        import torch

        for name, tensor in self.named_tensors():
            tensor.copy_(torch.from_numpy(parameters[name]))


def _module(placed: PlacedLayer) -> Any:  # noqa: PLR0911 - one return for each kind of layer
    from torch import nn

    layer = placed.layer
    two_dimensional = len(placed.input_shape) == 3
    match layer:
        case Conv(channels=channels, kernel=kernel, stride=stride, groups=groups, batch_norm=batch_norm):
            convolution = nn.Conv2d if two_dimensional else nn.Conv1d
            conv = convolution(
                placed.input_shape[0], channels, kernel, stride=stride, padding=kernel // 2, groups=groups
            )
            if not batch_norm:
                return conv
            normalise = nn.BatchNorm2d if two_dimensional else nn.BatchNorm1d
            return nn.Sequential(conv, normalise(channels, eps=BATCH_NORM_EPSILON))
        case Relu():
            return nn.ReLU()
        case MaxPool(size=size):
            return nn.MaxPool2d(size) if two_dimensional else nn.MaxPool1d(size)
        case AveragePool(size=size):
            return nn.AvgPool2d(size) if two_dimensional else nn.AvgPool1d(size)
        case GlobalAveragePool():
            pool = nn.AdaptiveAvgPool2d(1) if two_dimensional else nn.AdaptiveAvgPool1d(1)
            return nn.Sequential(pool, nn.Flatten())
        case Flatten():
            return nn.Flatten()
        case Dense(width=width):
            return nn.Linear(placed.input_shape[0], width)
        case _:
            assert_never(layer)


def _prepare(network: Network, schedule: Schedule) -> _Model:
    import torch

    torch.set_num_threads(schedule.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(schedule.seed)
    return _Model(network)


def _fit(
    model: _Model,
    loss_of: Callable[[torch.Tensor, torch.Tensor, NDArray[np.intp]], torch.Tensor],
    x: Floats,
    y: Labels,
    *,
    schedule: Schedule,
    augment: Augment | None,
    checkpoint: Checkpoint | None,
    title: str,
) -> None:
    import torch

    rng = np.random.default_rng(schedule.seed)
    batch = min(schedule.batch, len(x))
    steps_per_epoch = len(x) // batch
    steps = schedule.epochs * steps_per_epoch
    optimiser = torch.optim.AdamW(
        model.module.parameters(), lr=schedule.peak_rate, weight_decay=schedule.weight_decay
    )
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, schedule.peak_rate, total_steps=steps)
    run = TrainingState(model.module, optimiser, rates, rng)
    model.module.train()
    with Progress(console=Console(stderr=True)) as progress:
        first = run.resume(checkpoint) if checkpoint is not None else 0
        task = progress.add_task(title, total=steps, completed=first * steps_per_epoch)
        for epoch in range(first, schedule.epochs):
            for chosen in _batches(len(x), batch, rng):
                seen = augment(x[chosen], rng) if augment is not None else x[chosen]
                loss = loss_of(torch.from_numpy(seen), torch.from_numpy(y[chosen]), chosen)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                rates.step()
                progress.advance(task)
            if checkpoint is not None:
                run.keep(checkpoint, epochs=epoch + 1)
    model.module.eval()


def _batches(count: int, batch: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """One epoch; what does not fill a batch is left out."""
    order = rng.permutation(count)
    for start in range(0, count - batch + 1, batch):
        yield order[start : start + batch]


def _parameters(model: _Model) -> dict[str, Floats]:
    return {
        name: tensor.detach().numpy().astype(np.float32, copy=True) for name, tensor in model.named_tensors()
    }
