"""What every build begins with: the data, the full model, and what the bundle will say of its samples.

The full model is tried on D_opt. Of D_cal no more is looked at than `samples.splits` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cloud_hub.builder.assemble import FULL_MODEL, Declaration
from cloud_hub.builder.collect import full_labels, received
from cloud_hub.builder.costs import check_profile
from cloud_hub.builder.graphs.adopt import Classifier, adopt
from cloud_hub.builder.rebase import as_base, check_full, kept_labels, read_base, trained_on
from cloud_hub.builder.request import BuildRequest
from cloud_hub.builder.samples.data import Dataset, Parts, Shape, data_sha256, fit_parts, label_names
from cloud_hub.builder.samples.load import Keys, load_parts
from cloud_hub.builder.samples.splits import Splits, split_parts
from cloud_hub.errors import BuildError
from edge_cascade.bundle import Bundle
from edge_cascade.manifest import Layout, Preprocess, Window, Wire

MIN_FULL_ACCURACY: Final = 1.5
"""A full model that is not this many times better than guessing was fed something else than it learned."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Checked inputs. The full model takes samples as `declaration.preprocess` normalises them.

    `base` is the bundle whose network is kept, where the request rebases one.
    """

    declaration: Declaration
    full: Classifier
    full_file: bytes
    splits: Splits
    notes: tuple[str, ...]
    base: Bundle | None = None


def prepare(request: BuildRequest) -> Prepared:
    """Read and check everything that a build is given.

    Raises:
        BuildError: in one line: what was wrong, where, and what can be done.
    """
    if request.profile is not None:
        check_profile(Path(request.profile))
    base = None if request.rebase is None else read_base(request.rebase)
    if base is not None:
        request = as_base(request, base.graph)
    layout = layout_of(request)
    parts = load_parts(
        Path(request.data),
        keys=Keys(request.x_key, request.y_key, request.groups_key, request.labels_key),
        max_bytes=request.max_bytes,
    )
    full = adopt(Path(request.full), sample_shape=_network_shape(parts, layout), role="full model")
    if base is not None:
        check_full(base.graph, full)
    parts = fit_parts(parts, full.input_shape, layout)
    _check_reference(request, parts)
    declaration = _declare(request, parts, _labels(parts, full, base))
    full_file = full.to_bytes()
    _keep_users_file(request, full_file)
    splits = split_parts(parts, seed=request.seed, overlap=_overlap(request))
    if parts.calibration is None:
        _check_fresh(request, splits.train, base)
    notes = (*splits.notes, *_judge_full(full_file, splits.optimise, declaration))
    return Prepared(declaration, full, full_file, splits, notes, base)


def layout_of(request: BuildRequest) -> Layout:
    """The layout that was said, else channels first."""
    return request.layout or "channels_first"


def preprocess_of(request: BuildRequest) -> Preprocess:
    """`(x * scale - mean) / std` with the scale drawn into the other two."""
    scale = request.scale or 1.0
    return Preprocess(
        mean=tuple(value / scale for value in request.mean or (0.0,)),
        std=tuple(value / scale for value in request.std or (1.0,)),
        layout=layout_of(request),
    )


def wire_of(request: BuildRequest, parts: Parts) -> Wire:
    """How samples travel; `auto` keeps whole grey levels as they are and gives all else eight bits."""
    encoding = request.encoding or "auto"
    if encoding == "auto":
        if all(part.stored_as == "uint8" for _, part in parts):
            return Wire("uint8", request.wire_scale or 1.0)
        return Wire("int8", request.wire_scale)
    return Wire(encoding, request.wire_scale)


def _keep_users_file(request: BuildRequest, full_file: bytes) -> None:
    """Refuse to replace the file that the user gave by another form of it."""
    given, written = Path(request.full), Path(request.out) / FULL_MODEL
    if written.exists() and written.samefile(given) and given.read_bytes() != full_file:
        raise BuildError(f"out: {written} is your full model and would be replaced: choose another directory")


def _network_shape(parts: Parts, layout: Layout) -> Shape | None:
    """What the data suggests for a model whose file leaves sizes open."""
    shape = next(iter(parts))[1].sample_shape
    if layout == "channels_last" and len(shape) > 1:
        return (shape[-1], *shape[:-1])
    return shape


def _check_reference(request: BuildRequest, parts: Parts) -> None:
    judged = parts.train if parts.calibration is None else parts.calibration
    if request.disagreement_epsilon is not None and judged is not None and judged.y is None:
        raise BuildError(
            "disagreement_epsilon does nothing with data without labels, where epsilon is what bounds the "
            "disagreement: leave it out"
        )


def _check_fresh(request: BuildRequest, train: Dataset, base: Bundle | None) -> None:
    """Refuse to certify a network that was made elsewhere on data that it may have learned from."""
    if request.calibration_is_fresh or (request.edge is None and request.rebase is None):
        return
    if request.rebase is not None and base is not None:
        if trained_on(request.rebase, base) == data_sha256(train):
            return
        why = "rebase: the bundle's network may have learned from the data that would certify it"
    else:
        why = "edge: your network may have learned from the data that would certify it"
    raise BuildError(
        f"{why}: give calibration data of its own (x_calibration), or say --calibration-is-fresh if the "
        "network has seen none of the data"
    )


def _labels(parts: Parts, full: Classifier, base: Bundle | None) -> tuple[str, ...]:
    names = label_names(parts, full.classes)
    if base is None:
        return names
    return kept_labels(base.graph, None if all(part.names is None for _, part in parts) else names)


def _declare(request: BuildRequest, parts: Parts, labels: tuple[str, ...]) -> Declaration:
    sample_shape = next(iter(parts))[1].sample_shape
    preprocess = preprocess_of(request)
    channels = preprocess.network_shape(sample_shape)[0]
    for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        if len(values) not in {1, channels}:
            raise BuildError(
                f"{name} has {len(values)} values, samples have {channels} channels: give one value, or one "
                "for each channel"
            )
    _check_single_precision(request, preprocess)
    wire = wire_of(request, parts)
    if wire.encoding == "uint8" and any(part.x.min() < 0 for _, part in parts):
        raise BuildError("encoding = uint8: some samples have values below 0: choose int8 or float32")
    if request.window is not None and request.window != sample_shape[-1]:
        raise BuildError(
            f"window = {request.window}, but samples are {sample_shape}: their last axis is time"
        )
    return Declaration(
        model=request.model or _name_from(Path(request.out)),
        labels=labels,
        input_shape=sample_shape,
        preprocess=preprocess,
        wire=wire,
        window=None if request.window is None else Window(request.window, request.hop or request.window),
        version=request.version,
    )


def _check_single_precision(request: BuildRequest, preprocess: Preprocess) -> None:
    """Boards compute in float32: what is finite in double precision need not be there."""
    # As Python's own floats: numpy would compare in float32, which these values may overflow.
    largest, smallest = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
    if any(abs(value) > largest for value in preprocess.mean):
        raise BuildError("mean / scale is more than float32 can hold")
    if not all(smallest <= value <= largest / 2**10 for value in preprocess.std):
        raise BuildError("std / scale is more or less than float32 can divide by")
    if request.wire_scale is not None and not smallest <= request.wire_scale <= largest:
        raise BuildError(f"wire_scale = {request.wire_scale}: float32 cannot hold that")


def _name_from(out: Path) -> str:
    plain = out.resolve().name
    name = "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "-" for char in plain)
    return name.strip("-_")[:64] or "model"


def _overlap(request: BuildRequest) -> Window | None:
    if not request.window_overlap:
        return None
    if request.window is None or request.window_overlap >= request.window:
        raise BuildError(
            f"window_overlap = {request.window_overlap}: needs window, the length of a sample, and is "
            "less than it"
        )
    return Window(request.window, request.window - request.window_overlap)


def _judge_full(full_file: bytes, data: Dataset, declaration: Declaration) -> list[str]:
    """Refuse a full model that guesses, and say how good it is."""
    if data.y is None:
        return ["no calibration labels: what is certified is agreement with the full model, right or wrong"]
    answers = full_labels(full_file, received(data.x, declaration.preprocess, declaration.wire))
    accuracy = float(np.mean(answers == data.y))
    guessing = float(np.bincount(data.y).max() / len(data.y))
    if accuracy <= min(MIN_FULL_ACCURACY / len(declaration.labels), guessing):
        raise BuildError(
            f"full model: right on {100 * accuracy:.1f} % of the data for thresholds, as good as guessing: "
            "are the labels in the order of its outputs, and mean, std, scale and layout those it learned "
            "with?"
        )
    return [f"the full model is right on {100 * accuracy:.2f} % of the data for thresholds"]
