"""Networks for the board when the user brings none: three sizes for a shape of input. No I/O, no torch.

`EdgeFamily` is a port: whatever gives candidates for a shape and a number of classes, an architecture search
for one, can take the place of `default_family`.

Images and signals get a stem and four convolutions, twice as wide each time they become half as long (the
rule of VGG, Simonyan and Zisserman 2015, arXiv 1409.1556), vectors five dense layers. Exits stand behind
those layers at which the multiply-adds done come closest to 0.2 and 0.5 of all. The first layer of a vector
of many values does most of the work, so its exits save little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, prod, sqrt
from typing import Final

from cloud_hub.builder.networks.network import (
    AveragePool,
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    MaxPool,
    Network,
    Relu,
    Shape,
    Stage,
)
from cloud_hub.errors import BuildError

EXIT_SHARES: Final = (0.2, 0.5)
"""Of the multiply-adds, what is done at the first exits of any network; the last one is at 1."""

_BEHIND_STEM = 4  # layers behind a stem of one or more
_IMAGE_WIDTHS = {"small": 8, "medium": 14, "large": 20}
_SIGNAL_WIDTHS = {"small": 10, "medium": 18, "large": 26}
_VECTOR_WIDTHS = {"small": 32, "medium": 64, "large": 128}
_SIGNAL_LENGTH = 192  # a stem makes signals this short, in strides of at most 8
_IMAGE_SIDE = 40  # larger images, by their mean side, get a stem with strides ...
_STEM_SIDE = 24  # ... that makes them this small
_DENSE_PARAMETERS = 80_000
_CELLS_PER_AXIS = 4
_SHORT_SIGNAL = 16
_HEAD_PARAMETERS = 10_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """One network of a family, untrained."""

    name: str
    network: Network

    @property
    def weight_bytes(self) -> int:
        """What its weights take in a bundle: every one as float32 and as int8."""
        return 5 * self.network.parameter_count


EdgeFamily = Callable[[Shape, int], Sequence[Candidate]]
"""Candidates for inputs of a shape (channels first, without the batch axis) and a number of classes."""

Unit = tuple[Layer, ...]


def default_family(input_shape: Shape, classes: int) -> tuple[Candidate, ...]:
    """A small, a medium and a large network of three exits, smallest first.

    Raises:
        BuildError: for a shape that is no vector, signal (channels, length) or image (channels, height,
            width), or fewer than two classes.
    """
    if not 1 <= len(input_shape) <= 3 or min(input_shape) < 1 or classes < 2:
        raise BuildError(
            f"no network here is made for {classes} classes of inputs {input_shape}: expected a vector, "
            "a signal (channels, length) or an image (channels, height, width); bring your own with --edge"
        )
    widths, units_of = {
        1: (_VECTOR_WIDTHS, _vector_units),
        2: (_SIGNAL_WIDTHS, _signal_units),
        3: (_IMAGE_WIDTHS, _image_units),
    }[len(input_shape)]
    return tuple(
        Candidate(name, _with_exits(input_shape, classes, units_of(input_shape, width)))
        for name, width in widths.items()
    )


def _vector_units(input_shape: Shape, width: int) -> list[Unit]:
    width = max(8, min(width, _DENSE_PARAMETERS // input_shape[0]))
    return [(Dense(width), Relu())] * (1 + _BEHIND_STEM)


def _signal_units(input_shape: Shape, width: int) -> list[Unit]:
    stride = min(8, max(1, round(input_shape[1] / 128)))
    # Four strides long: the first filters see a few periods of what they look for.
    units: list[Unit] = [(Conv(width, max(7, 4 * stride + 1), stride), Relu())]
    length = ceil(input_shape[1] / stride)
    while length > _SIGNAL_LENGTH:
        stride = min(8, round(length / 128))
        units.append((Conv(width, _odd(stride), stride), Relu()))
        length = ceil(length / stride)
    channels = (2 * width, 2 * width, 4 * width, 4 * width)
    for count, kernel, stride in zip(channels, (7, 5, 5, 5), (2, 1, 2, 1), strict=True):
        units.append((Conv(count, kernel, stride), Relu()))
    return units


def _image_units(input_shape: Shape, width: int) -> list[Unit]:
    height, breadth = input_shape[1:]
    units: list[Unit] = []
    if sqrt(height * breadth) <= _IMAGE_SIDE:
        pooled = _halved(height, breadth)
        units.append((Conv(width, 3), Relu(), *pooled))
        height, breadth = (height // 2, breadth // 2) if pooled else (height, breadth)
    while (side := sqrt(height * breadth)) > _STEM_SIDE:
        stride = min(4, max(2, round(side / 16)))
        units.append((Conv(width, _odd(stride), stride), Relu()))
        height, breadth = ceil(height / stride), ceil(breadth / stride)
    pooled = _halved(height, breadth)
    units.append((Conv(2 * width, 3), Relu()))
    units.append((Conv(2 * width, 3), Relu(), *pooled))
    units.extend([(Conv(4 * width, 3), Relu())] * 2)
    return units


def _odd(stride: int) -> int:
    """The smallest odd kernel that leaves nothing between its strides and overlaps a little."""
    return stride + 1 + stride % 2


def _halved(height: int, breadth: int) -> Unit:
    return (MaxPool(2),) if min(height, breadth) >= 4 else ()


def _with_exits(input_shape: Shape, classes: int, units: Sequence[Unit]) -> Network:
    """Cut the units into three stages; of a convolution's stem alone nothing is answered."""
    plain = Network(input_shape, classes, (Stage(_joined(units), _pooled_dense(classes)),))
    costs = _unit_costs(plain, units)
    least = len(units) - _BEHIND_STEM + 1 if len(input_shape) > 1 else 1

    def distance(ends: tuple[int, int]) -> float:
        done = [sum(costs[:end]) / sum(costs) for end in ends]
        return sum(abs(share - wanted) for share, wanted in zip(done, EXIT_SHARES, strict=True))

    first, second = min(combinations(range(least, len(units)), 2), key=distance)
    bodies = [_joined(units[:first]), _joined(units[first:second]), _joined(units[second:])]
    shapes = _shapes_after(input_shape, classes, bodies)
    return Network(
        input_shape,
        classes,
        tuple(Stage(body, _head(shape, classes)) for body, shape in zip(bodies, shapes, strict=True)),
    )


