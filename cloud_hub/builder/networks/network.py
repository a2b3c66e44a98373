"""Layers, stages and exit heads as values; shapes, costs and seeded parameters. No I/O, no torch.

A network is a chain of stages. Each stage has layers that make its features and a head that answers from
them; a network of one stage is a plain classifier. Convolutions are 1-D or 2-D as the input's shape says,
padded by half their kernel. Parameters are a flat mapping, `stage0.conv1.weight` or `exit0.dense0.bias`,
where the number counts the layers of that kind in that stage or head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
Parameters = Mapping[str, NDArray[np.float32]]

BATCH_NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class Conv:
    """Convolution with as many axes as the input has behind its channels; followed by batch normalisation.

    `groups` equal to the number of input channels makes it depthwise.
    """

    channels: int
    kernel: int
    stride: int = 1
    groups: int = 1
    batch_norm: bool = True


@dataclass(frozen=True, slots=True)
class Relu:
    """max(x, 0)."""


@dataclass(frozen=True, slots=True)
class MaxPool:
    """Maximum over blocks of `size`, without padding."""

    size: int


@dataclass(frozen=True, slots=True)
class AveragePool:
    """Mean over blocks of `size`, without padding."""

    size: int


@dataclass(frozen=True, slots=True)
class GlobalAveragePool:
    """Mean over every axis behind the channels, flattened to (channels,)."""


@dataclass(frozen=True, slots=True)
class Flatten:
    """All axes behind the batch as one."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Affine map of a vector."""

    width: int


Layer = Conv | Relu | MaxPool | AveragePool | GlobalAveragePool | Flatten | Dense


