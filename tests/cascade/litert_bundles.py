"""A bundle with LiteRT files, in memory and on disk: `tiny_bundle` and what the builder writes for it."""

import dataclasses
import hashlib
import json

import pytest

from edge_cascade.bundle import LitertModel
from edge_cascade.tflite_file import inspect_tflite


def files_of(bundle):
    """The .tflite file of each (stage, precision)."""
    pytest.importorskip("flatbuffers")
    from cloud_hub.builder.graphs.staged import StagedGraph
    from cloud_hub.builder.graphs.stages import CutStage
    from cloud_hub.builder.litert.stage_files import litert_files

    stages = bundle.graph.stages
    shapes = StagedGraph(
        None,
        stages[0].input_shape,
        len(bundle.graph.labels),
        tuple(stage.feature_shape for stage in stages[:-1]),
        tuple(stage.mult_adds for stage in stages),
    )
    cuts = {}
    for (_, precision), stage in sorted(bundle.stage_models.items()):
        cuts.setdefault(precision, []).append(CutStage(stage.model, dict(stage.weights)))
    return litert_files(cuts, shapes)


def with_litert(bundle):
    """The bundle as it would be read, had it been built with LiteRT."""
    files = files_of(bundle)
    models = {
        key: dataclasses.replace(stage, litert=LitertModel(files[key], inspect_tflite(files[key])))
        for key, stage in bundle.stage_models.items()
    }
    return dataclasses.replace(bundle, stage_models=models)


def add_files(directory, files):
    """Put .tflite files into a bundle on disk, and their names into its manifests."""
    path = directory / "graph" / "manifest.json"
    manifest = json.loads(path.read_text())
    for (index, precision), content in files.items():
        name = f"stage{index}.{precision}.tflite"
        (directory / "graph" / name).write_bytes(content)
        manifest["stages"][index].setdefault("litert", {})[precision] = name
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        manifest["files"][name] = entry
    path.write_text(json.dumps(manifest))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path = directory / "weights" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"graph_sha256": digest}))
