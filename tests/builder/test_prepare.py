import shutil

import msgspec
import numpy as np
import onnx
import pytest

from cloud_hub.builder import prepare as preparing
from cloud_hub.builder.collect import received
from cloud_hub.builder.prepare import prepare, preprocess_of, wire_of
from cloud_hub.builder.reports.card import Card, DataPart
from cloud_hub.builder.request import make_request
from cloud_hub.builder.samples.data import Dataset, Parts, data_sha256
from cloud_hub.errors import BuildError
from edge_cascade.bundle import load_bundle
from edge_cascade.manifest import Preprocess, Window, Wire
from edge_cascade.preprocess import normalise
from edge_cascade.profile import StageCost, write_profile
from edge_cascade.shipped import shipped_model_dir
from tests.builder.models import CLASSES, MEAN, STD, arrays_of, brought, built, full_model, images
from tests.builder.test_request import refusal_of
from tests.cascade.test_profile import profile


@pytest.fixture
def request_for(tmp_path):
    """A request with what is to be different in the data and in the request."""

    def make(*, channels=1, data=None, **changes):
        arrays = {**arrays_of(channels=channels), **(data or {})}
        np.savez(
            tmp_path / "data.npz", **{name: array for name, array in arrays.items() if array is not None}
        )
        values = {
            "full": str(brought(channels=channels).full),
            "data": str(tmp_path / "data.npz"),
            "out": str(tmp_path / "out"),
            "mean": (MEAN,),
            "std": (STD,),
        }
        return make_request(values | changes)

    return make


def changed(name, change):
    return {
        f"{name}_{part}": change(arrays_of()[f"{name}_{part}"]) for part in ("train", "calibration", "test")
    }


def test_all_that_a_bundle_says_of_its_samples_comes_from_the_request_and_the_data(request_for):
    prepared = prepare(request_for(version="3.1", window=8, hop=4))
    declaration = prepared.declaration
    assert (declaration.model, declaration.version, declaration.labels) == (
        "out",
        "3.1",
        ("0", "1", "2", "3"),
    )
    assert (declaration.input_shape, declaration.preprocess) == ((1, 8, 8), Preprocess((MEAN,), (STD,)))
    assert (declaration.wire, declaration.window) == (Wire("uint8", 1.0), Window(8, 4))
    assert prepared.splits.calibrate.y is not None
    assert prepared.notes[-1].startswith("the full model is right on 98.")


@pytest.mark.parametrize(
    ("out", "name"), [("a/my model", "my-model"), ("x.y", "x-y"), ("größe", "gr--e"), ("--", "model")]
)
def test_a_model_is_called_as_its_directory_as_far_as_names_allow(request_for, tmp_path, out, name):
    assert prepare(request_for(out=str(tmp_path / out))).declaration.model == name


def test_a_model_that_is_built_in_the_working_directory_has_its_name(request_for, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert prepare(request_for(out=".")).declaration.model == "here"


def test_the_scale_is_drawn_into_mean_and_std():
    request = make_request(
        {
            "full": "f",
            "data": "d",
            "out": "o",
            "scale": 1 / 255,
            "mean": (0.485, 0.456),
            "std": (0.229, 0.224),
        }
    )
    x = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 3)).astype(np.float32)
    mean, std = (np.array(values).reshape(2, 1, 1) for values in (request.mean, request.std))
    assert np.allclose(normalise(x, preprocess_of(request)), (x / 255 - mean) / std, atol=1e-5)


def test_a_scaled_model_is_as_good_as_one_that_takes_the_numbers_themselves(request_for):
    scaled = prepare(request_for(scale=1 / 256, mean=(MEAN / 256,), std=(STD / 256,)))
    assert scaled.notes[-1] == prepare(request_for()).notes[-1]
    assert scaled.declaration.preprocess == Preprocess((MEAN,), (STD,))


def test_a_mean_per_channel_belongs_to_its_channel(request_for):
    offsets = np.array([200.0, 0.0, -50.0])
    arrays = arrays_of(channels=3)
    shifted = {name: x + offsets[:, None, None] for name, x in arrays.items() if name.startswith("x")}
    right = prepare(
        request_for(channels=3, data=shifted, mean=tuple((MEAN + offsets).tolist()), encoding="float32")
    )
    assert right.notes == prepare(request_for(channels=3)).notes
    with pytest.raises(BuildError, match="as good as guessing"):
        prepare(request_for(channels=3, data=shifted, mean=tuple((MEAN + 8 * offsets[::-1]).tolist())))


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (8, 8, 1)])
def test_axes_of_one_are_added_and_removed_as_the_network_wants_them(request_for, shape):
    data = changed("x", lambda x: x.reshape(-1, *shape))
    assert prepare(request_for(data=data)).declaration.input_shape == (1, 8, 8)


