"""The store on real SQLite files: what it has committed is there, whatever happens next."""

import os
import sqlite3
import threading

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from cloud_hub.core.delivery import NewReport, NewStatus, NewUpdate
from cloud_hub.errors import (
    ConfigError,
    NotFoundError,
    StoreBusyError,
    StoreRefusedError,
    StoreUnavailableError,
    StoreVersionError,
)
from cloud_hub.store import schema
from cloud_hub.store.blobs import FolderBlobs
from cloud_hub.store.database import Database
from cloud_hub.store.deliveries import Place
from cloud_hub.store.queries import CaseFilter, find_cases, get_case, list_devices, totals
from cloud_hub.store.store import Store
from cloud_hub.store.verdicts import (
    Answered,
    confirm,
    due_verdicts,
    insert_answers,
    label_case,
    mark_failed,
    note_sent,
    pending_cases,
    send_everything_again,
)
from edge_cascade.messages import Receipt
from edge_cascade.tensors import decode_tensor
from tests.hub.fleet import BOOT, FULL_MODEL, a_delivery, a_new_case, sample


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as store:
        yield store


def an_update(seq=9, device="press-1", round_id="r1", delta=b"delta"):
    return NewUpdate(device, BOOT, seq, "pump", round_id, bytes(32), 10, "int8", delta)


def answer_all(store, label=1):
    def work(connection):
        found = pending_cases(connection, "pump", 100)
        insert_answers(
            connection, [Answered(case, label, b"\0\0\xff\xff\0\0", FULL_MODEL) for case in found], now_ms=2
        )

    store.database.run(work)


def due(store, device="press-1", now_ms=0):
    return store.database.run(lambda c: due_verdicts(c, device, now_ms=now_ms, limit=100))


def ids(store, wanted=None, **page):
    rows = store.database.run(
        lambda c: find_cases(c, wanted or CaseFilter(), **({"before": None, "limit": 100} | page))
    )
    return [row["seq"] for row in rows]


def test_a_committed_case_is_there_after_reopening_with_its_tensor(tmp_path):
    with Store(tmp_path) as store:
        committed = store.commit([a_delivery(a_new_case(3, x=sample(1.5)))], now_ms=77)
        assert committed.fresh == {("press-1", BOOT, 3)}
    with Store(tmp_path) as store:
        row, labels = store.database.run(lambda c: get_case(c, 1))
        assert (row["seq"], row["received_at_ms"], row["escalated"], labels) == (3, 77, True, [])
        place = Place(row["blob"], row["blob_offset"], row["blob_length"])
        assert decode_tensor(store.tensor_bytes(place, row["tensor_bytes"])).tolist() == sample(1.5).tolist()


def test_the_same_case_twice_in_one_group_or_in_two_is_there_once(store):
    first = store.commit([a_delivery(a_new_case(1), a_new_case(1)), a_delivery(a_new_case(1))], now_ms=1)
    second = store.commit([a_delivery(a_new_case(1), a_new_case(2))], now_ms=2)
    assert (first.fresh, second.fresh) == ({("press-1", BOOT, 1)}, {("press-1", BOOT, 2)})
    assert ids(store) == [2, 1]
    assert store.database.run(totals).counters["duplicates"] == 3


def test_the_same_number_of_another_device_or_another_boot_is_another_case(store):
    cases = [a_new_case(1), a_new_case(1, device="press-2"), a_new_case(1, boot=b"\xff" * 8)]
    assert len(store.commit([a_delivery(*cases)], now_ms=1).fresh) == 3


def test_a_second_update_of_a_round_is_a_duplicate_and_the_first_stays(store, tmp_path):
    assert store.commit([a_delivery(update=an_update())], now_ms=1).fresh == {("press-1", BOOT, 9)}
    again = store.commit([a_delivery(update=an_update(seq=10, delta=b"other"))], now_ms=1)
    assert again.fresh == frozenset()
    (row,) = store.database.run(lambda c: c.execute(select(schema.updates)).mappings().all())
    assert store.blobs.get(row["blob"], row["blob_offset"], row["blob_length"]) == b"delta"


