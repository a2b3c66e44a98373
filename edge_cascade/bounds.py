"""Whether a weights part keeps to the bounds that its graph part sets. No I/O.

A graph part is signed offline, a weights part may be signed by a key that lives on the hub. Whoever steals
that key can make boards answer worse, but not make them sure of everything: thresholds, temperatures, what
is promised and the size of every tensor are held against what the offline keys have signed.

A tensor goes by its name without its precision: `fp32/w` and what `int8/w_quantized` stands for are both
held to the norm of `w`. Scales of activations have names, and norms, of their own. A kernel may apply other
scales to a quantised bias than the bias's own; what it makes of it is clipped to the range of its output,
whose scale is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade.manifest import Bounds, GraphManifest, Norms, WeightsManifest
from edge_cascade.policy import Plan

Tensors = Mapping[str, NDArray[np.generic]]
FloatArray = NDArray[np.float64]

HEADROOM: Final = 4.0
"""How far the norm of one tensor may grow beyond the weights that its bound was taken from."""
TOGETHER_HEADROOM: Final = 2.0
"""How far that of all of them may."""

# The root mean square that a tensor may have at least: biases often begin at nothing, and are to learn.
_SMALL: Final = 0.1
_QUANTISED: Final = "_quantized"
_SCALE: Final = "_scale"
_ZERO_POINT: Final = "_zero_point"


def bounds_problems(
    graph: GraphManifest, weights: WeightsManifest, tensors: Tensors, norms: Norms | None = None
) -> list[str]:
    """What of a weights part leaves its graph's bounds, a line each; `tensors` are those of its blob.

    `norms` hold where the graph part states none: see `signed_releases.PartNote`.
    """
    bounds = graph.bounds
    problems = [problem for plan in weights.plans for problem in _plan_problems(plan, bounds)]
    problems += [
        f"the certificate of plan {each.plan!r} allows {each.epsilon:g}, the bound is {bounds.max_epsilon:g}"
        for each in weights.certificates
        # Written so that NaN fails as well.
        if not 0.0 < each.epsilon <= bounds.max_epsilon
    ]
    problems += _scale_problems(tensors)
    if not problems:
        problems += _size_problems(tensors, bounds.max_abs_weight, bounds.norms or norms)
    return problems


def norms_around(tensors: Tensors) -> Norms:
    """The bounds that leave `HEADROOM` around the weights of a blob, rounded up to powers of two."""
    together: dict[str, float] = {}
    each: dict[str, float] = {}
    for precision, name, values in _meant(tensors):
        norm = _norm(values)
        least = 0.0
        if not name.endswith(_SCALE):
            together[precision] = math.hypot(together.get(precision, 0.0), norm)
            least = _SMALL * math.sqrt(values.size)
        each[name] = max(each.get(name, 0.0), _power_of_two(HEADROOM * max(norm, least)))
    return Norms(_power_of_two(TOGETHER_HEADROOM * max(together.values(), default=0.0)), each)


def _plan_problems(plan: Plan, bounds: Bounds) -> list[str]:
    problems = []
    highest = max(plan.points[plan.chosen].max_score)
    if not highest <= bounds.max_accept_score:
        problems.append(
            f"plan {plan.name!r} accepts scores up to {highest:g}, the bound is {bounds.max_accept_score:g}"
        )
    for index, rung in enumerate(plan.rungs):
        if not bounds.min_temperature <= rung.temperature <= bounds.max_temperature:
            problems.append(
                f"rung {index} of plan {plan.name!r} has the temperature {rung.temperature:g}, "
                f"the bounds are {bounds.min_temperature:g} to {bounds.max_temperature:g}"
            )
    return problems


def _scale_problems(tensors: Tensors) -> list[str]:
    problems = []
    for name, array in tensors.items():
        values = array.astype(np.float64)
        if _is_scale(name, tensors) and not (np.isfinite(values) & (values > 0)).all():
            problems.append(f"{name} is no scale: all must be finite and positive")
        problems += [
            f"{name} has {scale.size} scales for {array.shape}"
            for scale, _ in _scales_of(name, array, tensors)
            if scale.size != 1 and scale.size not in array.shape
        ]
    return problems


def _size_problems(tensors: Tensors, max_abs: float, norms: Norms | None) -> list[str]:
    problems = []
    together: dict[str, float] = {}
    for precision, name, values in _meant(tensors):
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= max_abs:
            problems.append(f"{precision}/{name} reaches {largest:g}, the bound is {max_abs:g}")
        if norms is None:
            continue
        norm = _norm(values)
        if name not in norms.each:
            problems.append(f"{precision}/{name}: no bound is signed for such a tensor")
        elif not norm <= norms.each[name]:
            problems.append(f"the norm of {precision}/{name} is {norm:g}, the bound is {norms.each[name]:g}")
        if not name.endswith(_SCALE):
            together[precision] = math.hypot(together.get(precision, 0.0), norm)
    if norms is not None:
        problems += [
            f"the norm of all {precision} weights is {norm:g}, the bound is {norms.together:g}"
            for precision, norm in together.items()
            if not norm <= norms.together
        ]
    return problems


def _meant(tensors: Tensors) -> Iterator[tuple[str, str, FloatArray]]:
    """Precision, name and the numbers meant, of each tensor; integers without a scale as they are."""
    for full_name, array in tensors.items():
        precision, _, name = full_name.partition("/")
        if array.dtype.kind == "f":
            yield precision, name, array.astype(np.float64)
        elif not name.endswith(_ZERO_POINT):
            read = [
                _dequantised(array, scale, offsets)
                for scale, offsets in _scales_of(full_name, array, tensors)
            ]
            values = max(read, key=_norm) if read else array.astype(np.float64)
            yield precision, name.removesuffix(_QUANTISED), values


def _is_scale(full_name: str, tensors: Tensors) -> bool:
    """Of a quantised tensor, or of an activation, which has no tensor of its own."""
    return full_name.endswith(_SCALE) and full_name.removesuffix(_SCALE) + _ZERO_POINT in tensors


def _scales_of(
    full_name: str, array: NDArray[np.generic], tensors: Tensors
) -> list[tuple[NDArray[np.generic], FloatArray]]:
    """The scales that integers may have, with their zero points.

    onnxruntime names that of `w_quantized` after `w` for weights, after `w_quantized` for biases. If there
    are both, one is a decoy, and which one the graph alone says.
    """
    if array.dtype.kind == "f" or full_name.endswith(_ZERO_POINT):
        return []
    found = []
    for base in dict.fromkeys((full_name, full_name.removesuffix(_QUANTISED))):
        if (scale := tensors.get(base + _SCALE)) is not None:
            offsets = tensors.get(base + _ZERO_POINT, np.zeros(1))
            found.append((scale, offsets.astype(np.float64).ravel()))
    return found


def _dequantised(array: NDArray[np.generic], scale: NDArray[np.generic], offsets: FloatArray) -> FloatArray:
    """The numbers that integers stand for.

    Along which axis the scales go is the graph's affair: of those that fit, it is taken to be that by which
    the norm is largest.
    """
    values = array.astype(np.float64)
    scales = scale.astype(np.float64).ravel()
    if offsets.size != scales.size:
        offsets = np.full(scales.size, np.max(np.abs(offsets), initial=0.0))
    if scales.size == 1:
        return (values - offsets) * scales if values.ndim else (values - offsets[0]) * scales[0]
    found = []
    for axis in (axis for axis, size in enumerate(values.shape) if size == scales.size):
        along = [1] * values.ndim
        along[axis] = scales.size
        found.append((values - offsets.reshape(along)) * scales.reshape(along))
    return max(found, key=_norm)


def _norm(values: FloatArray) -> float:
    return float(np.linalg.norm(values.ravel()))


def _power_of_two(value: float) -> float:
    return 0.0 if value == 0 else float(2.0 ** math.ceil(math.log2(value)))
