"""Bundles on disk: what they hold, read whole and checked before anything of them is used.

    bundle/
      graph/manifest.json            GraphManifest
      graph/stage0.fp32.onnx         one file per (stage, precision), without weights
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
from typing import Final, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from edge_cascade.errors import BundleError
from edge_cascade.onnx_file import ModelSummary, inspect_model
from edge_cascade.policy import Certificate, Plan, Precision, check_plan

FORMAT: Final = 1
GRAPH: Final = "graph"
WEIGHTS: Final = "weights"
MANIFEST: Final = "manifest.json"
WEIGHTS_BLOB: Final = "weights.safetensors"
GOLDEN_INPUTS: Final = "golden_inputs.safetensors"
GOLDEN_OUTPUTS: Final = "golden_outputs.safetensors"

STAGE_INPUT: Final = "x"
STAGE_TEMPERATURE: Final = "temperature"
STAGE_FEATURES: Final = "features"
STAGE_HEAD: Final = "head"

MAX_MANIFEST_BYTES: Final = 4 * 2**20
MAX_FILE_BYTES: Final = 256 * 2**20
MAX_LABELS: Final = 4096
# As float32 these are the 16 MiB that the hub decodes at most.
MAX_INPUT_ELEMENTS: Final = 2**22

ManifestT = TypeVar("ManifestT", bound=msgspec.Struct)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Digest and length of one file of a part."""

    sha256: str
    size_bytes: int


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`(x - mean) / std`, one value each or one per entry of the input's first axis (channels)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a stream becomes samples: `length` values per channel, the next window `hop` values later."""

    length: int
    hop: int


class Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an input travels: `float32` as it is, or `int8` as round(x / scale) with saturation.

    `scale` None: chosen per tensor so that its largest magnitude becomes 127. Calibration sees inputs only
    after they have passed through this.
    """

    encoding: Literal["float32", "int8"]
    scale: float | None = None


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One segment of the network. `feature_shape` (without the batch axis) is None for the last stage."""

    files: dict[Precision, str]
    input_shape: tuple[int, ...]
    feature_shape: tuple[int, ...] | None
    mult_adds: int


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a weights part may move: the graph part's signature covers these limits."""

    max_abs_weight: float
    max_accept_score: float
    """No rung but the last point of a chain may accept a score above this."""


class GraphManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model is, apart from its weights."""

    format: int
    model: str
    version: str
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    preprocess: Preprocess
    window: Window | None
    wire: Wire
    stages: tuple[Stage, ...]
    full_model_sha256: str
    bounds: Bounds
    min_daemon: str
    files: dict[str, FileEntry]
    train_step: str | None = None


class WeightsManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may change without a new graph: weights, temperatures, plans, certificates.

    `tolerance` bounds, per precision, how far a device's probabilities and scores may lie from the golden
    outputs; `base` and `delta_encoding` say what a weights blob sent as a difference applies to.
    """

    format: int
    graph_sha256: str
    plans: tuple[Plan, ...]
    default_plan: str
    certificates: tuple[Certificate, ...]
    tolerance: dict[Precision, float]
    files: dict[str, FileEntry]
    base: str | None = None
    delta_encoding: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class StageModel:
    """One checked stage: its serialised graph, the checker's summary, and the arrays it will be given."""

    stage: int
    precision: Precision
    model: bytes
    summary: ModelSummary
    weights: Mapping[str, NDArray[np.generic]]

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


def bundle_id_of(graph_sha256: str, weights_sha256: str) -> str:
    """The id of the bundle made of these two parts."""
    return hashlib.sha256(f"{graph_sha256}\n{weights_sha256}\n".encode()).hexdigest()