def test_an_old_report_does_not_replace_a_newer_one(store):
    def report(seq, value):
        return a_delivery(report=NewReport("press-1", BOOT, seq, 100 + seq, {"shed": value}))

    assert store.commit([report(5, 50)], now_ms=1).fresh == {("press-1", BOOT, 5)}
    assert store.commit([report(4, 40)], now_ms=2).fresh == frozenset()
    (device,) = store.database.run(lambda c: list_devices(c, after="", limit=10))
    assert (device["counters"], device["report_at_ms"], device["last_seen_ms"]) == ('{"shed":50}', 105, 2)


def test_a_device_that_comes_online_is_named_once_and_gets_everything_again(store):
    def status(online):
        return a_delivery(status=NewStatus("press-1", online, BOOT, "1.0", ()))

    store.commit([a_delivery(a_new_case(1))], now_ms=1)
    answer_all(store)
    store.database.run(lambda c: note_sent(c, [(due_verdicts(c, "press-1", now_ms=0, limit=1)[0], 10**9)]))
    assert due(store) == []
    assert store.commit([status(True)], now_ms=1).came_online == {"press-1"}
    assert len(due(store)) == 1
    assert store.commit([status(True)], now_ms=1).came_online == frozenset()
    assert store.commit([status(False)], now_ms=1).came_online == frozenset()
    assert store.commit([status(True)], now_ms=1).came_online == {"press-1"}


def test_pending_cases_are_the_oldest_of_their_model_without_an_answer(store):
    store.commit([a_delivery(a_new_case(1), a_new_case(2, model="fan"), a_new_case(3))], now_ms=1)
    found = store.database.run(lambda c: pending_cases(c, "pump", 10))
    assert [case.case_id for case in found] == [1, 3]
    store.database.run(lambda c: mark_failed(c, [(found[0], "broken tensor")]))
    answer_all(store)
    assert store.database.run(lambda c: pending_cases(c, "pump", 10)) == []
    states = store.database.run(
        lambda c: [(r["state"], r["failure"]) for r in find_cases(c, CaseFilter(), before=None, limit=9)]
    )
    assert states == [(1, None), (0, None), (2, "broken tensor")]


def test_a_receipt_ends_the_sending_and_one_from_the_future_changes_nothing(store):
    store.commit([a_delivery(a_new_case(1), a_new_case(2))], now_ms=1)
    answer_all(store)
    store.database.run(
        lambda c: confirm(c, [("press-1", Receipt(BOOT, 1, 1)), ("press-1", Receipt(BOOT, 2, 9))])
    )
    assert [verdict.seq for verdict in due(store)] == [2]
    store.database.run(lambda c: confirm(c, [("press-2", Receipt(BOOT, 2, 1))]))
    assert [verdict.seq for verdict in due(store)] == [2]


def test_a_label_outranks_the_model_and_is_due_again_after_the_first_was_confirmed(store):
    store.commit([a_delivery(a_new_case(1, device_label=1))], now_ms=1)
    answer_all(store, label=1)
    store.database.run(lambda c: confirm(c, [("press-1", Receipt(BOOT, 1, 1))]))
    assert due(store) == []
    label = {"probabilities": b"", "full_model": FULL_MODEL, "labelled_by": "ann", "now_ms": 3}
    assert store.database.run(lambda c: label_case(c, 1, 2, **label)) == 2
    (verdict,) = due(store)
    assert (verdict.label, verdict.source, verdict.revision) == (2, 2, 2)
    row, labels = store.database.run(lambda c: get_case(c, 1))
    assert (row["verdict_model_label"], labels[0]["labelled_by"]) == (1, "ann")
    counters = store.database.run(totals).counters
    assert (counters["verdicts/pump/model"], counters["verdicts/pump/human"]) == (0, 1)


