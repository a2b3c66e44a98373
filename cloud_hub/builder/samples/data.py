"""A data set as a value: its checks, its digest, and its fit to a network. No I/O.

Numbers stay in the sensor's unit; a bundle's `Preprocess` normalises them later. Every complaint is one line
that names the array, says what is wrong with it, and what to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.errors import BuildError
from edge_cascade.manifest import MAX_INPUT_ELEMENTS, Layout

Shape = tuple[int, ...]
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

MAX_SAMPLE_AXES: Final = 4
"""Axes of one sample, as in `manifest.GraphManifest.input_shape`."""

_ROWS_AT_ONCE = 4_096


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Samples `x` (n, *shape) float32 in the sensor's unit, and what is known of each of them.

    `y` (n,) int64 are labels, None where nobody knows them. `groups` (n,) int64 says what belongs together:
    a recording, a machine, a subject. `names` are the labels' names in the order of the network's outputs.
    `stored_as` is the dtype that the numbers came in, `uint8` for most images.
    """

    x: Floats
    y: Labels | None = None
    groups: Labels | None = None
    names: tuple[str, ...] | None = None
    stored_as: str = "float32"

    def __len__(self) -> int:
        return len(self.x)

    @property
    def sample_shape(self) -> Shape:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])

    def rows(self, index: NDArray[np.intp]) -> Dataset:
        """Some of the samples, in the order of `index`."""
        return replace(
            self,
            x=self.x[index],
            y=None if self.y is None else self.y[index],
            groups=None if self.groups is None else self.groups[index],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a source holds. A source that was never divided has all its samples in `train`."""

    train: Dataset | None = None
    calibration: Dataset | None = None
    test: Dataset | None = None

    def __iter__(self) -> Iterator[tuple[str, Dataset]]:
        """Every part that is there, with its name."""
        for field in fields(self):
            part = getattr(self, field.name)
            if part is not None:
                yield field.name, part


def check_samples(x: NDArray[np.generic], name: str) -> None:
    """Refuse samples that no network can be given: no axis, too many values, NaN or infinity.

    Raises:
        BuildError: saying how many samples are affected and which is the first.
    """
    shape = x.shape[1:]
    if x.ndim < 2 or len(shape) > MAX_SAMPLE_AXES or prod(shape) > MAX_INPUT_ELEMENTS:
        raise BuildError(
            f"{name} is {x.shape}: expected (samples, *shape) with 1 to {MAX_SAMPLE_AXES} axes "
            f"and at most {MAX_INPUT_ELEMENTS} values a sample"
        )
    bad = [
        start + int(row)
        for start in range(0, len(x), _ROWS_AT_ONCE)
        for row in np.flatnonzero(
            ~np.isfinite(x[start : start + _ROWS_AT_ONCE]).all(axis=tuple(range(1, x.ndim)))
        )
    ]
    if bad:
        raise BuildError(
            f"{name}: {len(bad)} of {len(x)} samples hold NaN, infinity or more than float32 can hold, "
            f"the first is sample {bad[0]}: repair them or leave them out"
        )


def data_sha256(data: Dataset) -> str:
    """Hex SHA-256 of samples, labels and groups, their order, dtypes and shapes included."""
    digest = hashlib.sha256()
    for name, array in (("x", data.x), ("y", data.y), ("groups", data.groups)):
        if array is None:
            continue
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name} {little.dtype.str} {little.shape}\n".encode())
        digest.update(np.ascontiguousarray(little).data)
    return digest.hexdigest()


def label_names(parts: Parts, classes: int) -> tuple[str, ...]:
    """One name for each of a network's outputs: the data's own, else the numbers from 0.

    Raises:
        BuildError: when a label or the number of names does not fit the network, or there is but one class.
    """
    names = next((part.names for _, part in parts if part.names is not None), None)
    if names is not None and len(names) != classes:
        raise BuildError(
            f"the data names {len(names)} labels, the network tells {classes} apart: "
            "name all of them, in the order of its outputs"
        )
    labelled = [(name, part.y) for name, part in parts if part.y is not None]
    for name, y in labelled:
        if y.max() >= classes:
            hint = ": subtract 1 from every label" if y.min() == 1 and y.max() == classes else ""
            raise BuildError(
                f"labels of {name} run from {y.min()} to {y.max()}, a network of {classes} classes knows "
                f"0 to {classes - 1}{hint}"
            )
    if labelled and len({int(label) for _, y in labelled for label in np.unique(y)}) == 1:
        raise BuildError("every sample has the same label: there is nothing to tell apart")
    return names if names is not None else tuple(str(index) for index in range(classes))


def fit_parts(parts: Parts, network_shape: Shape, layout: Layout = "channels_first") -> Parts:
    """The parts with samples shaped so that `layout` makes `network_shape` of them.

    Only axes of size 1 are added or removed; nothing is transposed, since a sensor's samples will not be.

    Raises:
        BuildError: naming both shapes.
    """
    fitted = {
        name: replace(part, x=part.x.reshape(len(part), *_fit_shape(name, part, network_shape, layout)))
        for name, part in parts
    }
    return Parts(**fitted)


def _fit_shape(name: str, part: Dataset, network_shape: Shape, layout: Layout) -> Shape:
    shape = part.sample_shape
    expected = network_shape
    if layout == "channels_last":
        expected = (*network_shape[1:], network_shape[0])
    if shape == expected:
        return shape
    same_axes = [size for size in shape if size != 1] == [size for size in expected if size != 1]
    if same_axes and (layout == "channels_first" or network_shape[0] == 1):
        return expected
    raise BuildError(
        f"samples of {name} are {shape}, the network takes {network_shape} with {layout}"
        f"{_hint(shape, network_shape, layout)}"
    )


def _hint(shape: Shape, network_shape: Shape, layout: Layout) -> str:
    if layout == "channels_first" and shape == (*network_shape[1:], network_shape[0]):
        return ": declare --layout channels_last"
    if layout == "channels_last" and shape == network_shape:
        return ": declare --layout channels_first"
    if prod(shape) == prod(network_shape):
        return f": reshape x to (samples, {', '.join(map(str, network_shape))})"
    return ": is this the data that it was trained on?"
