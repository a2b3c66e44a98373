import errno
import shutil
from pathlib import Path

import numpy as np
import pytest

from cloud_hub.builder import assemble
from cloud_hub.builder.gradients.site import NoGradientError
from cloud_hub.builder.networks.export import export_full
from cloud_hub.builder.write import recover_bundle
from edge_cascade.backends.onnx import OnnxStage, open_whole_model
from edge_cascade.bundle import load_bundle
from edge_cascade.ladder import Ladder
from edge_cascade.policy import SAMPLE
from edge_cascade.preprocess import normalise
from tests.builder.networks import FULL, SIGNAL, build_signal_bundle, inputs_of, parameters_of


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_signal_bundle(tmp_path_factory.mktemp("signal"))


def files_of(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_what_is_built_is_what_is_read(built):
    bundle = load_bundle(built.directory)
    assert bundle.bundle_id == built.bundle_id
    assert bundle.weights.plans == built.plans
    assert bundle.weights.default_plan == built.default_plan
    assert [stage.mult_adds for stage in bundle.graph.stages] == list(SIGNAL.mult_adds)
    assert [stage.feature_shape for stage in bundle.graph.stages] == [(4, 32), (8, 16), None]


def test_building_twice_gives_the_same_bytes(built, tmp_path):
    again = build_signal_bundle(tmp_path)
    assert again.bundle_id == built.bundle_id
    assert files_of(tmp_path) == files_of(built.directory.parent)


def test_building_over_an_old_bundle_replaces_it_and_leaves_nothing_behind(tmp_path):
    old = build_signal_bundle(tmp_path, version="1.0.0")
    new = build_signal_bundle(tmp_path, version="1.0.1")
    assert new.bundle_id != old.bundle_id
    assert load_bundle(tmp_path / "bundle").graph.version == "1.0.1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "full.onnx"]


def test_a_network_that_cannot_be_trained_is_served_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise NoGradientError(["Max (exit0.floored)"])

    monkeypatch.setattr(assemble, "train_step_of", refuse)
    bundle = load_bundle(build_signal_bundle(tmp_path).directory)
    assert bundle.train_step is None
    assert bundle.graph.head_parameters == ()


def refuse_renames_of(monkeypatch, named):
    """Renaming or replacing a path whose name starts so ends as on a full disk."""

    def refusing(original):
        def rename(path, target):
            if path.name.startswith(named[0]) and path.name.endswith(named[1]):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return original(path, target)

        return rename

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))


@pytest.mark.parametrize(
    "named", [(".bundle.", ".new"), (".manifest.json.", ".tmp"), ("..full.onnx.", ".tmp")]
)
def test_a_write_that_fails_leaves_the_old_bundle_with_its_full_model_and_nothing_else(
    tmp_path, monkeypatch, named
):
    build_signal_bundle(tmp_path, version="1.0.0")
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        refuse_renames_of(patch, named)
        with pytest.raises(OSError, match="No space left"):
            build_signal_bundle(tmp_path, version="1.0.1")
    assert files_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "full.onnx"]


def test_a_first_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        refuse_renames_of(patch, (".bundle.", ".new"))
        with pytest.raises(OSError, match="No space left"):
            build_signal_bundle(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_gives_the_old_bundle_back(built, tmp_path):
    for name in (".bundle.17.old", ".bundle.17.new", ".bundle.16.new"):
        shutil.copytree(built.directory, tmp_path / name)
    (tmp_path / ".bundle.17.new/graph/manifest.json").unlink()
    recover_bundle(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert files_of(tmp_path / "bundle") == files_of(built.directory)


def test_the_next_build_removes_what_a_killed_one_left(built, tmp_path):
    for name in ("bundle", ".bundle.17.old", ".bundle.17.new"):
        shutil.copytree(built.directory, tmp_path / name)
    again = build_signal_bundle(tmp_path, version="1.0.1")
    assert load_bundle(tmp_path / "bundle").bundle_id == again.bundle_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "full.onnx"]


def test_a_build_that_fails_after_a_killed_one_has_still_brought_the_old_bundle_back(
    built, tmp_path, monkeypatch
):
    shutil.copytree(built.directory, tmp_path / ".bundle.17.old")
    with monkeypatch.context() as patch:
        refuse_renames_of(patch, (".manifest.json.", ".tmp"))
        with pytest.raises(OSError, match="No space left"):
            build_signal_bundle(tmp_path, version="1.0.1")
    assert load_bundle(tmp_path / "bundle").bundle_id == built.bundle_id


def test_every_rung_reproduces_its_golden_outputs(built):
    bundle = load_bundle(built.directory)
    for plan in bundle.weights.plans:
        features = {SAMPLE: normalise(bundle.golden_inputs, bundle.graph.preprocess)}
        for index, rung in enumerate(plan.rungs):
            stage = bundle.stage_models[rung.stage, rung.precision]
            runner = OnnxStage(stage, bundle.graph.stages[rung.stage].feature_shape)
            made, head = runner.run_batch(features[rung.feeds_from], rung.temperature)
            if made is not None:
                features[index] = made
            golden = bundle.golden_outputs[f"{plan.name}/{index}"]
            assert np.abs(head - golden).max() <= bundle.weights.tolerance[rung.precision]


def test_a_ladder_climbs_every_plan_and_agrees_with_itself_in_a_batch(built):
    bundle = load_bundle(built.directory)
    for plan in bundle.weights.plans:
        ladder = Ladder(bundle, plan, OnnxStage, point=0)
        together = ladder.climb_batch(bundle.golden_inputs)
        assert all(len(climb.exits) == len(plan.rungs) and not climb.accepted for climb in together)
        for x, climb in zip(bundle.golden_inputs, together, strict=True):
            assert [e.label for e in ladder.climb(x).exits] == [e.label for e in climb.exits]


def test_full_model_beside_the_bundle_is_the_one_whose_digest_it_names(built):
    import hashlib

    content = (built.directory.parent / "full.onnx").read_bytes()
    assert load_bundle(built.directory).graph.full_model_sha256 == hashlib.sha256(content).hexdigest()
    x = inputs_of(FULL, 5)
    expected = open_whole_model(export_full(FULL, parameters_of(FULL)))(x)
    np.testing.assert_array_equal(open_whole_model(content)(x), expected)


def test_golden_inputs_have_been_over_the_wire(built):
    # int8 with a scale per sample: at most 255 different values, the largest of them 127 steps.
    for sample in load_bundle(built.directory).golden_inputs:
        steps = sample / (np.abs(sample).max() / 127)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
