"""What is sent of a training: clipped, noised, encoded, and nothing lost between updates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.deltas import decode_delta, encode_delta
from edge_cascade.errors import ProtocolError
from edge_cascade.manifest import Preprocess
from edge_cascade.messages import SelfLabels
from edge_cascade.weights import difference
from edge_daemon.core.examples import Drawn, Origin
from edge_daemon.training.targets import make_examples
from edge_daemon.training.updates import clipped, make_update, noised
from tests.device.rounds_cases import drawn, terms

SHAPES = {"conv.weight": (8, 1, 3), "head.bias": (4,), "head.weight": (4, 40)}
HEADS = ("head.weight", "head.bias")
MAX_BYTES = 10_000


def weights(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def update_of(base, trained, of, *, residual=None, seed=0):
    return make_update(
        base,
        trained,
        of,
        residual=residual or {},
        head_parameters=HEADS,
        noise=np.random.default_rng(seed),
    )


def norm_of(delta):
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in delta.values())))


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_without_privacy_the_fp32_delta_is_the_difference_itself():
    base, trained = weights(1), weights(2)
    made = update_of(base, trained, terms())
    assert same(decode_delta(made.delta, SHAPES, max_bytes=MAX_BYTES), difference(trained, base))
    assert (made.residual, made.heads) == (None, {})


@given(st.integers(0, 1000), st.floats(1e-3, 100.0), st.floats(1e-3, 100.0))
def test_a_clipped_delta_is_never_longer_than_the_bound_and_points_the_same_way(seed, scale, bound):
    delta = weights(seed, scale)
    short = clipped(delta, bound)
    assert norm_of(short) <= bound
    assert norm_of(short) == pytest.approx(min(bound, norm_of(delta)), rel=1e-5)
    cosine = sum(float((delta[name] * short[name]).sum()) for name in delta) / (
        norm_of(delta) * norm_of(short)
    )
    assert cosine == pytest.approx(1.0, abs=1e-5)


def test_a_delta_within_the_bound_is_left_as_it_is():
    delta = weights(1)
    assert same(clipped(delta, norm_of(delta)), delta)


def test_noise_has_the_deviation_that_was_asked_for_on_every_value():
    zeros = {"a": np.zeros((200, 500), np.float32), "b": np.zeros(50_000, np.float32)}
    noise = noised(zeros, 0.3, np.random.default_rng(5))
    for array in noise.values():
        assert array.dtype == np.float32
        assert array.mean() == pytest.approx(0.0, abs=0.006)
        assert array.std() == pytest.approx(0.3, rel=0.02)
        # Gaussian: 68.3 % within one deviation, 99.7 % within three.
        assert np.mean(np.abs(array) < 0.3) == pytest.approx(0.683, abs=0.01)
        assert np.mean(np.abs(array) < 0.9) == pytest.approx(0.9973, abs=0.002)
    assert abs(np.corrcoef(noise["a"].ravel()[:50_000], noise["b"])[0, 1]) < 0.02


def test_what_is_encoded_is_the_noised_and_clipped_delta():
    base, trained = weights(1), weights(2, 5.0)
    of = terms(clip_norm_ppm=1_500_000, noise_multiplier_ppm=200_000)
    made = update_of(base, trained, of, seed=9)
    expected = noised(clipped(difference(trained, base), 1.5), 1.5 * 0.2, np.random.default_rng(9))
    assert same(decode_delta(made.delta, SHAPES, max_bytes=MAX_BYTES), expected)
    quantised = update_of(
        base, trained, terms(clip_norm_ppm=1_500_000, noise_multiplier_ppm=200_000, encoding="int8"), seed=9
    )
    assert quantised.delta == encode_delta(expected, "int8")


@pytest.mark.parametrize("encoding", ["sign", "topk"])
def test_delivered_and_dropped_updates_and_the_residual_account_for_every_delta(encoding):
    """An update that was dropped takes its own delta with it, and nothing of what was left out before."""
    base = weights(0)
    of = terms(encoding=encoding, top_share_ppm=50_000)
    delivered_sum = {name: np.zeros(shape, np.float64) for name, shape in SHAPES.items()}
    delta_sum = {name: np.zeros(shape, np.float64) for name, shape in SHAPES.items()}
    residual = {}
    rng = np.random.default_rng(4)
    for step in range(40):
        trained = {name: base[name] + weights(100 + step, 0.1)[name] for name in base}
        made = update_of(base, trained, of, residual=residual)
        if rng.random() < 0.3:
            continue
        for name, array in decode_delta(made.delta, SHAPES, max_bytes=MAX_BYTES).items():
            delivered_sum[name] += array
            delta_sum[name] += difference(trained, base)[name]
        residual = made.residual
    for name in SHAPES:
        assert delivered_sum[name] + residual[name] == pytest.approx(delta_sum[name], abs=1e-4)
        assert np.abs(residual[name]).max() > 0


def test_a_residual_of_other_parameters_counts_as_none():
    base, trained, of = weights(0), weights(1), terms(encoding="sign")
    other = {"elsewhere": np.ones(3, np.float32)}
    assert update_of(base, trained, of, residual=other).delta == update_of(base, trained, of).delta


def test_private_heads_stay_on_the_board():
    base, trained = weights(1), weights(2)
    for encoding in ("fp32", "sign"):
        made = update_of(base, trained, terms(private_heads=True, encoding=encoding))
        sent = decode_delta(made.delta, {"conv.weight": SHAPES["conv.weight"]}, max_bytes=MAX_BYTES)
        assert sent.keys() == {"conv.weight"}
        assert same(made.heads, {name: trained[name] for name in HEADS})
        assert made.residual is None or made.residual.keys() == {"conv.weight"}


def test_a_network_that_is_all_heads_has_nothing_to_send():
    with pytest.raises(ProtocolError, match="without tensors"):
        make_update(
            weights(1),
            weights(2),
            terms(private_heads=True),
            residual={},
            head_parameters=tuple(SHAPES),
            noise=np.random.default_rng(0),
        )


# --- targets -----------------------------------------------------------------------------------------------

IDENTITY = Preprocess(mean=(0.0,), std=(1.0,))


def three(probabilities=None):
    """A self-label, a verdict, a human's label; two classes."""
    return Drawn(
        x=np.zeros((3, 1, 2), np.float32),
        labels=np.array([0, 1, 1]),
        origins=np.array([Origin.SELF, Origin.MODEL, Origin.HUMAN], np.uint8),
        probabilities=np.array(probabilities or [[np.nan, np.nan], [0.2, 0.8], [0.9, 0.1]], np.float32),
        confidence=np.array([0.9, 0.6, np.nan], np.float32),
    )


