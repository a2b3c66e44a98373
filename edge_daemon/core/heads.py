"""A bundle with the heads of one board in the place of its own. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_cascade.bounds import bounds_problems
from edge_cascade.bundle import Bundle, StageModel
from edge_cascade.errors import BundleError
from edge_cascade.weights import FloatArray


def with_heads(bundle: Bundle, heads: Mapping[str, FloatArray]) -> Bundle:
    """The same bundle, by its id too, with these heads in every precision, and without certificates.

    A head is float32 at every precision of its stage, or it could not be put there. What the certificates say
    was measured with other heads, so they are left out.

    Raises:
        BundleError: when these are not all heads of the bundle, a stage holds one otherwise, they are not
            finite or leave the bounds that the graph part sets.
    """
    _check_names(bundle, heads)
    stages = {key: _stage_with(stage, bundle, heads) for key, stage in bundle.stage_models.items()}
    weights = msgspec.structs.replace(bundle.weights, certificates=())
    personal = replace(bundle, stage_models=stages, weights=weights)
    # What the bundle itself leaves, others have accepted.
    known = bounds_problems(bundle.graph, weights, _tensors_of(bundle))
    for problem in bounds_problems(bundle.graph, weights, _tensors_of(personal)):
        if problem not in known:
            raise BundleError(f"private heads: {problem}")
    return personal


def _check_names(bundle: Bundle, heads: Mapping[str, FloatArray]) -> None:
    wanted = set(bundle.graph.head_parameters)
    if not wanted or heads.keys() != wanted:
        odd = min(wanted ^ heads.keys(), default="")
        what = f"{odd!r} is {'missing' if odd in wanted else 'none'}" if wanted else "the bundle names none"
        raise BundleError(f"private heads: {what}")
    for name, array in heads.items():
        if not np.isfinite(array).all():
            raise BundleError(f"private heads: {name!r} is not finite")


def _stage_with(stage: StageModel, bundle: Bundle, heads: Mapping[str, FloatArray]) -> StageModel:
    """Heads belong to the stage that holds them at float32, and to its other precisions."""
    exact = bundle.stage_models.get((stage.stage, "fp32"))
    own = heads.keys() & (stage.weights if exact is None else exact.weights).keys()
    for name in own:
        held = stage.weights.get(name)
        if held is None or held.dtype != np.float32 or held.shape != heads[name].shape:
            how = "quantised or not at all" if held is None else f"as {held.dtype} {held.shape}"
            raise BundleError(
                f"private heads: stage {stage.stage} in {stage.precision} holds {name!r} {how}, "
                f"these are float32 {heads[name].shape}"
            )
    return replace(stage, weights={**stage.weights, **{name: heads[name] for name in own}})


def _tensors_of(bundle: Bundle) -> dict[str, NDArray[np.generic]]:
    return {
        f"{precision}/{name}": array
        for (_, precision), stage in bundle.stage_models.items()
        for name, array in stage.weights.items()
    }