def load_bundle(directory: Path) -> Bundle:
    """Read and check a whole bundle.

    Raises:
        BundleError: naming the file and what is wrong with it.
        HostileFileError: when a model file asks for something no honest file needs.
    """
    graph_files, graph_sha256 = _read_part(directory / GRAPH)
    weights_files, weights_sha256 = _read_part(directory / WEIGHTS)
    graph = _decode_manifest(graph_files, GraphManifest, directory / GRAPH)
    weights = _decode_manifest(weights_files, WeightsManifest, directory / WEIGHTS)
    _check_files(graph_files, graph.files, directory / GRAPH)
    _check_files(weights_files, weights.files, directory / WEIGHTS)
    _check_graph(graph)
    _check_weights(weights, graph, graph_sha256)
    tensors = _load_tensors(weights_files, WEIGHTS_BLOB)
    _check_tensors(tensors, graph.bounds)
    return Bundle(
        bundle_id=bundle_id_of(graph_sha256, weights_sha256),
        graph_sha256=graph_sha256,
        weights_sha256=weights_sha256,
        graph=graph,
        weights=weights,
        stage_models=_stage_models(graph, graph_files, tensors),
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


def _check_graph(graph: GraphManifest) -> None:
    where = f"graph of {graph.model!r}"
    if graph.format != FORMAT:
        raise BundleError(f"{where}: bundle format {graph.format}, this version reads {FORMAT}")
    if not _MODEL_NAME.fullmatch(graph.model):
        raise BundleError(f"model name {graph.model!r} is not 1 to 64 letters, digits, '-' or '_'")
    if not 2 <= len(graph.labels) <= MAX_LABELS or len(set(graph.labels)) != len(graph.labels):
        raise BundleError(f"{where}: needs 2 to {MAX_LABELS} different labels, has {len(graph.labels)}")
    if not _SHA256.fullmatch(graph.full_model_sha256):
        raise BundleError(f"{where}: full_model_sha256 is no SHA-256")
    _check_shape(graph.input_shape, where=f"{where}: input_shape")
    _check_input(graph, where)
    _check_stages(graph, where)


def _check_stages(graph: GraphManifest, where: str) -> None:
    if not graph.stages:
        raise BundleError(f"{where}: no stages")
    expected: tuple[int, ...] | None = graph.input_shape
    for index, stage in enumerate(graph.stages):
        if stage.input_shape != expected:
            raise BundleError(f"{where}: stage {index} takes {stage.input_shape}, it is given {expected}")
        if not stage.files:
            raise BundleError(f"{where}: stage {index} has no files")
        expected = stage.feature_shape
        is_last = index == len(graph.stages) - 1
        if (expected is None) != is_last:
            raise BundleError(f"{where}: only the last stage has no features, stage {index} breaks this")
        if expected is not None:
            _check_shape(expected, where=f"{where}: stage {index} feature_shape")


def _check_shape(shape: tuple[int, ...], *, where: str) -> None:
    elements = 1
    for size in shape:
        if not 1 <= size <= MAX_INPUT_ELEMENTS:
            raise BundleError(f"{where} {shape}: every size is 1 to {MAX_INPUT_ELEMENTS}")
        elements *= size
    if not 1 <= len(shape) <= 4 or elements > MAX_INPUT_ELEMENTS:
        raise BundleError(f"{where} {shape}: 1 to 4 axes and at most {MAX_INPUT_ELEMENTS} values")


def _check_input(graph: GraphManifest, where: str) -> None:
    for name, values in (("mean", graph.preprocess.mean), ("std", graph.preprocess.std)):
        if len(values) not in {1, graph.input_shape[0]}:
            raise BundleError(f"{where}: preprocess.{name} has {len(values)} values for {graph.input_shape}")
    if not all(np.isfinite(graph.preprocess.mean)):
        raise BundleError(f"{where}: preprocess.mean is not finite")
    if not all(0 < value < float("inf") for value in graph.preprocess.std):
        raise BundleError(f"{where}: preprocess.std must be positive")
    if graph.wire.scale is not None and not 0 < graph.wire.scale < float("inf"):
        raise BundleError(f"{where}: wire scale {graph.wire.scale} is not a positive number")
    if graph.window is None:
        return
    if not 1 <= graph.window.hop <= graph.window.length:
        raise BundleError(f"{where}: a window needs 1 <= hop <= length, got {graph.window}")
    if graph.window.length != graph.input_shape[-1]:
        raise BundleError(
            f"{where}: a window of {graph.window.length} values for the input {graph.input_shape}"
        )


def _check_weights(weights: WeightsManifest, graph: GraphManifest, graph_sha256: str) -> None:
    where = f"weights of {graph.model!r}"
    if weights.format != FORMAT:
        raise BundleError(f"{where}: bundle format {weights.format}, this version reads {FORMAT}")
    if weights.graph_sha256 != graph_sha256:
        raise BundleError(f"{where}: made for the graph {weights.graph_sha256[:12]}, not {graph_sha256[:12]}")
    if weights.base is not None or weights.delta_encoding is not None:
        raise BundleError(f"{where}: sent as a difference, which this version does not read")
    names = [plan.name for plan in weights.plans]
    if not names or len(set(names)) != len(names) or weights.default_plan not in names:
        raise BundleError(f"{where}: plans {names} with default {weights.default_plan!r}")
    for plan in weights.plans:
        _check_plan_of(graph, plan, where)
    for certificate in weights.certificates:
        if certificate.plan not in names:
            raise BundleError(f"{where}: a certificate for the unknown plan {certificate.plan!r}")
    for precision, tolerance in weights.tolerance.items():
        if not 0 <= tolerance <= 1:
            raise BundleError(f"{where}: tolerance {tolerance} of {precision} outside 0..1")


def _check_plan_of(graph: GraphManifest, plan: Plan, where: str) -> None:
    check_plan(plan, stages=len(graph.stages))
    for rung in plan.rungs:
        if rung.precision not in graph.stages[rung.stage].files:
            raise BundleError(f"{where}: plan {plan.name!r} needs stage {rung.stage} in {rung.precision}")
    for point in plan.points[:-1]:
        if max(point.max_score) > graph.bounds.max_accept_score:
            raise BundleError(f"{where}: plan {plan.name!r} accepts scores above the graph's bound")


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
    graph: GraphManifest, files: Mapping[str, bytes], tensors: Mapping[str, NDArray[np.generic]]
) -> dict[tuple[int, Precision], StageModel]:
    models: dict[tuple[int, Precision], StageModel] = {}
    for index, stage in enumerate(graph.stages):
        for precision, name in stage.files.items():
            if name not in graph.files:
                raise BundleError(f"stage {index} in {precision}: its file {name!r} is not in the part")
            summary = inspect_model(files[name])
            _check_interface(summary, stage, where=name)
            models[index, precision] = StageModel(
                stage=index,
                precision=precision,
                model=files[name],
                summary=summary,
                weights=_weights_of(summary, precision, tensors, where=name),
            )
    return models


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