@pytest.mark.parametrize(
    ("changes", "targets", "weight"),
    [
        ({}, [[0, 1], [0, 1]], [1, 1]),
        (
            {"self_labels": SelfLabels.HARD, "self_weight_ppm": 250_000},
            [[1, 0], [0, 1], [0, 1]],
            [0.25, 1, 1],
        ),
        ({"self_labels": SelfLabels.SOFT}, [[0.9, 0.1], [0, 1], [0, 1]], [1, 1, 1]),
        ({"soft_ppm": 500_000}, [[0.1, 0.9], [0, 1]], [1, 1]),
        ({"soft_ppm": 1_000_000}, [[0.2, 0.8], [0, 1]], [1, 1]),
    ],
)
def test_targets_are_what_the_terms_make_of_each_origin(changes, targets, weight):
    examples = make_examples(three(), terms(**changes), IDENTITY, classes=2)
    assert examples.targets == pytest.approx(np.array(targets), abs=1e-6)
    assert examples.weight == pytest.approx(np.array(weight))
    assert len(examples.x) == len(targets)


def test_probabilities_that_are_not_known_leave_the_label_as_it_is():
    unknown = [[np.nan, np.nan]] * 3
    examples = make_examples(three(unknown), terms(soft_ppm=1_000_000), IDENTITY, classes=2)
    assert examples.targets == pytest.approx(np.array([[0, 1], [0, 1]]))


def test_targets_sum_to_one_and_labels_that_the_model_has_not_are_left_out():
    many = drawn(200)
    many.labels[3] = 7
    examples = make_examples(many, terms(soft_ppm=300_000), Preprocess((1.0,), (3.0,)), classes=4)
    assert len(examples) == 199
    assert examples.targets.sum(axis=1) == pytest.approx(np.ones(199), abs=1e-5)
    assert examples.x == pytest.approx((np.delete(many.x, 3, axis=0) - 1) / 3, abs=1e-6)
