import numpy as np
import pytest

from cloud_hub.builder.networks.network import (
    BATCH_NORM_EPSILON,
    Conv,
    Dense,
    Flatten,
    Network,
    Stage,
    fold_batch_norm,
    initial_parameters,
)
from tests.builder.networks import IMAGE, SIGNAL, parameters_of


def test_shapes_follow_strides_pools_and_padding():
    assert SIGNAL.feature_shapes == ((4, 32), (8, 16), (8, 8))
    assert IMAGE.feature_shapes == ((6, 4, 4), (8, 4, 4))


def test_multiply_adds_and_parameters_are_those_counted_by_hand():
    # conv 4*1*5 weights at 32 places; head 3*4. conv 8*(4/4)*3 at 32; head 3*8. conv 8*8*3 at 8; head 3*64.
    assert SIGNAL.mult_adds == (4 * 5 * 32 + 12, 8 * 3 * 32 + 24, 8 * 8 * 3 * 8 + 3 * 64)
    assert SIGNAL.parameter_count == (20 + 4 + 12 + 3) + (24 + 8 + 24 + 3) + (192 + 8 + 192 + 3)


def test_the_same_seed_gives_the_same_parameters():
    first = initial_parameters(SIGNAL, np.random.default_rng(5))
    second = initial_parameters(SIGNAL, np.random.default_rng(5))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_folded_batch_norm_equals_unfolded():
    parameters = parameters_of(SIGNAL)
    folded = fold_batch_norm(SIGNAL, parameters)
    own = {short: parameters[f"stage0.conv0.{short}"] for short in ("gamma", "beta", "mean", "variance")}
    patch = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)  # what the kernel sees

    plain = (parameters["stage0.conv0.weight"][:, 0] * patch).sum(axis=1) + parameters["stage0.conv0.bias"]
    normalised = (plain - own["mean"]) / np.sqrt(own["variance"] + BATCH_NORM_EPSILON) * own["gamma"] + own[
        "beta"
    ]
    at_once = (folded["stage0.conv0.weight"][:, 0] * patch).sum(axis=1) + folded["stage0.conv0.bias"]

    np.testing.assert_allclose(at_once, normalised, rtol=1e-5, atol=1e-6)
    assert {name.rsplit(".", 1)[1] for name in folded} == {"weight", "bias"}


def test_a_missing_or_misshapen_parameter_is_named():
    parameters = parameters_of(SIGNAL)
    short = {name: array for name, array in parameters.items() if name != "exit1.dense0.bias"}
    with pytest.raises(ValueError, match=r"exit1\.dense0\.bias"):
        fold_batch_norm(SIGNAL, short)
    with pytest.raises(ValueError, match=r"stage0\.conv0\.weight"):
        fold_batch_norm(SIGNAL, parameters | {"stage0.conv0.weight": np.zeros((4, 1, 3), np.float32)})


def test_a_head_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match="exit 0 gives"):
        Network((1, 8), 3, (Stage((Conv(2, 3),), (Flatten(), Dense(4))),))
