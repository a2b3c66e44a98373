import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cloud_hub.builder.samples.arrays import list_arrays, read_arrays
from cloud_hub.builder.samples.data import Dataset, Parts, data_sha256, fit_parts, label_names
from cloud_hub.builder.samples.load import Keys, load_dataset, load_parts
from cloud_hub.errors import BuildError

X = np.arange(60, dtype=np.float32).reshape(12, 5)
Y = np.arange(12) % 3


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return path

    return write


def refusal_of(call, *arguments, **keywords):
    with pytest.raises(BuildError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def test_x_and_y_are_one_undivided_set(save):
    parts = load_parts(save(x=X, y=Y))
    assert [name for name, _ in parts] == ["train"]
    assert np.array_equal(parts.train.x, X)
    assert parts.train.y.tolist() == Y.tolist()
    assert parts.train.y.dtype == np.int64
    assert (parts.train.groups, parts.train.names, parts.train.stored_as) == (None, None, "float32")


@pytest.mark.parametrize("suffix", ["_calibration", "_cal", "_val"])
def test_parts_are_known_by_their_suffix(save, suffix):
    path = save(**{"x_train": X, "y_train": Y, f"x{suffix}": X + 100, f"y{suffix}": Y, "x_test": X + 200})
    parts = load_parts(path)
    assert [name for name, _ in parts] == ["train", "calibration", "test"]
    assert parts.calibration.x[0, 0] == 100
    assert parts.test.y is None


def test_two_arrays_for_one_part_are_refused(save):
    assert "'x_cal' and 'x_val'" in refusal_of(load_parts, save(x_train=X, x_cal=X, x_val=X))
    assert "'x_train' and 'x'" in refusal_of(load_parts, save(x_train=X, x=X))


def test_integers_become_float32_and_their_dtype_is_remembered(save):
    data = load_parts(save(x=X.astype(np.uint8), y=Y.astype(np.uint8)[:, np.newaxis])).train
    assert data.x.dtype == np.float32
    assert data.stored_as == "uint8"
    assert data.y.tolist() == Y.tolist()


def test_arrays_in_column_order_and_foreign_byte_order_are_read_as_they_are_meant(save):
    data = load_parts(save(x=np.asfortranarray(X.astype(">f8")), y=Y.astype(">i2"))).train
    assert np.array_equal(data.x, X)
    assert data.y.tolist() == Y.tolist()


def test_text_labels_take_the_order_of_the_names_and_else_of_the_alphabet(save):
    text = np.array(["cat", "ant", "bee"] * 4)
    by_alphabet = load_parts(save(x=X, y=text)).train
    assert by_alphabet.names == ("ant", "bee", "cat")
    assert by_alphabet.y[:3].tolist() == [2, 0, 1]
    by_names = load_parts(save(x=X, y=text.astype("S"), classes=np.array(["cat", "bee", "ant"]))).train
    assert by_names.names == ("cat", "bee", "ant")
    assert by_names.y[:3].tolist() == [0, 2, 1]


def test_numbers_written_as_text_are_numbers_since_ten_sorts_before_two(save):
    y = np.arange(12)
    assert load_parts(save(x=X, y=y.astype(str))).train.y.tolist() == y.tolist()


def test_a_label_that_is_no_name_is_told(save):
    path = save(x=X, y=np.array(["cat", "dog"] * 6), labels=np.array(["cat", "bee"]))
    assert "'dog' (sample 1)" in refusal_of(load_parts, path)


def test_groups_keep_their_meaning_across_parts_and_may_have_another_name(save):
    path = save(x_train=X, load_train=np.arange(12) % 4 + 7, x_test=X, load_test=np.full(12, 9))
    assert load_parts(path).train.groups is None
    parts = load_parts(path, keys=Keys(groups="load"))
    assert parts.train.groups[:4].tolist() == [0, 1, 2, 3]
    assert set(parts.test.groups) == {2}
    assert "'machine'" in refusal_of(load_parts, path, keys=Keys(groups="machine"))


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"z": X}, "--x-key"),
        ({"x": X, "y": Y[:-1]}, "y is (11,) for 12 samples"),
        ({"x": X, "y": np.eye(12)}, "argmax"),
        ({"x": X, "y": Y - 1}, "label -1 (sample 0)"),
        ({"x": X, "y": Y + 0.5}, "0.5 (sample 0), which is no whole number"),
        (
            {"x": X, "y": Y, "labels": np.array(["a", "b"])},
            "label 2 (sample 2): there are 2 names, so labels are 0 to 1",
        ),
        ({"x": X, "labels": Y}, "--y-key labels"),
        ({"x": X[:, 0]}, "x is (12,): expected (samples, *shape)"),
        ({"x": np.float32(1)}, "x is ()"),
        ({"x": X[:0]}, "is empty"),
        ({"x": X.astype(complex)}, "neither plain numbers nor text"),
        ({"x": X.astype(str)}, "samples are numbers"),
        ({"x": np.where(X == 7, np.nan, X)}, "1 of 12 samples hold NaN"),
        ({"x": X.astype(np.float64) * 1e300}, "more than float32 can hold, the first is sample 0"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(save, arrays, told):
    assert told in refusal_of(load_parts, save(**arrays))


def test_python_objects_are_refused_and_never_unpickled(save):
    assert "Python objects" in refusal_of(load_parts, save(x=np.array([{}, []], object)))


def test_a_missing_file_and_a_text_file_are_told(tmp_path):
    assert "no such file" in refusal_of(load_parts, tmp_path / "none.npz")
    (tmp_path / "data.csv").write_text("1,2,3")
    assert "data.csv: no data: give an .npz" in refusal_of(load_parts, tmp_path / "data.csv")


def test_a_size_above_the_bound_is_refused_from_the_header_alone(tmp_path):
    # The header claims a terabyte; nothing stands behind it, so reading it would have failed otherwise.
    raw = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        raw, {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**20)}
    )
    (tmp_path / "x.npy").write_bytes(raw.getvalue())
    message = refusal_of(load_parts, tmp_path / "x.npy")
    assert "at most 2,147,483,648" in message
    assert "--max-bytes" in message


