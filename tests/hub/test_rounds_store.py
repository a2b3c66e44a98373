"""Series, rounds, members and bases on real SQLite files; the same statements for PostgreSQL."""

import dataclasses

import numpy as np
import pytest
from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql

from cloud_hub.core.delivery import NewUpdate
from cloud_hub.core.federation.standing import Standing
from cloud_hub.errors import NotFoundError, StoreRefusedError
from cloud_hub.federation.bases import Bases
from cloud_hub.store import members, rounds, schema
from cloud_hub.store.bases import (
    KEEP_BASES_MS,
    KEEP_UPDATES_MS,
    find_base,
    lead_up_to,
    remove_old,
)
from cloud_hub.store.deliveries import Place
from cloud_hub.store.store import Store
from edge_cascade.weights import FROM_ZEROS, climb_chain, shapes_of, zeros_of
from tests.hub.fleet import BOOT, a_delivery, a_new_case
from tests.hub.test_store import Recorder

WEIGHTS = {"w": np.linspace(-1, 1, 600, dtype=np.float32), "b": np.float32([-0.0, 2.0])}
GRAPH = bytes(31) + b"\x07"
ROUND = rounds.RoundRow("r1", 1, 5, bytes(32), "{}", None)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as store:
        yield store


def start(store, model="pump"):
    return store.database.run(
        lambda c: rounds.insert_series(c, model=model, settings="{}", graph=GRAPH, created_by="ann", now_ms=1)
    )


def an_update(device="press-1", round_id="r1", seq=1, delta=b"delta"):
    return NewUpdate(device, BOOT, seq, "pump", round_id, bytes(32), 10, "int8", delta)


def test_a_model_has_one_open_series_whoever_asks(store):
    assert start(store) == 1
    with pytest.raises(StoreRefusedError):
        start(store)
    assert start(store, "fan") == 2
    store.database.run(lambda c: rounds.save_series(c, 1, ended_at_ms=5))
    assert start(store) == 3
    assert [row.id for row in store.database.run(rounds.open_series_rows)] == [2, 3]


def test_the_guards_window_ends_at_the_newest_case_of_the_model(store):
    store.commit([a_delivery(a_new_case(1), a_new_case(2), a_new_case(3, model="fan"))], now_ms=1)
    start(store)
    (row,) = store.database.run(rounds.open_series_rows)
    assert (row.phase, row.window_start, row.machine) == ("asked", 2, None)


def test_the_first_reason_to_end_a_series_stays(store):
    start(store)
    assert store.database.run(lambda c: rounds.ask_to_abort(c, 1, "first"))
    assert store.database.run(lambda c: rounds.ask_to_abort(c, 1, "second"))
    assert store.database.run(lambda c: rounds.get_series(c, 1))["abort_reason"] == "first"
    store.database.run(lambda c: rounds.save_series(c, 1, ended_at_ms=5))
    assert not store.database.run(lambda c: rounds.ask_to_abort(c, 1, "third"))
    with pytest.raises(NotFoundError, match="there is no series 9"):
        store.database.run(lambda c: rounds.ask_to_abort(c, 9, "x"))


def test_rounds_are_numbered_over_all_series_of_their_model_and_one_is_open_at_a_time(store):
    start(store)
    store.database.run(lambda c: rounds.insert_round(c, ROUND, now_ms=2))
    assert store.database.run(lambda c: rounds.next_round_number(c, "pump")) == 6
    assert store.database.run(lambda c: rounds.next_round_number(c, "fan")) == 1
    with pytest.raises(StoreRefusedError):
        again = rounds.RoundRow("r2", 1, 6, bytes(32), "{}", None)
        store.database.run(lambda c: rounds.insert_round(c, again, now_ms=2))
    assert store.database.run(lambda c: rounds.open_round_of(c, 1)) == ROUND
    store.database.run(lambda c: rounds.end_open_round(c, 1, "over", now_ms=9))
    assert store.database.run(lambda c: rounds.open_round_of(c, 1)) is None
    found = store.database.run(lambda c: rounds.round_of_number(c, 1, 5))
    assert (found["outcome"], found["why"], found["closed_at_ms"]) == ("aborted", "over", 9)


def test_members_keep_their_bytes_down_whatever_else_is_written(store):
    start(store)
    state = members.MemberState

    def work(c):
        rounds.insert_round(c, ROUND, now_ms=2)
        members.save_members(c, "r1", [members.Member(name, state.ASKED) for name in ("a", "b")])
        members.add_bytes_down(c, "r1", {"a": 100, "b": 5})
        members.add_bytes_down(c, "r1", {"a": 20})
        members.save_members(c, "r1", [members.Member("a", state.ANSWERED, num_examples=7, bytes_up=30)])
        members.judge_members(c, "r1", [members.Member("a", state.REJECTED, "norm", "too long")])
        return members.members_of(c, "r1"), members.tally_members(c, ["r1"])

    found, tally = store.database.run(work)
    assert [tuple(row.values())[1:] for row in found] == [
        ("a", "rejected", "norm", "too long", 7, 30, 120),
        ("b", "asked", None, None, None, 0, 5),
    ]
    assert {(row.state, row.reason, row.devices, row.bytes_up, row.bytes_down) for row in tally} == {
        ("rejected", "norm", 1, 30, 120),
        ("asked", None, 1, 0, 5),
    }


