import dataclasses
import sys

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper
from rich.console import Console

from cloud_hub.builder import edge_network
from cloud_hub.builder.edge_network import choose_candidate, full_digest, make_edge_network
from cloud_hub.builder.prepare import prepare
from cloud_hub.builder.reports.card import Card
from cloud_hub.builder.request import make_request
from cloud_hub.builder.steps import FOLDER, Steps
from edge_cascade.bundle import load_bundle
from edge_cascade.shipped import shipped_model_dir
from tests.builder.models import (
    CLASSES,
    MEAN,
    QUICK,
    SIDE,
    STD,
    brought,
    built,
    full_model,
    run_hub,
    snapshot,
)
from tests.builder.onnx_models import model_of, tensor
from tests.builder.test_request import refusal_of

SIZES = ("small", "medium", "large")


@pytest.fixture
def base():
    return load_bundle(brought().base / "bundle")


def request_of(**changes):
    values = {
        "full": str(brought().full),
        "data": str(brought().data),
        "out": "unused",
        "mean": (MEAN,),
        "std": (STD,),
    }
    return make_request(values | changes)


@pytest.fixture(scope="module")
def prepared():
    return prepare(request_of())


def network_of(request, prepared, tmp_path):
    return make_edge_network(request, prepared, Steps(tmp_path / FOLDER), Console(quiet=True))


# --- rebase


@pytest.mark.parametrize("place", ["", "bundle"])
def test_a_rebased_network_is_the_bundles_own(base, tmp_path, place):
    request = request_of(rebase=str(brought().base / place))
    made = network_of(request, prepare(request), tmp_path)
    assert dict(made.stages.models).keys() == base.stage_models.keys()
    for key, stage in made.stages.models.items():
        assert stage.model == base.stage_models[key].model
        for name, array in base.stage_models[key].weights.items():
            assert np.array_equal(stage.weights[name], array)
    assert made.litert == {}
    assert base.bundle_id[:12] in made.made_by["network"]
    assert not (tmp_path / FOLDER).exists()


def test_stages_for_litert_come_along_with_the_bundle_that_has_some(prepared, tmp_path):
    digits = load_bundle(shipped_model_dir("digits") / "bundle")
    kept = dataclasses.replace(prepared, base=digits)
    made = network_of(request_of(rebase="digits", litert=True), kept, tmp_path)
    assert made.litert == {key: stage.litert.content for key, stage in digits.stage_models.items()}


def test_stages_for_litert_cannot_be_made_of_a_bundle_without_them(prepared, base, tmp_path):
    request = request_of(rebase=str(brought().base), litert=True)
    kept = dataclasses.replace(prepared, base=base)
    assert "the bundle has no stages for LiteRT" in refusal_of(network_of, request, kept, tmp_path)


# --- a network that is trained


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_is_asked_for_is_taken(prepared, size):
    assert choose_candidate(request_of(size=size), prepared).name == size


def test_without_a_budget_the_network_is_the_medium_one(prepared):
    assert choose_candidate(request_of(), prepared).name == "medium"


def test_the_largest_network_within_the_budgets_is_taken(prepared, monkeypatch):
    took_us = dict(zip(SIZES, (100.0, 200.0, 400.0), strict=True))
    monkeypatch.setattr(edge_network, "measure_candidate", lambda one, *, scale: scale * took_us[one.name])
    assert choose_candidate(request_of(budget_ms=0.3), prepared).name == "medium"
    assert choose_candidate(request_of(budget_ms=0.4), prepared).name == "large"
    monkeypatch.setattr(edge_network, "board_ratio", lambda path: {"fp32": 4.0})
    assert choose_candidate(request_of(budget_ms=0.4, profile="board.json"), prepared).name == "small"
    small = choose_candidate(request_of(size="small"), prepared)
    assert choose_candidate(request_of(budget_kb=small.weight_bytes / 1000), prepared).name == "small"


def test_a_budget_that_nothing_fits_shows_what_each_network_costs(prepared):
    complaint = refusal_of(choose_candidate, request_of(budget_kb=1), prepared)
    assert complaint.startswith("no network fits into 1,000 bytes: small ")
    assert "bring a smaller network with --edge" in complaint


def test_the_digest_is_that_of_the_file_that_the_hub_will_run(prepared, base):
    assert full_digest(prepared) == load_bundle(built() / "bundle").graph.full_model_sha256
    assert full_digest(prepared) != base.graph.full_model_sha256


