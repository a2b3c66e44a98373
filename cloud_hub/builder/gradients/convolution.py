"""Gradients of the convolution, in the forms that the stock CPU kernels run fastest.

The weight's gradient is a convolution of the input by the output's gradient, both with batch and channels
swapped. Its matrix product is only as wide as the kernel has taps. Without strides and groups, and with few
taps, copies of the input for every tap and one wide product take a third to nine tenths of the time, but on
the tiniest maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod

import numpy as np

from cloud_hub.builder.gradients.emitter import Emitter
from cloud_hub.builder.gradients.site import Rule, Site, static
from cloud_hub.builder.gradients.windows import Sizes, Windows, windows_of

_MOST_TAPS = 25  # measured: at 17 and 25 the copies are faster, at 33 the narrow product is


def convolution(site: Site, emit: Emitter) -> dict[int, str]:
    """dx by ConvTranspose, dw as above, db as a sum over batch and positions."""
    weight = static(site.input(1).dims)
    windows = windows_of(site, weight[2:])
    group = int(site.attribute("group", 1))
    found: dict[int, str] = {}
    if site.wants(0):
        found[0] = emit.op(
            "ConvTranspose",
            site.gradient,
            site.input(1).name,
            group=group,
            kernel_shape=list(windows.kernel),
            strides=list(windows.stride),
            dilations=list(windows.dilation),
            pads=windows.pads,
            output_padding=list(windows.rest),
        )
    if site.wants(1):
        is_dense = group == 1 and set(windows.stride) == {1} and prod(windows.kernel) <= _MOST_TAPS
        found[1] = (
            _weight_by_copies(site, emit, windows, weight)
            if is_dense
            else _weight_by_convolution(site, emit, windows, weight, group)
        )
    if site.wants(2):
        found[2] = emit.sum_over(site.gradient, [0, *range(2, site.y.rank)], keepdims=False)
    return found


def _weight_by_copies(site: Site, emit: Emitter, windows: Windows, weight: Sizes) -> str:
    """(taps x channels, n x positions) by (n x positions, out): the long side in front needs no packing."""
    outputs, channels = weight[:2]
    axes = list(range(2, 2 + windows.axes))
    swapped = [1, 0, *axes]
    source = emit.transposed(site.x.name, swapped)
    if any(windows.pads):
        pads = [0, 0, *windows.begin, 0, 0, *windows.end]
        source = emit.op("Pad", source, emit.integers(pads))
    copies = []
    for tap in product(*(range(size) for size in windows.kernel)):
        first = np.array(tap) * np.array(windows.dilation)
        last = first + np.array(windows.count)
        copies.append(
            emit.op("Slice", source, emit.integers(first), emit.integers(last), emit.integers(axes))
        )
    columns = emit.op("Concat", *copies, axis=0) if len(copies) > 1 else copies[0]
    taps = prod(windows.kernel)
    summed = emit.op(
        "Gemm",
        emit.reshaped(columns, [taps * channels, -1]),
        emit.reshaped(emit.transposed(site.gradient, swapped), [outputs, -1]),
        transB=1,
    )
    unfolded = emit.reshaped(summed, [*windows.kernel, channels, outputs])
    return emit.transposed(unfolded, [windows.axes + 1, windows.axes, *range(windows.axes)])


def _weight_by_convolution(site: Site, emit: Emitter, windows: Windows, weight: Sizes, group: int) -> str:
    """Strides and dilations change places; a group's samples lie side by side as its channels."""
    axes = list(range(2, 2 + windows.axes))
    source = site.x.name
    if group > 1:
        split = emit.reshaped(source, [-1, group, weight[1], *windows.size])
        sorted_by_group = emit.transposed(split, [2, 1, 0, *(axis + 1 for axis in axes)])
        source = emit.reshaped(sorted_by_group, [weight[1], -1, *windows.size])
    else:
        source = emit.transposed(source, [1, 0, *axes])
    wide = emit.op(
        "Conv",
        source,
        emit.transposed(site.gradient, [1, 0, *axes]),
        group=group,
        strides=list(windows.dilation),
        dilations=list(windows.stride),
        pads=windows.pads,
    )
    if _taps_seen(windows) != windows.kernel:
        starts, ends = emit.integers([0] * windows.axes), emit.integers(windows.kernel)
        wide = emit.op("Slice", wide, starts, ends, emit.integers(axes))
    return emit.transposed(wide, [1, 0, *axes])


def _taps_seen(windows: Windows) -> Sizes:
    """How long the swapped convolution's output is; where a rest was left there may be taps too many."""
    return tuple(
        (size + begin + end - stride * (count - 1) - 1) // dilation + 1
        for size, begin, end, stride, count, dilation in zip(
            windows.size,
            windows.begin,
            windows.end,
            windows.stride,
            windows.count,
            windows.dilation,
            strict=True,
        )
    )


RULES: Mapping[str, Rule] = {"Conv": convolution}
