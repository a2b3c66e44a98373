"""Bundles on disk: what they hold, read whole and checked before anything of them is used.

    bundle/
      graph/manifest.json            GraphManifest
      graph/stage0.fp32.onnx         one file per (stage, precision), without weights
      graph/stage0.fp32.tflite       the same for LiteRT, weights inside, where the builder could write it
      graph/train_step.onnx          where boards may learn: see `train_step`
      graph/golden_inputs.safetensors    `x`: (n, *shape) float32, as they come off the wire
      weights/manifest.json          WeightsManifest
      weights/weights.safetensors    `fp32/<initializer>`, `int8/<initializer>`
      weights/golden_outputs.safetensors `<plan>/<rung>`: (n, 5) float32, see `scores`

The digest of a part is the SHA-256 of its manifest, which holds the digest of every other file of the part;
the bundle's id is the SHA-256 of both digests. A file that no manifest names is refused, as is a symbolic
link: nothing here follows a path that the bundle itself supplies.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from edge_cascade.errors import BundleError
from edge_cascade.inspected import Inspected
from edge_cascade.manifest import (
    STAGE_FEATURES,
    STAGE_HEAD,
    STAGE_INPUT,
    STAGE_TEMPERATURE,
    Bounds,
    FileEntry,
    GraphManifest,
    Stage,
    WeightsManifest,
    check_graph,
    check_weights,
)
from edge_cascade.onnx_file import ModelSummary, inspect_model
from edge_cascade.pauses import Pause, no_pause
from edge_cascade.policy import Plan, Precision
from edge_cascade.tflite_file import TfliteSummary, check_stage_tensors, inspect_tflite
from edge_cascade.train_step import TrainStepModel, read_train_step

GRAPH: Final = "graph"
WEIGHTS: Final = "weights"
MANIFEST: Final = "manifest.json"
WEIGHTS_BLOB: Final = "weights.safetensors"
TRAIN_STEP: Final = "train_step.onnx"
GOLDEN_INPUTS: Final = "golden_inputs.safetensors"
GOLDEN_OUTPUTS: Final = "golden_outputs.safetensors"

MAX_MANIFEST_BYTES: Final = 4 * 2**20
MAX_FILE_BYTES: Final = 256 * 2**20

ManifestT = TypeVar("ManifestT", bound=msgspec.Struct)

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Their digests are those of the files: `_check_files` comes first.
_GRAPHS: Final = Inspected[ModelSummary]()
_LITERT_FILES: Final = Inspected[TfliteSummary]()


@dataclass(frozen=True, slots=True, repr=False)
class LitertModel:
    """A checked .tflite file, its weights inside, and the checker's summary."""

    content: bytes
    summary: TfliteSummary


@dataclass(frozen=True, slots=True, repr=False)
class StageModel:
    """One checked stage: its serialised graph, the checker's summary, and the arrays it will be given.

    `litert` is the same stage for LiteRT, where the bundle was built with it.
    """

    stage: int
    precision: Precision
    model: bytes
    summary: ModelSummary
    weights: Mapping[str, NDArray[np.generic]]
    litert: LitertModel | None = None

    def __repr__(self) -> str:
        return f"<StageModel {self.stage} in {self.precision}>"

    def __post_init__(self) -> None:
        """Refuse arrays that are not exactly what the graph asks for.

        A name left unsatisfied makes the runtime look for a file in the working directory.
        """
        where = f"stage {self.stage} in {self.precision}"
        wanted = {spec.name: spec for spec in self.summary.external}
        if wanted.keys() != self.weights.keys():
            odd = min(wanted.keys() ^ self.weights.keys())
            raise BundleError(
                f"{where}: the weight {odd!r} is {'missing' if odd in wanted else 'not wanted'}"
            )
        for name, spec in wanted.items():
            array = self.weights[name]
            if array.dtype.name != spec.dtype or array.shape != spec.shape:
                raise BundleError(
                    f"{where}: the weight {name!r} is {array.dtype.name} {array.shape}, "
                    f"the graph needs {spec.dtype} {spec.shape}"
                )


