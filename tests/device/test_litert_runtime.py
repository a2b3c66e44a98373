"""The device's choice of a runtime: a bundle served on LiteRT, and one line where it cannot be."""

import itertools
import random
import shutil

import numpy as np
import pytest

from edge_cascade.bundle import load_bundle
from edge_daemon.config import AuditConfig, ModelConfig
from edge_daemon.errors import ModelError
from edge_daemon.models import Numbering, open_pipelines
from tests.cascade.litert_bundles import add_files, files_of


def open_on(directory, runtime):
    models = (ModelConfig(bundle=str(directory), runtime=runtime),)
    numbering = Numbering(b"boot", itertools.count().__next__)
    pipelines = open_pipelines(
        models, AuditConfig(rate=0.0), numbering, rng=random.Random(0), now_s=lambda: 0.0
    )
    return next(iter(pipelines.values()))


@pytest.fixture
def litert_dir(tiny_model_dir, tiny_bundle, tmp_path):
    directory = shutil.copytree(tiny_model_dir / "bundle", tmp_path / "bundle")
    add_files(directory, files_of(tiny_bundle))
    return directory


def test_a_model_is_served_on_litert_as_on_onnxruntime(litert_dir):
    pytest.importorskip("ai_edge_litert")
    bundle = load_bundle(litert_dir)
    x = np.random.default_rng(1).standard_normal((20, *bundle.graph.input_shape)).astype(np.float32) * 3
    answers = []
    for runtime in ("litert", "onnxruntime"):
        ladder = open_on(litert_dir, runtime).ladder
        answers.append([ladder.climb(sample).answer.label for sample in x])
    assert answers[0] == answers[1]


def test_a_bundle_without_litert_files_is_refused_in_one_line(tiny_model_dir):
    with pytest.raises(
        ModelError, match=r"models: bundle '.*': stage 0 in \w+: the bundle holds no LiteRT file"
    ):
        open_on(tiny_model_dir / "bundle", "litert")