def test_an_update_is_new_until_it_is_noted_and_then_a_vote_or_none(store):
    store.commit([a_delivery(update=an_update(), device="press-1")], now_ms=1)
    store.commit([a_delivery(update=an_update("press-2", delta=b"x"), device="press-2")], now_ms=1)
    first, second = store.database.run(lambda c: members.new_updates(c, 10))
    assert (first.device, first.num_examples, store.blobs.get(first.place.blob, 0, 5)) == (
        "press-1",
        10,
        b"delta",
    )
    store.database.run(lambda c: members.note_updates(c, [(first.id, "r1"), (second.id, None)]))
    assert store.database.run(lambda c: members.new_updates(c, 10)) == []
    assert store.database.run(lambda c: members.votes_in(c, "r1")) == {"press-1": first}


def test_records_of_devices_are_kept_by_model_and_being_asked_leaves_them_as_they_are(store):
    record = Standing(6, 1, 40)

    def work(c):
        members.save_standings(c, "pump", {"a": record})
        members.note_asked(c, "pump", ["a", "b"], 12)
        return members.standings_of(c, "pump", {"a", "b"}), members.standings_of(c, "fan", {"a"})

    assert store.database.run(work) == ({"a": record, "b": Standing()}, {"a": Standing()})
    assert sorted(store.database.run(members.ever_asked)) == ["a", "b"]


def test_a_base_from_zeros_and_by_steps_is_the_same_to_the_bit(store):
    bases = Bases(store)
    first = bases.first("pump", GRAPH, WEIGHTS)
    wanted = {name: array + np.float32(0.01) for name, array in WEIGHTS.items()}
    second = bases.next(first.row, first.weights, wanted, "int8")
    third = bases.next(second.row, second.weights, WEIGHTS, "int8", extra=b"rule")
    for each in (first, second, third):
        store.database.run(lambda c, each=each: each.keep(c, now_ms=1))
    zeros = zeros_of(shapes_of(WEIGHTS))
    for origin, held in ((FROM_ZEROS, zeros), (first.row.digest, first.weights)):
        way = bases.way_to(third.row.digest, origin)
        assert way.origin == origin
        reached = climb_chain(held, way.steps, expected=third.row.digest, max_bytes=10**6)
        np.testing.assert_array_equal(reached["w"], third.weights["w"])
    assert len(bases.way_to(third.row.digest, first.row.digest).steps) == 2
    assert bases.way_to(third.row.digest, bytes(31) + b"\x09").origin == FROM_ZEROS
    assert bases.way_to(bytes(31) + b"\x09", FROM_ZEROS) is None
    assert store.blobs.get(third.extra.blob, third.extra.offset, third.extra.length) == b"rule"
    np.testing.assert_array_equal(bases.load(third.row, shapes_of(WEIGHTS))["w"], third.weights["w"])


def test_steps_that_together_are_longer_than_the_whole_are_not_sent(store):
    bases = Bases(store)
    rng = np.random.default_rng(0)
    made = bases.first("pump", GRAPH, WEIGHTS)
    origin = made.row.digest
    store.database.run(lambda c: made.keep(c, now_ms=1))
    for _ in range(8):
        wanted = {n: a + rng.standard_normal(a.shape).astype(np.float32) for n, a in made.weights.items()}
        made = bases.next(made.row, made.weights, wanted, "int8")
        store.database.run(lambda c, made=made: made.keep(c, now_ms=1))
    assert bases.way_to(made.row.digest, origin).origin == FROM_ZEROS


