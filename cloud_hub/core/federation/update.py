"""What one device learned in one round, and the tensors that it learned it about. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]
Weights: TypeAlias = Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """A decoded client update. `delta` is trained weights minus base; nothing in it has been checked yet."""

    device: str
    num_examples: int
    base: bytes
    delta: Weights


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and shapes of a model's tensors, by name, and their places in one flat vector."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, weights: Weights) -> Layout:
        """The layout of these weights. Sorted, so that a flat vector read back later means the same."""
        return cls(tuple(sorted((name, array.shape) for name, array in weights.items())))

    @property
    def size(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    def places(self) -> Iterator[tuple[str, tuple[int, ...], slice]]:
        """Name, shape and place of each tensor."""
        start = 0
        for name, shape in self.tensors:
            stop = start + math.prod(shape)
            yield name, shape, slice(start, stop)
            start = stop

    def parts(self, weights: Weights) -> Iterator[tuple[slice, FloatArray]]:
        """Place and flat view of each tensor.

        Raises:
            ValueError: when names or shapes are not these; before the first part is given out.
        """
        shapes = {name: array.shape for name, array in weights.items()}
        if shapes != dict(self.tensors):
            raise ValueError(f"tensors {shapes}, expected {dict(self.tensors)}")
        return ((place, weights[name].reshape(-1)) for name, _, place in self.places())
