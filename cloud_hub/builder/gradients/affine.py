"""Gradients of products of matrices."""

from __future__ import annotations

from collections.abc import Mapping

from cloud_hub.builder.gradients.emitter import Emitter
from cloud_hub.builder.gradients.site import Rule, Site, UnsupportedNodeError, Value


def gemm(site: Site, emit: Emitter) -> dict[int, str]:
    """Y = alpha A' B' + beta C: dA' = alpha dY B'^T, dB' = alpha A'^T dY, dC = beta dY."""
    a, b, gradient = site.x.name, site.input(1).name, site.gradient
    alpha, beta = float(site.attribute("alpha", 1.0)), float(site.attribute("beta", 1.0))
    left, right = int(site.attribute("transA", 0)), int(site.attribute("transB", 0))
    found: dict[int, str] = {}
    if site.wants(0):
        found[0] = (
            emit.op("Gemm", b, gradient, alpha=alpha, transA=right, transB=1)
            if left
            else emit.op("Gemm", gradient, b, alpha=alpha, transB=1 - right)
        )
    if site.wants(1):
        found[1] = (
            emit.op("Gemm", gradient, a, alpha=alpha, transA=1, transB=left)
            if right
            else emit.op("Gemm", a, gradient, alpha=alpha, transA=1 - left)
        )
    if site.wants(2):
        bias = site.input(2)
        found[2] = emit.scaled(emit.unbroadcast(gradient, site.y.dims, bias.name, bias.dims), beta)
    return found


def matmul(site: Site, emit: Emitter) -> dict[int, str]:
    """dA = dY B^T, dB = A^T dY, summed over batch axes that were broadcast."""
    a, b = site.x, site.input(1)
    if min(a.rank, b.rank) < 2:
        raise UnsupportedNodeError("an operand is a vector")
    found: dict[int, str] = {}
    if site.wants(0):
        product = emit.op("MatMul", site.gradient, _swapped(b, emit))
        found[0] = emit.unbroadcast(product, (*site.y.dims[:-1], a.dims[-1]), a.name, a.dims)
    if site.wants(1):
        found[1] = _right_gradient(site, emit)
    return found


def _right_gradient(site: Site, emit: Emitter) -> str:
    a, b = site.x, site.input(1)
    inner, outer = b.dims[-2:]
    if b.rank == 2 and inner is not None and outer is not None:  # all rows at once: one product, no sum
        rows = emit.reshaped(a.name, [-1, inner])
        return emit.op("Gemm", rows, emit.reshaped(site.gradient, [-1, outer]), transA=1)
    product = emit.op("MatMul", _swapped(a, emit), site.gradient)
    return emit.unbroadcast(product, (*site.y.dims[:-2], inner, outer), b.name, b.dims)


def _swapped(value: Value, emit: Emitter) -> str:
    last = value.rank - 1
    return emit.transposed(value.name, [*range(last - 1), last, last - 1])


RULES: Mapping[str, Rule] = {"Gemm": gemm, "MatMul": matmul}