def edge_model(outputs=CLASSES, side=SIDE):
    """A smaller classifier of the user's own."""
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("Conv", ["i", "c0"], ["a0"], name="first", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a0"], ["r0"], name="first.relu"),
        helper.make_node("Conv", ["r0", "c1"], ["a1"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a1"], ["r1"], name="second.relu"),
        helper.make_node("Flatten", ["r1"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "w"], ["o"], name="last", transB=1),
    ]
    cells = ((side + 1) // 2) ** 2
    weights = {"c0": (6, 1, 3, 3), "c1": (8, 6, 3, 3), "w": (outputs, 8 * cells)}
    return model_of(
        nodes,
        [("i", ["n", 1, side, side])],
        [("o", ["n", outputs])],
        [
            tensor(name, (0.3 * rng.standard_normal(shape)).astype(np.float32))
            for name, shape in weights.items()
        ],
    )


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (edge_model(outputs=3), "takes (1, 8, 8) and tells 3 classes apart, the full model (1, 8, 8) and 4"),
        (edge_model(side=6), "takes (1, 6, 6)"),
    ],
)
def test_an_edge_network_that_does_not_fit_is_told_before_the_full_model_is_asked(
    prepared, tmp_path, monkeypatch, model, complaint
):
    monkeypatch.setattr(edge_network, "full_logits", None)
    onnx.save(model, tmp_path / "edge.onnx")
    request = request_of(edge=str(tmp_path / "edge.onnx"))
    assert complaint in refusal_of(network_of, request, prepared, tmp_path)


def test_without_torch_training_is_refused_at_once_with_what_to_install(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(edge_network, "full_logits", None)
    complaint = refusal_of(network_of, request_of(), prepared, tmp_path)
    assert complaint == "this needs torch: pip install 'edge-daemon[build]'"


def report_of(out):
    return msgspec.json.decode((out / "report.json").read_bytes(), type=Card)


def without_rebase(out, *options):
    ours = brought()
    usual = ["--full", ours.full, "--data", ours.data, "--out", out]
    return run_hub("build", *usual, *QUICK, "--epsilon", "0.1", *options)


def test_a_network_of_the_family_is_trained_and_an_interrupted_training_goes_on(
    tmp_path, monkeypatch, capsys
):
    torch = pytest.importorskip("torch", reason="training needs torch (the build extra)")
    # Threads that spin take the cores from each other, and a few steps then take seconds.
    set_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: set_threads(1))
    options = ["--size", "small", "--epochs", "1", "--batch", "50", "--json"]
    assert without_rebase(tmp_path / "calm" / "out", *options) == 0
    # Training shows its progress, which is no part of the report.
    assert msgspec.json.decode(capsys.readouterr().out, type=Card) == report_of(tmp_path / "calm" / "out")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cloud_hub.builder.build.measure_ladders", interrupt)
        assert without_rebase(tmp_path / "out", *options) == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
    with monkeypatch.context() as patch:
        # What was trained is not trained again.
        patch.setattr(edge_network, "train_edge", None)
        assert without_rebase(tmp_path / "out", *options) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "calm" / "out")
    made_by = report_of(tmp_path / "out").made_by
    assert made_by["network"] == "small of the default family"
    assert made_by["training"] == "1 epochs, distillation 0.5, seed 0"


def test_a_network_of_the_users_own_gets_exits(tmp_path):
    pytest.importorskip("torch", reason="training exits needs torch (the build extra)")
    onnx.save(edge_model(), tmp_path / "edge.onnx")
    assert without_rebase(tmp_path / "out", "--edge", tmp_path / "edge.onnx", "--uncertified") == 0
    bundle = load_bundle(tmp_path / "out" / "bundle")
    assert len(bundle.graph.stages) > 1
    assert report_of(tmp_path / "out").made_by["network"].startswith("edge.onnx with ")
    assert not (tmp_path / "out" / FOLDER).exists()


def test_the_full_model_itself_may_be_the_boards_network(tmp_path):
    onnx.save(full_model(), tmp_path / "edge.onnx")
    pytest.importorskip("torch", reason="training exits needs torch (the build extra)")
    assert without_rebase(tmp_path / "out", "--edge", tmp_path / "edge.onnx") == 0
    card = report_of(tmp_path / "out")
    assert card.evaluation.upload_share < 0.05
