"""Gradients of operators that only move elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.gradients.emitter import Emitter
from cloud_hub.builder.gradients.site import Rule, Site, UnsupportedNodeError, positive_axis, static

_FAR = 1 << 30  # an end that means the whole axis, however long


def reshape(site: Site, emit: Emitter) -> dict[int, str]:
    """dy in the input's shape. Also Flatten, Squeeze and Unsqueeze."""
    return {0: emit.in_shape_of(site.gradient, site.x.name, site.x.dims)}


def transpose(site: Site, emit: Emitter) -> dict[int, str]:
    """dy with its axes put back."""
    order = site.attribute("perm") or list(reversed(range(site.x.rank)))
    back = [order.index(axis) for axis in range(site.x.rank)]
    return {0: emit.transposed(site.gradient, back)}


def expand(site: Site, emit: Emitter) -> dict[int, str]:
    """dy summed where the input was repeated."""
    return {0: emit.unbroadcast(site.gradient, site.y.dims, site.x.name, site.x.dims)}


def concat(site: Site, emit: Emitter) -> dict[int, str]:
    """Every input gets its own piece of dy."""
    axis = positive_axis(int(site.attribute("axis")), site.y.rank)
    sizes = static([site.input(index).dims[axis] for index in range(len(site.inputs))])
    if len(sizes) == 1:
        return {0: site.gradient}
    inputs = [site.gradient, emit.integers(sizes)]
    pieces = emit.ops("Split", inputs, len(sizes), axis=axis)
    return {index: piece for index, piece in enumerate(pieces) if site.wants(index)}


def split(site: Site, emit: Emitter) -> dict[int, str]:
    """The pieces' gradients side by side, zeros for those that nobody needs."""
    pieces = [
        gradient or emit.zeros_like(value.name)
        for gradient, value in zip(site.gradients, site.outputs, strict=True)
    ]
    return {0: emit.op("Concat", *pieces, axis=int(site.attribute("axis", 0)))}


def slice_of(site: Site, emit: Emitter) -> dict[int, str]:
    """dy between zeros, axis by axis."""
    starts, ends = site.integers(1) or [], site.integers(2) or []
    axes = site.integers(3) or list(range(len(starts)))
    steps = site.integers(4) or [1] * len(starts)
    gradient = site.gradient
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = positive_axis(axis, site.x.rank)
        if (
            site.x.dims[place] is None
            and site.y.dims[place] is None
            and (start, step) == (0, 1)
            and end > _FAR
        ):
            continue
        (size,) = static([site.x.dims[place]])
        kept = np.arange(size)[_python_slice(start, end, step, size)]
        gradient = _Axis(site.x.rank, place, size).put_back(emit, gradient, kept)
    return {0: gradient}


def _python_slice(start: int, end: int, step: int, size: int) -> slice:
    """The specification's clamping is Python's, but an end far below zero means the very front."""
    if step < 0 and end < -size:
        return slice(start, None, step)
    return slice(start, end, step)


def gather(site: Site, emit: Emitter) -> dict[int, str]:
    """dy put back at the indices, which have to be constant; summed where an index comes twice."""
    indices = site.constant(1)
    assert indices is not None
    place = positive_axis(int(site.attribute("axis", 0)), site.x.rank)
    (size,) = static([site.x.dims[place]])
    gradient = site.gradient
    if indices.ndim != 1:
        flat = (*site.x.dims[:place], indices.size, *site.x.dims[place + 1 :])
        if sum(dim is None for dim in flat) > 1:
            raise UnsupportedNodeError("more than one axis depends on the batch")
        gradient = emit.reshaped(gradient, [-1 if dim is None else dim for dim in flat])
    return {0: _Axis(site.x.rank, place, size).put_back(emit, gradient, indices.ravel() % size)}


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis, of `size` elements, of a value of some rank."""

    rank: int
    place: int
    size: int

    def put_back(self, emit: Emitter, gradient: str, kept: NDArray[np.int64]) -> str:
        """Slices of dy along the axis added up at the places `kept`, which are from 0 to size - 1."""
        count = len(kept)
        if np.array_equal(kept, np.arange(self.size)):
            return gradient
        if count and np.array_equal(kept, kept[0] + np.arange(count)):
            first = int(kept[0])
            return self._padded(emit, gradient, first, self.size - count - first)
        if len(np.unique(kept)) == count:
            sources = np.full(self.size, count, np.int64)
            sources[kept] = np.arange(count)
            zero_behind = self._padded(emit, gradient, 0, 1)
            return emit.op("Gather", zero_behind, emit.integers(sources), axis=self.place)
        order = [*(axis for axis in range(self.rank) if axis != self.place), self.place]
        one_hot = emit.floats(np.eye(self.size)[kept])
        summed = emit.op("MatMul", emit.transposed(gradient, order), one_hot)
        return emit.transposed(summed, [order.index(axis) for axis in range(self.rank)])

    def _padded(self, emit: Emitter, name: str, before: int, behind: int) -> str:
        pads = np.zeros((2, self.rank), np.int64)
        pads[:, self.place] = before, behind
        return emit.op("Pad", name, emit.integers(pads.ravel()))


def pad(site: Site, emit: Emitter) -> dict[int, str]:
    """The inner part of dy, for padding by a constant."""
    if site.attribute("mode", b"constant") != b"constant":
        raise UnsupportedNodeError("it repeats elements")
    pads = site.integers(1) or []
    axes = site.integers(3) or list(range(site.x.rank))
    places = [positive_axis(axis, site.x.rank) for axis in axes]
    if min(pads, default=0) < 0:
        raise UnsupportedNodeError("it cuts off elements")
    return {0: _inner(emit, site.gradient, places, pads)}


def _inner(emit: Emitter, gradient: str, axes: Sequence[int], pads: Sequence[int]) -> str:
    begin, end = pads[: len(axes)], pads[len(axes) :]
    padded = [(a, b, e) for a, b, e in zip(axes, begin, end, strict=True) if b or e]
    if not padded:
        return gradient
    far = np.iinfo(np.int64).max
    return emit.op(
        "Slice",
        gradient,
        emit.integers([b for _, b, _ in padded]),
        emit.integers([-e if e else far for _, _, e in padded]),
        emit.integers([a for a, _, _ in padded]),
    )


RULES: Mapping[str, Rule] = {
    "Concat": concat,
    "Expand": expand,
    "Flatten": reshape,
    "Gather": gather,
    "Pad": pad,
    "Reshape": reshape,
    "Slice": slice_of,
    "Split": split,
    "Squeeze": reshape,
    "Transpose": transpose,
    "Unsqueeze": reshape,
}
