"""The delivery contract, for any spool; then what only a file on a disk can suffer."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_daemon import spool_ledger
from edge_daemon.clock import SystemClock
from edge_daemon.core.spooling import (
    ROW_OVERHEAD_BYTES,
    Dropped,
    DropReason,
    Priority,
    Row,
    SpoolLimits,
    count_drops,
    select_expired,
    select_surplus,
)
from edge_daemon.errors import (
    SpoolClosedError,
    SpoolError,
    SpoolFullError,
    SpoolInUseError,
    SpoolVersionError,
)
from edge_daemon.spool import SqliteSpool
from tests.device.spooling_cases import BOOT, OTHER_BOOT, FakeClock, item, raw, report, update, wait_until

DAY_S = 86400.0
ALL = (1000, 10**9)


def accept(spool, *items):
    for future in [spool.append(one) for one in items]:
        future.result(10)


def names(batch):
    return [] if batch is None else list(batch.bodies)


def drops(spool):
    return {
        (reason.value, kind.name): dropped.count for (reason, kind), dropped in spool.counts().drops.items()
    }


class SpoolContract:
    """Any spool passes. A subclass has `open_spool(limits, clock)`, which continues where the last ended."""

    LIMITS = SpoolLimits(max_bytes=100_000, max_age_s=7 * DAY_S, commit_window_ms=1, max_in_flight_batches=2)

    def open_spool(self, limits=LIMITS, clock=None):
        raise NotImplementedError

    def test_what_was_appended_is_claimed_as_it_was(self):
        spool = self.open_spool()
        rows = [item(1), item(2, values=500)]
        accept(spool, *rows)
        batch = spool.claim(*ALL)
        assert (batch.key, dict(batch.bodies)) == (rows[0].key, {1: rows[0].body, 2: rows[1].body})

    def test_appending_twice_stores_once(self):
        spool = self.open_spool()
        accept(spool, raw(1), raw(1))
        assert (spool.counts().rows, names(spool.claim(*ALL))) == (1, [1])

    def test_highest_priority_leaves_first_then_the_oldest(self):
        spool = self.open_spool()
        accept(
            spool,
            raw(1, priority=Priority.FAILED),
            raw(2),
            raw(3, priority=Priority.AUDIT),
            raw(4),
            raw(5, priority=Priority.AUDIT),
        )
        assert names(spool.claim(*ALL)) == [3, 5, 2, 4, 1]

    def test_a_batch_holds_rows_of_one_boot_model_bundle_and_plan(self):
        spool = self.open_spool()
        accept(spool, raw(1, boot=OTHER_BOOT), raw(2), raw(3, model="other"), raw(4), report(5), update(6))
        claimed = []
        while batch := spool.claim(*ALL):
            claimed.append((batch.key.kind.name, batch.key.boot, batch.key.model, names(batch)))
            spool.acknowledge(batch.key.boot, names(batch))
        assert claimed == [
            ("REPORT", BOOT, "", [5]),
            ("UPDATE", BOOT, "vibration", [6]),
            ("CASE", OTHER_BOOT, "m", [1]),
            ("CASE", BOOT, "m", [2, 4]),
            ("CASE", BOOT, "other", [3]),
        ]

    def test_what_became_of_a_client_update_is_told_once_its_row_is_gone(self):
        clock = FakeClock()
        spool = self.open_spool(clock=clock)
        gone = []
        spool.on_update_gone(lambda *update: gone.append(update))
        accept(spool, update(1), update(2), update(3), raw(4), report(5))
        spool.acknowledge(BOOT, [1, 4])
        spool.reject(BOOT, 2, DropReason.REJECTED)
        spool.reject(BOOT, 5, DropReason.REJECTED)
        spool.flush()
        assert gone == [(BOOT, 1, None), (BOOT, 2, DropReason.REJECTED)]
        clock.now_s += 8 * DAY_S
        spool.flush()
        assert gone[2:] == [(BOOT, 3, DropReason.EXPIRED)]
        accept(spool, update(6, delta=bytes(60_000)), raw(7, size=50_000, priority=Priority.AUDIT))
        assert gone[3:] == [(BOOT, 6, DropReason.LIMIT)]
        spool.flush()
        assert len(gone) == 4

    def test_a_batch_is_bounded_by_items_and_bytes_but_never_empty(self):
        spool = self.open_spool()
        accept(spool, *(raw(seq, size=1000) for seq in range(6)))
        assert names(spool.claim(4, 3000)) == [0, 1, 2]
        assert names(spool.claim(10, 10)) == [3]

    def test_no_more_batches_are_in_flight_than_allowed(self):
        spool = self.open_spool()
        accept(spool, *(raw(seq) for seq in range(3)))
        first, second = spool.claim(1, 1000), spool.claim(1, 1000)
        assert (names(first), names(second), spool.claim(1, 1000)) == ([0], [1], None)
        spool.acknowledge(BOOT, [0])
        assert names(spool.claim(1, 1000)) == [2]

    def test_what_is_in_flight_is_not_offered_until_released(self):
        spool = self.open_spool()
        accept(spool, raw(1), raw(2))
        batch = spool.claim(*ALL)
        assert spool.claim(*ALL) is None
        spool.acknowledge(BOOT, [1])
        spool.release(batch.token)
        assert names(spool.claim(*ALL)) == [2]

    def test_releasing_a_batch_that_is_gone_does_nothing(self):
        spool = self.open_spool()
        accept(spool, raw(1))
        batch = spool.claim(*ALL)
        spool.acknowledge(BOOT, [1])
        spool.release(batch.token)
        spool.release(4711)
        spool.flush()
        assert spool.counts().rows == 0

    def test_an_acknowledgement_may_come_late_twice_and_for_strangers(self):
        spool = self.open_spool()
        accept(spool, raw(1), raw(2))
        spool.release(spool.claim(*ALL).token)
        spool.acknowledge(BOOT, [1, 99])
        spool.acknowledge(BOOT, [1])
        spool.acknowledge(OTHER_BOOT, [2])
        spool.flush()
        counts = spool.counts()
        assert (counts.rows, counts.acknowledged, drops(spool)) == (1, 1, {})

    def test_a_rejected_row_goes_into_its_counter(self):
        spool = self.open_spool()
        accept(spool, raw(1, size=100), raw(2, size=100))
        spool.claim(*ALL)
        spool.reject(BOOT, 1, DropReason.REJECTED)
        spool.flush()
        assert (spool.counts().rows, dict(spool.counts().drops)) == (
            1,
            {(DropReason.REJECTED, Priority.ESCALATION): Dropped(1, 100 + ROW_OVERHEAD_BYTES)},
        )

    def test_a_deferred_row_is_offered_again_only_after_its_delay(self):
        spool = self.open_spool()
        accept(spool, raw(1), raw(2))
        spool.claim(*ALL)
        spool.defer(BOOT, [1], 3600.0)
        spool.defer(BOOT, [2], 0.0)
        assert names(spool.claim(*ALL)) == [2]

    def test_at_the_limit_the_lowest_priority_goes_first_then_the_oldest(self):
        spool = self.open_spool(SpoolLimits(max_bytes=1000, commit_window_ms=1))
        size = 200 - ROW_OVERHEAD_BYTES
        accept(
            spool, raw(1, size=size, priority=Priority.AUDIT), *(raw(seq, size=size) for seq in (2, 3, 4, 5))
        )
        accept(spool, raw(6, size=size), raw(7, size=size, priority=Priority.AUDIT))
        assert names(spool.claim(*ALL)) == [1, 7, 4, 5, 6]
        assert dict(spool.counts().drops) == {(DropReason.LIMIT, Priority.ESCALATION): Dropped(2, 400)}

    def test_at_the_limit_what_is_in_flight_goes_last(self):
        spool = self.open_spool(SpoolLimits(max_bytes=1000, commit_window_ms=1))
        size = 200 - ROW_OVERHEAD_BYTES
        accept(spool, *(raw(seq, size=size) for seq in range(5)))
        spool.claim(2, 10_000)
        accept(spool, raw(5, size=size))
        spool.acknowledge(BOOT, [0, 1])
        assert names(spool.claim(*ALL)) == [3, 4, 5]

    def test_an_expired_row_goes_before_a_lower_priority(self):
        clock = FakeClock()
        spool = self.open_spool(SpoolLimits(max_bytes=600, max_age_s=DAY_S, commit_window_ms=1), clock)
        size = 200 - ROW_OVERHEAD_BYTES
        accept(spool, raw(1, size=size, priority=Priority.AUDIT))
        clock.now_s += 0.75 * DAY_S
        accept(spool, raw(2, size=size, priority=Priority.FAILED))
        clock.now_s += 0.75 * DAY_S
        accept(spool, raw(3, size=size), raw(4, size=size))
        assert names(spool.claim(*ALL)) == [3, 4, 2]
        assert drops(spool) == {("expired", "AUDIT"): 1}

    def test_a_jump_of_the_wall_clock_expires_nothing(self):
        clock = FakeClock()
        spool = self.open_spool(clock=clock)
        accept(spool, raw(1))
        for wall_ms in (0, 2_100_000_000_000, 1_790_000_000_000):
            clock.wall_now_ms = wall_ms
            spool.flush()
        assert (spool.counts().rows, drops(spool)) == (1, {})

    def test_age_counts_only_while_the_daemon_runs(self):
        limits = SpoolLimits(max_age_s=DAY_S, commit_window_ms=1)
        for day in range(3):
            # A new boot starts the monotonic clock somewhere else, and a year may have passed meanwhile.
            clock = FakeClock()
            clock.now_s = 5.0 + day
            clock.wall_now_ms += day * 365 * 86_400_000
            spool = self.open_spool(limits, clock)
            if day == 0:
                accept(spool, raw(1))
            clock.now_s += 0.4 * DAY_S
            spool.flush()
            assert drops(spool) == ({} if day < 2 else {("expired", "ESCALATION"): 1})
            self.close_spool(spool)

    def test_everything_is_there_after_closing_and_opening(self):
        spool = self.open_spool()
        accept(spool, raw(1), raw(2, boot=OTHER_BOOT), report(3), raw(4))
        spool.claim(1, 1000)
        spool.acknowledge(BOOT, [4])
        spool.reject(BOOT, 3, DropReason.REJECTED)
        self.close_spool(spool)
        spool = self.open_spool()
        assert [names(spool.claim(*ALL)), names(spool.claim(*ALL))] == [[1], [2]]
        assert drops(spool) == {("rejected", "REPORT"): 1}

    def test_an_item_above_the_whole_limit_is_refused_and_counted(self):
        spool = self.open_spool(SpoolLimits(max_bytes=1000, commit_window_ms=1))
        with pytest.raises(SpoolFullError, match="1064 bytes, the spool holds 1000"):
            spool.append(raw(1, size=1000)).result(10)
        assert (spool.counts().rows, spool.counts().spool_failed) == (0, 1)
        spool.flush()
        assert drops(spool) == {("disk", "ESCALATION"): 1}

    def test_a_closed_spool_refuses(self):
        spool = self.open_spool()
        self.close_spool(spool)
        with pytest.raises(SpoolClosedError):
            spool.append(raw(1)).result(10)
        with pytest.raises(SpoolClosedError):
            spool.claim(*ALL)
        spool.acknowledge(BOOT, [1])

    def test_wake_is_called_for_new_rows_only(self):
        spool = self.open_spool()
        woken = []
        spool.on_append(lambda: woken.append(spool.counts().waiting_rows))
        accept(spool, raw(1))
        spool.acknowledge(BOOT, [1])
        spool.flush()
        assert woken == [1]

    def test_many_threads_append_claim_and_acknowledge_and_nothing_is_lost(self):
        spool = self.open_spool()
        writers = [
            threading.Thread(
                target=lambda n=n: accept(spool, *(raw(100 * n + k, size=10) for k in range(100)))
            )
            for n in range(4)
        ]
        for writer in writers:
            writer.start()
        seen = []
        while len(seen) < 400:
            batch = spool.claim(16, 10**6)
            if batch is not None:
                seen += names(batch)
                spool.acknowledge(BOOT, names(batch))
        for writer in writers:
            writer.join()
        assert sorted(seen) == list(range(400))


class TestSqliteSpool(SpoolContract):
    @pytest.fixture(autouse=True)
    def _path(self, tmp_path):
        self.path = tmp_path / "state" / "spool.db"
        self.opened = []
        yield
        for spool in self.opened:
            spool.close()

    def open_spool(self, limits=SpoolContract.LIMITS, clock=None):
        spool = SqliteSpool(self.path, limits, clock or FakeClock())
        spool.open()
        self.opened.append(spool)
        return spool

    def close_spool(self, spool):
        spool.close()

    def test_append_does_not_wait_for_the_disk(self):
        spool = self.open_spool()
        is_free = threading.Event()
        spool._tell(is_free.wait)
        future = spool.append(raw(1))
        assert not future.done()
        is_free.set()
        assert future.result(10) is None

    def test_the_ticket_cannot_be_taken_back(self):
        spool = self.open_spool()
        future = spool.append(raw(1))
        assert future.cancel() is False
        assert future.result(10) is None

    def test_too_much_waiting_for_the_disk_is_refused(self, monkeypatch):
        monkeypatch.setattr("edge_daemon.spool.MAX_QUEUED_ITEMS", 2)
        spool = self.open_spool()
        is_free = threading.Event()
        spool._tell(is_free.wait)
        futures = [spool.append(raw(seq)) for seq in range(3)]
        is_free.set()
        assert [type(future.exception(10)) for future in futures] == [type(None), type(None), SpoolFullError]
        assert (spool.counts().rows, spool.counts().spool_failed) == (2, 1)

    def test_a_group_shares_a_commit(self):
        spool = self.open_spool(SpoolLimits(commit_window_ms=20))
        accept(spool, *(raw(seq) for seq in range(200)))
        assert spool.counts().commits < 20

    def test_a_second_process_is_told_so(self):
        self.open_spool()
        with pytest.raises(SpoolInUseError, match=r"spool\.db is in use by another process"):
            self.open_spool()

    def test_a_newer_schema_is_refused_and_left_alone(self):
        self.close_spool(self.open_spool())
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.execute("PRAGMA user_version = 99")
        with pytest.raises(
            SpoolVersionError, match="schema 99, this daemon knows 1: install the newer daemon"
        ):
            self.open_spool()
        assert sorted(path.name for path in self.path.parent.iterdir()) == ["spool.db", "spool.db-reserve"]

    def test_a_row_whose_bytes_changed_is_a_counted_drop(self):
        spool = self.open_spool()
        accept(spool, raw(1), raw(2))
        self.close_spool(spool)
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.execute("UPDATE item SET body = x'00' WHERE seq = 1")
            connection.commit()
        spool = self.open_spool()
        assert names(spool.claim(*ALL)) == [2]
        spool.flush()
        assert drops(spool) == {("damaged", "ESCALATION"): 1}

    # --- a broken file ---

    @pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 8000])
    def test_a_file_that_is_no_database_is_moved_aside(self, content):
        self.path.parent.mkdir()
        self.path.write_bytes(content)
        spool = self.open_spool()
        accept(spool, raw(1))
        assert self.path.with_name("spool.corrupt-1").read_bytes() == content
        assert (spool.counts().corruptions, names(spool.claim(*ALL))) == (1, [1])

    def test_a_foreign_database_is_moved_aside(self):
        self.path.parent.mkdir()
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.execute("CREATE TABLE photos (x)")
        accept(self.open_spool(), raw(1))
        assert self.path.with_name("spool.corrupt-1").exists()

    def fill_and_tear(self, page_of_total):
        """1,000 rows, then one page overwritten, as a torn write leaves it."""
        spool = self.open_spool(SpoolLimits(commit_window_ms=1))
        accept(spool, *(raw(seq, size=1000) for seq in range(1000)))
        spool.reject(BOOT, 999, DropReason.REJECTED)
        self.close_spool(spool)
        size = self.path.stat().st_size
        page = int(size // 4096 * page_of_total)
        with self.path.open("r+b") as file:
            file.seek(page * 4096)
            file.write(os.urandom(4096))

    @pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
    def test_a_torn_page_costs_only_its_own_rows_and_those_are_counted(self, place):
        self.fill_and_tear(place)
        spool = self.open_spool(SpoolLimits(commit_window_ms=1))
        counts = spool.counts()
        lost = counts.drops.get((DropReason.CORRUPT, Priority.ESCALATION), Dropped(0, 0)).count
        assert counts.corruptions == 1
        assert counts.rows + lost == 999
        assert counts.rows > 900
        assert counts.drops[DropReason.REJECTED, Priority.ESCALATION].count == 1
        accept(spool, raw(5000))
        while batch := spool.claim(*ALL):
            spool.acknowledge(BOOT, names(batch))
        spool.flush()
        assert spool.counts().rows == 0

    def test_only_the_last_few_damaged_files_are_kept(self):
        for n in range(5):
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_bytes(b"damage number %d" % n * 100)
            self.close_spool(self.open_spool())
        kept = {path.name: path.read_bytes()[:15] for path in self.path.parent.glob("spool.corrupt-*")}
        assert kept == {f"spool.corrupt-{n + 1}": b"damage number %d" % n for n in (2, 3, 4)}

    def test_damage_found_while_running_is_repaired_without_a_restart(self, monkeypatch):
        spool = self.open_spool()
        accept(spool, raw(1))
        spool.flush()
        ledger = spool._ledger

        def damaged(*_):
            monkeypatch.undo()
            error = sqlite3.DatabaseError("database disk image is malformed")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error

        monkeypatch.setattr(ledger._file, "add", damaged)
        with pytest.raises(SpoolError, match="malformed"):
            spool.append(raw(2)).result(10)
        accept(spool, raw(3))
        assert names(spool.claim(*ALL)) == [1, 3]

    # --- a disk that refuses ---

    def test_a_directory_that_cannot_be_made_is_tried_again(self, monkeypatch):
        monkeypatch.setattr(spool_ledger, "RETRY_S", 0.0)
        self.path.parent.write_text("a file where the directory belongs")
        spool = self.open_spool()
        with pytest.raises(SpoolError):
            spool.append(raw(1)).result(10)
        with pytest.raises(SpoolError):
            spool.claim(*ALL)
        assert (spool.counts().rows, spool.counts().spool_failed) == (0, 1)
        self.path.parent.unlink()
        accept(spool, raw(2))
        assert names(spool.claim(*ALL)) == [2]


@contextlib.contextmanager
def small_disk(size_kib):
    """A real file system of that size; a test that needs one is skipped where it cannot be mounted."""
    with tempfile.TemporaryDirectory() as directory:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", directory]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("a tmpfs cannot be mounted here (needs root)")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "-l", directory], check=True)


@pytest.fixture
def full_disk(monkeypatch):
    """A spool with a few rows on a disk that somebody else has filled."""
    monkeypatch.setattr(spool_ledger, "RETRY_S", 0.05)
    with small_disk(4096) as disk:
        spool = SqliteSpool(disk / "spool.db", SpoolLimits(commit_window_ms=1), SystemClock())
        spool.open()
        accept(spool, *(raw(seq, size=1000) for seq in range(50)))
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1024)):
                pass
        yield spool, ballast
        spool.close()


def append_until_refused(spool):
    """Sequence numbers that were accepted before the disk refused one."""
    accepted = []
    for seq in range(1000, 2000):
        future = spool.append(raw(seq, size=4000))
        if future.exception(10) is not None:
            assert isinstance(future.exception(), SpoolError)
            return accepted
        accepted.append(seq)
    raise AssertionError("the disk never became full")


def test_a_full_disk_refuses_and_accepts_again_when_there_is_room(full_disk):
    spool, ballast = full_disk
    accepted = append_until_refused(spool)
    assert spool.counts().spool_failed == 1
    ballast.unlink()
    accept(spool, raw(3000))
    assert sorted(names(spool.claim(*ALL))) == [*range(50), *accepted, 3000]


def test_on_a_full_disk_acknowledged_rows_are_not_offered_again_and_go(full_disk):
    spool, _ = full_disk
    accepted = append_until_refused(spool)
    batch = spool.claim(*ALL)
    spool.acknowledge(BOOT, names(batch))
    assert spool.claim(*ALL) is None
    wait_until(lambda: spool.counts().rows == 0, what="the rows leave although the disk is full")
    # The one that was refused has been counted, on the disk that refused it.
    assert (spool.counts().acknowledged, drops(spool)) == (50 + len(accepted), {("disk", "ESCALATION"): 1})
    accept(spool, raw(4000, size=4000))


CHILD = """
import sys
from pathlib import Path
from edge_daemon.clock import SystemClock
from edge_daemon.core.spooling import SpoolLimits
from edge_daemon.spool import SqliteSpool
from tests.device.spooling_cases import raw
spool = SqliteSpool(Path(sys.argv[1]), SpoolLimits(commit_window_ms=1), SystemClock())
spool.open()
for seq in range(int(sys.argv[2])):
    spool.append(raw(seq)).result()
    print(seq, flush=True)
