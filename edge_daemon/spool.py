"""The spool's thread: one connection, one fsync for everything that came within a window.

`append` puts the item into a queue and returns a future. The thread takes what has come, has the ledger
write it in one transaction, and resolves the futures after the commit. When the last commit is longer ago
than `commit_window_ms` it commits at once; else it waits for company, never longer than the window. So a
crash costs at most what came within one window and one fsync, and nothing of it had been said to be accepted.

A disk that refuses ends no thread: appends fail, are counted, and the next ones try again.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from edge_daemon.core.spooling import Batch, DropReason, SpoolCounts, SpoolItem, SpoolLimits
from edge_daemon.errors import (
    ItemTooLargeError,
    SpoolClosedError,
    SpoolError,
    SpoolFullError,
    SpoolInUseError,
    SpoolVersionError,
)
from edge_daemon.ports import Clock
from edge_daemon.spool_ledger import SpoolLedger

log = logging.getLogger(__name__)

MAX_QUEUED_ITEMS: Final = 8192
MAX_QUEUED_BYTES: Final = 32 * 2**20
MAX_COMMANDS_A_TURN: Final = 1024
SWEEP_S: Final = 30.0
"""How often what has expired is looked for while nothing else happens."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class _Append:
    item: SpoolItem
    future: Future[None]
    asked_s: float


@dataclass(frozen=True, slots=True)
class _Task:
    run: Callable[[], None]


