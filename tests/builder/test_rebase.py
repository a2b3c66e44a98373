import dataclasses

import msgspec
import numpy as np
import pytest

from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.prepare import prepare
from cloud_hub.builder.rebase import as_base, check_full, kept_labels, read_base, trained_on
from cloud_hub.builder.request import make_request
from edge_cascade.bundle import load_bundle
from edge_cascade.manifest import Preprocess, Window, Wire
from edge_cascade.shipped import shipped_model_dir, shipped_models
from tests.builder.models import MEAN, STD, brought, built, images, run_hub
from tests.builder.test_request import refusal_of

NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def graph():
    """That of the shared base, with all that a bundle may say."""
    return msgspec.structs.replace(
        load_bundle(brought().base / "bundle").graph,
        model="doors",
        labels=NAMES,
        preprocess=Preprocess((MEAN,), (STD,)),
        wire=Wire("int8", 0.5),
        window=Window(8, 4),
    )


def request_of(**changes):
    values = {"full": str(brought().full), "data": str(brought().data), "out": "unused", "rebase": "doors"}
    return make_request(values | changes)


def test_what_is_not_said_of_samples_is_the_bundles(graph):
    made = as_base(request_of(), graph)
    assert (made.model, made.mean, made.std, made.layout) == ("doors", (MEAN,), (STD,), "channels_first")
    assert (made.encoding, made.wire_scale, made.window, made.hop) == ("int8", 0.5, 8, 4)


def test_a_bundle_of_no_stream_has_no_window_and_a_scale_by_sample_stays_one(graph):
    graph = msgspec.structs.replace(graph, window=None, wire=Wire("int8"))
    made = as_base(request_of(), graph)
    assert (made.window, made.hop, made.encoding, made.wire_scale) == (None, None, "int8", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": (MEAN,)},
        {"std": (STD,), "layout": "channels_first"},
        {"scale": 1 / 255, "mean": (MEAN / 255,), "std": (STD / 255,)},
        {"encoding": "int8", "wire_scale": 0.5, "window": 8, "hop": 4},
        {"encoding": "auto", "hop": 4},
    ],
)
def test_the_bundles_own_may_be_said_again(graph, changes):
    assert as_base(request_of(**changes), graph) == as_base(request_of(), graph)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"mean": (1.0, 2.0)},
            "rebase: mean / scale is 1, 2, that of the bundle 128: leave it out, or build",
        ),
        ({"std": (1.0,)}, "std / scale is 1, that of the bundle 64"),
        ({"scale": 0.5, "mean": (MEAN,)}, "mean / scale is 256, that of the bundle 128"),
        ({"scale": 2.0}, "mean / scale is 0, that of the bundle 128"),
        ({"layout": "channels_last"}, "layout is channels_last, that of the bundle channels_first"),
        ({"encoding": "uint8"}, "encoding is uint8, that of the bundle int8"),
        ({"wire_scale": 1.0}, "wire_scale is 1.0, that of the bundle 0.5"),
        ({"window": 16}, "window is 16, that of the bundle 8"),
        ({"hop": 8}, "hop is 8, that of the bundle 4"),
    ],
)
def test_what_is_said_and_differs_is_refused(graph, changes, complaint):
    assert complaint in refusal_of(as_base, request_of(**changes), graph)


def test_a_window_for_a_bundle_without_one_is_refused(graph):
    graph = msgspec.structs.replace(graph, window=None)
    assert "window is 8, that of the bundle none" in refusal_of(as_base, request_of(window=8), graph)


def test_a_model_may_be_renamed(graph):
    assert as_base(request_of(model="gates"), graph).model == "gates"


def test_names_are_the_bundles_unless_the_data_names_labels_that_never_had_names(graph):
    assert kept_labels(graph, None) == NAMES
    assert kept_labels(graph, NAMES) == NAMES
    unnamed = msgspec.structs.replace(graph, labels=("0", "1", "2", "3"))
    assert kept_labels(unnamed, NAMES) == NAMES


def test_labels_of_other_names_or_in_another_order_are_refused(graph):
    complaint = refusal_of(kept_labels, graph, ("ant", "cat", "bee", "dog"))
    assert "calls a label 'bee' that the data calls 'cat'" in complaint
    assert "give the data an array labels" in complaint


def test_a_bundle_of_other_samples_or_classes_than_the_full_models_is_refused(graph):
    full = adopt(brought().full, sample_shape=(1, 8, 8), role="full model")
    check_full(graph, full)
    other = msgspec.structs.replace(graph, input_shape=(1, 9, 9))
    assert refusal_of(check_full, other, full) == (
        "rebase: the bundle's input shape is (1, 9, 9), that of the full model (1, 8, 8)"
    )
    fewer = msgspec.structs.replace(graph, labels=("a", "b"))
    assert "number of labels is 2, that of the full model 4" in refusal_of(check_full, fewer, full)


def test_a_shipped_model_may_be_rebased_by_its_name(graph):
    full = dataclasses.replace(
        adopt(brought().full, sample_shape=(1, 8, 8), role="full model"), input_shape=graph.input_shape
    )
    digits = read_base("digits")
    assert digits.bundle_id == load_bundle(shipped_model_dir("digits") / "bundle").bundle_id
    assert "number of labels is 10, that of the full model 4" in refusal_of(check_full, digits.graph, full)


@pytest.mark.parametrize("name", shipped_models())
def test_all_that_boards_know_of_a_shipped_model_is_kept(name):
    graph = read_base(name).graph
    made = as_base(request_of(rebase=name), graph)
    assert made.model == name
    assert (made.window, made.hop) == ((1024, graph.window.hop) if name == "vibration" else (None, None))
    assert (made.encoding, made.wire_scale) == (graph.wire.encoding, graph.wire.scale)
    assert kept_labels(graph, None) == graph.labels
    assert trained_on(name, read_base(name)) is not None


def test_a_bundle_that_is_damaged_or_absent_is_told(tmp_path):
    assert "rebase: no model 'nothing' ships" in refusal_of(read_base, "nothing")
    (tmp_path / "graph").mkdir()
    assert refusal_of(read_base, str(tmp_path)).startswith("rebase: ")


def test_a_rebase_that_says_nothing_of_samples_declares_them_as_the_bundle_does():
    kept = load_bundle(built() / "bundle").graph
    declaration = prepare(request_of(rebase=str(built()))).declaration
    for name in ("model", "labels", "input_shape", "preprocess", "wire", "window"):
        assert getattr(declaration, name) == getattr(kept, name)


def test_a_rebased_build_keeps_the_names_of_its_labels_and_its_own(tmp_path):
    train, calibration = images(100, 2), images(1000, 3)
    arrays = {"x_train": train.x, "x_cal": calibration.x, "labels": np.array(NAMES)}
    named = tmp_path / "named.npz"
    np.savez(named, **arrays, y_train=np.array(NAMES)[train.y], y_cal=np.array(NAMES)[calibration.y])
    usual = ["build", "--full", brought().full, "--uncertified", "--plans", "int8"]
    base, again = tmp_path / "base", tmp_path / "again"
    first = ["--data", named, "--rebase", brought().base, "--model", "doors", "--out", base]
    assert run_hub(*usual, *first) == 0
    assert run_hub(*usual, "--data", brought().data, "--rebase", base, "--out", again) == 0
    for out in (base, again):
        graph = load_bundle(out / "bundle").graph
        assert (graph.model, graph.labels, graph.wire) == ("doors", NAMES, Wire("uint8", 1.0))
