"""The full model answers what is pending, and no bad case keeps the others waiting."""

import threading

import numpy as np
import pytest
from onnx import TensorProto, helper

from cloud_hub.errors import ModelError
from cloud_hub.full_model import Answer, CannotAnswerError, FullModelWorker, answer_batch
from cloud_hub.models import load_model
from cloud_hub.store.queries import CaseFilter, find_cases, totals
from cloud_hub.store.store import Store
from edge_cascade.backends.onnx import open_whole_model
from edge_cascade.packing import unpack_probabilities
from tests.hub.fleet import SHAPE, a_delivery, a_model, a_new_case, run_by_mean, sample, wait_until


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as store:
        yield store


def rows_of(store):
    return list(reversed(store.database.run(lambda c: find_cases(c, CaseFilter(), before=None, limit=500))))


def test_pending_cases_get_the_full_models_verdict(store):
    store.commit([a_delivery(*[a_new_case(n, x=sample(n)) for n in range(3)])], now_ms=1)
    told = []
    worker = FullModelWorker(store, {"pump": a_model()}, on_answered=told.append)
    assert worker.answer_some(a_model()) == 3
    assert worker.answer_some(a_model()) == 0
    rows = rows_of(store)
    assert [(r["verdict_label"], r["verdict_source"], r["verdict_revision"], r["state"]) for r in rows] == [
        (0, 1, 1, 1),
        (1, 1, 1, 1),
        (2, 1, 1, 1),
    ]
    probabilities = unpack_probabilities(rows[2]["verdict_probabilities"])
    assert probabilities.index(max(probabilities)) == 2
    assert sum(probabilities) == pytest.approx(1, abs=1e-4)
    assert told == [frozenset({"press-1"})]


def test_a_real_onnx_file_runs_through_the_one_runtime(store):
    weight = helper.make_tensor("w", TensorProto.FLOAT, [8, 3], np.eye(8, 3, dtype=np.float32).ravel())
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "full",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [weight],
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = a_model(open_whole_model(file.SerializeToString()))
    x = np.zeros(SHAPE, np.float32)
    x[0, 2] = 5.0
    store.commit([a_delivery(a_new_case(1, x=x))], now_ms=1)
    FullModelWorker(store, {"pump": model}).answer_some(model)
    assert rows_of(store)[0]["verdict_label"] == 2


def picky(x):
    if (x == 13).any():
        raise RuntimeError("unlucky")
    return run_by_mean(x)


def test_one_poison_sample_fails_alone():
    outcomes = answer_batch(a_model(picky), [sample(0), sample(13), sample(2)])
    assert [outcome.label for outcome in outcomes if isinstance(outcome, Answer)] == [0, 2]
    assert isinstance(outcomes[1], CannotAnswerError)


def test_a_poison_case_is_marked_failed_counted_and_never_tried_again(store):
    store.commit([a_delivery(*[a_new_case(n, x=sample(x)) for n, x in enumerate((0, 13, 2))])], now_ms=1)
    model = a_model(picky)
    worker = FullModelWorker(store, {"pump": model})
    assert worker.answer_some(model) == 3
    assert worker.answer_some(model) == 0
    assert [row["failure"] for row in rows_of(store)] == [None, "RuntimeError: unlucky", None]
    assert store.database.run(totals).counters["failures/pump"] == 1


@pytest.mark.parametrize(
    "run",
    [
        lambda x: np.zeros((len(x), 2), np.float32),
        lambda x: np.zeros((len(x) + 1, 3), np.float32),
        lambda x: np.full((len(x), 3), np.nan, np.float32),
    ],
)
def test_answers_of_a_wrong_shape_or_without_a_number_are_no_answers(run):
    assert all(isinstance(o, CannotAnswerError) for o in answer_batch(a_model(run), [sample(), sample()]))


def test_a_case_of_a_wrong_shape_or_with_a_lost_tensor_fails_alone(store, tmp_path):
    store.commit([a_delivery(a_new_case(1, x=np.zeros(5, np.float32)))], now_ms=1)
    store.commit([a_delivery(a_new_case(2, x=sample(9)))], now_ms=1)
    lost = rows_of(store)[1]["blob"]
    (tmp_path / "blobs" / lost[:2] / lost).unlink()
    store.commit([a_delivery(a_new_case(3, x=sample(1)))], now_ms=1)
    FullModelWorker(store, {"pump": a_model()}).answer_some(a_model())
    assert [row["state"] for row in rows_of(store)] == [2, 2, 1]


def test_cases_wait_for_their_model_over_restarts(tmp_path):
    with Store(tmp_path) as store:
        store.commit([a_delivery(a_new_case(1, x=sample(2)))], now_ms=1)
        worker = FullModelWorker(store, {"fan": a_model(name="fan")})
        assert worker.answer_some(a_model(name="fan")) == 0
    with Store(tmp_path) as store:
        worker = FullModelWorker(store, {"pump": a_model()})
        worker.start()
        wait_until(lambda: store.database.run(totals).pending == 0, what="the answer")
        worker.stop()
        assert rows_of(store)[0]["verdict_label"] == 2


def test_the_thread_shares_batches_and_survives_a_fault_of_the_store(store):
    batches = []
    lock = threading.Lock()

    def run(x):
        with lock:
            batches.append(len(x))
        return run_by_mean(x)

    worker = FullModelWorker(store, {"pump": a_model(run)}, max_batch=16)
    store.commit([a_delivery(*[a_new_case(n) for n in range(100)])], now_ms=1)
    worker.start()
    wait_until(lambda: store.database.run(totals).pending == 0, what="all answers")
    store.commit([a_delivery(*[a_new_case(n) for n in range(100, 105)])], now_ms=1)
    worker.wake()
    wait_until(lambda: store.database.run(totals).pending == 0, what="the late answers")
    assert worker.is_alive
    worker.stop()
    assert not worker.is_alive
    assert max(batches) == 16
    assert sum(batches) == 105


def test_a_bundle_that_does_not_exist_is_one_clear_line(tmp_path):
    for bundle in ("no-such-model", str(tmp_path / "nowhere")):
        with pytest.raises(ModelError, match=r"no model|no such directory"):
            load_model(bundle, None)
