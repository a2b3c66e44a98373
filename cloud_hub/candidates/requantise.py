"""The network of a bundle with other weights, in every precision that it ships in. No files.

The graph is cut as it was when the bundle was built, so its files come out byte for byte the same, and a
release of other weights is its weights part alone. Where they do not, or where the bundle has stages for
LiteRT, whose files hold the weights, the release is a whole one, and it is said why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.assemble import Cuts, Declaration, Policy, cut_network, stage_files, weights_part
from cloud_hub.builder.calibration.outcomes import Floats
from cloud_hub.builder.collect import Stages, stages_of_bundle
from cloud_hub.builder.joined import staged_of_stages
from cloud_hub.builder.litert.stage_files import litert_files
from cloud_hub.builder.write import GraphPart, WeightsPart
from cloud_hub.errors import BuildError
from edge_cascade.bundle import Bundle, StageModel
from edge_cascade.policy import Precision
from edge_cascade.weights import Weights

MIN_REPRESENTATIVE: Final = 64
"""With fewer training samples than this the golden inputs help to find the ranges of int8."""


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """Stages as they ship; `litert` where the base has them; `whole_release`: why weights alone won't do."""

    stages: Stages
    litert: Mapping[tuple[int, Precision], bytes]
    whole_release: str


def check_new_weights(bundle: Bundle, weights: Weights) -> None:
    """Refuse weights that the bundle's boards would refuse.

    Raises:
        BuildError: naming the first that is missing, of another shape, not finite or out of bounds.
    """
    known = bundle.parameters()
    if odd := known.keys() ^ weights.keys():
        raise BuildError(f"the weight {min(odd)!r} is {'missing' if min(odd) in known else 'not known'}")
    for name, array in weights.items():
        if array.shape != known[name].shape:
            raise BuildError(f"the weight {name!r} is {array.shape}, the network has {known[name].shape}")
    check_bounds(weights, bundle.graph.bounds.max_abs_weight)


def check_bounds(tensors: Mapping[str, NDArray[np.generic]], max_abs: float) -> None:
    """Refuse weights above the bound that the graph part sets.

    Raises:
        BuildError: naming the first.
    """
    for name, array in sorted(tensors.items()):
        if array.dtype.kind != "f" or array.size == 0:
            continue
        largest = float(np.abs(array).max())
        # Written so that NaN fails as well.
        if not largest <= max_abs:
            raise BuildError(
                f"the weight {name!r} reaches {largest:g}, the graph's bound is {max_abs:g}: such weights "
                "need a bundle that is built anew"
            )


def requantised(bundle: Bundle, weights: Weights, training: Floats) -> Network:
    """The network with other weights; int8 takes its ranges from `training`, samples in the sensor's unit.

    Raises:
        BuildError: when a stage cannot be quantised or written.
    """
    graph = bundle.graph
    if len(training) < MIN_REPRESENTATIVE:
        training = np.concatenate([training, bundle.golden_inputs])
    staged = staged_of_stages(stages_of_bundle(bundle), len(graph.labels), weights)
    declaration = Declaration(
        model=graph.model,
        labels=graph.labels,
        input_shape=graph.input_shape,
        preprocess=graph.preprocess,
        wire=graph.wire,
        window=graph.window,
    )
    cuts = cut_network(staged, training, declaration)
    wanted = {key: stage for key, stage in cuts.stages.models.items() if key in bundle.stage_models}
    litert = _litert(bundle, cuts)
    return Network(replace(cuts.stages, models=wanted), litert, _why_whole(bundle, wanted, litert))


def graph_part(bundle: Bundle, network: Network) -> GraphPart:
    """The base's graph part around the network's stages; the same bytes where these are the same."""
    graph = bundle.graph
    assert bundle.train_step is not None
    return GraphPart(
        model=graph.model,
        version=graph.version,
        labels=graph.labels,
        input_shape=graph.input_shape,
        preprocess=graph.preprocess,
        window=graph.window,
        wire=graph.wire,
        stages=graph.stages,
        stage_files=stage_files(network.stages, network.litert),
        golden_inputs=bundle.golden_inputs,
        full_model_sha256=graph.full_model_sha256,
        bounds=graph.bounds,
        min_daemon=graph.min_daemon,
        train_step=bundle.train_step.model,
        head_parameters=graph.head_parameters,
    )


def new_weights_part(bundle: Bundle, network: Network, policy: Policy) -> WeightsPart:
    """The candidate's weights part.

    Raises:
        BuildError: for a scale of int8 out of the graph's bounds.
    """
    part = weights_part(network.stages, policy, bundle.graph.preprocess, bundle.golden_inputs)
    check_bounds(part.tensors, bundle.graph.bounds.max_abs_weight)
    return part


def _litert(bundle: Bundle, cuts: Cuts) -> Mapping[tuple[int, Precision], bytes]:
    wanted = {key for key, stage in bundle.stage_models.items() if stage.litert is not None}
    if not wanted:
        return {}
    return {
        key: content for key, content in litert_files(cuts.by_precision, cuts.staged).items() if key in wanted
    }


def _why_whole(
    bundle: Bundle,
    stages: Mapping[tuple[int, Precision], StageModel],
    litert: Mapping[tuple[int, Precision], bytes],
) -> str:
    if litert:
        return "its stages for LiteRT hold their weights inside"
    for (index, precision), stage in stages.items():
        if stage.model != bundle.stage_models[index, precision].model:
            return f"stage {index} in {precision} is cut otherwise than it was when the base was built"
    return ""
