"""What boards report of releases, from the spool's row to the hub's."""

import msgspec
import pytest
from sqlalchemy import select

from cloud_hub.core.admission import RejectedError, admit_shadow, admit_swap
from cloud_hub.core.delivery import Delivery, NewReport
from cloud_hub.ingest import acks_of
from cloud_hub.store import release_reports, schema
from cloud_hub.store.release_reports import KEPT_MS, remove_old_shadows, remove_old_vitals
from cloud_hub.store.store import Store
from edge_cascade.messages import DifferingPair, Report, ShadowReport, ShadowScene, SwapReport
from edge_daemon.core.spooling import Batch, report_item, shadow_item, swap_item
from edge_daemon.frames import decode_batch, message_of
from tests.hub.rollouts_fleet import Fleet

BOOT, DIGEST = bytes(8), bytes(32)
SWAP = SwapReport("b", BOOT, 1, 5, "tiny", "7", DIGEST, DIGEST, "golden", "0.2 off")
SHADOW = ShadowReport("b", BOOT, 2, "tiny", DIGEST, DIGEST, [ShadowScene("s", 3, [DifferingPair(9, 1, 2)])])
COUNTERS = Report("b", BOOT, 3, 5, {"edge_rss_bytes": 7})


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as store:
        yield store


def rows_of(store, table):
    return store.database.run(lambda c: c.execute(select(table)).mappings().all())


@pytest.mark.parametrize(
    ("item", "message"), [(swap_item, SWAP), (shadow_item, SHADOW), (report_item, COUNTERS)]
)
def test_a_report_comes_out_of_the_spool_as_it_went_in(item, message):
    row = item(message)
    items, damaged = decode_batch(Batch(1, row.key, {row.seq: row.body}))
    assert (message_of("b", row.key, list(items.values())), damaged) == (message, [])


def test_reports_are_kept_once_and_acknowledged_each_time(store):
    group = [Delivery("b", b"", BOOT, swap=SWAP), Delivery("b", b"", BOOT, shadow=SHADOW)]
    for is_new in (True, False):
        committed = store.commit(group, now_ms=1)
        assert committed.fresh == ({("b", BOOT, 1), ("b", BOOT, 2)} if is_new else set())
        answers = [acks for _, acks in acks_of(group, committed, "edge")]
        assert sorted(seq for acks in answers for seq in acks.committed) == ([1, 2] if is_new else [])
        assert sorted(seq for acks in answers for seq in acks.duplicate) == ([] if is_new else [1, 2])
    assert [row["failure"] for row in rows_of(store, schema.swap_reports)] == ["golden"]
    assert len(rows_of(store, schema.shadow_reports)) == 1


def test_of_a_reports_counters_health_keeps_its_own_and_for_a_month(store):
    counters = {"edge_rss_bytes": 7, "edge_samples{model=tiny}": 3, "edge_spool_rows": 9}
    store.commit([Delivery("b", b"", BOOT, report=NewReport("b", BOOT, 3, 5, counters))], now_ms=10)
    (row,) = rows_of(store, schema.vitals)
    assert row["counters"] == '{"edge_rss_bytes":7,"edge_samples{model=tiny}":3}'
    remove = [lambda c, at=at: remove_old_vitals(c, now_ms=at) for at in (10 + KEPT_MS, 11 + KEPT_MS)]
    assert [store.database.run(each) for each in remove] == [0, 1]


def test_pairs_go_after_a_month_a_few_at_a_time_but_for_those_that_judge_a_rollout(store, monkeypatch):
    fleet = Fleet(store, ["b"])
    fleet.release(5)
    for seq in range(6):
        if seq == 4:
            fleet.rollout = fleet.start(5)
        shadow = msgspec.structs.replace(SHADOW, seq=seq)
        store.commit([Delivery("b", b"", BOOT, shadow=shadow)], now_ms=10)
    monkeypatch.setattr(release_reports, "REMOVED_AT_ONCE", 3)

    def removed(now_ms):
        return store.database.run(lambda c: remove_old_shadows(c, now_ms=now_ms))

    assert removed(10 + KEPT_MS) == 0
    assert [removed(11 + KEPT_MS) for _ in range(3)] == [3, 1, 0]
    assert [row["seq"] for row in rows_of(store, schema.shadow_reports)] == [4, 5]
    fleet.turn()
    fleet.order(fleet.rollout, "halt")
    fleet.turn()
    assert [removed(11 + KEPT_MS) for _ in range(2)] == [1, 0]


def test_reports_that_were_received_by_a_clock_far_ahead_do_not_stay_for_ever(store):
    store.commit([Delivery("b", b"", BOOT, report=NewReport("b", BOOT, 3, 5, {}))], now_ms=10 + 2 * KEPT_MS)
    assert store.database.run(lambda c: remove_old_vitals(c, now_ms=10)) == 1


def test_what_no_store_should_hold_is_rejected():
    with pytest.raises(RejectedError, match="control character"):
        admit_swap(SwapReport("b", BOOT, 1, 5, "tiny", "7", DIGEST, DIGEST, "golden", "a\0b"))
    with pytest.raises(RejectedError, match="2 of 1 pairs differ"):
        pairs = [DifferingPair(1, 0, 1), DifferingPair(2, 0, 1)]
        admit_shadow(ShadowReport("b", BOOT, 2, "tiny", DIGEST, DIGEST, [ShadowScene("s", 1, pairs)]))