@dataclass(frozen=True, slots=True)
class Stage:
    """A segment of the network and the head that answers after it; the head ends in `Dense(classes)`."""

    layers: tuple[Layer, ...]
    head: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """A multi-exit network over inputs of `input_shape` (channels first, without the batch axis)."""

    input_shape: Shape
    classes: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit, with the layer's name."""
        for index, placed in enumerate(self.heads):
            if placed[-1].output_shape != (self.classes,):
                raise ValueError(f"exit {index} gives {placed[-1].output_shape}, expected ({self.classes},)")

    @property
    def bodies(self) -> tuple[tuple[PlacedLayer, ...], ...]:
        """Each stage's layers with names and shapes."""
        placed = []
        shape = self.input_shape
        for index, stage in enumerate(self.stages):
            placed.append(tuple(_place(stage.layers, shape, f"stage{index}")))
            shape = placed[-1][-1].output_shape
        return tuple(placed)

    @property
    def heads(self) -> tuple[tuple[PlacedLayer, ...], ...]:
        """Each exit's layers with names and shapes."""
        return tuple(
            tuple(_place(stage.head, body[-1].output_shape, f"exit{index}"))
            for index, (stage, body) in enumerate(zip(self.stages, self.bodies, strict=True))
        )

    @property
    def feature_shapes(self) -> tuple[Shape, ...]:
        """Shape of each stage's features, without the batch axis."""
        return tuple(body[-1].output_shape for body in self.bodies)

    @property
    def mult_adds(self) -> tuple[int, ...]:
        """Multiply-adds of each stage with its head, for one sample."""
        return tuple(
            sum(layer.mult_adds for layer in (*body, *head))
            for body, head in zip(self.bodies, self.heads, strict=True)
        )

    @property
    def parameter_count(self) -> int:
        """Weights and biases after batch normalisation was folded."""
        return sum(
            prod(shape)
            for layer in self.layers
            for name, shape in layer.parameter_shapes.items()
            if name in {"weight", "bias"}
        )

    @property
    def layers(self) -> Iterator[PlacedLayer]:
        """Every layer, stage by stage, each stage's head behind its body."""
        for body, head in zip(self.bodies, self.heads, strict=True):
            yield from body
            yield from head


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """A layer at its place in a network. Shapes are without the batch axis."""

    name: str
    layer: Layer
    input_shape: Shape
    output_shape: Shape

    @property
    def parameter_shapes(self) -> dict[str, Shape]:
        """Shapes of the layer's parameters by their short names; batch normalisation's are not yet folded."""
        match self.layer:
            case Conv(channels=channels, kernel=kernel, groups=groups, batch_norm=batch_norm):
                axes = len(self.input_shape) - 1
                shapes = {"weight": (channels, self.input_shape[0] // groups, *[kernel] * axes)}
                names = ("gamma", "beta", "mean", "variance") if batch_norm else ("bias",)
                folded = {"bias": (channels,)} if batch_norm else {}
                return shapes | folded | dict.fromkeys(names, (channels,))
            case Dense(width=width):
                return {"weight": (width, self.input_shape[0]), "bias": (width,)}
            case _:
                return {}

    @property
    def mult_adds(self) -> int:
        """Multiply-adds for one sample; pooling and activations count as nothing."""
        weight = self.parameter_shapes.get("weight")
        return 0 if weight is None else prod(weight) * prod(self.output_shape[1:])


def initial_parameters(network: Network, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """He-initialised parameters (He et al. 2015, eq. 10) with batch normalisation at rest."""
    parameters: dict[str, NDArray[np.float32]] = {}
    for placed in network.layers:
        for short, shape in placed.parameter_shapes.items():
            name = f"{placed.name}.{short}"
            if short == "weight":
                scale = np.sqrt(2.0 / prod(shape[1:]))
                parameters[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
            elif short in {"gamma", "variance"}:
                parameters[name] = np.ones(shape, np.float32)
            else:
                parameters[name] = np.zeros(shape, np.float32)
    return parameters


def fold_batch_norm(network: Network, parameters: Parameters) -> dict[str, NDArray[np.float32]]:
    """Only weights and biases: batch normalisation becomes part of the convolution before it.

    Raises:
        ValueError: if a parameter is missing, is not named by the network, or has another shape.
    """
    _check_parameters(network, parameters)
    folded: dict[str, NDArray[np.float32]] = {}
    for placed in network.layers:
        shapes = placed.parameter_shapes
        if not shapes:
            continue
        own = {short: parameters[f"{placed.name}.{short}"] for short in shapes}
        weight, bias = own["weight"], own["bias"]
        if "gamma" in own:
            factor = own["gamma"] / np.sqrt(own["variance"] + np.float32(BATCH_NORM_EPSILON))
            weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
            bias = (bias - own["mean"]) * factor + own["beta"]
        folded[f"{placed.name}.weight"] = np.ascontiguousarray(weight, np.float32)
        folded[f"{placed.name}.bias"] = np.ascontiguousarray(bias, np.float32)
    return folded


def _check_parameters(network: Network, parameters: Parameters) -> None:
    expected = {
        f"{placed.name}.{short}": shape
        for placed in network.layers
        for short, shape in placed.parameter_shapes.items()
    }
    if different := expected.keys() ^ parameters.keys():
        raise ValueError(f"parameters do not fit the network: {min(different)!r} is on one side only")
    for name, shape in expected.items():
        if parameters[name].shape != shape:
            raise ValueError(f"parameter {name!r} is {parameters[name].shape}, the network needs {shape}")


def _place(layers: Sequence[Layer], shape: Shape, prefix: str) -> Iterator[PlacedLayer]:
    seen: dict[str, int] = {}
    for layer in layers:
        kind = type(layer).__name__.lower()
        name = f"{prefix}.{kind}{seen.setdefault(kind, 0)}"
        seen[kind] += 1
        output = _output_shape(layer, shape, name)
        yield PlacedLayer(name, layer, shape, output)
        shape = output


def _output_shape(layer: Layer, shape: Shape, name: str) -> Shape:
    match layer:
        case Conv(channels=channels, kernel=kernel, stride=stride, groups=groups):
            if len(shape) not in {2, 3} or shape[0] % groups or channels % groups:
                raise ValueError(f"{name}: cannot convolve {shape} in {groups} groups")
            return (channels, *[(size + 2 * (kernel // 2) - kernel) // stride + 1 for size in shape[1:]])
        case MaxPool(size=size) | AveragePool(size=size):
            if min(shape[1:], default=0) < size:
                raise ValueError(f"{name}: cannot pool {shape} by {size}")
            return (shape[0], *[extent // size for extent in shape[1:]])
        case GlobalAveragePool():
            return (shape[0],)
        case Flatten():
            return (prod(shape),)
        case Dense(width=width):
            if len(shape) != 1:
                raise ValueError(f"{name}: needs a vector, is given {shape}")
            return (width,)
        case Relu():
            return shape
        case _:
            assert_never(layer)