def test_a_single_channel_may_be_declared_last(request_for):
    data = changed("x", lambda x: x.reshape(-1, 8, 8))
    prepared = prepare(request_for(data=data, layout="channels_last"))
    assert prepared.declaration.input_shape == (8, 8, 1)
    assert prepared.declaration.preprocess.network_shape((8, 8, 1)) == (1, 8, 8)


def test_the_sizes_that_a_file_leaves_open_are_the_datas(request_for, tmp_path):
    model = full_model()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    onnx.save(model, tmp_path / "open.onnx")
    assert prepare(request_for(full=str(tmp_path / "open.onnx"))).full.input_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("stored_as", "changes", "wire"),
    [
        ("uint8", {}, Wire("uint8", 1.0)),
        ("uint8", {"wire_scale": 2.0}, Wire("uint8", 2.0)),
        ("uint8", {"encoding": "int8"}, Wire("int8", None)),
        ("float32", {}, Wire("int8", None)),
        ("float32", {"wire_scale": 0.5}, Wire("int8", 0.5)),
        ("float32", {"encoding": "uint8"}, Wire("uint8", None)),
        ("float32", {"encoding": "float32"}, Wire("float32", None)),
    ],
)
def test_grey_levels_travel_as_they_are_and_the_rest_in_eight_bits(stored_as, changes, wire):
    data = Dataset(np.zeros((1, 2), np.float32), stored_as=stored_as)
    request = make_request({"full": "f", "data": "d", "out": "o", **changes})
    assert wire_of(request, Parts(train=data)) == wire


def test_one_part_of_another_type_makes_all_of_them_travel_alike():
    parts = Parts(
        train=Dataset(np.zeros((1, 2), np.float32), stored_as="uint8"),
        test=Dataset(np.zeros((1, 2), np.float32), stored_as="float64"),
    )
    assert wire_of(make_request({"full": "f", "data": "d", "out": "o"}), parts) == Wire("int8")


def test_names_of_labels_come_from_the_data(request_for):
    names = np.array(["ant", "bee", "cat", "dog"])
    data = changed("y", lambda y: names[y]) | {"labels": names}
    assert prepare(request_for(data=data)).declaration.labels == tuple(names)


def test_arrays_may_have_other_names(request_for):
    arrays = arrays_of()
    data = dict.fromkeys(arrays) | {
        name.replace("x_", "pictures_").replace("y_", "fruit_"): array for name, array in arrays.items()
    }
    prepared = prepare(request_for(data=data, x_key="pictures", y_key="fruit"))
    assert len(prepared.splits.calibrate) + len(prepared.splits.optimise) == 1000


def test_unlabelled_data_are_judged_by_the_full_model_and_that_is_said(request_for):
    prepared = prepare(request_for(data=changed("y", lambda y: None)))
    assert prepared.splits.calibrate.y is None
    assert prepared.notes[-1].startswith("no calibration labels: what is certified is agreement")


def test_the_full_model_is_tried_on_what_chooses_and_never_on_what_certifies(request_for, monkeypatch):
    asked = []

    def full_labels(full, x):
        asked.append(x)
        return original(full, x)

    original = preparing.full_labels
    monkeypatch.setattr(preparing, "full_labels", full_labels)
    prepared = prepare(request_for())
    (given,) = asked
    assert np.array_equal(
        given, received(prepared.splits.optimise.x, prepared.declaration.preprocess, Wire("uint8", 1.0))
    )
    assert prepared.notes[-1].endswith(" % of the data for thresholds")


def test_a_bound_on_disagreement_beside_epsilon_is_refused_without_labels(request_for):
    request = request_for(data=changed("y", lambda y: None), disagreement_epsilon=0.1)
    assert "disagreement_epsilon does nothing with data without labels" in refusal_of(prepare, request)
    arrays = arrays_of()
    data = dict.fromkeys(arrays) | {"x": arrays["x_calibration"]}
    request = request_for(data=data, disagreement_epsilon=0.1)
    assert "disagreement_epsilon does nothing with" in refusal_of(prepare, request)


