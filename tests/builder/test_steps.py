import numpy as np
import pytest

from cloud_hub.builder.steps import VERSION, Checkpoint, Steps

ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.asarray(3, np.int64)}


def fail(checkpoint):
    raise AssertionError("computed again")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


def test_a_finished_step_is_read_and_not_computed_again(tmp_path):
    Steps(tmp_path).arrays("train", {"seed": 1}, lambda checkpoint: ARRAYS)
    assert_same(Steps(tmp_path).arrays("train", {"seed": 1}, fail), ARRAYS)


@pytest.mark.parametrize("other", [("train", {"seed": 2}), ("heads", {"seed": 1})])
def test_another_step_or_another_input_is_computed(tmp_path, other):
    Steps(tmp_path).arrays("train", {"seed": 1}, lambda checkpoint: {"w": np.zeros(1)})
    assert_same(Steps(tmp_path).arrays(*other, lambda checkpoint: ARRAYS), ARRAYS)


def test_what_another_version_of_the_steps_kept_is_computed_again(tmp_path, monkeypatch):
    Steps(tmp_path).arrays("train", 1, lambda checkpoint: {"w": np.zeros(1)})
    monkeypatch.setattr("cloud_hub.builder.steps.VERSION", VERSION + 1)
    assert_same(Steps(tmp_path).arrays("train", 1, lambda checkpoint: ARRAYS), ARRAYS)


@pytest.mark.parametrize("damage", [b"", b"short", b"\xff" * 200])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    steps = Steps(tmp_path)
    steps.arrays("train", 1, lambda checkpoint: {"w": np.zeros(1)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    assert_same(steps.arrays("train", 1, lambda checkpoint: ARRAYS), ARRAYS)


def test_an_interrupted_step_finds_its_own_checkpoint_and_leaves_none_when_done(tmp_path):
    def interrupted(checkpoint):
        checkpoint.save(ARRAYS, {"epochs": 3})
        raise KeyboardInterrupt

    def resumed(checkpoint):
        arrays, state = checkpoint.load()
        assert state == {"epochs": 3}
        return arrays

    with pytest.raises(KeyboardInterrupt):
        Steps(tmp_path).arrays("train", 1, interrupted)
    assert_same(Steps(tmp_path).arrays("train", 1, resumed), ARRAYS)
    assert [path.name.count("partial") for path in tmp_path.iterdir()] == [0]


def test_a_checkpoint_that_was_never_written_is_none(tmp_path):
    assert Checkpoint(tmp_path / "none.safetensors").load() is None


def test_training_goes_on_from_a_checkpoint_to_the_very_same_weights(tmp_path):
    pytest.importorskip("torch", reason="training needs torch (the build extra)")
    from cloud_hub.builder.networks.network import Conv, Dense, Flatten, Network, Relu, Stage
    from cloud_hub.builder.networks.training import Schedule, train_full

    class Interrupted(Checkpoint):
        def save(self, arrays, state):
            super().save(arrays, state)
            if state["epochs"] == 2:
                raise KeyboardInterrupt

    network = Network((1, 8, 8), 4, (Stage((Conv(6, 3), Relu()), (Flatten(), Dense(4))),))
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 1, 8, 8)).astype(np.float32), rng.integers(0, 4, 300)
    schedule = Schedule(epochs=4, seed=1, batch=32, threads=1)
    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_full(network, x, y, schedule=schedule, checkpoint=Interrupted(path))
    resumed = train_full(network, x, y, schedule=schedule, checkpoint=Checkpoint(path))
    assert_same(resumed, train_full(network, x, y, schedule=schedule))
