"""Gradients of activations and of the softmax. At a kink the lower side's slope counts, or none at all."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi, sqrt

from cloud_hub.builder.gradients.emitter import Emitter
from cloud_hub.builder.gradients.site import Rule, Site, UnsupportedNodeError


def relu(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy where y > 0."""
    # A cast and a product take two thirds of the time of Where, and less than half of Sign's.
    mask = emit.op("Cast", emit.op("Greater", site.y.name, emit.floats(0.0)), to=1)
    return {0: emit.op("Mul", site.gradient, mask)}


def leaky_relu(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy where x > 0, else alpha dy."""
    slope = float(site.attribute("alpha", 0.01))
    rises = emit.op("Greater", site.x.name, emit.floats(0.0))
    return {0: emit.op("Where", rises, site.gradient, emit.scaled(site.gradient, slope))}


def clip(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy strictly within the bounds."""
    if site.wants(1) or site.wants(2):
        raise UnsupportedNodeError("a bound is a parameter")
    gradient = site.gradient
    for index, operator in ((1, "Greater"), (2, "Less")):
        bound = site.optional(index)
        if bound is not None:
            within = emit.op(operator, site.x.name, bound.name)
            gradient = emit.op("Where", within, gradient, emit.floats(0.0))
    return {0: gradient}


def sigmoid(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy y (1 - y)."""
    slope = emit.op("Mul", site.y.name, emit.op("Sub", emit.floats(1.0), site.y.name))
    return {0: emit.op("Mul", site.gradient, slope)}


def hyperbolic_tangent(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy (1 - y^2)."""
    slope = emit.op("Sub", emit.floats(1.0), emit.op("Mul", site.y.name, site.y.name))
    return {0: emit.op("Mul", site.gradient, slope)}


def error_function(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy 2/sqrt(pi) exp(-x^2)."""
    bell = emit.op("Exp", emit.op("Neg", emit.op("Mul", site.x.name, site.x.name)))
    return {0: emit.op("Mul", site.gradient, emit.scaled(bell, 2.0 / sqrt(pi)))}


def gelu(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy (F(x) + x F'(x)) with the normal distribution F, or its tanh form (Hendrycks, Gimpel 2016)."""
    x = site.x.name
    square = emit.op("Mul", x, x)
    if site.attribute("approximate", b"none") == b"tanh":
        scale, cubic = sqrt(2.0 / pi), 0.044715
        inner = emit.op("Mul", x, emit.op("Add", emit.scaled(square, scale * cubic), emit.floats(scale)))
        bent = emit.op("Tanh", inner)
        steepness = emit.op("Add", emit.scaled(square, 3.0 * scale * cubic), emit.floats(scale))
        fall = emit.op("Sub", emit.floats(1.0), emit.op("Mul", bent, bent))
        density = emit.scaled(emit.op("Mul", fall, steepness), 0.5)
    else:
        bent = emit.op("Erf", emit.scaled(x, sqrt(0.5)))
        density = emit.scaled(emit.op("Exp", emit.scaled(square, -0.5)), 1.0 / sqrt(2.0 * pi))
    share = emit.scaled(emit.op("Add", bent, emit.floats(1.0)), 0.5)
    slope = emit.op("Add", share, emit.op("Mul", x, density))
    return {0: emit.op("Mul", site.gradient, slope)}


def hard_sigmoid(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = alpha dy where 0 < y < 1."""
    rising = emit.op(
        "And",
        emit.op("Greater", site.y.name, emit.floats(0.0)),
        emit.op("Less", site.y.name, emit.floats(1.0)),
    )
    scaled = emit.scaled(site.gradient, float(site.attribute("alpha", 0.2)))
    return {0: emit.op("Where", rising, scaled, emit.floats(0.0))}


def hard_swish(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy times 0 below -3, 1 above 3, (2x + 3)/6 between (Howard et al. 2019)."""
    x = site.x.name
    between = emit.op("Add", emit.scaled(x, 1.0 / 3.0), emit.floats(0.5))
    upper = emit.op("Where", emit.op("Less", x, emit.floats(3.0)), between, emit.floats(1.0))
    slope = emit.op("Where", emit.op("Greater", x, emit.floats(-3.0)), upper, emit.floats(0.0))
    return {0: emit.op("Mul", site.gradient, slope)}


def softplus(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy sigmoid(x)."""
    return {0: emit.op("Mul", site.gradient, emit.op("Sigmoid", site.x.name))}


def softmax(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = y (dy - sum(dy y))."""
    product = emit.op("Mul", site.gradient, site.y.name)
    mean = emit.sum_over(product, [int(site.attribute("axis", -1))], keepdims=True)
    return {0: emit.op("Sub", product, emit.op("Mul", site.y.name, mean))}


def log_softmax(site: Site, emit: Emitter) -> dict[int, str]:
    """dx = dy - exp(y) sum(dy)."""
    whole = emit.sum_over(site.gradient, [int(site.attribute("axis", -1))], keepdims=True)
    return {0: emit.op("Sub", site.gradient, emit.op("Mul", emit.op("Exp", site.y.name), whole))}


RULES: Mapping[str, Rule] = {
    "Clip": clip,
    "Erf": error_function,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "LeakyRelu": leaky_relu,
    "LogSoftmax": log_softmax,
    "Relu": relu,
    "Sigmoid": sigmoid,
    "Softmax": softmax,
    "Softplus": softplus,
    "Tanh": hyperbolic_tangent,
}