def test_a_label_that_came_first_stays_when_the_model_answers(store):
    store.commit([a_delivery(a_new_case(1))], now_ms=1)
    pending = store.database.run(lambda c: pending_cases(c, "pump", 10))
    label = {"probabilities": b"", "full_model": FULL_MODEL, "labelled_by": "ann", "now_ms": 3}
    store.database.run(lambda c: label_case(c, 1, 0, **label))
    store.database.run(lambda c: insert_answers(c, [Answered(pending[0], 2, b"", FULL_MODEL)], now_ms=4))
    row, _ = store.database.run(lambda c: get_case(c, 1))
    assert (row["verdict_label"], row["verdict_source"], row["verdict_revision"]) == (0, 2, 1)
    assert row["verdict_model_label"] == 2


def test_agreement_is_counted_apart_for_audits_and_escalations(store):
    cases = [
        a_new_case(1, device_label=1, escalated=False, audit_ppm=5),
        a_new_case(2, device_label=2, escalated=False, audit_ppm=5),
        a_new_case(3, device_label=0, escalated=True),
    ]
    store.commit([a_delivery(*cases)], now_ms=1)
    answer_all(store, label=1)
    counters = store.database.run(totals).counters
    found = {name: value for name, value in counters.items() if name.startswith("agreement/")}
    assert found == {
        "agreement/pump/audit/same": 1,
        "agreement/pump/audit/different": 1,
        "agreement/pump/escalation/different": 1,
    }


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    with Store(tmp_path_factory.mktemp("filled")) as store:
        other = a_new_case(2, device="press-2", escalated=False, audit_ppm=9)
        store.commit([a_delivery(a_new_case(1), other)], now_ms=10)
        store.commit([a_delivery(a_new_case(3, model="fan"))], now_ms=20)
        answer_all(store, label=1)
        yield store


@pytest.mark.parametrize(
    ("wanted", "seqs"),
    [
        (CaseFilter(device="press-2"), [2]),
        (CaseFilter(model="fan"), [3]),
        (CaseFilter(audited=True), [2]),
        (CaseFilter(audited=False), [3, 1]),
        (CaseFilter(escalated=False), [2]),
        (CaseFilter(since_ms=20), [3]),
        (CaseFilter(until_ms=20), [2, 1]),
        (CaseFilter(has_verdict=True), [2, 1]),
        (CaseFilter(has_verdict=False), [3]),
        (CaseFilter(label=1), [2, 1]),
        (CaseFilter(label=0), []),
    ],
)
def test_filters_find_what_they_name(filled, wanted, seqs):
    assert ids(filled, wanted) == seqs


def test_pages_are_disjoint_and_complete(store):
    store.commit([a_delivery(*[a_new_case(seq) for seq in range(7)])], now_ms=1)
    assert [ids(store, before=before, limit=3) for before in (None, 5, 2)] == [[6, 5, 4], [3, 2, 1], [0]]


def test_sending_starts_anew_with_every_run(tmp_path):
    with Store(tmp_path) as store:
        store.commit([a_delivery(a_new_case(1))], now_ms=1)
        answer_all(store)
        store.database.run(
            lambda c: note_sent(c, [(v, 10**12) for v in due_verdicts(c, "press-1", now_ms=0, limit=9)])
        )
        assert due(store) == []
    with Store(tmp_path) as store:
        assert [(verdict.seq, verdict.sends) for verdict in due(store)] == [(1, 0)]


def test_orphaned_packs_go_at_the_next_start_and_named_ones_stay(tmp_path):
    with Store(tmp_path) as store:
        store.commit([a_delivery(a_new_case(1))], now_ms=1)
        kept = list((tmp_path / "blobs").glob("*/*"))
        orphan = store.blobs.put(b"a crash came before the row")
        (kept[0].parent / ".half-written.77.tmp").write_bytes(b"x")
    with Store(tmp_path) as store:
        assert list((tmp_path / "blobs").glob("*/*")) == kept
        with pytest.raises(NotFoundError):
            store.blobs.get(orphan, 0, 1)


def test_a_missing_or_short_pack_is_an_error_of_ours(tmp_path):
    blobs = FolderBlobs(tmp_path)
    name = blobs.put(b"abc")
    for wrong in (("0" * 64, 0, 1), (name, 0, 4), ("../../etc/passwd", 0, 1)):
        with pytest.raises(NotFoundError):
            blobs.get(*wrong)


