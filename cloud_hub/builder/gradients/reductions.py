"""Gradients of sums and means over axes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from cloud_hub.builder.gradients.emitter import Emitter
from cloud_hub.builder.gradients.site import Rule, Site, positive_axis, static


def reduce_sum(site: Site, emit: Emitter) -> dict[int, str]:
    """dy repeated along the axes that were summed."""
    axes = _axes(site)
    return {0: _repeated(site, emit, site.gradient, axes)} if axes else {0: site.gradient}


def reduce_mean(site: Site, emit: Emitter) -> dict[int, str]:
    """An equal share of dy along the axes."""
    axes = _axes(site)
    if not axes:
        return {0: site.gradient}
    count = prod(static([site.x.dims[axis] for axis in axes]))
    return {0: _repeated(site, emit, emit.scaled(site.gradient, 1.0 / count), axes)}


def _axes(site: Site) -> list[int]:
    """The reduced axes: an attribute in older opsets, an input in newer ones; none given means all."""
    axes = site.integers(1)
    if axes is None:
        axes = site.attribute("axes")
    if not axes:
        return [] if site.attribute("noop_with_empty_axes", 0) else list(range(site.x.rank))
    return sorted(positive_axis(axis, site.x.rank) for axis in axes)


def _repeated(site: Site, emit: Emitter, gradient: str, axes: list[int]) -> str:
    if not site.attribute("keepdims", 1):
        gradient = emit.op("Unsqueeze", gradient, emit.integers(axes))
    return emit.spread(gradient, site.x.name, site.x.dims, axes)


RULES: Mapping[str, Rule] = {"ReduceMean": reduce_mean, "ReduceSum": reduce_sum}