@dataclass(frozen=True, slots=True, repr=False)
class Bundle:
    """A bundle that was read whole, and whose every file was checked against its digest."""

    bundle_id: str
    graph_sha256: str
    weights_sha256: str
    graph: GraphManifest
    weights: WeightsManifest
    stage_models: Mapping[tuple[int, Precision], StageModel]
    golden_inputs: NDArray[np.float32]
    golden_outputs: Mapping[str, NDArray[np.float32]]
    train_step: TrainStepModel | None = None

    def __repr__(self) -> str:
        return f"<Bundle of {self.graph.model} {self.bundle_id[:12]}>"

    def plan(self, name: str | None = None) -> Plan:
        """The plan called `name`, or the default one.

        Raises:
            BundleError: naming the plans there are.
        """
        wanted = name or self.weights.default_plan
        for plan in self.weights.plans:
            if plan.name == wanted:
                return plan
        known = ", ".join(plan.name for plan in self.weights.plans)
        raise BundleError(f"bundle of {self.graph.model!r} has no plan {wanted!r}; it has: {known}")

    def parameters(self) -> dict[str, NDArray[np.float32]]:
        """The float32 values of what the train step moves; empty where the bundle has no train step."""
        if self.train_step is None:
            return {}
        stages = [model.weights for (_, precision), model in self.stage_models.items() if precision == "fp32"]
        weights = {name: array for stage in stages for name, array in stage.items()}
        return {name: np.asarray(weights[name], dtype=np.float32) for name in self.train_step.shapes}

    def certified_point(self, plan: Plan) -> int:
        """The last point of `plan` that its certificate covers, -1 if it has none.

        Where the truth was known that is the certificate of loss: that of disagreement may reach further.
        """
        points = {each.kind: each.last_point for each in self.weights.certificates if each.plan == plan.name}
        return points.get("loss", points.get("disagreement", -1))


def bundle_id_of(graph_sha256: str, weights_sha256: str) -> str:
    """The id of the bundle made of these two parts."""
    return hashlib.sha256(f"{graph_sha256}\n{weights_sha256}\n".encode()).hexdigest()


def load_bundle(directory: Path, *, pause: Pause = no_pause) -> Bundle:
    """Read and check a whole bundle, with a pause before each piece that takes some time.

    Raises:
        BundleError: naming the file and what is wrong with it.
        HostileFileError: when a model file asks for something no honest file needs.
    """
    graph_files, graph_sha256 = _read_part(directory / GRAPH)
    weights_files, weights_sha256 = _read_part(directory / WEIGHTS)
    pause()
    graph = _decode_manifest(graph_files, GraphManifest, directory / GRAPH)
    weights = _decode_manifest(weights_files, WeightsManifest, directory / WEIGHTS)
    _check_files(graph_files, graph.files, directory / GRAPH)
    _check_files(weights_files, weights.files, directory / WEIGHTS)
    check_graph(graph)
    check_weights(weights, graph, graph_sha256)
    tensors = _load_tensors(weights_files, WEIGHTS_BLOB)
    _check_tensors(tensors, graph.bounds)
    stage_models = _stage_models(graph, graph_files, tensors, pause)
    pause()
    return Bundle(
        bundle_id=bundle_id_of(graph_sha256, weights_sha256),
        graph_sha256=graph_sha256,
        weights_sha256=weights_sha256,
        graph=graph,
        weights=weights,
        stage_models=stage_models,
        train_step=_train_step(graph, graph_files, stage_models, pause),
        golden_inputs=_golden_inputs(graph, graph_files),
        golden_outputs=_golden_outputs(weights, weights_files),
    )


def _read_part(directory: Path) -> tuple[dict[str, bytes], str]:
    if directory.is_symlink() or not directory.is_dir():
        raise BundleError(f"{directory}: no such directory; a bundle has the parts 'graph' and 'weights'")
    files: dict[str, bytes] = {}
    try:
        for path in sorted(directory.iterdir()):
            if not _FILE_NAME.fullmatch(path.name):
                raise BundleError(f"{path}: unexpected file name")
            limit = MAX_MANIFEST_BYTES if path.name == MANIFEST else MAX_FILE_BYTES
            files[path.name] = _read_regular_file(path, limit)
    except OSError as error:
        raise BundleError(f"{error.filename or directory}: {error.strerror}") from error
    if MANIFEST not in files:
        raise BundleError(f"{directory / MANIFEST}: missing")
    return files, hashlib.sha256(files[MANIFEST]).hexdigest()