def test_a_profile_is_read_before_anything_else(request_for, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "load_parts", None)
    path = tmp_path / "board.json"
    assert "write one with `edge-daemon profile`" in refusal_of(prepare, request_for(profile=str(path)))
    write_profile(path, profile(stage_cost(bundle_id="ab" * 32)))
    assert "holds no stage of the models that ship" in refusal_of(prepare, request_for(profile=str(path)))
    write_profile(path, profile(stage_cost(runtime="litert")))
    assert refusal_of(prepare, request_for(profile=str(path))) == (
        f"{path}: measured with litert, and what is compared is onnxruntime: measure the board with "
        "`edge-daemon profile --runtime onnxruntime`"
    )


def test_a_profile_that_can_be_compared_is_taken(request_for, tmp_path):
    write_profile(tmp_path / "board.json", profile(stage_cost()))
    assert prepare(request_for(profile=str(tmp_path / "board.json"))).base is None


def stage_cost(**changes):
    known = load_bundle(shipped_model_dir("digits") / "bundle").bundle_id
    cost = StageCost("digits", known, 0, "fp32", "onnxruntime", "tight", 1000, 9.0, 9.0, 50)
    return msgspec.structs.replace(cost, **changes)


# --- what certifies a network that was made elsewhere

APART = "give calibration data of its own (x_calibration), or say --calibration-is-fresh"


def in_one_piece():
    arrays = arrays_of()
    return dict.fromkeys(arrays) | {"x": arrays["x_calibration"], "y": arrays["y_calibration"]}


def test_data_in_one_piece_certify_no_network_of_the_users_own_unless_he_vouches(request_for):
    edge = str(brought().full)
    assert f"edge: your network may have learned from the data that would certify it: {APART}" in refusal_of(
        prepare, request_for(data=in_one_piece(), edge=edge)
    )
    assert (
        prepare(request_for(data=in_one_piece(), edge=edge, calibration_is_fresh=True)).splits.calibrate.y
        is not None
    )
    assert prepare(request_for(edge=edge)).splits.calibrate.y is not None
    assert prepare(request_for(data=in_one_piece())).splits.calibrate.y is not None


def test_data_in_one_piece_certify_no_network_that_is_kept_unless_he_vouches(request_for):
    base = str(brought().base)
    assert f"rebase: the bundle's network may have learned from the data that would certify it: {APART}" in (
        refusal_of(prepare, request_for(data=in_one_piece(), rebase=base))
    )
    assert (
        prepare(request_for(data=in_one_piece(), rebase=base, calibration_is_fresh=True)).splits.calibrate.y
        is not None
    )
    assert prepare(request_for(rebase=base)).splits.calibrate.y is not None


def reported(tmp_path, train, **changes):
    """The shared base's network, in a directory whose report says what trained it."""
    out = tmp_path / "reported"
    shutil.copytree(built() / "bundle", out / "bundle")
    card = msgspec.json.decode((built() / "report.json").read_bytes(), type=Card)
    parts = (DataPart("training", len(train), None, data_sha256(train)), *card.data[1:])
    card = msgspec.structs.replace(card, **{"data": parts, **changes})
    (out / "report.json").write_bytes(msgspec.json.encode(card))
    return str(out)


def test_a_report_that_names_the_same_training_part_shows_that_the_rest_trained_nothing(
    request_for, tmp_path
):
    train = prepare(request_for(data=in_one_piece())).splits.train
    base = reported(tmp_path, train)
    assert prepare(request_for(data=in_one_piece(), rebase=base)).splits.calibrate.y is not None
    # Another seed divides otherwise, and certifies on what trained.
    assert APART in refusal_of(prepare, request_for(data=in_one_piece(), rebase=base, seed=1))


def test_a_report_about_another_bundle_or_a_damaged_one_shows_nothing(request_for, tmp_path):
    train = prepare(request_for(data=in_one_piece())).splits.train
    card = msgspec.json.decode((built() / "report.json").read_bytes(), type=Card)
    other = msgspec.structs.replace(card.evaluation, bundle_id="ab" * 32)
    base = reported(tmp_path, train, evaluation=other)
    assert APART in refusal_of(prepare, request_for(data=in_one_piece(), rebase=base))
    (tmp_path / "reported" / "report.json").write_bytes(b"\xff{")
    assert APART in refusal_of(prepare, request_for(data=in_one_piece(), rebase=base))


def test_another_seed_certifies_on_other_samples(request_for):
    first, second, again = (prepare(request_for(seed=seed)).splits.calibrate for seed in (0, 1, 0))
    assert data_sha256(first) != data_sha256(second)
    assert data_sha256(first) == data_sha256(again)


