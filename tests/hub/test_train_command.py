"""`cloud-hub train` makes a draft of uploaded cases; `cloud-hub release` and REST show it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from cloud_hub.__main__ import main
from cloud_hub.errors import BuildError, CertificateError, ConfigError, ModelError, NotFoundError
from cloud_hub.store.store import Store
from edge_cascade.bundle import load_bundle
from edge_cascade.messages import Use
from tests.builder.models import brought, built
from tests.hub.candidates import MODEL, answer, send
from tests.hub.test_rest import Api

QUICK = ("--epochs", "15", "--batch-size", "32", "--learning-rate", "0.01")


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sent")
    with Store(directory) as store:
        send(store, 600, 11)
        send(store, 1500, 12, use=Use.HOLDOUT)
        answer(store)
    return directory


@pytest.fixture
def state_dir(sent, tmp_path):
    shutil.copytree(sent, tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def hub(state_dir, tmp_path):
    """`cloud-hub` with a configuration of this state directory."""
    return program(tmp_path, state_dir, built() / "bundle")


def program(tmp_path, state_dir, bundle):
    config = tmp_path / "hub.toml"
    config.write_text(f'[hub]\nstate_dir = "{state_dir}"\n[[models]]\nbundle = "{bundle}"\n')

    def run(*arguments):
        return main([*map(str, arguments), "--config", str(config)])

    return run


@pytest.fixture
def trained(hub, capsys):
    assert hub("train", MODEL, *QUICK) == 0
    return capsys.readouterr()


def test_training_prints_the_draft_and_reports_on_the_other_stream(trained, state_dir):
    shown = dict(line.split(None, 1) for line in trained.out.splitlines() if line.split()[0] != "certificate")
    assert shown["release"] == "1 of digit-like, draft"
    assert shown["trained"].startswith("hub: examples 600, schedule 15 epochs, batches of 32, learning rate")
    assert shown["holdout"].startswith("better: ")
    assert shown["thresholds"] == "chosen on 450 holdout cases"
    assert shown["size"].startswith("weights only, ")
    assert re.search(r"certificate +int8: disagreement at most 3.5 % .* on 1050 fresh cases", trained.out)
    assert re.search(
        r"% expected with plan int8; its parent said [0-9.]+ %, for its own promise", trained.out
    )
    assert "training on 600 cases" in trained.err
    assert all(line.strip() for line in trained.err.splitlines())
    assert load_bundle(state_dir / "releases" / shown["bundle"] / "bundle").graph.model == MODEL


def test_releases_are_listed_and_shown_as_text_and_as_json(trained, hub, capsys):
    assert hub("release", "list") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["id", "model", "state"]
    assert row.split()[:3] == ["1", MODEL, "draft"]
    assert hub("release", "show", 1) == 0
    assert capsys.readouterr().out == trained.out
    assert hub("release", "list", "--model", "other", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert hub("release", "show", 1, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["id"], shown["state"], shown["lineage"]["trained"]) == (1, "draft", "hub")
    assert shown["figures"]["unseen"] == 1050
    assert hub("release", "show", 2) == NotFoundError.exit_code
    assert "there is no release 2; `cloud-hub release list` shows them" in capsys.readouterr().err


def test_rest_shows_releases_by_page_and_one_by_one(trained, hub, state_dir, capsys):
    assert hub("release", "show", 1, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    with Store(state_dir) as store:
        api = Api(store)
        try:
            assert api.json("/v1/releases") == {"releases": [shown], "unreadable": [], "next": None}
            assert api.json(f"/v1/releases?model={MODEL}&limit=1&cursor=2")["releases"] == [shown]
            assert api.json("/v1/releases?model=other") == {"releases": [], "unreadable": [], "next": None}
            assert api.json("/v1/releases/1") == shown
            assert "no release 2" in api.problem("/v1/releases/2", 404)
            assert "ids are numbers" in api.problem("/v1/releases/first", 404)
            api.problem("/v1/releases?limit=0", 400)
            api.problem("/v1/releases", 401, token=None)
        finally:
            api.close()


def test_it_works_beside_a_hub_that_holds_the_directory(state_dir, hub, capsys):
    with Store(state_dir):
        assert hub("train", MODEL, *QUICK, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["outcome"] == "draft"
    assert printed["training"]["examples"] == 600
    assert printed["training"]["last_loss"] < printed["training"]["first_loss"]
    assert printed["release"]["lineage"]["examples"] == 600


def test_the_same_training_once_more_waits_for_fresh_cases(trained, hub, capsys):
    assert hub("train", MODEL, *QUICK, "--json") == CertificateError.exit_code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(
        "cloud-hub: 0 fresh holdout cases for the certificate, at least "
    )
    assert json.loads(captured.out)["outcome"] == "waiting"


@pytest.mark.parametrize("point", ["hub.release-written", "hub.release-registered"])
def test_a_draft_survives_a_kill_before_or_after_its_row(hub, state_dir, tmp_path, capsys, point):
    command = [sys.executable, "-m", "cloud_hub", "train", MODEL, *QUICK, "--config", tmp_path / "hub.toml"]
    environment = os.environ | {"EDGE_CRASH_AT": point}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert hub("train", MODEL, *QUICK) == CertificateError.exit_code
    recovered = "release 1 of digit-like was written and not registered, and is now"
    assert (recovered in capsys.readouterr().err) == (point == "hub.release-written")
    assert hub("release", "list", "--json") == 0
    assert [each["id"] for each in json.loads(capsys.readouterr().out)] == [1]


def test_training_that_changes_nothing_is_refused_in_one_line(hub, capsys):
    nothing = ("--epochs", "1", "--learning-rate", "1e-9")
    assert hub("train", MODEL, *nothing) == BuildError.exit_code
    assert capsys.readouterr().err.splitlines()[-1].startswith("cloud-hub: not better beyond noise: ")
    assert hub("train", MODEL, *nothing, "--if-not-worse") == 0


def test_a_learning_rate_that_is_too_high_is_refused(hub, capsys):
    assert hub("train", MODEL, "--epochs", "3", "--learning-rate", "900") == BuildError.exit_code
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the loss became" in line or "worse at" in line or "left the range" in line


def test_what_cannot_be_trained_is_said_before_any_work(tmp_path, capsys):
    run = program(tmp_path, tmp_path / "empty", built() / "bundle")
    assert run("train", "pump") == ConfigError.exit_code
    assert "none is called 'pump'; there are: digit-like" in capsys.readouterr().err
    assert run("train", MODEL) == CertificateError.exit_code
    assert "0 holdout cases for the guard, at least 100 are needed" in capsys.readouterr().err
    with Store(tmp_path / "empty") as store:
        send(store, 120, 12, use=Use.HOLDOUT)
        answer(store)
    assert run("train", MODEL) == NotFoundError.exit_code
    assert "no case of 'digit-like' to train on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("train", MODEL, "--epochs", "0")
    assert "'0' is not a whole number from 1" in capsys.readouterr().err


def test_a_bundle_without_a_train_step_says_what_to_do(tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(brought().base, own)
    _drop_train_step(own / "bundle")
    run = program(tmp_path, tmp_path / "state", own / "bundle")
    assert run("train", "base") == ModelError.exit_code
    assert "has no train step: build it again with this version" in capsys.readouterr().err


def _drop_train_step(bundle):
    import hashlib

    graph = json.loads((bundle / "graph" / "manifest.json").read_bytes())
    del graph["files"][graph.pop("train_step")]
    graph.pop("head_parameters", None)
    (bundle / "graph" / "train_step.onnx").unlink()
    content = json.dumps(graph).encode()
    (bundle / "graph" / "manifest.json").write_bytes(content)
    weights = json.loads((bundle / "weights" / "manifest.json").read_bytes())
    weights["graph_sha256"] = hashlib.sha256(content).hexdigest()
    (bundle / "weights" / "manifest.json").write_text(json.dumps(weights))