def _joined(units: Sequence[Unit]) -> tuple[Layer, ...]:
    return tuple(layer for unit in units for layer in unit)


def _pooled_dense(classes: int) -> tuple[Layer, ...]:
    return (GlobalAveragePool(), Dense(classes))


def _unit_costs(plain: Network, units: Sequence[Unit]) -> list[int]:
    layers = iter(plain.bodies[0])
    return [sum(next(layers).mult_adds for _ in unit) for unit in units]


def _shapes_after(input_shape: Shape, classes: int, bodies: Sequence[tuple[Layer, ...]]) -> tuple[Shape, ...]:
    stages = tuple(Stage(body, _pooled_dense(classes)) for body in bodies)
    return Network(input_shape, classes, stages).feature_shapes


def _head(shape: Shape, classes: int) -> tuple[Layer, ...]:
    """Means over a few cells of the map, then one dense layer; over all of it for signals, and many classes.

    A fault in a long signal may be anywhere; a stroke in an image may not.
    """
    if len(shape) == 1:
        return (Dense(classes),)
    size = max(1, min(ceil(max(shape[1:]) / _CELLS_PER_AXIS), *shape[1:]))
    cells = prod(extent // size for extent in shape[1:])
    is_long_signal = len(shape) == 2 and shape[1] > _SHORT_SIGNAL
    if is_long_signal or shape[0] * cells * classes > _HEAD_PARAMETERS:
        return _pooled_dense(classes)
    return (AveragePool(size), Flatten(), Dense(classes))
