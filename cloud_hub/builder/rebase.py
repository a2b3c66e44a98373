"""What a bundle whose network is kept says of the build: its samples, its names, and what trained it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from msgspec.structs import replace

from cloud_hub.builder.graphs.adopt import Classifier
from cloud_hub.builder.reports.card import Card
from cloud_hub.builder.reports.card_files import REPORT
from cloud_hub.builder.request import BuildRequest
from cloud_hub.errors import BuildError
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.errors import BundleError
from edge_cascade.manifest import GraphManifest
from edge_cascade.shipped import find_bundle

TRAINING: Final = "training"
"""What a report calls the data that trained the network."""


def read_base(name_or_path: str) -> Bundle:
    """The bundle whose network is kept.

    Raises:
        BuildError: when there is none, or it is damaged.
    """
    try:
        return load_bundle(find_bundle(name_or_path))
    except BundleError as error:
        raise BuildError(f"rebase: {error}") from error


def as_base(request: BuildRequest, graph: GraphManifest) -> BuildRequest:
    """The request with all that was not said of its samples as the bundle has it, its `scale` 1.

    Raises:
        BuildError: for what was said and differs: the network learned otherwise, or boards were told so.
    """
    scale = request.scale or 1.0
    # A scale alone is said of the mean and the deviation that it stands beside.
    mean, std = (
        tuple(one / scale for one in said or (usual,)) if said or request.scale else None
        for said, usual in ((request.mean, 0.0), (request.std, 1.0))
    )
    kept = {
        "mean": graph.preprocess.mean,
        "std": graph.preprocess.std,
        "layout": graph.preprocess.layout,
        "encoding": graph.wire.encoding,
        "wire_scale": graph.wire.scale,
        "window": None if graph.window is None else graph.window.length,
        "hop": None if graph.window is None else graph.window.hop,
    }
    said = {
        "mean": mean,
        "std": std,
        "layout": request.layout,
        "encoding": None if request.encoding == "auto" else request.encoding,
        "wire_scale": request.wire_scale,
        "window": request.window,
        "hop": request.hop,
    }
    for name, value in said.items():
        if value is not None and not _is_same(value, kept[name]):
            shown = f"{name} / scale" if name in {"mean", "std"} else name
            raise BuildError(
                f"rebase: {shown} is {_shown(value)}, that of the bundle {_shown(kept[name])}: leave it out, "
                "or build anew without rebase"
            )
    return replace(request, **kept, scale=1.0, model=request.model or graph.model)


def check_full(graph: GraphManifest, full: Classifier) -> None:
    """Refuse a full model of other samples or another number of classes.

    Raises:
        BuildError: naming what differs.
    """
    for name, old, new in (
        ("input shape", graph.preprocess.network_shape(graph.input_shape), full.input_shape),
        ("number of labels", len(graph.labels), full.classes),
    ):
        if old != new:
            raise BuildError(f"rebase: the bundle's {name} is {old}, that of the full model {new}")


def kept_labels(graph: GraphManifest, named: Sequence[str] | None) -> tuple[str, ...]:
    """The labels' names: the data's where it names them, else the bundle's.

    Raises:
        BuildError: where both name them, and differently.
    """
    if named is None or tuple(named) == graph.labels:
        return graph.labels
    if graph.labels != tuple(map(str, range(len(graph.labels)))):
        first = next(pair for pair in zip(graph.labels, named, strict=True) if pair[0] != pair[1])
        raise BuildError(
            f"rebase: the bundle calls a label {first[0]!r} that the data calls {first[1]!r}: both must name "
            "the same labels in the same order; give the data an array labels in that of the bundle"
        )
    return tuple(named)


def trained_on(name_or_path: str, bundle: Bundle) -> str | None:
    """The digest of the samples that trained a bundle's network, from the report beside it if there is one.

    A report that cannot be read, or that is about another bundle, says nothing.
    """
    report = find_bundle(name_or_path).parent / REPORT
    try:
        card = msgspec.json.decode(report.read_bytes(), type=Card)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if card.evaluation.bundle_id != bundle.bundle_id:
        return None
    return next((part.sha256 for part in card.data if part.name == TRAINING), None)


def _is_same(said: object, kept: object) -> bool:
    if isinstance(said, tuple) and isinstance(kept, tuple):
        # What is said with a scale may differ from what was said without one in the last place.
        return len(said) == len(kept) and np.allclose(said, kept, rtol=1e-6, atol=0.0)
    return said == kept


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{one:g}" for one in value)
    return "none" if value is None else str(value)
