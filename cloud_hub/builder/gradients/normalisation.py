"""Gradients of normalisations at inference: batch statistics are frozen."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from cloud_hub.builder.gradients.emitter import Emitter
from cloud_hub.builder.gradients.site import Rule, Site, UnsupportedNodeError, positive_axis, static


def batch_normalization(site: Site, emit: Emitter) -> dict[int, str]:
    """y = (x - mean) r scale + shift with r = 1/sqrt(variance + epsilon): an affine map of each channel."""
    if site.attribute("training_mode", 0) or site.wants(3) or site.wants(4):
        raise UnsupportedNodeError("its statistics are not frozen")
    (channels,) = static(site.input(1).dims)
    per_channel = [channels, *[1] * (site.x.rank - 2)]
    scale, _, mean, variance = (site.input(index).name for index in range(1, 5))
    epsilon = emit.floats(float(site.attribute("epsilon", 1e-5)))
    deviation = emit.op("Sqrt", emit.op("Add", variance, epsilon))
    others = [0, *range(2, site.x.rank)]
    found: dict[int, str] = {}
    if site.wants(0):
        factor = emit.reshaped(emit.op("Div", scale, deviation), per_channel)
        found[0] = emit.op("Mul", site.gradient, factor)
    if site.wants(1):
        centred = emit.op("Sub", site.x.name, emit.reshaped(mean, per_channel))
        moment = emit.sum_over(emit.op("Mul", site.gradient, centred), others, keepdims=False)
        found[1] = emit.op("Div", moment, deviation)
    if site.wants(2):
        found[2] = emit.sum_over(site.gradient, others, keepdims=False)
    return found


def layer_normalization(site: Site, emit: Emitter) -> dict[int, str]:
    """With z = (x - mean)/deviation and g = dy scale: dx = (g - mean(g) - z mean(g z))/deviation.

    Ba, Kiros and Hinton 2016, arXiv 1607.06450.
    """
    axes = list(range(positive_axis(int(site.attribute("axis", -1)), site.x.rank), site.x.rank))
    share = 1.0 / prod(static([site.x.dims[axis] for axis in axes]))

    def mean_of(name: str) -> str:
        return emit.scaled(emit.sum_over(name, axes, keepdims=True), share)

    centred = emit.op("Sub", site.x.name, mean_of(site.x.name))
    variance = mean_of(emit.op("Mul", centred, centred))
    epsilon = emit.floats(float(site.attribute("epsilon", 1e-5)))
    deviation = emit.op("Sqrt", emit.op("Add", variance, epsilon))
    normal = emit.op("Div", centred, deviation)
    found: dict[int, str] = {}
    if site.wants(0):
        scaled = emit.op("Mul", site.gradient, site.input(1).name)
        slanted = emit.op("Mul", normal, mean_of(emit.op("Mul", scaled, normal)))
        rest = emit.op("Sub", emit.op("Sub", scaled, mean_of(scaled)), slanted)
        found[0] = emit.op("Div", rest, deviation)
    for index, summand in ((1, normal), (2, None)):
        if site.wants(index):
            value = site.input(index)
            whole = site.gradient if summand is None else emit.op("Mul", site.gradient, summand)
            found[index] = emit.unbroadcast(whole, site.x.dims, value.name, value.dims)
    return found


RULES: Mapping[str, Rule] = {
    "BatchNormalization": batch_normalization,
    "LayerNormalization": layer_normalization,
}
