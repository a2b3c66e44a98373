"""What every build begins with: the data, the full model, and what the bundle will say of its samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cloud_hub.builder.assemble import FULL_MODEL, Declaration
from cloud_hub.builder.collect import full_labels, received
from cloud_hub.builder.graphs.adopt import Classifier, adopt
from cloud_hub.builder.request import BuildRequest
from cloud_hub.builder.samples.data import Dataset, Parts, Shape, fit_parts, label_names
from cloud_hub.builder.samples.load import Keys, load_parts
from cloud_hub.builder.samples.splits import Splits, split_parts
from cloud_hub.errors import BuildError
from edge_cascade.manifest import Preprocess, Window, Wire

MIN_FULL_ACCURACY: Final = 1.5
"""A full model that is not this many times better than guessing was fed something else than it learned."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Checked inputs. The full model takes samples as `declaration.preprocess` normalises them."""

    declaration: Declaration
    full: Classifier
    full_file: bytes
    splits: Splits
    notes: tuple[str, ...]

    @property
    def labelled(self) -> bool:
        """Whether the truth is known; else the full model's answers stand for it."""
        return self.splits.calibrate.y is not None


def prepare(request: BuildRequest) -> Prepared:
    """Read and check everything that a build is given.

    Raises:
        BuildError: in one line: what was wrong, where, and what can be done.
    """
    parts = load_parts(
        Path(request.data),
        keys=Keys(request.x_key, request.y_key, request.groups_key, request.labels_key),
        max_bytes=request.max_bytes,
    )
    full = adopt(Path(request.full), sample_shape=_network_shape(parts, request), role="full model")
    parts = fit_parts(parts, full.input_shape, request.layout)
    declaration = _declare(request, parts, full)
    full_file = full.to_bytes()
    _keep_users_file(request, full_file)
    splits = split_parts(parts, seed=request.seed, overlap=_overlap(request))
    notes = (*splits.notes, *_judge_full(full_file, splits.calibrate, declaration))
    return Prepared(declaration, full, full_file, splits, notes)


def preprocess_of(request: BuildRequest) -> Preprocess:
    """`(x * scale - mean) / std` with the scale drawn into the other two."""
    return Preprocess(
        mean=tuple(value / request.scale for value in request.mean),
        std=tuple(value / request.scale for value in request.std),
        layout=request.layout,
    )


def wire_of(request: BuildRequest, parts: Parts) -> Wire:
    """How samples travel; `auto` keeps whole grey levels as they are and gives all else eight bits."""
    if request.encoding == "auto":
        if all(part.stored_as == "uint8" for _, part in parts):
            return Wire("uint8", request.wire_scale or 1.0)
        return Wire("int8", request.wire_scale)
    return Wire(request.encoding, request.wire_scale)


def _keep_users_file(request: BuildRequest, full_file: bytes) -> None:
    """Refuse to replace the file that the user gave by another form of it."""
    given, written = Path(request.full), Path(request.out) / FULL_MODEL
    if written.exists() and written.samefile(given) and given.read_bytes() != full_file:
        raise BuildError(f"out: {written} is your full model and would be replaced: choose another directory")


def _network_shape(parts: Parts, request: BuildRequest) -> Shape | None:
    """What the data suggests for a model whose file leaves sizes open."""
    shape = next(iter(parts))[1].sample_shape
    if request.layout == "channels_last" and len(shape) > 1:
        return (shape[-1], *shape[:-1])
    return shape


def _declare(request: BuildRequest, parts: Parts, full: Classifier) -> Declaration:
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
        labels=label_names(parts, full.classes),
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
            f"full model: right on {100 * accuracy:.1f} % of the calibration data, as good as guessing: are "
            "the labels in the order of its outputs, and mean, std, scale and layout those it learned with?"
        )
    return [f"the full model is right on {100 * accuracy:.2f} % of the calibration data"]