def _read_regular_file(path: Path, max_bytes: int) -> bytes:
    # O_NOFOLLOW and fstat on the open file: what was checked is what is read, whatever the path becomes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: not a regular file")
        if status.st_size > max_bytes:
            raise BundleError(f"{path}: {status.st_size} bytes, at most {max_bytes} are read")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise BundleError(f"{path}: more than {max_bytes} bytes")
    return content


def _decode_manifest(files: Mapping[str, bytes], kind: type[ManifestT], directory: Path) -> ManifestT:
    try:
        return msgspec.json.decode(files[MANIFEST], type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{directory / MANIFEST}: {error}") from error


def _check_files(found: Mapping[str, bytes], named: Mapping[str, FileEntry], directory: Path) -> None:
    missing = named.keys() - found.keys()
    if missing:
        raise BundleError(f"{directory / min(missing)}: named in the manifest but missing")
    stray = found.keys() - named.keys() - {MANIFEST}
    if stray:
        raise BundleError(f"{directory / min(stray)}: not named in the manifest")
    for name, entry in named.items():
        if len(found[name]) != entry.size_bytes:
            raise BundleError(
                f"{directory / name}: {len(found[name])} bytes, the manifest says {entry.size_bytes}"
            )
        if hashlib.sha256(found[name]).hexdigest() != entry.sha256:
            raise BundleError(
                f"{directory / name}: its SHA-256 is not the one in the manifest; it is damaged"
            )


def _load_tensors(files: Mapping[str, bytes], name: str) -> dict[str, NDArray[np.generic]]:
    if name not in files:
        raise BundleError(f"{name}: missing")
    try:
        tensors: dict[str, NDArray[np.generic]] = load_safetensors(files[name])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{name}: {error}") from error
    return tensors


def _check_tensors(tensors: Mapping[str, NDArray[np.generic]], bounds: Bounds) -> None:
    for name, array in tensors.items():
        if array.dtype.kind != "f" or array.size == 0:
            continue
        # Written so that NaN fails as well.
        if not np.abs(array).max() <= bounds.max_abs_weight:
            raise BundleError(
                f"{WEIGHTS_BLOB}: {name} is not finite or exceeds the graph's bound {bounds.max_abs_weight}"
            )


def _stage_models(
    graph: GraphManifest,
    files: Mapping[str, bytes],
    tensors: Mapping[str, NDArray[np.generic]],
    pause: Pause,
) -> dict[tuple[int, Precision], StageModel]:
    models: dict[tuple[int, Precision], StageModel] = {}
    for index, stage in enumerate(graph.stages):
        for precision, name in stage.files.items():
            if name not in graph.files:
                raise BundleError(f"stage {index} in {precision}: its file {name!r} is not in the part")
            summary = _inspected_graph(graph, name, files, pause)
            _check_interface(summary, stage, where=name)
            models[index, precision] = StageModel(
                stage=index,
                precision=precision,
                model=files[name],
                summary=summary,
                weights=_weights_of(summary, precision, tensors, where=name),
                litert=_litert_model(graph, index, precision, files, pause),
            )
    return models


def _inspected_graph(
    graph: GraphManifest, name: str, files: Mapping[str, bytes], pause: Pause
) -> ModelSummary:
    def inspect() -> ModelSummary:
        pause()
        return inspect_model(files[name], pause=pause)

    return _GRAPHS.of(graph.files[name].sha256, inspect)


def _litert_model(
    graph: GraphManifest, index: int, precision: Precision, files: Mapping[str, bytes], pause: Pause
) -> LitertModel | None:
    stage = graph.stages[index]
    name = stage.litert.get(precision)
    if name is None:
        return None
    if name not in graph.files:
        raise BundleError(f"stage {index} in {precision}: its file {name!r} is not in the part")

    def inspect() -> TfliteSummary:
        pause()
        return inspect_tflite(files[name])

    summary = _LITERT_FILES.of(graph.files[name].sha256, inspect)
    check_stage_tensors(summary, stage.input_shape, stage.feature_shape, index=index, where=name)
    return LitertModel(files[name], summary)


def _train_step(
    graph: GraphManifest,
    files: Mapping[str, bytes],
    stages: Mapping[tuple[int, Precision], StageModel],
    pause: Pause,
) -> TrainStepModel | None:
    name = graph.train_step
    if name is None:
        return None
    if name not in graph.files:
        raise BundleError(f"its train step {name!r} is not in the graph part")
    step = read_train_step(
        files[name],
        _inspected_graph(graph, name, files, pause),
        input_shape=graph.stages[0].input_shape,
        classes=len(graph.labels),
        where=name,
    )
    given = {
        weight: (array.dtype.name, array.shape)
        for (_, precision), stage in stages.items()
        if precision == "fp32"
        for weight, array in stage.weights.items()
    }
    for parameter, shape in step.shapes.items():
        if given.get(parameter) != ("float32", shape):
            raise BundleError(f"{name}: no fp32 stage has the parameter {parameter!r} as float32 {shape}")
    if odd := set(graph.head_parameters) - step.shapes.keys():
        raise BundleError(f"{name}: the head parameter {min(odd)!r} is not one of its parameters")
    return step


def _check_interface(summary: ModelSummary, stage: Stage, *, where: str) -> None:
    inputs = {value.name: value for value in summary.inputs}
    outputs = {value.name for value in summary.outputs}
    expected_outputs = {STAGE_HEAD} if stage.feature_shape is None else {STAGE_HEAD, STAGE_FEATURES}
    if inputs.keys() != {STAGE_INPUT, STAGE_TEMPERATURE} or outputs != expected_outputs:
        raise BundleError(
            f"{where}: takes {sorted(inputs)} and gives {sorted(outputs)}, expected "
            f"{[STAGE_TEMPERATURE, STAGE_INPUT]} and {sorted(expected_outputs)}"
        )
    given = inputs[STAGE_INPUT]
    if given.dtype != "float32" or given.shape[1:] != stage.input_shape:
        raise BundleError(
            f"{where}: input is {given.dtype} {given.shape}, expected float32 {stage.input_shape}"
        )


def _weights_of(
    summary: ModelSummary, precision: Precision, tensors: Mapping[str, NDArray[np.generic]], *, where: str
) -> dict[str, NDArray[np.generic]]:
    weights: dict[str, NDArray[np.generic]] = {}
    for spec in summary.external:
        key = f"{precision}/{spec.name}"
        if key not in tensors:
            raise BundleError(f"{where}: needs the weight {key!r}, which the weights part does not have")
        weights[spec.name] = tensors[key]
    return weights


def _golden_inputs(graph: GraphManifest, files: Mapping[str, bytes]) -> NDArray[np.float32]:
    tensors = _load_tensors(files, GOLDEN_INPUTS)
    x = tensors.get(STAGE_INPUT)
    if x is None or x.dtype != np.float32 or x.shape[1:] != graph.input_shape:
        raise BundleError(f"{GOLDEN_INPUTS}: needs 'x' as float32 {graph.input_shape}")
    return x.astype(np.float32, copy=False)


def _golden_outputs(weights: WeightsManifest, files: Mapping[str, bytes]) -> dict[str, NDArray[np.float32]]:
    tensors = _load_tensors(files, GOLDEN_OUTPUTS)
    outputs: dict[str, NDArray[np.float32]] = {}
    for plan in weights.plans:
        for rung in range(len(plan.rungs)):
            key = f"{plan.name}/{rung}"
            if key not in tensors:
                raise BundleError(f"{GOLDEN_OUTPUTS}: {key!r} is missing")
            outputs[key] = tensors[key].astype(np.float32, copy=False)
    return outputs
