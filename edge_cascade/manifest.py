"""What the two manifests of a bundle say, and whether they contradict themselves. No I/O: see `bundle`."""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec
import numpy as np

from edge_cascade.errors import BundleError
from edge_cascade.policy import Certificate, Plan, Precision, check_plan

FORMAT: Final = 1

STAGE_INPUT: Final = "x"
STAGE_TEMPERATURE: Final = "temperature"
STAGE_FEATURES: Final = "features"
STAGE_HEAD: Final = "head"

MAX_LABELS: Final = 4096
# As float32 these are the 16 MiB that the hub decodes at most.
MAX_INPUT_ELEMENTS: Final = 2**22

Layout = Literal["channels_first", "channels_last"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Digest and length of one file of a part."""

    sha256: str
    size_bytes: int


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`(x - mean) / std`, one value each or one per channel; then channels to the front.

    `layout` says which axis of a sample holds the channels: the first, or the last (as in most images).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Layout = "channels_first"

    def network_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what the network is given of a sample of this shape."""
        if self.layout == "channels_last":
            return (sample_shape[-1], *sample_shape[:-1])
        return sample_shape


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a stream becomes samples: `length` values per channel, the next window `hop` values later."""

    length: int
    hop: int


class Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an input travels: `float32` as it is, or `int8` or `uint8` as round(x / scale) with saturation.

    `scale` None: chosen per tensor so that its largest magnitude becomes 127 (255). Calibration sees inputs
    only after they have passed through this.
    """

    encoding: Literal["float32", "int8", "uint8"]
    scale: float | None = None


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One segment of the network. `feature_shape` (without the batch axis) is None for the last stage.

    `files` are for onnxruntime; `litert` are the same segment as .tflite, their weights inside.
    """

    files: dict[Precision, str]
    input_shape: tuple[int, ...]
    feature_shape: tuple[int, ...] | None
    mult_adds: int
    litert: dict[Precision, str] = {}


class Norms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """L2 norms that no weights may exceed: all of one precision together, and each tensor by its name.

    How tensors are named and quantised ones are read: see `bounds`.
    """

    together: float
    each: dict[str, float]


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How far a weights part may move: the graph part's signature covers these limits.

    Those with a default hold for every weights part that the hub signs online; see `signed_releases`.
    """

    max_abs_weight: float
    max_accept_score: float
    """No rung but the last point of a chain may accept a score above this."""
    max_epsilon: float = 0.05
    """No certificate may promise less than this (accuracy lost, 0..1)."""
    norms: Norms | None = None
    """None: those hold that the graph was signed with; see `signed_releases.PartNote`."""
    min_temperature: float = 0.05
    max_temperature: float = 20.0


class GraphManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model is, apart from its weights.

    `train_step` names the file by which boards learn; `head_parameters` are those of its parameters that
    belong to the exits' heads and may stay on the board (FedPer, Arivazhagan 2019, arXiv 1912.00818).
    """

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
    head_parameters: tuple[str, ...] = ()


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


def check_graph(graph: GraphManifest) -> None:
    """Refuse a graph manifest that contradicts itself.

    Raises:
        BundleError: naming the model and what is wrong.
    """
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
    expected: tuple[int, ...] | None = graph.preprocess.network_shape(graph.input_shape)
    for index, stage in enumerate(graph.stages):
        if stage.input_shape != expected:
            raise BundleError(f"{where}: stage {index} takes {stage.input_shape}, it is given {expected}")
        if not stage.files:
            raise BundleError(f"{where}: stage {index} has no files")
        if stage.litert.keys() - stage.files.keys():
            raise BundleError(f"{where}: stage {index} is there for LiteRT alone in {min(stage.litert)}")
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
        if len(values) not in {1, graph.preprocess.network_shape(graph.input_shape)[0]}:
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


def check_weights(weights: WeightsManifest, graph: GraphManifest, graph_sha256: str) -> None:
    """Refuse a weights manifest that contradicts itself or the graph whose digest is `graph_sha256`.

    Raises:
        BundleError: naming the model and what is wrong.
    """
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
