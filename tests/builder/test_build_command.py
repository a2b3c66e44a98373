import json
import subprocess
import sys

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper

from cloud_hub.builder.reports.ablate import Ablation
from cloud_hub.builder.reports.card import Card
from cloud_hub.builder.reports.evaluate import Evaluation
from edge_daemon.__main__ import main as edge_daemon
from tests.builder.models import (
    QUICK,
    SIDE,
    arrays_of,
    brought,
    built,
    full_model,
    images,
    run_hub,
)
from tests.builder.onnx_models import model_of, tensor


def complaint_of(captured):
    """The last line on stderr, which is the only one that complains; nothing is a traceback."""
    assert captured.out == ""
    assert "Traceback" not in captured.err
    complaints = [line for line in captured.err.splitlines() if line.startswith("cloud-hub:")]
    assert complaints == [captured.err.splitlines()[-1]]
    return complaints[0]


@pytest.fixture
def save(tmp_path):
    """An .npz of the usual arrays and what differs; None leaves one out."""

    def write(**changes):
        arrays = {name: array for name, array in {**arrays_of(), **changes}.items() if array is not None}
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return write


def undivided(x, y, **more):
    return dict.fromkeys(arrays_of()) | {"x": x, "y": y, **more}


def regression():
    weights = tensor("w", np.ones((1, SIDE * SIDE), np.float32))
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["price"], transB=1),
    ]
    return model_of(nodes, [("x", ["n", 1, SIDE, SIDE])], [("price", ["n", 1])], [weights])


# --- what is wrong with what was brought


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (regression(), "gives one number a sample (price): a regression model?"),
        (full_model(3), "the bundle's input shape is (1, 8, 8), that of the full model (3, 8, 8)"),
        (b"no model", "not an ONNX file"),
        (b"", "not an ONNX model"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_full_model_that_cannot_be_one_is_told(tmp_path, capsys, model, complaint):
    path = tmp_path / "model.onnx"
    if isinstance(model, bytes):
        path.write_bytes(model)
    elif model is not None:
        onnx.save(model, path)
    assert brought().build(tmp_path / "out", *QUICK, "--full", path) == 10
    assert complaint in complaint_of(capsys.readouterr())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"no data", "not a readable .npz file"), (b"", "not a readable .npz file"), (None, "no such file")],
)
def test_data_that_are_none_are_told(tmp_path, capsys, content, complaint):
    path = tmp_path / "data.npz"
    if content is not None:
        path.write_bytes(content)
    assert brought().build(tmp_path / "out", *QUICK, "--data", path) == 10
    assert complaint in complaint_of(capsys.readouterr())
    assert not (tmp_path / "out").exists()


def test_data_that_do_not_fit_the_model_are_told(tmp_path, capsys, save):
    bad = arrays_of()["x_test"].astype(np.float32)
    bad[2, 0, 3, 3] = np.inf
    assert brought().build(tmp_path / "out", *QUICK, "--data", save(x_test=bad)) == 10
    assert "x_test: 1 of 300 samples hold NaN, infinity" in complaint_of(capsys.readouterr())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["huge.npz", "huge.npy", "huge.onnx"])
def test_a_file_of_two_gigabytes_is_refused_before_it_is_read(tmp_path, capsys, name):
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(2 * 2**30 + 1)
    option = "--full" if name.endswith("onnx") else "--data"
    assert brought().build(tmp_path / "out", *QUICK, option, path) == 10
    assert str(2 * 2**30 + 1) in complaint_of(capsys.readouterr()).replace(",", "")


def test_data_above_the_bound_are_refused_with_the_option_that_raises_it(tmp_path, capsys):
    assert brought().build(tmp_path / "out", *QUICK, "--max-bytes", 10_000) == 10
    assert "at most 10,000 are read: raise --max-bytes" in complaint_of(capsys.readouterr())


def test_a_bundle_to_rebase_that_is_none_is_told(tmp_path, capsys):
    assert brought().build(tmp_path / "out", *QUICK, "--rebase", tmp_path) == 10
    assert f"rebase: {tmp_path}: no bundle in it" in complaint_of(capsys.readouterr())
    assert not (tmp_path / "out").exists()


def test_an_option_that_cannot_be_is_told_before_anything_is_read(tmp_path, capsys):
    assert run_hub("build", "--full", "f", "--data", "d", "--out", tmp_path, "--epsilon", "5") == 10
    captured = capsys.readouterr()
    assert captured.err == "cloud-hub: build: epsilon = 5.0: expected float < 1.0\n"


