"""The threads that fetch, verify and try bundles: one a model, one thing after the other. Answers are events.

A fetch may wait for days, for the hub or for its hours; it must hold up no other model. Trials take turns all
the same: two at once would spoil each other's latency and memory.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge_cascade.errors import CascadeError, first_line
from edge_cascade.pauses import Pause, no_pause
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
from edge_daemon.releases.turns import turn

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


class _Lane:
    """The thread of one model."""

    def __init__(self, model: str, carry_out: Callable[[_Job], None]) -> None:
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._carry_out = carry_out
        self._thread = threading.Thread(target=self._run, name=f"swap-work-{model}", daemon=True)
        self._thread.start()

    def put(self, job: _Job) -> None:
        self._queue.put(job)

    def end(self) -> None:
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            self._carry_out(job)


class Worker:
    """One thread a model, from its first job on. `add` and its kin are called by the swapper, `tell` on the
    threads that work.
    """

    def __init__(
        self,
        source: ReleaseSource,
        trial: Trial,
        tell: Callable[[str, Event], None],
        pause: Pause = no_pause,
    ) -> None:
        """`pause` is called before each thing that is done."""
        self._source = source
        self._trial = trial
        self._tell = tell
        self._pause = pause
        self._lanes: dict[str, _Lane] = {}
        self._jobs: list[_Job] = []
        self._lock = threading.Lock()
        self._trials = threading.Lock()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Stop what runs; what waits is forgotten, and so is what is added later."""
        self._stopping.set()
        with self._lock:
            for job in self._jobs:
                job.stop.set()
            lanes = list(self._lanes.values())
        for lane in lanes:
            lane.end()
        deadline_s = time.monotonic() + STOP_S
        for lane in lanes:
            lane.join(max(deadline_s - time.monotonic(), 0.0))

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
        """Have something done behind what waits of this model; None: for no attempt in particular."""
        job = _Job(model, attempt, act, failure)
        with self._lock:
            if self._stopping.is_set():
                return
            self._jobs.append(job)
            if model not in self._lanes:
                self._lanes[model] = _Lane(model, self._carry_out)
            self._lanes[model].put(job)

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
            with turn(self._trials, stop):
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

    def _carry_out(self, job: _Job) -> None:
        self._pause()
        event = None if job.stop.is_set() else _event_of(job)
        with self._lock:
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
