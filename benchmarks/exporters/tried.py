"""One file that nobody prepared, through what `cloud-hub build --edge` does with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.exporters.architectures import Shape
from benchmarks.exporters.exports import Batch, Exporter
from cloud_hub.builder.build import build
from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.graphs.cuts import find_cuts, prepare_cuts
from cloud_hub.builder.request import make_request
from cloud_hub.errors import HubError
from edge_cascade.backends.onnx import open_whole_model

Floats = NDArray[np.float32]

EPSILON: Final = 0.02
TRAINING, CALIBRATION = 256, 700


@dataclass(frozen=True, slots=True)
class Original:
    """What the model itself says of some samples; `said_as` turns logits into what it says."""

    x: Floats
    said: Floats
    said_as: Callable[[Floats], Floats] = lambda logits: logits


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of one file.

    `places` are all the values it can be cut at, `exits` the shares of the work behind which exits go by
    default. `off_by` is the largest deviation from the original's answers, as a share of the largest of them.
    `refused` is the message, where it was.
    """

    name: str
    exporter: Exporter
    batch: Batch
    places: int = 0
    exits: tuple[float, ...] = ()
    off_by: float = math.nan
    refused: str = ""


@dataclass(frozen=True, slots=True)
class BuiltEdge:
    """A certified bundle, its network the file with exits: the plan in use, its share of work and uploads."""

    plan: str
    mult_adds: float
    upload_share: float
    refused: str = ""


def try_file(name: str, exporter: Exporter, batch: Batch, path: Path, original: Original) -> Tried:
    """Adopt a file, hold its answers against the original's, and look where it can be cut."""
    try:
        classifier = adopt(path, sample_shape=original.x.shape[1:], role="edge network")
        plan = find_cuts(classifier)
        chosen = prepare_cuts(classifier)
    except HubError as error:
        return Tried(name, exporter, batch, refused=str(error).partition(f"{path}: ")[2] or str(error))
    return Tried(
        name,
        exporter,
        batch,
        places=len(plan.cuts),
        exits=tuple(cut.share for cut in chosen.cuts),
        off_by=deviation(
            original.said_as(open_whole_model(classifier.to_bytes())(original.x)), original.said
        ),
    )


def deviation(said: Floats, expected: Floats) -> float:
    """The largest difference, as a share of the largest answer or of 1."""
    return float(np.abs(said - expected).max() / max(1.0, float(np.abs(expected).max())))


def build_edge(path: Path, shape: Shape, folder: Path, console: Console) -> BuiltEdge:
    """All of `cloud-hub build --edge`, the file as full model too, on noise: what is certified is agreement."""
    rng = np.random.default_rng(0)
    data = folder / "noise.npz"
    arrays: dict[str, Any] = {
        f"x_{part}": rng.standard_normal((count, *shape)).astype(np.float32)
        for part, count in (("train", TRAINING), ("calibration", CALIBRATION))
    }
    np.savez(data, **arrays)
    request = {"full": str(path), "edge": str(path), "data": str(data), "out": str(folder / "bundle")}
    try:
        built = build(make_request({**request, "epsilon": EPSILON, "plans": ("int8", "fp32")}), console)
    except HubError as error:
        return BuiltEdge("", math.nan, math.nan, str(error))
    seen = built.card.evaluation
    plan = "" if built.certified is None else built.certified.default_plan
    return BuiltEdge(plan, seen.compute_share, seen.upload_share)
