"""From a multi-exit graph to a bundle on disk: quantise, cut, measure, write. Who decides is the caller.

The same arguments give the same bytes on one machine: no clock and no chance goes into them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.descent import MAX_ACCEPT_SCORE
from cloud_hub.builder.calibration.outcomes import Floats
from cloud_hub.builder.collect import StageRuns, Stages, Step, off_the_wire, stages_of_cuts
from cloud_hub.builder.graphs.quantise import quantise
from cloud_hub.builder.graphs.staged import StagedGraph
from cloud_hub.builder.graphs.stages import CutStage, cut_stages
from cloud_hub.builder.joined import Lesson, staged_of_stages, train_step_of
from cloud_hub.builder.write import GraphPart, WeightsPart, write_bundle
from cloud_hub.errors import BuildError
from edge_cascade.bounds import norms_around
from edge_cascade.durable import sync_directory, write_durably
from edge_cascade.manifest import Bounds, Preprocess, Stage, Window, Wire
from edge_cascade.policy import Certificate, Plan, Precision
from edge_cascade.preprocess import normalise

BUNDLE = "bundle"
FULL_MODEL = "full.onnx"

# fp32: other processors add in another order. int8: another kernel may round a half the other way, which
# moves a value by a whole step. onnxruntime's fused and unfused x86 kernels agree to 1e-6; ARM has its own.
TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-3, "int8": 0.05}

_GOLDEN_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a bundle says of its model and of its samples, `input_shape` as the sensor has it."""

    model: str
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    preprocess: Preprocess
    wire: Wire
    window: Window | None = None
    version: str = "1.0.0"
    min_daemon: str = "0.1.0"


@dataclass(frozen=True, slots=True)
class Policy:
    """What calibration decided: see `edge_cascade.manifest.WeightsManifest`."""

    plans: tuple[Plan, ...]
    default_plan: str
    certificates: tuple[Certificate, ...] = ()


@dataclass(frozen=True, slots=True)
class Cuts:
    """A network cut in every precision, as it ships."""

    staged: StagedGraph
    by_precision: Mapping[Precision, Sequence[CutStage]]

    @property
    def stages(self) -> Stages:
        """The same, ready to run."""
        shapes = [self.staged.feature_shape_of(index) for index in range(self.staged.stages)]
        return stages_of_cuts(self.by_precision, shapes, self.staged.mult_adds)


def cut_network(staged: StagedGraph, representative: Floats, declaration: Declaration) -> Cuts:
    """Quantise the whole graph and cut both precisions.

    `representative` are training samples (n, *input_shape) in the sensor's unit, from which int8 takes its
    ranges.
    """
    given = normalise(representative, declaration.preprocess)
    return Cuts(staged, {"fp32": cut_stages(staged), "int8": cut_stages(quantise(staged, given))})


def ladder_steps(stages: int) -> dict[str, tuple[Step, ...]]:
    """The ladders that are tried: int8 alone, int8 with the last stage once more in fp32, fp32 alone."""
    int8: tuple[Step, ...] = tuple((stage, "int8", stage - 1) for stage in range(stages))
    fp32: tuple[Step, ...] = tuple((stage, "fp32", stage - 1) for stage in range(stages))
    again: Step = (stages - 1, "fp32", stages - 2)
    return {"int8": int8, "int8-fp32": (*int8, again), "fp32": fp32}


@dataclass(frozen=True, slots=True)
class Content:
    """All that goes into a bundle. `golden_samples` (n, *input_shape) are in the sensor's unit."""

    declaration: Declaration
    stages: Stages
    policy: Policy
    full_model: bytes
    golden_samples: Floats
    litert: Mapping[tuple[int, Precision], bytes] = field(default_factory=dict)


