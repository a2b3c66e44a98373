"""Gradients of pooling. The first of equal maxima gets the gradient, as in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.gradients.emitter import Emitter
from cloud_hub.builder.gradients.site import Rule, Site, UnsupportedNodeError, static
from cloud_hub.builder.gradients.windows import Windows, windows_of

_SCATTER_ADD_OPSET = 16  # ScatterElements learned to add


def max_pool(site: Site, emit: Emitter) -> dict[int, str]:
    """dy goes to where the maxima were, found by running the pooling again for its indices."""
    windows = windows_of(site, tuple(site.attribute("kernel_shape")))
    if site.attribute("storage_order", 0):
        raise UnsupportedNodeError("column-major indices")
    if windows.overlap and site.opset < _SCATTER_ADD_OPSET:
        raise UnsupportedNodeError(f"windows overlap: export the model for opset {_SCATTER_ADD_OPSET}")
    _, places = emit.ops(
        "MaxPool",
        [site.x.name],
        2,
        kernel_shape=list(windows.kernel),
        strides=list(windows.stride),
        dilations=list(windows.dilation),
        pads=windows.pads,
    )
    whole = emit.integers([-1])
    empty = emit.op("ConstantOfShape", emit.op("Reshape", emit.op("Size", site.x.name), whole))
    adding = {"reduction": "add"} if windows.overlap else {}
    scattered = emit.op(
        "ScatterElements",
        empty,
        emit.op("Reshape", places, whole),
        emit.op("Reshape", site.gradient, whole),
        axis=0,
        **adding,
    )
    return {0: emit.in_shape_of(scattered, site.x.name, site.x.dims)}


def average_pool(site: Site, emit: Emitter) -> dict[int, str]:
    """Each element gets its share of the mean of every window that it lies in."""
    windows = windows_of(site, tuple(site.attribute("kernel_shape")))
    (channels,) = static(site.x.dims[1:2])
    divided = emit.op("Div", site.gradient, emit.floats(_counted(site, windows)))
    spread = emit.op(
        "ConvTranspose",
        divided,
        emit.floats(np.ones((channels, 1, *windows.kernel))),
        group=channels,
        kernel_shape=list(windows.kernel),
        strides=list(windows.stride),
        dilations=list(windows.dilation),
        pads=windows.pads,
        output_padding=list(windows.rest),
    )
    return {0: spread}


def _counted(site: Site, windows: Windows) -> NDArray[Any]:
    """By how many elements each window's sum was divided, (*count); padding counts only where asked for."""
    with_padding = bool(site.attribute("count_include_pad", 0))
    counted = np.ones((), np.int64)
    for axis in range(windows.axes):
        starts = np.arange(windows.count[axis]) * windows.stride[axis] - windows.begin[axis]
        places = starts[:, np.newaxis] + np.arange(windows.kernel[axis]) * windows.dilation[axis]
        low, high = 0, windows.size[axis]
        if with_padding:
            low, high = -windows.begin[axis], high + _declared_end(site, windows, axis)
        inside = ((places >= low) & (places < high)).sum(axis=1)
        counted = np.multiply.outer(counted, inside)
    return counted


def _declared_end(site: Site, windows: Windows, axis: int) -> int:
    """The padding behind that the node declares: what `ceil_mode` adds is never counted."""
    pads: Sequence[int] = site.attribute("pads") or []
    if site.attribute("auto_pad", b"NOTSET") == b"NOTSET":
        return pads[windows.axes + axis] if pads else 0
    return windows.end[axis]


def global_average_pool(site: Site, emit: Emitter) -> dict[int, str]:
    """Every position gets an equal share."""
    share = emit.scaled(site.gradient, 1.0 / prod(static(site.x.dims[2:])))
    return {0: emit.spread(share, site.x.name, site.x.dims, list(range(2, site.x.rank)))}


def global_max_pool(site: Site, emit: Emitter) -> dict[int, str]:
    """The first maximum of a channel gets all of it."""
    (channels,) = static(site.x.dims[1:2])
    flat = emit.reshaped(site.x.name, [-1, channels, prod(static(site.x.dims[2:]))])
    place = emit.op("ArgMax", flat, axis=2, keepdims=1)
    updates = emit.reshaped(site.gradient, [-1, channels, 1])
    scattered = emit.op("ScatterElements", emit.zeros_like(flat), place, updates, axis=2)
    return {0: emit.in_shape_of(scattered, site.x.name, site.x.dims)}


RULES: Mapping[str, Rule] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "MaxPool": max_pool,
}
