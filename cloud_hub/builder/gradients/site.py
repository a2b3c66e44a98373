"""What a rule is told about its node, and what it says where it has no answer. Values only, no I/O.

Dims are those of onnx with `None` for every axis that depends on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cloud_hub.builder.gradients.emitter import Dims, Emitter
from cloud_hub.builder.graphs.onnx_graph import attribute_of, describe_node
from cloud_hub.errors import BuildError


class NoGradientError(BuildError):
    """Nodes between a parameter and the loss that have no gradient here; `nodes` describes each of them.

    A caller may leave out the parameters before them and train the rest, such as the heads.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self.nodes = tuple(nodes)
        listed = ", ".join(self.nodes[:8]) + (" ..." if len(self.nodes) > 8 else "")
        super().__init__(
            f"no gradient through {listed}: leave out the parameters before, or train heads only"
        )


class UnsupportedNodeError(Exception):
    """A rule's word that it knows the operator, but not in this form; `differentiate` collects them."""


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph; `constant` where it is known, `wanted` where a parameter influences it."""

    name: str
    dims: Dims
    constant: NDArray[Any] | None = None
    wanted: bool = False

    @property
    def rank(self) -> int:
        """How many axes it has."""
        return len(self.dims)


@dataclass(frozen=True, slots=True)
class Site:
    """A node, its values, and the names of the gradients of its outputs (None where nobody needs one)."""

    node: onnx.NodeProto
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    gradients: tuple[str | None, ...]
    opset: int

    @property
    def x(self) -> Value:
        """The first input."""
        return self.input(0)

    @property
    def y(self) -> Value:
        """The first output."""
        return self.outputs[0]

    @property
    def gradient(self) -> str:
        """The gradient of the first output.

        Raises:
            UnsupportedNodeError: if only another output leads to the loss.
        """
        if self.gradients[0] is None:
            raise UnsupportedNodeError("an output other than the first is used")
        return self.gradients[0]

    def input(self, index: int) -> Value:
        """An input that the operator cannot do without."""
        value = self.optional(index)
        if value is None:
            raise UnsupportedNodeError(f"input {index} is left out")
        return value

    def optional(self, index: int) -> Value | None:
        """An input, or None if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def wants(self, index: int) -> bool:
        """Whether the gradient of an input is needed."""
        value = self.optional(index)
        return value is not None and value.wanted

    def constant(self, index: int) -> NDArray[Any] | None:
        """The known content of an input; None if it is left out.

        Raises:
            UnsupportedNodeError: if it is only known at run time, or is a parameter.
        """
        value = self.optional(index)
        if value is None:
            return None
        if value.constant is None or value.wanted:
            raise UnsupportedNodeError(f"input {index} is not constant")
        return value.constant

    def integers(self, index: int) -> list[int] | None:
        """A constant input as a list of integers; None if it is left out."""
        array = self.constant(index)
        return None if array is None else [int(number) for number in np.ravel(array)]

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value, strings as `bytes`."""
        return attribute_of(self.node, name, default)

    def describe(self) -> str:
        """Operator and name, for a message."""
        return describe_node(self.node)


Rule = Callable[[Site, Emitter], Mapping[int, str]]
"""Emits the nodes of one operator's gradient; gives, for each wanted input, its gradient's name."""


def static(dims: Sequence[int | None]) -> tuple[int, ...]:
    """Dims that do not depend on the batch.

    Raises:
        UnsupportedNodeError: if one does.
    """
    if None in dims:
        raise UnsupportedNodeError("an axis that must be known depends on the batch")
    return tuple(dim for dim in dims if dim is not None)


def positive_axis(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis % rank if rank else 0
