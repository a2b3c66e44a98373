"""Gradients of elementwise arithmetic with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping

from cloud_hub.builder.gradients.emitter import Emitter
from cloud_hub.builder.gradients.site import Rule, Site


def identity(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy."""
    return {0: site.gradient}


def negative(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = -dy."""
    return {0: emit.op("Neg", site.gradient)}


def sum_of(site: Site, emit: Emitter) -> dict[int, str]:
    """Every summand gets dy, summed where it was repeated. Also Add."""
    return {
        index: _own_shape(site, emit, index, site.gradient)
        for index in range(len(site.inputs))
        if site.wants(index)
    }


def difference(site: Site, emit: Emitter) -> dict[int, str]:
    """da = dy, db = -dy."""
    found: dict[int, str] = {}
    if site.wants(0):
        found[0] = _own_shape(site, emit, 0, site.gradient)
    if site.wants(1):
        found[1] = emit.op("Neg", _own_shape(site, emit, 1, site.gradient))
    return found


def product(site: Site, emit: Emitter) -> dict[int, str]:
    """da = dy b, db = dy a."""
    return {
        index: _own_shape(site, emit, index, emit.op("Mul", site.gradient, site.input(1 - index).name))
        for index in (0, 1)
        if site.wants(index)
    }


def quotient(site: Site, emit: Emitter) -> dict[int, str]:
    """With q = dy / b: da = q, db = -q y."""
    share = emit.op("Div", site.gradient, site.input(1).name)
    found: dict[int, str] = {}
    if site.wants(0):
        found[0] = _own_shape(site, emit, 0, share)
    if site.wants(1):
        found[1] = emit.op("Neg", _own_shape(site, emit, 1, emit.op("Mul", share, site.y.name)))
    return found


def power(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy p x^(p-1), for an exponent that is constant."""
    exponent = site.constant(1)
    assert exponent is not None
    slope = emit.op(
        "Mul", emit.floats(exponent), emit.op("Pow", site.x.name, emit.floats(exponent.astype(float) - 1.0))
    )
    return {0: _own_shape(site, emit, 0, emit.op("Mul", site.gradient, slope))}


def square_root(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy / 2y."""
    return {0: emit.scaled(emit.op("Div", site.gradient, site.y.name), 0.5)}


def exponential(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy y."""
    return {0: emit.op("Mul", site.gradient, site.y.name)}


def logarithm(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy / x."""
    return {0: emit.op("Div", site.gradient, site.x.name)}


def reciprocal(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = -dy y^2."""
    square = emit.op("Mul", site.y.name, site.y.name)
    return {0: emit.op("Neg", emit.op("Mul", site.gradient, square))}


def absolute(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy sign(x); 0 at 0."""
    return {0: emit.op("Mul", site.gradient, emit.op("Sign", site.x.name))}


def _own_shape(site: Site, emit: Emitter, index: int, gradient: str) -> str:
    value = site.input(index)
    return emit.unbroadcast(gradient, site.y.dims, value.name, value.dims)


RULES: Mapping[str, Rule] = {
    "Abs": absolute,
    "Add": sum_of,
    "Div": quotient,
    "Exp": exponential,
    "Identity": identity,
    "Log": logarithm,
    "Mul": product,
    "Neg": negative,
    "Pow": power,
    "Reciprocal": reciprocal,
    "Sqrt": square_root,
    "Sub": difference,
    "Sum": sum_of,
}
