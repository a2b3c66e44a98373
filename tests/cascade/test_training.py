"""Training by a train step, the weights it starts from, and the terms that ask for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.deltas import encode_delta
from edge_cascade.errors import DivergedError, ProtocolError, TrainingError
from edge_cascade.messages import RoundTerms
from edge_cascade.round_terms import decode_terms, encode_terms, is_signed, public_key_of, sign_terms
from edge_cascade.training import (
    MAX_LOSS_GAIN,
    Examples,
    Schedule,
    mean_loss,
    one_hot,
    refuse_worse,
    softened,
    train,
)
from edge_cascade.weights import (
    FROM_ZEROS,
    climb_chain,
    difference,
    moved,
    shapes_of,
    size_bytes_of,
    weights_digest,
    zeros_of,
)

DIGEST = bytes(range(32))
TERMS = RoundTerms("m", "r", DIGEST, DIGEST, 70_000, "int8", 10_000, 1, 32, 10_000, 0, 0, 16, 500)
KEY = bytes(range(1, 33))


class Slope:
    """Descends on the mean distance of one number from the batch's x; counts what it is given."""

    def begin(self, base):
        self.value, self.seen = base["w"].copy(), []

    def step(self, x, targets, sample_weight, *, learning_rate, momentum, proximal):
        self.seen.append(len(x))
        gap = self.value - x.mean()
        self.value = (self.value - learning_rate * gap).astype(np.float32)
        return float(gap[0] ** 2)

    def weights(self):
        return {"w": self.value.copy()}


def examples(count):
    return Examples(
        np.ones((count, 1), np.float32), np.ones((count, 2), np.float32), np.ones(count, np.float32)
    )


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "b": rng.standard_normal(3).astype(np.float32),
        "a": rng.standard_normal((2, 5)).astype(np.float32),
    }


# --- the loop ----------------------------------------------------------------------------------------------


def test_every_example_is_seen_once_an_epoch_and_the_loss_falls():
    step = Slope()
    trained = train(
        step, {"w": np.zeros(1, np.float32)}, examples(10), Schedule(3, 4, 0.5), rng=np.random.default_rng(0)
    )
    assert step.seen == [4, 4, 2] * 3
    assert trained.last_loss < trained.first_loss


def test_the_same_seed_trains_to_the_same_weights(tiny_bundle):
    from edge_cascade.backends.onnx import OnnxTrainStep

    step = tiny_bundle.train_step
    rng = np.random.default_rng(3)
    data = Examples(
        rng.standard_normal((30, *step.input_shape)).astype(np.float32),
        one_hot(rng.integers(0, step.classes, 30), step.classes),
        np.ones(30, np.float32),
    )

    def run():
        return train(
            OnnxTrainStep(step),
            tiny_bundle.parameters(),
            data,
            Schedule(4, 8, 0.05, 0.9),
            rng=np.random.default_rng(1),
        )

    first, second = run(), run()
    assert weights_digest(first.weights) == weights_digest(second.weights)
    assert first.last_loss < first.first_loss
    assert first.weights.keys() == tiny_bundle.parameters().keys()


def test_nothing_to_learn_from_is_said():
    with pytest.raises(TrainingError, match="no example"):
        train(
            Slope(),
            {"w": np.zeros(1, np.float32)},
            examples(0),
            Schedule(1, 4, 0.5),
            rng=np.random.default_rng(0),
        )


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_a_rate_that_runs_away_is_named():
    with pytest.raises(DivergedError, match=r"loss became .*: the learning rate 1e\+30 is too high"):
        train(
            Slope(),
            {"w": np.zeros(1, np.float32)},
            examples(8),
            Schedule(9, 4, 1e30),
            rng=np.random.default_rng(0),
        )


def test_a_mean_loss_is_that_of_all_examples_by_weight_and_moves_nothing(tiny_bundle):
    from edge_cascade.backends.onnx import OnnxTrainStep

    step = tiny_bundle.train_step
    rng = np.random.default_rng(3)
    data = Examples(
        rng.standard_normal((10, *step.input_shape)).astype(np.float32),
        one_hot(rng.integers(0, step.classes, 10), step.classes),
        rng.uniform(0.1, 1.0, 10).astype(np.float32),
    )
    runner = OnnxTrainStep(step)
    base = tiny_bundle.parameters()
    in_parts = mean_loss(runner, base, data, batch_size=3)
    assert all(np.array_equal(array, base[name]) for name, array in runner.weights().items())
    assert in_parts == pytest.approx(mean_loss(runner, base, data, batch_size=10), rel=1e-5)
    assert mean_loss(runner, base, data.take(np.arange(0)), batch_size=3) == 0.0