def test_a_second_hub_on_the_same_directory_is_refused(store, tmp_path):
    with pytest.raises(StoreBusyError, match="another running hub"):
        Store(tmp_path).open()


def test_a_store_from_before_releases_were_signed_gains_their_tables_and_keeps_its_rows(tmp_path):
    gained = (
        schema.rollout_orders,
        schema.rollouts,
        schema.device_labels,
        schema.desired,
        schema.swap_reports,
        schema.shadow_reports,
        schema.vitals,
        schema.acts,
    )

    def back_to_version_2(connection):
        for table in gained:
            table.drop(connection)
        connection.execute(schema.meta.update().values(value="2"))

    with Store(tmp_path) as store:
        store.commit([a_delivery(a_new_case(1))], now_ms=1)
        store.database.run(back_to_version_2)
    with Store(tmp_path) as store:
        counts = [
            store.database.run(lambda c, table=table: len(c.execute(select(table)).all())) for table in gained
        ]
        assert counts == [0] * len(gained)
        assert len(store.database.run(lambda c: find_cases(c, CaseFilter(), before=None, limit=9))) == 1
        assert store.database.run(lambda c: c.execute(select(schema.meta.c.value)).scalar()) == "3"


def test_a_second_process_can_write_while_the_hub_does(store, tmp_path):
    """What `cloud-hub token create` does beside a running hub."""
    errors = []

    def write_much(database, start):
        try:
            for number in range(50):
                database.run(lambda c, n=start + number: schema.add_to_counters(c, {f"n{n}": 1}))
        except Exception as error:
            errors.append(error)

    with Database(f"sqlite:///{tmp_path}/hub.db") as other:
        threads = [
            threading.Thread(target=write_much, args=arguments)
            for arguments in ((other, 0), (store.database, 100))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert len(store.database.run(totals).counters) == 100


def test_a_store_of_a_newer_version_is_refused_with_the_fix(tmp_path):
    with Store(tmp_path) as store:
        store.database.run(lambda c: c.execute(schema.meta.update().values(value="99")))
    with pytest.raises(
        StoreVersionError, match=r"schema version 99, this hub reads 3: install the newer hub"
    ):
        Store(tmp_path).open()


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path):
    (tmp_path / "hub.db").write_bytes(b"not a database at all, " * 100)
    with pytest.raises(StoreUnavailableError, match="not a database"):
        Store(tmp_path).open()


def test_every_commit_is_synced_to_the_disk(tmp_path):
    with Database(f"sqlite:///{tmp_path}/hub.db") as database:
        assert database.run(lambda c: c.execute(text("PRAGMA synchronous")).scalar()) == 2
        assert database.run(lambda c: c.execute(text("PRAGMA journal_mode")).scalar()) == "wal"


def test_work_that_is_refused_undoes_itself_and_nothing_else(tmp_path):
    with Database(f"sqlite:///{tmp_path}/hub.db") as database:
        gate = threading.Event()
        database.submit(lambda _: gate.wait(10))  # while this one holds the thread, the others gather
        good = [database.submit(lambda c, n=n: schema.add_to_counters(c, {f"good{n}": 1})) for n in range(2)]

        def bad_work(connection):
            schema.add_to_counters(connection, {"bad": 1})
            connection.execute(insert(schema.counters), {"name": "good0", "value": 1})

        bad = database.submit(bad_work)
        own = database.submit(lambda _: 1 / 0)
        gate.set()
        assert [future.result(10) for future in good] == [None, None]
        with pytest.raises(StoreRefusedError):
            bad.result(10)
        with pytest.raises(ZeroDivisionError):
            own.result(10)
        names = database.run(lambda c: set(c.execute(select(schema.counters.c.name)).scalars()))
        assert names == {"good0", "good1"}