def test_a_member_that_inflates_to_less_than_its_header_says_is_damaged(tmp_path):
    raw = io.BytesIO()
    np.save(raw, X)
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", raw.getvalue()[:-4])
    assert "shorter" in refusal_of(load_parts, tmp_path / "data.npz")


def test_the_bound_counts_numbers_as_the_float32_they_become(save):
    path = save(x=X.astype(np.uint8), y=Y.astype(np.uint8))
    assert list_arrays(path)["x"].memory_bytes == 4 * X.size
    needed = path.stat().st_size
    assert len(load_parts(path, max_bytes=needed).train) == 12
    big = save(x=np.zeros((needed, 1), np.uint8))
    read_arrays(big, ["x"])
    assert "--max-bytes" in refusal_of(load_parts, big, max_bytes=3 * needed)


def test_a_set_to_judge_by_is_the_test_part_or_else_the_whole(save):
    assert load_dataset(save(x=X, x_test=X + 1)).x[0, 0] == 1
    assert load_dataset(save(x=X)).x[0, 0] == 0
    assert "neither" in refusal_of(load_dataset, save(x_val=X))


def test_one_array_alone_is_unlabelled_data(tmp_path):
    np.save(tmp_path / "x.npy", X)
    assert np.array_equal(load_dataset(tmp_path / "x.npy").x, X)


@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path_factory, flips):
    raw = io.BytesIO()
    np.savez_compressed(raw, x=X, y=np.array(["a", "b"] * 6))
    data = bytearray(raw.getvalue())
    for place, value in flips:
        data[place % len(data)] = value
    path = tmp_path_factory.mktemp("damaged") / "data.npz"
    path.write_bytes(data)
    check_total(path)