# --- where the result cannot be written


@pytest.mark.parametrize("below", ["", "below/it"])
def test_a_directory_that_cannot_be_made_is_told_before_any_work(tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    assert brought().build(tmp_path / "file" / below, *QUICK) == 10
    captured = capsys.readouterr()
    assert captured.err == f"cloud-hub: out: {tmp_path / 'file'} is no directory: choose another\n"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_that_may_not_be_written_is_told_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cloud_hub.builder.build.os.access", lambda path, mode: False)
    assert brought().build(tmp_path / "out", *QUICK) == 10
    assert f"out: {tmp_path} cannot be written" in complaint_of(capsys.readouterr())


def test_a_folder_of_somebody_elses_is_not_replaced_by_the_bundle(tmp_path, capsys):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("mine")
    assert brought().build(tmp_path, *QUICK) == 10
    assert "bundle is there and is no bundle" in complaint_of(capsys.readouterr())
    assert (tmp_path / "bundle" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def fail(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("cloud_hub.builder.write.write_durably", fail)
    assert brought().build(tmp_path / "out", *QUICK) == 10
    assert complaint_of(capsys.readouterr()).endswith("cannot be written: No space left on device")
    assert list((tmp_path / "out").iterdir()) == []


# --- promises that cannot be had


def test_too_little_data_for_the_promise_says_how_many_samples_it_takes(tmp_path, capsys):
    assert brought().build(tmp_path / "out", *QUICK, "--epsilon", "0.001") == 11
    line = complaint_of(capsys.readouterr())
    assert "epsilon 0.001 at delta 0.05 for 1 plan needs at least 2995 samples without a loss" in line
    assert "; or --uncertified for a bundle without a promise" in line
    assert not (tmp_path / "out").exists()


def test_the_same_data_do_without_a_promise(tmp_path, capsys):
    assert brought().build(tmp_path / "out", *QUICK, "--epsilon", "0.001", "--uncertified") == 0
    assert "No certificate: the thresholds fit the calibration data" in capsys.readouterr().out


def test_more_uploads_than_allowed_shows_what_each_promise_costs(tmp_path, capsys):
    assert brought().build(tmp_path / "out", *QUICK, "--max-upload", "0.01") == 11
    line = complaint_of(capsys.readouterr())
    assert "% upload, more than the 1 % allowed, which take an epsilon of about" in line
    assert "Expected at other promises: 0.1 % costs 100.0 % upload; " in line
    assert not (tmp_path / "out").exists()


def test_a_promise_that_only_holds_if_everything_is_sent_is_refused(tmp_path, capsys, save):
    # The full model and the data name the classes in another order than the network that is kept.
    order = np.array([1, 2, 3, 0])
    arrays = {name: order[y] for name, y in arrays_of().items() if name.startswith("y")}
    model = full_model()
    for weights in model.graph.initializer:
        array = onnx.numpy_helper.to_array(weights)
        weights.CopyFrom(tensor(weights.name, array[np.argsort(order)]))
    onnx.save(model, tmp_path / "full.onnx")
    options = [*QUICK, "--full", tmp_path / "full.onnx", "--data", save(**arrays)]
    assert brought().build(tmp_path / "out", *options) == 11
    line = complaint_of(capsys.readouterr())
    assert "epsilon 0.02 holds only if every sample is sent. Expected at other promises: 0.1 % costs" in line
    assert not (tmp_path / "out").exists()


def test_a_full_model_as_good_as_guessing_is_told(tmp_path, capsys, save):
    rng = np.random.default_rng(0)
    arrays = {name: rng.permutation(y) for name, y in arrays_of().items() if name.startswith("y")}
    assert brought().build(tmp_path / "out", *QUICK, "--data", save(**arrays)) == 10
    assert "as good as guessing: are the labels in the order of its outputs" in complaint_of(
        capsys.readouterr()
    )


# --- what a finished build prints


def test_unlabelled_data_certify_agreement_alone(tmp_path, capsys, save):
    arrays = {name: None for name in arrays_of() if name.startswith("y")}
    assert brought().build(tmp_path / "out", *QUICK, "--epsilon", "0.05", "--data", save(**arrays)) == 0
    captured = capsys.readouterr()
    assert "no calibration labels" in captured.err
    assert "against the full model's answers" in " ".join(captured.out.split())
    card = msgspec.json.decode((tmp_path / "out" / "report.json").read_bytes(), type=Card)
    assert [certificate.kind for certificate in card.certificates] == ["disagreement"]


def test_the_summary_fits_a_terminal_of_eighty_columns_with_no_figure_cut(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert brought().build(tmp_path / "out", *QUICK) == 0
    out = capsys.readouterr().out
    assert "multiply-adds" in out
    assert "123,168" in out
    assert "saved by" in out
    assert f"for the boards  {tmp_path / 'out' / 'bundle'}" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith(("for ", "to "))) <= 80


def test_json_is_the_report_and_nothing_else(tmp_path, capsys):
    assert brought().build(tmp_path / "out", *QUICK, "--json") == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "out" / "report.json").read_text(encoding="utf-8")
    card = msgspec.json.decode(captured.out, type=Card)
    assert card.evaluation.upload_share < 0.5


def test_a_label_that_looks_like_markup_is_printed_as_it_is(tmp_path, capsys, save):
    names = np.array(["[/bold]", "[red]", "c", "d"])
    arrays = {name: names[y] for name, y in arrays_of().items() if name.startswith("y")}
    kept = arrays["y_test"] != "[/bold]"
    arrays |= {"y_test": arrays["y_test"][kept], "x_test": arrays_of()["x_test"][kept], "labels": names}
    assert brought().build(tmp_path / "out", *QUICK, "--data", save(**arrays)) == 0
    assert "no test sample of class '[/bold]'" in " ".join(capsys.readouterr().err.split())


def test_a_recipe_builds_what_the_command_line_builds(tmp_path, capsys):
    ours = brought()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'full = "{ours.full}"\ndata = "{ours.data}"\nrebase = "{ours.base}"\nout = "m"\n'
        'mean = [128]\nstd = [64]\nepsilon = 0.5\nplans = ["int8"]\n'
    )
    assert run_hub("build", recipe, "--epsilon", "0.02") == 0
    first = capsys.readouterr().out
    assert ours.build(tmp_path / "other" / "m", *QUICK) == 0
    second = capsys.readouterr().out.replace(str(tmp_path / "other"), str(tmp_path))
    assert first == second


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit) as caught:
        run_hub("build", "--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--mean=-1.5,2" in out
    assert "(required)" in out


# --- what other commands make of it


def test_evaluate_takes_the_directory_of_a_build(capsys):
    assert run_hub("evaluate", built(), "--data", brought().data) == 0
    out = capsys.readouterr().out
    assert "hub: full model" in out
    assert "certificate: loss in" in out


def test_evaluate_says_of_the_test_data_what_the_card_says(capsys):
    assert run_hub("evaluate", built(), "--data", brought().data, "--json") == 0
    seen = msgspec.json.decode(capsys.readouterr().out, type=Evaluation)
    card = msgspec.json.decode((built() / "report.json").read_bytes(), type=Card)
    assert seen == card.evaluation
    assert not any(check.contradicts for check in seen.checks)


def test_evaluate_reads_arrays_of_other_names(tmp_path, capsys):
    test = images(50, 4)
    np.savez(tmp_path / "data.npz", pictures=test.x, fruit=test.y)
    options = ["--data", tmp_path / "data.npz", "--x-key", "pictures", "--y-key", "fruit", "--json"]
    assert run_hub("evaluate", built(), *options) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["samples"], seen["reference"]) == (50, "true labels")


def test_ablate_takes_the_directory_of_a_build_and_cuts_no_figure(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    test = ["--data", brought().data, "--epsilon", "0.05", "--splits", "1"]
    assert run_hub("ablate", built(), *test) == 0
    rows = capsys.readouterr().out.splitlines()
    assert next(row for row in rows if "of draws" in row).split()[-1] == "up"
    built_row = next(row for row in rows if row.startswith("as built")).split()
    assert built_row[-2] == "%"
    assert float(built_row[-1]) > 0
    assert run_hub("ablate", built() / "bundle", *test, "--json") == 0
    rows = msgspec.json.decode(capsys.readouterr().out, type=Ablation).rows
    assert {"as built", "no early exit"} <= {row.name for row in rows}


def test_bench_takes_the_directory_of_a_build(capsys):
    assert edge_daemon(["bench", str(built()), "--seconds", "1", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "digit-like"


def test_the_command_loads_no_runtime_until_it_builds():
    code = (
        "import sys; from cloud_hub.__main__ import build_parser; build_parser(); "
        "sys.exit(any(name in sys.modules for name in ('onnx', 'onnxruntime', 'torch', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
