"""Convolutions and pools: ONNX pads in numbers, TensorFlow Lite in the words SAME and VALID. No I/O.

A signal is an image of height one. Where pads are neither word, the value is padded beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx

from cloud_hub.builder.litert.constants import Constant
from cloud_hub.builder.litert.layout import Layout, Shape, Value, version_of
from cloud_hub.builder.litert.writer import TfliteGraph
from cloud_hub.errors import BuildError
from edge_cascade.tflite_schema import PADDING_SAME, PADDING_VALID

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Window:
    """A window's size, steps and dilation over height and width, and the pads before and after each."""

    size: Pair
    strides: Pair
    dilations: Pair
    begin: Pair
    end: Pair
    over: Pair
    """Height and width of what it slides over."""
    hangs_over: bool = False
    """Whether the pads at the end are more than ONNX has, for a number of outputs that is rounded up."""

    @classmethod
    def of(cls, node: onnx.NodeProto, shape: Shape, made: Shape, kernel: Shape | None = None) -> Self:
        """The window of a node from an ONNX shape to another; `kernel` where weights imply it.

        Where the number of outputs is rounded up the last window hangs over: that much is padded more.

        Raises:
            BuildError: when it hangs over altogether.
        """
        given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        over = shape[2:]
        axes = len(over)
        size = tuple(given.get("kernel_shape", kernel or ()))
        strides = tuple(given.get("strides", [1] * axes))
        dilations = tuple(given.get("dilations", [1] * axes))
        spans = [(length - 1) * step + 1 for length, step in zip(size, dilations, strict=True)]
        pads = _pads_of(given, over, spans, strides)
        overhang = [0] * axes
        for place in range(axes):
            start = (made[2 + place] - 1) * strides[place]
            # Shape inference and runtimes differ in whether a window wholly in the pads counts.
            if given.get("ceil_mode", 0) and start >= over[place] + pads[place]:
                raise BuildError(f"LiteRT: {node.op_type} ({node.name!r}) with ceil_mode cannot be written")
            reached = start + spans[place]
            overhang[place] = max(reached - over[place] - pads[place] - pads[axes + place], 0)
            pads[axes + place] += overhang[place]
        return cls(
            _pair(size, 1), _pair(strides, 1), _pair(dilations, 1),
            _pair(pads[:axes], 0), _pair(pads[axes:], 0), _pair(over, 1), any(overhang),
        )  # fmt: skip

    @classmethod
    def whole(cls, shape: Shape) -> Self:
        """A window over everything."""
        over = _pair(shape[2:], 1)
        return cls(over, (1, 1), (1, 1), (0, 0), (0, 0), over)

    @property
    def padding(self) -> int | None:
        """SAME or VALID where one of them means these pads."""
        if not any((*self.begin, *self.end)):
            return PADDING_VALID
        for place in range(2):
            span = (self.size[place] - 1) * self.dilations[place] + 1
            same = _same_pads(self.over[place], span, self.strides[place])
            if (self.begin[place], self.end[place]) != same:
                return None
        return PADDING_SAME


@dataclass(frozen=True, slots=True)
class Kernel:
    """A convolution's weights (outputs, inputs per group, *places) and biases (outputs,)."""

    weight: Constant
    bias: Constant | None
    groups: int

    @property
    def is_depthwise(self) -> bool:
        """Whether every input channel has outputs of its own."""
        return self.groups > 1 and self.weight.real.shape[1] == 1

    @property
    def op(self) -> str:
        """The operator that runs it."""
        return "DEPTHWISE_CONV_2D" if self.is_depthwise else "CONV_2D"

    def version(self, window: Window, *, in_int8: bool) -> int:
        """The operator's version that brought what this kernel asks for."""
        if self.groups > 1 and not self.is_depthwise:
            return 6
        if in_int8:
            return 3
        return 2 if window.dilations != (1, 1) else 1

    def add_to(self, graph: TfliteGraph, value: Value, *, in_int8: bool) -> list[int]:
        """Write weights and biases as the operator takes them; returns their tensors."""
        if self.is_depthwise:
            moved = self.weight.mapped(lambda array: _as_image(array)[:, 0].transpose(1, 2, 0)[None], axis=3)
        else:
            moved = self.weight.mapped(lambda array: _as_image(array).transpose(0, 2, 3, 1))
        outputs = self.weight.real.shape[0]
        bias = self.bias or Constant("no_bias", np.zeros(outputs, np.float32))
        given = value.quantised if in_int8 else None
        return [moved.add_to(graph, quantised=in_int8), bias.add_bias_to(graph, given, self.weight)]


