import hashlib
import json
import os
import shutil

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from edge_cascade.bundle import load_bundle
from edge_cascade.errors import BundleError
from edge_cascade.policy import OperatingPoint, Plan, Rung, check_plan


@pytest.fixture
def bundle_dir(tiny_model_dir, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tiny_model_dir / "bundle", tmp_path / "bundle")


@pytest.fixture
def bundle_id(tiny_bundle):
    return tiny_bundle.bundle_id


def rewrite(part, change):
    """Change a part's manifest, as its author could."""
    path = part / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rewrite_graph(bundle, change):
    """Change the graph's manifest and make the weights part belong to it."""
    digest = rewrite(bundle / "graph", change)
    rewrite(bundle / "weights", lambda manifest: manifest.update(graph_sha256=digest))


def rewrite_weights(bundle, change_tensors):
    """Change the weights themselves, digests and all."""
    path = bundle / "weights" / "weights.safetensors"
    tensors = load_file(path)
    change_tensors(tensors)
    path.unlink()
    save_file(tensors, path)
    entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size_bytes": path.stat().st_size}
    rewrite(bundle / "weights", lambda manifest: manifest["files"].update({"weights.safetensors": entry}))


def test_a_bundle_loads_whole_and_its_id_is_that_of_both_parts(tiny_model_dir, tiny_bundle):
    digests = [
        hashlib.sha256((tiny_model_dir / "bundle" / part / "manifest.json").read_bytes()).hexdigest()
        for part in ("graph", "weights")
    ]
    assert [tiny_bundle.graph_sha256, tiny_bundle.weights_sha256] == digests
    assert tiny_bundle.bundle_id == hashlib.sha256("".join(f"{d}\n" for d in digests).encode()).hexdigest()
    assert set(tiny_bundle.stage_models) == {(s, p) for s in range(3) for p in ("fp32", "int8")}


def test_a_plan_that_does_not_exist_is_refused_with_those_that_do(tiny_bundle):
    with pytest.raises(BundleError, match=r"no plan 'fast'; it has: int8"):
        tiny_bundle.plan("fast")


def test_missing_directories_and_files_are_named(bundle_dir, tmp_path):
    with pytest.raises(BundleError, match="no such directory"):
        load_bundle(tmp_path / "nowhere")
    (bundle_dir / "graph/stage1.int8.onnx").unlink()
    with pytest.raises(BundleError, match=r"stage1\.int8\.onnx: named in the manifest but missing"):
        load_bundle(bundle_dir)
    (bundle_dir / "weights/manifest.json").unlink()
    with pytest.raises(BundleError, match=r"weights/manifest\.json: missing"):
        load_bundle(bundle_dir)


def test_a_file_that_no_manifest_names_is_refused(bundle_dir):
    (bundle_dir / "graph/weights").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"graph/weights: not named in the manifest"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize(
    "name", ["graph/stage0.fp32.onnx", "weights/weights.safetensors", "weights/golden_outputs.safetensors"]
)
def test_one_flipped_bit_is_found(bundle_dir, name):
    content = bytearray((bundle_dir / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_dir / name).write_bytes(content)
    with pytest.raises(BundleError, match="damaged"):
        load_bundle(bundle_dir)


def test_a_truncated_file_says_how_much_there_is(bundle_dir):
    path = bundle_dir / "weights/weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BundleError, match=r"100 bytes, the manifest says \d+"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize("how", ["symlink", "fifo", "directory"])
def test_what_is_no_regular_file_is_refused_without_being_followed(bundle_dir, tmp_path, how):
    path = bundle_dir / "graph/stage0.fp32.onnx"
    kept = tmp_path / "kept"
    path.rename(kept)
    if how == "symlink":
        path.symlink_to(kept)
    elif how == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(BundleError, match=r"stage0\.fp32\.onnx"):
        load_bundle(bundle_dir)


def test_a_part_that_is_a_link_is_refused(bundle_dir, tmp_path):
    (bundle_dir / "graph").rename(tmp_path / "elsewhere")
    (bundle_dir / "graph").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="no such directory"):
        load_bundle(bundle_dir)