"""


def run_child(path, rows, **environ):
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(rows)],
        env={**os.environ, **environ},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("point", "kept"), [("spool.before-commit", [0, 1]), ("spool.after-commit", [0, 1, 2])]
)
def test_kill_9_around_the_third_commit_keeps_what_was_committed(tmp_path, point, kept):
    child = run_child(tmp_path / "spool.db", 5, EDGE_CRASH_AT=f"{point}:3")
    assert (child.returncode, child.stdout.split()) == (-signal.SIGKILL, ["0", "1"]), child.stderr
    spool = SqliteSpool(tmp_path / "spool.db", SpoolLimits(), SystemClock())
    spool.open()
    assert names(spool.claim(*ALL)) == kept
    assert spool.counts().corruptions == 0
    spool.close()


def test_a_torn_end_of_the_log_costs_nothing_that_was_accepted_before(tmp_path):
    run_child(tmp_path / "spool.db", 5, EDGE_CRASH_AT="spool.after-commit:3")
    with (tmp_path / "spool.db-wal").open("r+b") as wal:
        wal.truncate((tmp_path / "spool.db-wal").stat().st_size - 1000)
    spool = SqliteSpool(tmp_path / "spool.db", SpoolLimits(), SystemClock())
    spool.open()
    assert names(spool.claim(*ALL)) == [0, 1]
    spool.close()


LIMITED_CHILD = """
import resource, sys
from pathlib import Path
from edge_daemon import spool_ledger
from edge_daemon.clock import SystemClock
from edge_daemon.core.spooling import SpoolLimits
from edge_daemon.spool import SqliteSpool
from tests.device.spooling_cases import raw
spool_ledger.RETRY_S = 0.0
spool = SqliteSpool(Path(sys.argv[1]), SpoolLimits(commit_window_ms=1), SystemClock())
spool.open()
spool.append(raw(0)).result()
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
print(type(spool.append(raw(1, size=200_000)).exception()).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool.append(raw(2)).result()
print(list(spool.claim(10, 10**6).bodies), spool.counts().spool_failed)
"""


def test_an_io_error_is_survived(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", LIMITED_CHILD, str(tmp_path / "spool.db")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    assert child.stdout.split("\n")[:2] == ["SpoolError", "[0, 2] 1"], child.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# --- the pure part ---------------------------------------------------------------------------------------


def rows(*values):
    return [Row(n, priority, stored_ms, size) for n, (priority, stored_ms, size) in enumerate(values)]


def test_expiry_stops_at_the_first_young_row_and_spares_what_is_in_flight():
    by_age = rows(
        (Priority.AUDIT, 1, 10), (Priority.AUDIT, 2, 10), (Priority.FAILED, 9, 10), (Priority.FAILED, 3, 10)
    )
    assert select_expired(by_age, stored_before_ms=5, in_flight={1}) == [by_age[0]]


def test_surplus_takes_no_more_rows_than_needed():
    by_rank = rows(*[(Priority.FAILED, 0, 10)] * 5)
    assert select_surplus(by_rank, excess_bytes=11, in_flight=()) == by_rank[:2]
    assert select_surplus(by_rank, excess_bytes=0, in_flight=()) == []
    assert select_surplus(by_rank, excess_bytes=41, in_flight={0, 1}) == [*by_rank[2:], *by_rank[:2]]


def test_drops_are_counted_by_kind():
    gone = rows((Priority.AUDIT, 0, 10), (Priority.FAILED, 0, 5), (Priority.AUDIT, 0, 7))
    assert count_drops(gone) == {Priority.AUDIT: Dropped(2, 17), Priority.FAILED: Dropped(1, 5)}


@pytest.mark.parametrize("escalated", [True, False])
@pytest.mark.parametrize("reason", [1, 2, 3, 4])
def test_an_audited_case_has_one_priority_whatever_the_gate_said(escalated, reason):
    from edge_cascade.messages import Reason

    audited = item(1, audit_ppm=10_000, escalated=escalated, reason=Reason(reason))
    assert audited.priority is Priority.AUDIT


# --- any order of anything ---------------------------------------------------------------------------------


class SpoolMachine(RuleBasedStateMachine):
    """Every accepted item is in the spool, acknowledged, or in a drop counter; nothing is offered twice."""

    LIMITS = SpoolLimits(max_bytes=3000, max_age_s=100.0, commit_window_ms=0, max_in_flight_batches=2)

    @initialize()
    def start(self):
        self.directory = tempfile.TemporaryDirectory()
        self.clock = FakeClock()
        self.seq = 0
        self.accepted = 0
        self.acknowledged = 0
        self.in_flight = {}
        self.open()

    def open(self):
        self.spool = SqliteSpool(Path(self.directory.name) / "spool.db", self.LIMITS, self.clock)
        self.spool.open()
        self.base = 0

    def teardown(self):
        if hasattr(self, "spool"):
            self.spool.close()
            self.directory.cleanup()

    @rule(
        sizes=st.lists(st.integers(1, 900), min_size=1, max_size=6),
        priority=st.sampled_from(Priority),
        model=st.sampled_from("mn"),
    )
    def append(self, sizes, priority, model):
        items = []
        for size in sizes:
            self.seq += 1
            items.append(raw(self.seq, size=size, priority=priority, model=model))
        accept(self.spool, *items)
        self.accepted += len(items)

    @rule(max_items=st.integers(1, 5), max_bytes=st.integers(1, 2000))
    def claim(self, max_items, max_bytes):
        batch = self.spool.claim(max_items, max_bytes)
        if batch is None:
            return
        taken = set(names(batch))
        assert len(taken) <= max_items
        # What is in flight may have been given up meanwhile, but is never offered a second time.
        assert not any(taken & others for others in self.in_flight.values())
        self.in_flight[batch.token] = taken

    @rule(data=st.data())
    def acknowledge(self, data):
        seqs = data.draw(st.lists(st.integers(0, self.seq + 2), max_size=6, unique=True))
        self.settle(seqs)
        self.spool.acknowledge(BOOT, seqs)

    @rule()
    def acknowledge_everything_in_flight(self):
        for seqs in list(self.in_flight.values()):
            self.spool.acknowledge(BOOT, sorted(seqs))
            self.settle(seqs)

    @rule(data=st.data())
    def reject(self, data):
        seq = data.draw(st.integers(0, self.seq + 2))
        self.settle([seq])
        self.spool.reject(BOOT, seq, DropReason.REJECTED)

    @rule(data=st.data(), delay_s=st.sampled_from([0.0, 1000.0]))
    def defer(self, data, delay_s):
        seq = data.draw(st.integers(0, self.seq + 2))
        self.settle([seq])
        self.spool.defer(BOOT, [seq], delay_s)

    @rule(data=st.data())
    def release(self, data):
        if self.in_flight:
            token = data.draw(st.sampled_from(sorted(self.in_flight)))
            del self.in_flight[token]
            self.spool.release(token)

    @rule(seconds=st.integers(0, 80), jump_ms=st.integers(-(10**12), 10**12))
    def time_passes(self, seconds, jump_ms):
        self.clock.now_s += seconds
        self.clock.wall_now_ms += jump_ms

    @rule()
    def reopen(self):
        self.spool.flush()
        self.acknowledged += self.spool.counts().acknowledged
        self.spool.close()
        self.in_flight = {}
        self.clock.now_s = random.Random(self.seq).uniform(0, 1e6)
        self.open()

    def settle(self, seqs):
        for token in list(self.in_flight):
            self.in_flight[token] -= set(seqs)
            if not self.in_flight[token]:
                del self.in_flight[token]

    @invariant()
    def every_accepted_item_is_somewhere(self):
        self.spool.flush()
        counts = self.spool.counts()
        dropped = sum(dropped.count for dropped in counts.drops.values())
        assert counts.rows + self.acknowledged + counts.acknowledged + dropped == self.accepted
        assert counts.size_bytes <= self.LIMITS.max_bytes
        assert counts.leaving_rows == 0
        assert 0 <= counts.waiting_rows <= counts.rows


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
