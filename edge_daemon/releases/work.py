"""The thread that fetches, verifies and tries bundles, one thing after the other. Its answers are events."""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge_cascade.errors import CascadeError, first_line
from edge_daemon.core.swap_events import (
    Downloaded,
    Event,
    Failed,
    Failure,
    SpaceChecked,
    TrialPassed,
    Verified,
)
from edge_daemon.errors import EdgeError, RefusedError
from edge_daemon.ports import ReleaseSource, Wanted
from edge_daemon.releases.trial import Trial, TriedAs

log = logging.getLogger(__name__)

STOP_S: Final = 5.0

Act = Callable[[threading.Event], "Event | None"]


@dataclass(frozen=True, slots=True)
class _Job:
    model: str
    attempt: int | None
    act: Act
    failure: Failure
    """What it is when it ends in an error that says nothing about the bundle."""
    stop: threading.Event = field(default_factory=threading.Event)


class Worker:
    """One thread; `add` and its kin are called by the swapper, `tell` on the worker's thread."""

    def __init__(self, source: ReleaseSource, trial: Trial, tell: Callable[[str, Event], None]) -> None:
        self._source = source
        self._trial = trial
        self._tell = tell
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="swap-work", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop what runs; what waits is forgotten."""
        self._stopping.set()
        with self._lock:
            for job in self._jobs:
                job.stop.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def abandon(self, model: str, attempt: int) -> None:
        """Stop what runs or waits for an attempt; nothing more is said of it."""
        with self._lock:
            for job in self._jobs:
                if (job.model, job.attempt) == (model, attempt):
                    job.stop.set()

    def add(
        self, model: str, attempt: int | None, act: Act | Callable[[threading.Event], None],
        failure: Failure = Failure.LOAD,
    ) -> None:  # fmt: skip
        """Have something done behind what waits; None: for no attempt in particular."""
        job = _Job(model, attempt, act, failure)
        with self._lock:
            self._jobs.append(job)
            if self._stopping.is_set():
                job.stop.set()
        self._queue.put(job)

    def check_space(self, model: str, attempt: int, room: Callable[[], int]) -> None:
        """Say `SpaceChecked`."""
        self.add(model, attempt, lambda _: SpaceChecked(attempt, room()), Failure.SPACE)

    def download(self, model: str, attempt: int, wanted: Wanted | None, held: Sequence[Path]) -> None:
        """Say `Downloaded` or `Failed`. None: nothing needs to be fetched."""

        def act(stop: threading.Event) -> Event:
            if wanted is not None:
                self._source.fetch(wanted, held, stop)
            return Downloaded(attempt)

        self.add(model, attempt, act, Failure.DOWNLOAD)

    def verify(self, model: str, attempt: int, wanted: Wanted | None) -> None:
        """Say `Verified` or `Failed`. None: it came with the daemon."""

        def act(_: threading.Event) -> Event:
            if wanted is not None:
                self._source.verify(wanted)
            return Verified(attempt)

        self.add(model, attempt, act)

    def try_out(self, model: str, attempt: int, bundle: Path, against: Path | None, how: TriedAs) -> None:
        """Say `TrialPassed` or `Failed`."""

        def act(stop: threading.Event) -> Event:
            result = self._trial.run(bundle, against, how, stop)
            log.info(
                "trial passed model=%s us=%.0f mib=%d refused=%s",
                model,
                result.seconds * 1e6,
                result.peak_bytes // 2**20,
                ", ".join(result.refused) or "nothing",
            )
            return TrialPassed(attempt)

        self.add(model, attempt, act)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            event = None if job.stop.is_set() else _event_of(job)
            with self._lock, contextlib.suppress(ValueError):
                self._jobs.remove(job)
            if event is not None and not job.stop.is_set():
                self._tell(job.model, event)


def _event_of(job: _Job) -> Event | None:
    """What became of it."""
    try:
        return job.act(job.stop)
    except RefusedError as error:
        failure, detail = error.failure, error.detail
    except MemoryError:
        failure, detail = Failure.MEMORY, "no memory for it in the daemon"
    except OSError as error:
        is_full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        failure, detail = (Failure.SPACE if is_full else job.failure), str(error)
    except (CascadeError, EdgeError) as error:
        failure, detail = job.failure, first_line(error)
    except Exception as error:
        # A worker that dies swaps nothing for ever.
        log.exception("defect in the work for a swap model=%s", job.model)
        failure, detail = job.failure, f"defect: {first_line(error)}"
    return _failed(job, failure, detail)


def _failed(job: _Job, failure: Failure, detail: str) -> Event | None:
    if job.attempt is None:
        log.warning("work for a swap failed model=%s: %s", job.model, detail)
        return None
    return Failed(job.attempt, failure, detail)