ARRAYS = hnp.arrays(
    dtype=st.one_of(
        hnp.integer_dtypes(),
        hnp.floating_dtypes(),
        hnp.boolean_dtypes(),
        hnp.unicode_string_dtypes(max_len=3),
        hnp.byte_string_dtypes(max_len=3),
        hnp.complex_number_dtypes(),
    ),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
KEYS = st.sampled_from(
    ["x", "y", "groups", "x_train", "y_train", "x_val", "y_val", "x_test", "y_test", "groups_train", "labels"]
)


@given(arrays=st.dictionaries(KEYS, ARRAYS, max_size=6))
def test_any_arrays_become_parts_or_one_line(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("arrays") / "data.npz"
    np.savez(path, **arrays)
    check_total(path)


@given(header=st.binary(max_size=80))
def test_any_array_header_is_read_or_refused(tmp_path_factory, header):
    path = tmp_path_factory.mktemp("header") / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    check_total(path)


def check_total(path):
    parts, message = Parts(), "read"
    try:
        parts = load_parts(path)
    except BuildError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    for _, part in parts:
        assert part.x.dtype == np.float32
        assert np.isfinite(part.x).all()
        assert part.y is None or part.y.shape == (len(part),)


def images(shape, value=0):
    return Parts(train=Dataset(np.full((3, *shape), value, np.float32)))


@pytest.mark.parametrize(
    ("shape", "network", "layout", "fitted"),
    [
        ((28, 28), (1, 28, 28), "channels_first", (1, 28, 28)),
        ((28, 28), (1, 28, 28), "channels_last", (28, 28, 1)),
        ((8, 6, 3), (3, 8, 6), "channels_last", (8, 6, 3)),
        ((1024,), (1, 1024), "channels_first", (1, 1024)),
        ((1, 16), (16,), "channels_first", (16,)),
        ((9, 128), (9, 128), "channels_first", (9, 128)),
    ],
)
def test_samples_get_the_axes_of_size_one_that_the_network_has(shape, network, layout, fitted):
    assert fit_parts(images(shape), network, layout).train.sample_shape == fitted


@pytest.mark.parametrize(
    ("shape", "network", "layout", "told"),
    [
        ((8, 6, 3), (3, 8, 6), "channels_first", "declare --layout channels_last"),
        ((3, 8, 6), (3, 8, 6), "channels_last", "declare --layout channels_first"),
        ((8, 8), (64,), "channels_first", "reshape x to (samples, 64)"),
        ((8, 8), (1, 9, 9), "channels_first", "samples of train are (8, 8), the network takes (1, 9, 9)"),
        ((8, 6), (1, 6, 8), "channels_first", "(8, 6)"),
    ],
)
def test_shapes_that_do_not_fit_are_both_named(shape, network, layout, told):
    assert told in refusal_of(fit_parts, images(shape), network, layout)


def labelled(*labels, names=None):
    return Parts(
        train=Dataset(np.zeros((len(labels), 2), np.float32), np.array(labels, np.int64), names=names)
    )


def test_labels_are_named_for_every_output_of_the_network():
    assert label_names(labelled(0, 2), 3) == ("0", "1", "2")
    assert label_names(labelled(0, 1, names=("off", "on")), 2) == ("off", "on")
    assert label_names(Parts(train=Dataset(np.zeros((2, 2), np.float32))), 2) == ("0", "1")


def test_labels_that_the_network_does_not_know_are_refused():
    assert "subtract 1" in refusal_of(label_names, labelled(1, 2, 3), 3)
    assert "knows 0 to 2" in refusal_of(label_names, labelled(0, 7), 3)
    assert "names 2 labels, the network tells 3" in refusal_of(
        label_names, labelled(0, 1, names=("a", "b")), 3
    )
    assert "same label" in refusal_of(label_names, labelled(1, 1), 3)


def test_the_digest_changes_with_order_dtype_shape_labels_and_groups():
    base = Dataset(X, Y)
    others = [
        Dataset(X[::-1], Y),
        Dataset(X.reshape(12, 1, 5), Y),
        Dataset(X),
        Dataset(X, (Y + 1) % 3),
        Dataset(X, Y.astype(np.int32)),
        Dataset(X, groups=Y),
        Dataset(X, Y, groups=Y),
    ]
    digests = {data_sha256(data) for data in [base, *others]}
    assert len(digests) == len(others) + 1
    assert data_sha256(Dataset(X.copy(), Y.copy())) == data_sha256(base)


def test_a_folder_holds_one_class_in_each_sub_folder(tmp_path):
    for name, count in (("on", 2), ("off", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            np.save(tmp_path / name / f"{number}.npy", np.full((2, 4), number, np.int16))
        (tmp_path / name / ".hidden").write_text("no sample")
    np.savez(tmp_path / "on" / "more.npz", x=np.zeros((5, 2, 4), np.uint8))
    data = load_parts(tmp_path).train
    assert data.names == ("off", "on")
    assert data.y.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert data.x.shape == (10, 2, 4)
    assert data.stored_as == "int16"


def test_a_folder_may_be_divided_already(tmp_path):
    for part in ("train", "val", "test"):
        for number, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            np.save(tmp_path / part / name / "s.npy", np.full(4, number))
    parts = load_parts(tmp_path)
    assert [(name, part.y.tolist()) for name, part in parts] == [
        ("train", [0, 1]),
        ("calibration", [0, 1]),
        ("test", [0, 1]),
    ]


def test_a_folder_that_cannot_be_used_is_told_with_the_file(tmp_path):
    assert "0 folders of a class" in refusal_of(load_parts, tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
    assert "empty" in refusal_of(load_parts, tmp_path)
    np.save(tmp_path / "a" / "0.npy", np.zeros(4))
    np.save(tmp_path / "b" / "0.npy", np.zeros(5))
    assert "b/0.npy: samples of (5,) where the first ones are (4,)" in refusal_of(load_parts, tmp_path)
    (tmp_path / "b" / "0.npy").unlink()
    assert "raise --max-bytes" in refusal_of(load_parts, tmp_path, max_bytes=12)
    (tmp_path / "b" / "sound.wav").write_bytes(b"RIFF")
    assert "b/sound.wav: neither an array nor an image" in refusal_of(load_parts, tmp_path)


def test_images_become_pixels_grey_or_coloured(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, value in (("dark", 10), ("light", 200)):
        (tmp_path / "grey" / name).mkdir(parents=True)
        (tmp_path / "rgb" / name).mkdir(parents=True)
        image.new("L", (6, 4), value).save(tmp_path / "grey" / name / "i.png")
        image.new("RGBA", (6, 4), (value, 1, 2, 255)).save(tmp_path / "rgb" / name / "i.png")
    grey, rgb = load_parts(tmp_path / "grey").train, load_parts(tmp_path / "rgb").train
    assert grey.x.shape == (2, 4, 6)
    assert rgb.x.shape == (2, 4, 6, 3)
    assert rgb.x[1, 0, 0].tolist() == [200, 1, 2]
    assert (grey.stored_as, rgb.names) == ("uint8", ("dark", "light"))


def test_a_damaged_or_too_large_image_is_told_with_its_name(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in "ab":
        (tmp_path / name).mkdir()
        image.new("L", (64, 64)).save(tmp_path / name / "i.png")
    assert "raise --max-bytes" in refusal_of(load_parts, tmp_path, max_bytes=20_000)
    whole = (tmp_path / "b" / "i.png").read_bytes()
    (tmp_path / "b" / "i.png").write_bytes(whole[: len(whole) // 2])
    assert "b/i.png: not a readable image" in refusal_of(load_parts, tmp_path)
