"""Writes the directory of `edge_cascade.bundle`: two parts, each with a manifest of its files' digests.

The bytes depend on nothing but what is passed in: no time, no machine, no measurement.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors

from edge_cascade.bundle import (
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    GRAPH,
    MANIFEST,
    TRAIN_STEP,
    WEIGHTS,
    WEIGHTS_BLOB,
    bundle_id_of,
)
from edge_cascade.durable import sync_directory, write_durably
from edge_cascade.manifest import (
    FORMAT,
    STAGE_INPUT,
    Bounds,
    FileEntry,
    GraphManifest,
    Preprocess,
    Stage,
    WeightsManifest,
    Window,
    Wire,
)
from edge_cascade.policy import Certificate, Plan, Precision

_FRESH: Final = ".new"
_STALE: Final = ".old"


@dataclass(frozen=True, slots=True)
class GraphPart:
    """What the graph part's manifest says and its files hold, all but the digests."""

    model: str
    version: str
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    preprocess: Preprocess
    window: Window | None
    wire: Wire
    stages: tuple[Stage, ...]
    stage_files: Mapping[str, bytes]
    golden_inputs: NDArray[np.float32]
    full_model_sha256: str
    bounds: Bounds
    min_daemon: str
    train_step: bytes | None = None
    head_parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightsPart:
    """What the weights part's manifest says and its files hold, all but the digests.

    `tensors` are keyed as in the blob, `golden_outputs` as `<plan>/<rung>`.
    """

    tensors: Mapping[str, NDArray[np.generic]]
    plans: tuple[Plan, ...]
    default_plan: str
    certificates: tuple[Certificate, ...]
    golden_outputs: Mapping[str, NDArray[np.float32]]
    tolerance: Mapping[Precision, float]


def write_bundle(directory: Path, graph: GraphPart, weights: WeightsPart) -> str:
    """Write a bundle as `directory`, replacing what is there, and return its id.

    It is written beside `directory` and renamed, so a reader finds the old bundle, none or the new one, never
    a part of one. What fails leaves the old bundle; if the process is killed between the two renames,
    `recover_bundle` of the next write brings it back. The full model is not in it; only its digest is.

    Raises:
        OSError: as it came (disk full, read-only); the old bundle is then still there.
    """
    graph_files, graph_manifest = _graph_files(graph)
    graph_sha256 = hashlib.sha256(graph_manifest).hexdigest()
    weights_files = {
        WEIGHTS_BLOB: save_safetensors(dict(weights.tensors)),
        GOLDEN_OUTPUTS: save_safetensors(dict(weights.golden_outputs)),
    }
    weights_manifest = msgspec.json.encode(
        WeightsManifest(
            format=FORMAT,
            graph_sha256=graph_sha256,
            plans=weights.plans,
            default_plan=weights.default_plan,
            certificates=weights.certificates,
            tolerance=dict(weights.tolerance),
            files=_entries(weights_files),
        )
    )
    _replace_directory(
        directory,
        {
            GRAPH: {**graph_files, MANIFEST: graph_manifest},
            WEIGHTS: {**weights_files, MANIFEST: weights_manifest},
        },
    )
    return bundle_id_of(graph_sha256, hashlib.sha256(weights_manifest).hexdigest())


def graph_digest(graph: GraphPart) -> str:
    """The digest that a graph part will have."""
    return hashlib.sha256(_graph_files(graph)[1]).hexdigest()


def _graph_files(graph: GraphPart) -> tuple[dict[str, bytes], bytes]:
    """The files of a graph part, and its manifest."""
    files = {**graph.stage_files, GOLDEN_INPUTS: save_safetensors({STAGE_INPUT: graph.golden_inputs})}
    if graph.train_step is not None:
        files[TRAIN_STEP] = graph.train_step
    return files, msgspec.json.encode(
        GraphManifest(
            format=FORMAT,
            model=graph.model,
            version=graph.version,
            labels=graph.labels,
            input_shape=graph.input_shape,
            preprocess=graph.preprocess,
            window=graph.window,
            wire=graph.wire,
            stages=graph.stages,
            full_model_sha256=graph.full_model_sha256,
            bounds=graph.bounds,
            min_daemon=graph.min_daemon,
            files=_entries(files),
            train_step=None if graph.train_step is None else TRAIN_STEP,
            head_parameters=graph.head_parameters,
        )
    )


def recover_bundle(directory: Path) -> None:
    """Tidy up after a write that was killed: bring the old bundle back, or drop it if there is one.

    A second build of the same directory must not be at work.

    Raises:
        OSError: when the old bundle cannot be renamed; it then stays where it is.
    """
    hidden = glob.escape(f".{directory.name}.")
    stale = sorted(directory.parent.glob(f"{hidden}*{_STALE}"), key=lambda path: path.stat().st_mtime_ns)
    if stale and not directory.exists():
        stale.pop().rename(directory)
        sync_directory(directory.parent)
    for path in (*stale, *directory.parent.glob(f"{hidden}*{_FRESH}")):
        shutil.rmtree(path, ignore_errors=True)


def _entries(files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    return {
        name: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
        for name, content in sorted(files.items())
    }


def _replace_directory(directory: Path, parts: Mapping[str, Mapping[str, bytes]]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover_bundle(directory)
    fresh = directory.with_name(f".{directory.name}.{os.getpid()}{_FRESH}")
    stale = directory.with_name(f".{directory.name}.{os.getpid()}{_STALE}")
    try:
        for part, files in parts.items():
            (fresh / part).mkdir(parents=True)
            for name, content in files.items():
                write_durably(fresh / part / name, content)
        sync_directory(fresh)
        _exchange(directory, fresh, stale)
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(stale, ignore_errors=True)


def _exchange(directory: Path, fresh: Path, stale: Path) -> None:
    """Put `fresh` in the place of `directory`, which becomes `stale`; what fails leaves `directory` there."""
    # A directory cannot be renamed onto one that holds something.
    if directory.exists():
        directory.rename(stale)
    try:
        fresh.rename(directory)
    except BaseException:
        if stale.exists():
            stale.rename(directory)
        raise