class SqliteSpool:
    """The queue to the hub in one SQLite file; implements `ports.Spool`. `open` before use, `close` after."""

    def __init__(self, path: Path, limits: SpoolLimits, clock: Clock) -> None:
        self._max_bytes = limits.max_bytes
        self._window_s = limits.commit_window_ms / 1000.0
        self._commands: queue.SimpleQueue[_Append | _Task] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._wakes: list[Callable[[], None]] = []
        self._tells: list[Callable[[bytes, int, DropReason | None], None]] = []
        # Guards the five below, which any thread may change.
        self._entry = threading.Lock()
        self._is_open = False
        self._queued_items = 0
        self._queued_bytes = 0
        self._failed = 0
        # From here on: the spool's thread only.
        self._ledger = SpoolLedger(path, limits, clock)
        self._group: list[_Append] = []
        self._is_ending = False
        self._last_commit_s = 0.0

    # --- any thread ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the thread; the file is opened, made or repaired.

        A disk that refuses is no error here: appends fail until it does not.

        Raises:
            SpoolVersionError: when a newer daemon wrote the file.
            SpoolInUseError: when another process has it.
        """
        assert self._thread is None
        self._last_commit_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._is_open = True
        self._thread.start()
        try:
            self._ask(self._ledger.open)
        except (SpoolVersionError, SpoolInUseError):
            self.close()
            raise
        except SpoolError as error:
            log.warning("the spool starts without its file: %s", error)

    def close(self, timeout_s: float = 5.0) -> None:
        """Commit what was asked so far, and end."""
        with self._entry:
            if not self._is_open:
                return
            self._is_open = False
            self._commands.put(_Task(self._end))
        if self._thread is not None:
            self._thread.join(timeout_s)

    def append(self, item: SpoolItem) -> Future[None]:
        """Queue an item; the future is done when it is committed and fsynced. See `ports.Spool`."""
        future: Future[None] = Future()
        # Nobody can take it back, not even by cancelling the asyncio future around it.
        future.set_running_or_notify_cancel()
        size_bytes = item.size_bytes
        with self._entry:
            refusal = self._refusal_of(size_bytes)
            if refusal is None:
                self._queued_items += 1
                self._queued_bytes += size_bytes
                self._commands.put(_Append(item, future, time.monotonic()))
            else:
                self._failed += 1
                if self._is_open:
                    self._commands.put(_Task(lambda: self._ledger.note_lost([item])))
        if refusal is not None:
            future.set_exception(refusal)
        return future

    def claim(self, max_items: int, max_bytes: int) -> Batch | None:
        """Take rows of one key in flight. See `ports.Spool`."""
        return self._ask(lambda: self._ledger.claim(max_items, max_bytes))

    def acknowledge(self, boot: bytes, seqs: Sequence[int]) -> None:
        """The hub has these."""
        self._tell(lambda: self._ledger.leave(boot, seqs, None))

    def reject(self, boot: bytes, seq: int, reason: DropReason) -> None:
        """Give a row up, counted."""
        self._tell(lambda: self._ledger.leave(boot, (seq,), reason))

    def defer(self, boot: bytes, seqs: Sequence[int], delay_s: float) -> None:
        """Put rows back for later."""
        self._tell(lambda: self._ledger.defer(boot, seqs, delay_s))

    def release(self, token: int) -> None:
        """Put a batch back."""
        self._tell(lambda: self._ledger.release(token))

    def flush(self) -> None:
        """Wait until everything asked so far is on disk, and what has expired is gone. See `ports.Spool`."""
        self._ask(self._flush)

    def counts(self) -> SpoolCounts:
        """Where the spool stood after the last change."""
        return dataclasses.replace(self._ledger.counts, spool_failed=self._failed)

    def on_append(self, wake: Callable[[], None]) -> None:
        """Call `wake` after each commit that brought rows. It must not raise."""
        self._wakes.append(wake)

    def on_update_gone(self, tell: Callable[[bytes, int, DropReason | None], None]) -> None:
        """Call `tell` for each client update whose row is gone. It must not raise. See `ports.Spool`."""
        self._tells.append(tell)

    def _refusal_of(self, size_bytes: int) -> SpoolError | None:
        if not self._is_open:
            return SpoolClosedError("the spool is closed")
        if size_bytes > self._max_bytes:
            return ItemTooLargeError(f"an item of {size_bytes} bytes, the spool holds {self._max_bytes}")
        if self._queued_items >= MAX_QUEUED_ITEMS or (
            self._queued_items > 0 and self._queued_bytes + size_bytes > MAX_QUEUED_BYTES
        ):
            return SpoolFullError(f"the disk is behind: {self._queued_items} items wait for it")
        return None

    def _tell(self, run: Callable[[], None]) -> None:
        with self._entry:
            if self._is_open:
                self._commands.put(_Task(run))

    def _ask(self, run: Callable[[], ResultT]) -> ResultT:
        future: Future[ResultT] = Future()

        def answer() -> None:
            try:
                future.set_result(run())
            except SpoolError as error:
                future.set_exception(error)
            except Exception as error:  # noqa: BLE001 - whoever asked must hear of it, whatever it was
                future.set_exception(SpoolError(self._ledger.note_failure(error)))

        with self._entry:
            if not self._is_open:
                raise SpoolClosedError("the spool is closed")
            self._commands.put(_Task(answer))
        return future.result()

    # --- the spool's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_ending:
            self._take(max(self._due_s() - time.monotonic(), 0.0))
            if time.monotonic() >= self._due_s():
                self._commit()
        self._commit()
        self._ledger.close()

    def _end(self) -> None:
        self._is_ending = True

    def _take(self, timeout_s: float) -> None:
        """What has come, waiting for the first of it."""
        try:
            command = self._commands.get(timeout=timeout_s)
            for _ in range(MAX_COMMANDS_A_TURN):
                match command:
                    case _Append():
                        self._group.append(command)
                    case _Task(run):
                        self._do(run)
                if len(self._group) == MAX_COMMANDS_A_TURN:
                    return
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _do(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001 - a defect must not end the thread
            # Told, not asked: at worst a row is sent again, and the hub says "duplicate".
            self._ledger.note_failure(error)

    def _due_s(self) -> float:
        """When the next transaction is to be made."""
        due_s = self._last_commit_s + SWEEP_S
        if self._group:
            asked_s = self._group[0].asked_s
            due_s = min(due_s, max(asked_s, min(asked_s, self._last_commit_s) + self._window_s))
        if self._ledger.has_leaving:
            due_s = min(due_s, max(self._last_commit_s + self._window_s, self._ledger.retry_at_s))
        return due_s

    def _flush(self) -> None:
        problem = self._commit()
        if problem is not None:
            raise SpoolError(problem)

    def _commit(self) -> str | None:
        """Write the group and what has left. Returns what went wrong, if something did."""
        group, self._group = self._group, []
        with self._entry:
            self._queued_items -= len(group)
            self._queued_bytes -= sum(append.item.size_bytes for append in group)
        problem = self._write([append.item for append in group])
        if problem is None:
            for append in group:
                append.future.set_result(None)
            for wake in self._wakes if group else ():
                wake()
            return None
        self._ledger.note_lost(append.item for append in group)
        if group and self._ledger.has_leaving:
            # Less needs less: on a full disk, what leaves makes the room that the next append needs.
            self._write([])
        with self._entry:
            self._failed += len(group)
        for append in group:
            append.future.set_exception(SpoolError(problem))
        return problem

    def _write(self, items: Sequence[SpoolItem]) -> str | None:
        try:
            gone = self._ledger.write(items)
        except SpoolError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - the futures must hear of it, whatever it was
            return self._ledger.note_failure(error)
        finally:
            self._last_commit_s = time.monotonic()
        for boot, seq, reason in gone:
            for tell in self._tells:
                tell(boot, seq, reason)
        return None
