"""Cases with a verdict become arrays; people outrank the model, damage is left out and counted."""

import numpy as np
import pytest

from cloud_hub import examples
from cloud_hub.examples import UNKNOWN, count_cases, example_pages, read_examples
from cloud_hub.full_model import FullModelWorker
from cloud_hub.store.database import Database
from cloud_hub.store.examples import ExampleFilter
from cloud_hub.store.store import Store, database_url
from cloud_hub.store.verdicts import label_case
from edge_cascade.messages import Use
from edge_cascade.packing import pack_probabilities
from tests.hub.fleet import FULL_MODEL, a_delivery, a_model, a_new_case, sample


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as store:
        yield store


def commit(store, *cases):
    store.commit([a_delivery(*cases)], now_ms=1)


def answer(store):
    FullModelWorker(store, {"pump": a_model()}).answer_some(a_model())


def label(store, case_id, to):
    certain = pack_probabilities([float(index == to) for index in range(3)])
    store.database.run(
        lambda c: label_case(
            c, case_id, to, probabilities=certain, full_model=FULL_MODEL, labelled_by="ada", now_ms=2
        )
    )


def test_cases_come_in_the_order_of_their_ids_with_what_the_full_model_said(store):
    commit(store, *[a_new_case(n, x=sample(n)) for n in range(3)])
    answer(store)
    found = read_examples(store, a_model(), Use.TRAIN)
    assert found.ids.tolist() == [1, 2, 3]
    assert found.x.dtype == np.float32
    np.testing.assert_array_equal(found.x, [sample(0), sample(1), sample(2)])
    assert found.labels.tolist() == found.model_labels.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1.0, atol=1e-4)
    assert found.probabilities.argmax(axis=1).tolist() == [0, 1, 2]
    assert (found.is_human.tolist(), found.damaged) == ([False] * 3, 0)


def test_a_persons_label_outranks_the_models_and_leaves_no_probabilities(store):
    commit(store, a_new_case(0, x=sample(0)), a_new_case(1, x=sample(1)))
    answer(store)
    label(store, 2, 0)
    found = read_examples(store, a_model(), Use.TRAIN)
    assert (found.labels.tolist(), found.model_labels.tolist()) == ([0, 0], [0, 1])
    assert found.is_human.tolist() == [False, True]
    assert np.isnan(found.probabilities).any(axis=1).tolist() == [False, True]


def test_where_a_person_was_first_nothing_is_known_of_the_full_model(store):
    commit(store, a_new_case(0, x=sample(0)))
    label(store, 1, 2)
    found = read_examples(store, a_model(), Use.TRAIN)
    assert (found.labels.tolist(), found.model_labels.tolist()) == ([2], [UNKNOWN])


def test_only_the_use_the_ids_and_the_audits_that_were_asked_for(store):
    commit(
        store,
        *[a_new_case(n) for n in range(4)],
        *[a_new_case(n, use=Use.HOLDOUT, audit_ppm=9, escalated=False) for n in range(4, 6)],
        a_new_case(6, audit_ppm=9, escalated=False),
        a_new_case(7, model="other"),
    )
    answer(store)

    def ids(use, **limits):
        return read_examples(store, a_model(), use, **limits).ids.tolist()

    assert ids(Use.TRAIN) == [1, 2, 3, 4, 7]
    assert ids(Use.TRAIN, after_id=2, upto_id=4) == [3, 4]
    assert ids(Use.TRAIN, limit=2) == [4, 7]
    assert ids(Use.TRAIN, limit=99, after_id=3) == [4, 7]
    assert ids(Use.TRAIN, audits_only=True) == [7]
    assert ids(Use.HOLDOUT) == [5, 6]
    assert count_cases(store, a_model(), Use.HOLDOUT, after_id=5) == 1


def test_cases_without_a_verdict_and_those_of_another_full_model_are_left_out(store):
    commit(store, a_new_case(0), a_new_case(1))
    assert len(read_examples(store, a_model(), Use.TRAIN)) == 0
    answer(store)
    newer = a_model()
    object.__setattr__(newer, "full_model", bytes(32))
    assert len(read_examples(store, newer, Use.TRAIN)) == 0
    label(store, 2, 1)
    assert read_examples(store, newer, Use.TRAIN).ids.tolist() == [2]


def test_a_damaged_tensor_is_left_out_and_counted_and_spoils_no_neighbour(store, tmp_path):
    for n in range(3):
        commit(store, a_new_case(n, x=np.random.default_rng(n).random((2, 4), np.float32)))
    commit(store, *[a_new_case(n, x=np.random.default_rng(n).random((2, 4), np.float32)) for n in (3, 4)])
    answer(store)
    packs = sorted((tmp_path / "blobs").glob("??/*"), key=lambda path: path.stat().st_mtime_ns)
    packs[0].unlink()
    packs[1].write_bytes(b"\xff" * packs[1].stat().st_size)
    packs[3].write_bytes(packs[3].read_bytes()[:-1])
    found = read_examples(store, a_model(), Use.TRAIN)
    assert (found.ids.tolist(), found.damaged) == ([3, 4], 3)


def test_samples_of_a_shape_that_the_model_no_longer_takes_are_left_out(store):
    commit(store, a_new_case(0), a_new_case(1))
    answer(store)
    other = a_model()
    object.__setattr__(other, "input_shape", (8,))
    found = read_examples(store, other, Use.TRAIN)
    assert (len(found), found.damaged, found.x.shape) == (0, 2, (0, 8))


def test_pages_bound_memory_and_each_pack_is_read_once_a_page(store, monkeypatch):
    commit(store, *[a_new_case(n) for n in range(7)])
    answer(store)
    reads = []
    get = store.blobs.get
    monkeypatch.setattr(store.blobs, "get", lambda *place: reads.append(place) or get(*place))
    wanted = ExampleFilter("pump", Use.TRAIN, FULL_MODEL)
    pages = list(example_pages(store, a_model(), wanted, page=3))
    assert [page.ids.tolist() for page in pages] == [[1, 2, 3], [4, 5, 6], [7]]
    assert len(reads) == 3
    monkeypatch.setattr(examples, "MAX_SPAN_BYTES", 1)
    assert read_examples(store, a_model(), Use.TRAIN).ids.tolist() == list(range(1, 8))


def test_a_command_reads_beside_a_hub_that_holds_the_directory(store, tmp_path):
    commit(store, a_new_case(0))
    answer(store)

    class Beside:
        blobs = store.blobs

    with Database(database_url(tmp_path, None)) as database:
        beside = Beside()
        beside.database = database
        assert read_examples(beside, a_model(), Use.TRAIN).ids.tolist() == [1]


def test_rows_keep_what_belongs_together(store):
    commit(store, *[a_new_case(n, x=sample(n)) for n in range(3)])
    answer(store)
    found = read_examples(store, a_model(), Use.TRAIN).rows(np.array([2, 0]))
    assert (found.ids.tolist(), found.labels.tolist()) == ([3, 1], [2, 0])
    np.testing.assert_array_equal(found.x, [sample(2), sample(0)])