def write_model(out: Path, content: Content) -> str:
    """Write `out/bundle` and, for the hub, `out/full.onnx`; returns the bundle's id.

    Both are written beside their places before either takes its own, so a full disk leaves the old pair. A
    process that is killed between the two renames leaves the new bundle with the old full model. A hub
    refuses such a pair by the digest; building once more mends it.

    Raises:
        OSError: as it came (disk full, read-only).
    """
    declaration, stages = content.declaration, content.stages
    golden_inputs = off_the_wire(content.golden_samples[:_GOLDEN_SAMPLES], declaration.wire)
    weights = weights_part(stages, content.policy, declaration.preprocess, golden_inputs)
    lesson = _lesson_of(staged_of_stages(stages, len(declaration.labels)))
    graph = GraphPart(
        model=declaration.model,
        version=declaration.version,
        labels=declaration.labels,
        input_shape=declaration.input_shape,
        preprocess=declaration.preprocess,
        window=declaration.window,
        wire=declaration.wire,
        stages=_manifest_stages(content),
        stage_files=stage_files(stages, content.litert),
        golden_inputs=golden_inputs,
        full_model_sha256=hashlib.sha256(content.full_model).hexdigest(),
        bounds=_bounds_around(weights),
        min_daemon=declaration.min_daemon,
        train_step=None if lesson is None else lesson.model,
        head_parameters=() if lesson is None else lesson.head_parameters,
    )
    out.mkdir(parents=True, exist_ok=True)
    waiting = out / f".{FULL_MODEL}.new"
    try:
        write_durably(waiting, content.full_model)
        bundle_id = write_bundle(out / BUNDLE, graph, weights)
        waiting.replace(out / FULL_MODEL)
        sync_directory(out)
    finally:
        waiting.unlink(missing_ok=True)
    return bundle_id


def _bounds_around(weights: WeightsPart) -> Bounds:
    """What later weights of the graph must keep to; they may promise as little as these do."""
    bounds = Bounds(
        max_abs_weight=_weight_bound(weights.tensors),
        max_accept_score=MAX_ACCEPT_SCORE,
        norms=norms_around(weights.tensors),
    )
    promised = (bounds.max_epsilon, *(each.epsilon for each in weights.certificates))
    return msgspec.structs.replace(bounds, max_epsilon=max(promised))


def _lesson_of(staged: StagedGraph) -> Lesson | None:
    """None for a network of which not even the heads can be trained: boards serve it and never learn."""
    try:
        return train_step_of(staged)
    except BuildError:
        return None


def weights_part(
    stages: Stages, policy: Policy, preprocess: Preprocess, golden_inputs: Floats
) -> WeightsPart:
    """All that may change without a new graph; `golden_inputs` as they come off the wire."""
    runs = StageRuns(stages, normalise(golden_inputs, preprocess))
    return WeightsPart(
        tensors={
            f"{precision}/{name}": array
            for (_, precision), stage in stages.models.items()
            for name, array in stage.weights.items()
        },
        plans=policy.plans,
        default_plan=policy.default_plan,
        certificates=policy.certificates,
        golden_outputs={
            f"{plan.name}/{rung}": np.ascontiguousarray(head)
            for plan in policy.plans
            for rung, head in enumerate(runs.climb(plan.rungs))
        },
        tolerance=TOLERANCE,
    )


def stage_files(stages: Stages, litert: Mapping[tuple[int, Precision], bytes]) -> dict[str, bytes]:
    """The files of the graph part that hold stages, by name."""
    onnx_files = {_file_name(*key, "onnx"): stage.model for key, stage in stages.models.items()}
    return onnx_files | {_file_name(*key, "tflite"): model for key, model in litert.items()}


def _manifest_stages(content: Content) -> tuple[Stage, ...]:
    stages = content.stages
    shape: tuple[int, ...] | None = content.declaration.preprocess.network_shape(
        content.declaration.input_shape
    )
    made = []
    for index, (feature_shape, mult_adds) in enumerate(
        zip(stages.feature_shapes, stages.mult_adds, strict=True)
    ):
        assert shape is not None  # only the last stage has no features
        made.append(
            Stage(
                files={key[1]: _file_name(*key, "onnx") for key in stages.models if key[0] == index},
                input_shape=shape,
                feature_shape=feature_shape,
                mult_adds=mult_adds,
                litert={key[1]: _file_name(*key, "tflite") for key in content.litert if key[0] == index},
            )
        )
        shape = feature_shape
    return tuple(made)


def _file_name(stage: int, precision: Precision, suffix: str) -> str:
    return f"stage{stage}.{precision}.{suffix}"


def _weight_bound(tensors: Mapping[str, NDArray[np.generic]]) -> float:
    """A power of two, at least four times the largest weight: room to learn, none to overflow."""
    largest = max(float(np.abs(array).max()) for array in tensors.values() if array.dtype.kind == "f")
    return float(2.0 ** np.ceil(np.log2(4.0 * largest)))