def test_weights_made_for_another_graph_are_refused(bundle_dir):
    rewrite(bundle_dir / "graph", lambda manifest: manifest.update(version="9"))
    with pytest.raises(BundleError, match="made for the graph"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"model": "../x"}, "model name"),
        ({"labels": ["a"]}, "2 to 4096"),
        ({"labels": ["a", "a"]}, "different labels"),
        ({"stages": []}, "no stages"),
        ({"input_shape": [1, 99], "window": None}, "stage 0 takes"),
        ({"input_shape": [0, 128]}, "every size"),
        ({"full_model_sha256": "x"}, "SHA-256"),
        ({"preprocess": {"mean": [0.0, 1.0, 2.0], "std": [1.0]}}, "preprocess.mean"),
        ({"preprocess": {"mean": [0.0], "std": [0.0]}}, "std must be positive"),
        ({"wire": {"encoding": "int8", "scale": -1.0}}, "wire scale"),
        ({"window": {"length": 10, "hop": 11}}, "hop <= length"),
        ({"window": {"length": 64, "hop": 64}}, "a window of 64 values"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_graph_that_contradicts_itself_is_refused(bundle_dir, change, message):
    rewrite_graph(bundle_dir, lambda manifest: manifest.update(change))
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle_dir)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"format": "x"}', "\x00", '{"a": ' * 5000]
)
def test_a_manifest_that_is_no_manifest_is_refused(bundle_dir, text):
    (bundle_dir / "graph/manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load_bundle(bundle_dir)


def test_a_name_that_leads_outside_is_no_file_of_the_part(bundle_dir):
    def change(manifest):
        manifest["stages"][0]["files"]["fp32"] = "../../../etc/passwd"

    rewrite_graph(bundle_dir, change)
    with pytest.raises(BundleError, match="not in the part"):
        load_bundle(bundle_dir)


def test_weights_outside_the_graphs_bound_are_refused(bundle_dir):
    def grow(tensors):
        tensors["fp32/stage0.conv0.weight"] *= 1e6

    rewrite_weights(bundle_dir, grow)
    with pytest.raises(BundleError, match="bound"):
        load_bundle(bundle_dir)


def test_weights_that_are_not_finite_are_refused(bundle_dir):
    def spoil(tensors):
        name = next(name for name in tensors if name.startswith("fp32/"))
        tensors[name] = np.full_like(tensors[name], np.nan)

    rewrite_weights(bundle_dir, spoil)
    with pytest.raises(BundleError, match="not finite"):
        load_bundle(bundle_dir)


def test_a_missing_weight_is_named(bundle_dir):
    rewrite_weights(bundle_dir, lambda tensors: tensors.pop("fp32/stage0.conv0.weight"))
    with pytest.raises(BundleError, match=r"fp32/stage0\.conv0\.weight"):
        load_bundle(bundle_dir)


def test_thresholds_above_the_graphs_bound_are_refused_except_at_the_last_point(bundle_dir):
    def accept_everything(manifest):
        manifest["plans"][0]["points"][1]["max_score"] = [1.0] * len(manifest["plans"][0]["rungs"])

    rewrite(bundle_dir / "weights", accept_everything)
    with pytest.raises(BundleError, match="above the graph's bound"):
        load_bundle(bundle_dir)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(file=st.integers(0, 99), place=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_spoiled_byte_anywhere_is_refused_or_changes_the_id(bundle_dir, bundle_id, file, place, change):
    names = sorted(path for path in bundle_dir.rglob("*") if path.is_file())
    path = names[file % len(names)]
    before = path.read_bytes()
    content = bytearray(before)
    content[place % len(content)] ^= change
    path.write_bytes(content)
    try:
        assert load_bundle(bundle_dir).bundle_id != bundle_id
    except BundleError:
        pass
    finally:
        path.write_bytes(before)


PLAN = Plan(
    name="p",
    score="margin",
    rungs=(Rung(0, "int8", -1, 1.0, 10), Rung(1, "int8", 0, 1.0, 10), Rung(1, "fp32", 0, 1.0, 10)),
    points=(
        OperatingPoint((-1.0, -1.0, -1.0), 1.0, 0.9, 30.0),
        OperatingPoint((0.1, 0.2, 1.0), 0.0, 0.8, 20.0),
    ),
    chosen=1,
    method="naive",
)


def changed(plan, rung=None, **fields):
    if rung is not None:
        rungs = list(plan.rungs)
        rungs[rung] = msgspec.structs.replace(rungs[rung], **fields)
        fields = {"rungs": tuple(rungs)}
    return msgspec.structs.replace(plan, **fields)


def test_a_sound_plan_passes():
    check_plan(PLAN, stages=2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (changed(PLAN, rungs=()), "0 rungs"),
        (changed(PLAN, rungs=PLAN.rungs * 9), "27 rungs"),
        (changed(PLAN, 1, stage=2), "stage 2 does not exist"),
        (changed(PLAN, 1, feeds_from=-1), "only stage 0 can"),
        (changed(PLAN, 1, feeds_from=1), "not climbed before it"),
        (changed(PLAN, 2, feeds_from=1), "needs the features of stage 0"),
        (changed(PLAN, 0, temperature=0.0), "temperature"),
        (changed(PLAN, 0, temperature=float("nan")), "temperature"),
        (changed(PLAN, points=()), "no operating points"),
        (changed(PLAN, chosen=2), "chosen point 2"),
        (changed(PLAN, points=(OperatingPoint((0.1,), 0, 0, 0),)), "1 thresholds for 3 rungs"),
        (changed(PLAN, points=(OperatingPoint((0.1, 0.2, float("nan")), 0, 0, 0),)), "outside -1..1"),
        (changed(PLAN, points=(OperatingPoint((0.1, 0.2, 1.5), 0, 0, 0),)), "outside -1..1"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(plan, message):
    with pytest.raises(BundleError, match=message):
        check_plan(plan, stages=2)


# --- the train step ----------------------------------------------------------------------------------------


def test_the_train_step_moves_what_the_fp32_stages_run_on(tiny_bundle):
    step, parameters = tiny_bundle.train_step, tiny_bundle.parameters()
    assert {name: array.shape for name, array in parameters.items()} == dict(step.shapes)
    assert set(tiny_bundle.graph.head_parameters) < parameters.keys()
    fp32 = [
        stage.weights for (_, precision), stage in tiny_bundle.stage_models.items() if precision == "fp32"
    ]
    assert all(any(np.array_equal(w.get(name), array) for w in fp32) for name, array in parameters.items())


def test_a_bundle_without_a_train_step_serves_and_learns_nothing(bundle_dir):
    (bundle_dir / "graph" / "train_step.onnx").unlink()

    def change(manifest):
        del manifest["files"]["train_step.onnx"]
        manifest.update(train_step=None, head_parameters=[])

    rewrite_graph(bundle_dir, change)
    bundle = load_bundle(bundle_dir)
    assert (bundle.train_step, bundle.parameters()) == (None, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_step": "other.onnx"}, "train step 'other.onnx' is not in the graph part"),
        ({"train_step": "stage0.fp32.onnx"}, r"stage0.fp32.onnx: is no train step: 0 parameters"),
        ({"head_parameters": ["nobody"]}, "head parameter 'nobody' is not one of its parameters"),
    ],
)
def test_a_train_step_that_is_none_is_refused(bundle_dir, change, message):
    rewrite_graph(bundle_dir, lambda manifest: manifest.update(change))
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle_dir)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda graph: graph.input.pop(), "odd inputs"),
        (lambda graph: graph.output.pop(), "odd outputs"),
        (lambda graph: setattr(graph.input[0], "name", "y"), "odd inputs"),
        (lambda graph: _set_dim(graph, "targets", 1, 9), r"targets is .*, expected \(n, \(4,\)\)"),
        (lambda graph: _set_dim(graph, "exit0.dense0.bias", 0, 5), "is not of the shape of its parameter"),
    ],
)
def test_a_train_step_of_another_network_is_refused(bundle_dir, spoil, message):
    onnx = pytest.importorskip("onnx")
    path = bundle_dir / "graph" / "train_step.onnx"
    model = onnx.load(path)
    spoil(model.graph)
    content = model.SerializeToString()
    path.write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    rewrite_graph(bundle_dir, lambda manifest: manifest["files"].update({"train_step.onnx": entry}))
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle_dir)


def test_a_train_step_whose_parameter_no_stage_has_is_refused(bundle_dir):
    def drop_a_bias(tensors):
        bias = tensors.pop("fp32/exit0.dense0.bias")
        tensors["fp32/exit0.dense0.bias"] = bias.astype(np.float64)

    rewrite_weights(bundle_dir, drop_a_bias)
    with pytest.raises(BundleError, match=r"exit0\.dense0\.bias"):
        load_bundle(bundle_dir)


def _set_dim(graph, name, axis, size):
    value = next(value for value in graph.input if value.name == name)
    value.type.tensor_type.shape.dim[axis].dim_value = size