def test_no_group_is_in_two_parts(request_for):
    arrays = arrays_of()
    count = len(arrays["x_calibration"])
    groups = np.random.default_rng(5).integers(0, 150, count)
    data = dict.fromkeys(arrays)
    data |= {"x": arrays["x_calibration"], "y": arrays["y_calibration"], "groups": groups}
    splits = prepare(request_for(data=data)).splits
    parts = [set(part.groups.tolist()) for part in (splits.train, splits.optimise, splits.calibrate)]
    assert set.union(*parts) == set(groups.tolist())
    assert sum(map(len, parts)) == len(set.union(*parts))


def nan_in(x):
    x = x.astype(np.float32)
    x[5, 0, 0, 0] = np.nan
    return x


@pytest.mark.parametrize(
    ("data", "changes", "complaint"),
    [
        ({}, {"mean": (1.0, 2.0, 3.0)}, "mean has 3 values, samples have 1 channels: give one value, or one"),
        ({}, {"std": (1.0, 2.0)}, "std has 2 values"),
        ({}, {"window": 5}, "window = 5, but samples are (1, 8, 8): their last axis is time"),
        ({}, {"window_overlap": 2}, "window_overlap = 2: needs window"),
        ({}, {"window": 8, "window_overlap": 8}, "window_overlap = 8: needs window, the length of a sample"),
        ({}, {"std": (1e-45,)}, "std / scale is more or less than float32 can divide by"),
        ({}, {"scale": 1e300}, "std / scale is more or less"),
        ({}, {"mean": (1e39,)}, "mean / scale is more than float32 can hold"),
        ({}, {"wire_scale": 1e-60}, "wire_scale = 1e-60: float32 cannot hold that"),
        (
            changed("x", lambda x: x[:, :, :7]),
            {},
            "samples of train are (1, 7, 8), the network takes (1, 8, 8)",
        ),
        (changed("x", lambda x: x - 200.0), {"encoding": "uint8"}, "some samples have values below 0"),
        (changed("x", nan_in), {}, "x_train: 1 of 100 samples hold NaN"),
        (
            changed("y", lambda y: y + 1),
            {},
            "run from 1 to 4, a network of 4 classes knows 0 to 3: subtract 1",
        ),
        (changed("y", lambda y: y - 1), {}, "labels are 0 to"),
        (changed("y", lambda y: y + 0.5), {}, "which is no whole number"),
        (changed("y", np.zeros_like), {}, "every sample has the same label: there is nothing to tell apart"),
        (
            changed("y", np.random.default_rng(0).permutation),
            {},
            "as good as guessing: are the labels in the",
        ),
        (changed("y", lambda y: np.eye(CLASSES)[y]), {}, "one label per sample, as argmax gives it"),
        ({"labels": np.array(["a", "b", "c"])}, {}, "y_train holds the label 3"),
        ({}, {"mean": (0.0,), "std": (1e-3,)}, "as good as guessing"),
        ({}, {"y_key": "fault"}, "no array 'fault' goes with any 'x'"),
    ],
)
def test_data_and_request_that_do_not_fit_are_told_in_one_line(request_for, data, changes, complaint):
    assert complaint in refusal_of(prepare, request_for(data=data, **changes))


def test_a_class_without_calibration_samples_is_named(request_for):
    arrays = arrays_of()
    kept = arrays["y_calibration"] != 2
    data = {name: arrays[name][kept] for name in ("x_calibration", "y_calibration")}
    assert "no sample of class 2 is left to calibrate on" in refusal_of(prepare, request_for(data=data))


def test_ten_samples_are_too_few_and_each_part_says_what_it_got(request_for):
    few = images(10, 9)
    data = dict.fromkeys(arrays_of()) | {"x": few.x, "y": few.y}
    assert "too little data: " in refusal_of(prepare, request_for(data=data))


def test_the_users_own_file_is_not_replaced_by_another_form_of_it(request_for, tmp_path):
    onnx.save(full_model(), tmp_path / "full.onnx")
    request = request_for(full=str(tmp_path / "full.onnx"), out=str(tmp_path))
    assert "is your full model and would be replaced" in refusal_of(prepare, request)


def test_a_full_model_that_a_build_wrote_may_lie_in_the_same_directory(request_for, tmp_path):
    (tmp_path / "out").mkdir()
    written = tmp_path / "out" / "full.onnx"
    written.write_bytes(prepare(request_for()).full_file)
    assert prepare(request_for(full=str(written))).full_file == written.read_bytes()