def test_what_is_old_and_needed_by_nobody_is_removed_and_its_pack_with_it(tmp_path):
    with Store(tmp_path) as store:
        bases = Bases(store)
        start(store)
        first = bases.first("pump", GRAPH, WEIGHTS)
        wanted = {name: array + np.float32(0.01) for name, array in WEIGHTS.items()}
        second = bases.next(first.row, first.weights, wanted, "int8")
        lost = bases.next(first.row, first.weights, {n: -a for n, a in wanted.items()}, "int8")
        store.commit([a_delivery(update=an_update())], now_ms=1)
        store.commit([a_delivery(a_new_case(1), update=an_update("press-2"), device="press-2")], now_ms=1)
        store.commit([a_delivery(update=an_update("press-3", "r9", delta=b"y"), device="press-3")], now_ms=1)

        def work(c):
            for each in (first, second, lost):
                each.keep(c, now_ms=1)
            rounds.insert_round(c, ROUND, now_ms=1)
            rounds.save_series(c, 1, base=second.row.digest, first_base=first.row.digest)
            new = members.new_updates(c, 10)
            members.note_updates(c, [(u.id, "r1" if u.round_id == "r1" else None) for u in new])

        store.database.run(work)
        late = KEEP_UPDATES_MS + 2

        def removed(now_ms, open_bases=()):
            gone = store.database.run(lambda c: remove_old(c, now_ms=now_ms, open_bases=open_bases))
            store.blobs.remove(gone.packs)
            return gone.rows

        # The round is open: only the stray may go.
        assert removed(late) == 1
        store.database.run(lambda c: rounds.save_round(c, "r1", outcome="committed", closed_at_ms=5))
        assert removed(5 + KEEP_UPDATES_MS) == 0
        # Sent again, they would be votes once more.
        assert removed(5 + KEEP_UPDATES_MS + 1, open_bases=[an_update().training_base]) == 0
        assert removed(5 + KEEP_UPDATES_MS + 1) == 2
        assert removed(KEEP_BASES_MS + 2) == 1
        assert store.database.run(lambda c: find_base(c, lost.row.digest)) is None
        assert [row.digest for row in store.database.run(lambda c: lead_up_to(c, second.row.digest))] == [
            second.row.digest,
            first.row.digest,
        ]
        # One pack holds a case beside its update, two hold bases.
        count = select(func.count()).select_from(schema.blobs)
        assert store.database.run(lambda c: c.execute(count).scalar_one()) == 3
        assert len(list((tmp_path / "blobs").glob("*/*"))) == 3
    with Store(tmp_path) as store:
        assert Bases(store).load(second.row, shapes_of(WEIGHTS)).keys() == WEIGHTS.keys()


def test_a_rules_state_is_kept_of_the_last_committed_round_of_an_open_series(store):
    start(store)
    bases = Bases(store)
    first = bases.first("pump", GRAPH, WEIGHTS)
    made = [
        bases.next(first.row, first.weights, WEIGHTS, "int8", extra=bytes([number]) * 40)
        for number in range(3)
    ]

    def work(c):
        first.keep(c, now_ms=1)
        for number, (each, outcome) in enumerate(
            zip(made, ("committed", "committed", "rolled_back"), strict=True), 1
        ):
            each.keep(c, now_ms=1)
            rounds.insert_round(c, dataclasses.replace(ROUND, id=f"r{number}", number=number), now_ms=1)
            rounds.save_round(c, f"r{number}", outcome=outcome, closed_at_ms=1, **each.rule_columns)

    store.database.run(work)
    gone = store.database.run(lambda c: remove_old(c, now_ms=2))
    assert (gone.rows, gone.packs) == (0, {made[0].pack, made[2].pack} - {first.pack})
    kept = store.database.run(lambda c: rounds.committed_rounds(c, 1))
    assert [row["rule_blob"] for row in kept] == [None, made[1].pack]


def test_a_pack_that_was_put_again_is_left_for_the_next_start(store):
    name = store.blobs.put(b"sent twice")
    assert store.blobs.put(b"sent twice") == name
    store.blobs.remove([name])
    assert store.blobs.get(name, 0, 10) == b"sent twice"


class EmptyRecorder(Recorder):
    """Answers every question with nothing."""

    def first(self):
        return None

    def scalar(self):
        return None

    def scalar_one(self):
        return 1

    def scalars(self):
        return self


def test_every_statement_of_rounds_compiles_for_postgresql():
    recorder = EmptyRecorder(postgresql.dialect())
    rounds.insert_series(recorder, model="m", settings="{}", graph=GRAPH, created_by="a", now_ms=1)
    rounds.open_series_rows(recorder)
    rounds.list_series(recorder, before=3, limit=2)
    rounds.next_round_number(recorder, "m")
    rounds.insert_round(recorder, ROUND, now_ms=1)
    rounds.save_round(recorder, "r1", outcome="aborted")
    rounds.open_round_of(recorder, 1)
    rounds.series_of_rounds(recorder, ["r1"])
    rounds.committed_rounds(recorder, 1)
    rounds.list_rounds(recorder, series_id=1, before=(1, 2), limit=3)
    rounds.end_open_round(recorder, 1, "x", now_ms=1)
    members.save_members(recorder, "r1", [members.Member("a", members.MemberState.ASKED)])
    members.judge_members(recorder, "r1", [members.Member("a", members.MemberState.COUNTED)])
    members.add_bytes_down(recorder, "r1", {"a": 1})
    members.tally_members(recorder, ["r1"])
    members.fleet_of(recorder, "m", ["a"])
    members.bundles_of_graph(recorder, GRAPH)
    members.save_standings(recorder, "m", {"a": Standing()})
    members.note_asked(recorder, "m", ["a"], 1)
    members.ever_asked(recorder)
    members.new_updates(recorder, 1)
    members.note_updates(recorder, [(1, "r1")])
    members.votes_in(recorder, "r1")
    stray = members.StoredUpdate(1, "r1", "a", "m", GRAPH, 1, "int8", Place("x", 0, 1))
    members.note_late(recorder, [stray])
    remove_old(recorder, now_ms=1)
    assert sum("ON CONFLICT" in statement for statement in recorder.statements) == 3
    assert any("noted = false" in statement for statement in recorder.statements)
    assert all("?" not in statement for statement in recorder.statements)