def test_a_training_may_tremble_and_must_not_ruin():
    refuse_worse(0.0, MAX_LOSS_GAIN)
    for after in (0.2, float("inf"), float("nan")):
        with pytest.raises(DivergedError, match="own examples went from 0 to"):
            refuse_worse(0.0, after)


def test_targets_are_rows_that_sum_to_one():
    labels = np.array([2, 0])
    assert one_hot(labels, 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    soft = softened(labels, np.array([0.8, 0.5], np.float32), 3)
    assert np.allclose(soft, [[0.1, 0.1, 0.8], [0.5, 0.25, 0.25]])


# --- bases -------------------------------------------------------------------------------------------------


def test_a_digest_knows_names_shapes_and_values():
    base = weights()
    others = [
        {**base, "b": base["b"] + np.float32(1e-6)},
        {"b": base["b"], "c": base["a"]},
        {**base, "a": base["a"].reshape(5, 2)},
    ]
    assert len({weights_digest(each) for each in [base, *others]}) == 4
    assert weights_digest(dict(reversed(base.items()))) == weights_digest(base)


@given(st.lists(st.sampled_from(["fp32", "int8"]), min_size=1, max_size=4), st.integers(0, 2**16))
def test_whoever_adds_the_same_steps_holds_the_same_base(encodings, seed):
    shapes = shapes_of(weights())
    reached, steps = zeros_of(shapes), []
    for number, encoding in enumerate(encodings):
        step = encode_delta(weights(seed + number), encoding)
        steps.append(step)
        reached = climb_chain(
            reached, [step], expected=_end_of(reached, step), max_bytes=size_bytes_of(shapes)
        )
    again = climb_chain(
        zeros_of(shapes), steps, expected=weights_digest(reached), max_bytes=size_bytes_of(shapes)
    )
    assert all(np.array_equal(again[name], reached[name]) for name in reached)


def _end_of(base, step):
    from edge_cascade.deltas import decode_delta

    return weights_digest(moved(base, decode_delta(step, shapes_of(base), max_bytes=10_000)))


def test_a_base_with_a_negative_zero_is_reached_from_zeros():
    base = {"a": np.array([-0.0, 1.0], np.float32)}
    whole = encode_delta(base, "fp32")
    reached = climb_chain(zeros_of(shapes_of(base)), [whole], expected=weights_digest(base), max_bytes=8)
    assert reached["a"].tolist() == [0.0, 1.0]


def test_a_chain_that_ends_elsewhere_is_refused():
    base = weights()
    with pytest.raises(ProtocolError, match="not the one that the offer names"):
        climb_chain(base, [encode_delta(weights(1), "int8")], expected=FROM_ZEROS, max_bytes=10_000)


def test_a_difference_added_leads_back():
    before, after = weights(0), weights(1)
    back = moved(before, difference(after, before))
    assert all(np.allclose(back[name], after[name], atol=1e-6) for name in after)


# --- terms -------------------------------------------------------------------------------------------------


def test_terms_come_back_and_only_their_signature_holds():
    data = encode_terms(TERMS)
    signature, public = sign_terms(data, KEY), public_key_of(KEY)
    assert decode_terms(data) == TERMS
    assert is_signed(data, signature, public)
    assert not is_signed(data + b"x", signature, public)
    assert not is_signed(data, signature, public_key_of(bytes(32)))
    assert not is_signed(data, b"", public)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"epochs": 0}, "0 epochs"),
        ({"batch_size": 0}, "batches of no examples"),
        ({"learning_rate_ppm": 0}, "learning rate"),
        ({"momentum_ppm": 1_000_000}, "never forgets"),
        ({"min_examples": 600}, "min_examples"),
        ({"encoding": "topk", "top_share_ppm": 0}, "top share"),
        ({"encoding": "sign", "noise_multiplier_ppm": 1, "clip_norm_ppm": 1}, "exclude each other"),
        ({"noise_multiplier_ppm": 1}, "without a clipping norm"),
    ],
)
def test_terms_that_no_board_would_take_are_refused_on_both_sides(change, why):
    import msgspec

    wrong = msgspec.structs.replace(TERMS, **change)
    with pytest.raises(ProtocolError, match=why):
        encode_terms(wrong)
    with pytest.raises(ProtocolError, match=why):
        decode_terms(msgspec.msgpack.encode(wrong))


@given(st.binary(max_size=200))
def test_any_bytes_are_terms_or_a_protocol_error(data):
    try:
        decode_terms(data)
    except ProtocolError:
        return
    pytest.fail("random bytes were taken for terms")