def add_conv(
    graph: TfliteGraph, value: Value, kernel: Kernel, window: Window, made: Value, *, activation: int
) -> None:
    """Append a convolution with the activation that follows it."""
    in_int8 = made.quantised is not None
    source, padding = _padded(graph, value, window, lowest=False)
    options: dict[str, float] = {
        "padding": padding,
        "activation": activation,
        "dilation_h": window.dilations[0],
        "dilation_w": window.dilations[1],
        **_strides(window),
    }
    if kernel.is_depthwise:
        options["depth_multiplier"] = kernel.weight.real.shape[0] // kernel.groups
    graph.add(
        kernel.op,
        [source.tensor, *kernel.add_to(graph, value, in_int8=in_int8)],
        [made.tensor],
        options,
        version=kernel.version(window, in_int8=in_int8),
    )


def add_max_pool(graph: TfliteGraph, value: Value, window: Window, made: Value) -> None:
    """Append a maximum over windows; pads count as lower than anything."""
    source, padding = _padded(graph, value, window, lowest=True)
    _add_pool(graph, "MAX_POOL_2D", source, made, window, padding=padding)


def add_average_pool(
    graph: TfliteGraph, value: Value, window: Window, made: Value, *, counts_padding: bool
) -> None:
    """Append a mean over windows, of what is really there, or of pads as zeros too."""
    padding = window.padding
    if counts_padding and window.hangs_over:
        raise BuildError("LiteRT: an AveragePool with ceil_mode that counts its pads cannot be written")
    if padding is None and not counts_padding:
        raise BuildError(f"LiteRT: an AveragePool with pads {window.begin} {window.end} cannot be written")
    if padding != PADDING_VALID and counts_padding:
        value, padding = _with_pads(graph, value, window, lowest=False), PADDING_VALID
    _add_pool(graph, "AVERAGE_POOL_2D", value, made, window, padding=int(padding or PADDING_SAME))


def _add_pool(
    graph: TfliteGraph, op: str, value: Value, made: Value, window: Window, *, padding: int
) -> None:
    if window.dilations != (1, 1):
        raise BuildError("LiteRT: a pool with dilations cannot be written")
    height, width = window.size
    options = {"padding": padding, "filter_h": height, "filter_w": width, **_strides(window)}
    graph.add(op, [value.tensor], [made.tensor], options, version=version_of(made))


def _padded(graph: TfliteGraph, value: Value, window: Window, *, lowest: bool) -> tuple[Value, int]:
    padding = window.padding
    if padding is not None:
        return value, padding
    return _with_pads(graph, value, window, lowest=lowest), PADDING_VALID


def _with_pads(graph: TfliteGraph, value: Value, window: Window, *, lowest: bool) -> Value:
    _, height, width, channels = graph.tensors[value.tensor].shape
    height += window.begin[0] + window.end[0]
    width += window.begin[1] + window.end[1]
    name = f"{graph.tensors[value.tensor].name}.padded"
    tensor = graph.value(name, (1, height, width, channels), value.dtype, value.quantised)
    pads = [[0, 0], [window.begin[0], window.end[0]], [window.begin[1], window.end[1]], [0, 0]]
    inputs = [value.tensor, graph.constant("pads", np.array(pads, np.int32))]
    if lowest:
        dtype = np.dtype(value.dtype)
        low = np.iinfo(dtype).min if dtype.kind == "i" else np.finfo(dtype).min
        inputs.append(graph.constant("lowest", np.array([low], dtype), value.quantised))
    graph.add("PADV2" if lowest else "PAD", inputs, [tensor], version=version_of(value))
    return Value(tensor, value.shape, Layout.LAST, value.quantised)


def _strides(window: Window) -> dict[str, float]:
    return {"stride_h": window.strides[0], "stride_w": window.strides[1]}


def _as_image(weights: Any) -> Any:
    if weights.ndim == 3:
        return weights[:, :, None]
    if weights.ndim == 4:
        return weights
    raise BuildError(f"LiteRT: a convolution over {weights.ndim - 2} axes cannot be written")


def _pair(numbers: Any, fill: int) -> Pair:
    values = [int(number) for number in numbers]
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


def _pads_of(given: dict[str, Any], over: Shape, spans: list[int], strides: tuple[int, ...]) -> list[int]:
    word = given.get("auto_pad", b"NOTSET").decode()
    if word == "NOTSET":
        return [int(pad) for pad in given.get("pads", [0] * (2 * len(over)))]
    if word == "VALID":
        return [0] * (2 * len(over))
    both = [_same_pads(size, span, stride) for size, span, stride in zip(over, spans, strides, strict=True)]
    if word == "SAME_LOWER":
        both = [(end, begin) for begin, end in both]
    return [begin for begin, _ in both] + [end for _, end in both]


def _same_pads(size: int, span: int, stride: int) -> Pair:
    total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
    return total // 2, total - total // 2
