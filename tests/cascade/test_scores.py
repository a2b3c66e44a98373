import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_cascade.manifest import Preprocess
from edge_cascade.preprocess import normalise
from edge_cascade.scores import LABEL, PROBABILITY, SCORE_COLUMN, head_of_logits, softmax

logits = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(2, 12)), elements=st.floats(-50, 50, width=32)
)


@given(logits, st.floats(0.125, 8))
def test_probabilities_sum_to_one_and_scores_lie_between_0_and_1(x, temperature):
    head = head_of_logits(x, temperature)
    assert np.allclose(softmax(x, temperature).sum(axis=1), 1, atol=1e-5)
    assert (head[:, PROBABILITY:] >= -1e-6).all()
    assert (head[:, PROBABILITY:] <= 1 + 1e-6).all()
    assert np.array_equal(head[:, LABEL], softmax(x, temperature).argmax(axis=1))


def test_a_certain_answer_scores_0_and_a_lost_one_1():
    certain, lost = head_of_logits(np.array([[100.0, 0, 0], [0, 0, 0]], dtype=np.float32))
    for column in SCORE_COLUMN.values():
        assert certain[column] == pytest.approx(0, abs=1e-6)
    assert lost[SCORE_COLUMN["entropy"]] == pytest.approx(1)
    assert lost[SCORE_COLUMN["margin"]] == pytest.approx(1)
    assert lost[SCORE_COLUMN["max_prob"]] == pytest.approx(2 / 3)


@given(logits)
def test_a_higher_temperature_never_makes_an_answer_surer(x):
    cool, warm = head_of_logits(x, 1.0), head_of_logits(x, 2.0)
    for column in SCORE_COLUMN.values():
        assert (warm[:, column] >= cool[:, column] - 1e-4).all()


def test_normalising_uses_one_value_or_one_per_channel():
    x = np.ones((1, 2, 3), dtype=np.float32)
    assert np.array_equal(normalise(x, Preprocess((1.0,), (2.0,))), np.zeros((1, 2, 3)))
    assert normalise(x, Preprocess((0.0, 1.0), (2.0, 1.0))).tolist() == [[[0.5] * 3, [0.0] * 3]]