def test_a_full_database_says_so_takes_nothing_and_works_again_with_room(tmp_path):
    with Store(tmp_path) as store:
        store.commit([a_delivery(a_new_case(0))], now_ms=1)
        pages = store.database.run(lambda c: c.execute(text("PRAGMA page_count")).scalar())
        store.database.run(lambda c: c.execute(text(f"PRAGMA max_page_count={pages}")).scalar())
        many = [a_new_case(seq, exits=bytes(7 * 16)) for seq in range(1, 1000)]
        with pytest.raises(StoreUnavailableError, match="full"):
            store.commit([a_delivery(*many)], now_ms=1)
        assert store.database.problem is not None
        # The connection was dropped with the error, and the limit with the connection.
        assert len(store.commit([a_delivery(*many)], now_ms=1).fresh) == 999
        assert store.database.problem is None


def test_what_is_no_database_or_damaged_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "hub.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreUnavailableError) as told, Database(f"sqlite:///{path}"):
        pass
    assert str(told.value).startswith(f"store {path}: file is not a database; ")
    assert "restore it from a backup" in str(told.value)


def test_nobody_else_may_read_a_new_database_whatever_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        with Database(f"sqlite:///{tmp_path}/hub.db") as database:
            database.run(lambda c: c.execute(insert(schema.counters), [{"name": "a", "value": 1}]))
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes.keys() > {"hub.db", "hub.db-wal"}
    assert set(modes.values()) == {0o600}


def test_an_address_that_is_none_is_told_without_its_password():
    with pytest.raises(ConfigError) as told:
        Database("postgresql://hub:s3c@ret@db.example:port/hub")
    assert "store.url = 'postgresql://...@db.example:port/hub'" in str(told.value)


def test_closing_finishes_the_work_at_hand_and_refuses_more(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/hub.db")
    database.open()
    futures = [database.submit(lambda c, n=n: schema.add_to_counters(c, {str(n): 1})) for n in range(200)]
    database.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(StoreUnavailableError, match="closed"):
        database.run(lambda _: None)
    with sqlite3.connect(tmp_path / "hub.db") as connection:
        assert connection.execute("select count(*) from counters").fetchone() == (200,)
    connection.close()


def test_every_statement_compiles_for_postgresql():
    """No server here: the dialect says what it would send, the DDL and the partial indexes included."""
    dialect = postgresql.dialect()
    statements = [str(CreateTable(table).compile(dialect=dialect)) for table in schema.metadata.sorted_tables]
    statements += [
        str(CreateIndex(index).compile(dialect=dialect))
        for table in schema.metadata.sorted_tables
        for index in sorted(table.indexes, key=lambda index: index.name)
    ]
    recorder = Recorder(dialect)
    schema.add_to_counters(recorder, {"a": 1})
    schema.upsert(recorder, schema.devices, [{"name": "d"}], update=["last_seen_ms"])
    schema.insert_if_absent(recorder, schema.cases, [{"device": "d"}])
    confirm(recorder, [("d", Receipt(BOOT, 1, 1))])
    send_everything_again(recorder)
    pending_cases(recorder, "pump", 5)
    due_verdicts(recorder, "d", now_ms=1, limit=5)
    find_cases(recorder, CaseFilter("d", "m", 1, None, True, True, 1, 2, True), before=3, limit=5)
    assert (
        "BIGINT GENERATED BY DEFAULT AS IDENTITY"
        in statements[[t.name for t in schema.metadata.sorted_tables].index("cases")]
    )
    assert any("WHERE state = 0" in statement for statement in statements)
    assert sum("ON CONFLICT" in statement for statement in recorder.statements) == 3
    assert all("?" not in statement for statement in recorder.statements)


class Recorder:
    """A connection that compiles what it is given and finds nothing."""

    def __init__(self, dialect):
        self.dialect = dialect
        self.statements = []

    def execute(self, statement, parameters=None):
        keys = list(parameters[0]) if isinstance(parameters, list) else None
        self.statements.append(str(statement.compile(dialect=self.dialect, column_keys=keys)))
        return self

    def __iter__(self):
        return iter(())

    def mappings(self):
        return self

    def all(self):
        return []
