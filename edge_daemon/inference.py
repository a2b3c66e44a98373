"""The one thread that owns the ladders: takes samples from the queue, answers, hands the cases on.

It publishes by itself: the way back through an event loop costs a tail of 20 ms. It never waits for a disk or
a network: the spool commits on its own thread, and the message is acknowledged when that is done.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import groupby
from typing import Final, Protocol

from edge_cascade.burst import Burst
from edge_cascade.messages import Case
from edge_daemon.errors import StoppedError
from edge_daemon.inlet.queue import Queued, SampleQueue
from edge_daemon.lull import Lull
from edge_daemon.pipeline import Outcome, Pipeline, Sample

log = logging.getLogger(__name__)

# Above this many waiting samples a batch through the ladder is worth its bookkeeping.
BATCH_FROM: Final = 4
MAX_BATCH: Final = 32
WAIT_S: Final = 0.5

Publish = Callable[[Outcome], None]
Submit = Callable[[Pipeline, Case], "Future[None]"]
Observe = Callable[[str, Sample, Outcome], None]
"""The model, what it was asked, what became of it: for whoever learns from samples."""


class Tally(Protocol):
    """What the inference thread counts; called once per sample, so it must be cheap."""

    def count_outcome(self, pipeline: Pipeline, outcome: Outcome) -> None: ...


class InferenceThread:
    """Runs until stopped; a sample that makes it raise is counted as failed and the next one is served."""

    def __init__(
        self,
        pipelines: dict[str, Pipeline],
        queue: SampleQueue,
        *,
        publish: Publish,
        submit: Submit,
        tally: Tally,
        on_failed: Callable[[Pipeline], None],
        observe: Observe | None = None,
        lull: Lull | None = None,
    ) -> None:
        """`pipelines` by model: once this runs, only `install` changes what is in it.

        `lull` is told of answers, for whoever works beside them.
        """
        self._pipelines = pipelines
        self._flips: deque[tuple[str, Pipeline, Future[Pipeline]]] = deque()
        self._queue = queue
        self._publish = publish
        self._submit = submit
        self._tally = tally
        self._on_failed = on_failed
        self._observe = observe
        self._lull = lull or Lull()
        self._stopping = threading.Event()
        self._has_ended = threading.Event()
        self._busy_since_s: float | None = None
        self._burst = Burst()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Answer what is queued, then end; whether that was done within `timeout_s`."""
        self._stopping.set()
        self._queue.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stuck_s(self) -> float:
        """For how long the sample in hand has been there; 0 when none is."""
        since = self._busy_since_s
        return 0.0 if since is None else time.monotonic() - since

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def install(self, model: str, pipeline: Pipeline) -> Future[Pipeline]:
        """Have `pipeline` answer for `model`; the one before it, of which nothing is in hand any more.

        The change is made between two batches. Whoever cancels the future before it was made prevents it. It
        fails with `StoppedError` once this has stopped.
        """
        flip = (model, pipeline, Future[Pipeline]())
        self._flips.append(flip)
        self._queue.wake()
        if self._has_ended.is_set():
            self._refuse_flips()
        return flip[2]

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            self._has_ended.set()
            self._refuse_flips()

    def _serve(self) -> None:
        while True:
            items = self._queue.get(MAX_BATCH, WAIT_S)
            if self._flips:
                self._flip()
            if not items:
                if self._stopping.is_set():
                    return
                continue
            self._busy_since_s = time.monotonic()
            for model, group in groupby(items, key=lambda item: item.model):
                self._answer(self._pipelines[model], list(group))
            self._busy_since_s = None
            self._lull.note_answer()

    def _flip(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                model, pipeline, flipped = self._flips.popleft()
                if flipped.set_running_or_notify_cancel():
                    before, self._pipelines[model] = self._pipelines[model], pipeline
                    flipped.set_result(before)

    def _refuse_flips(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                _, _, flipped = self._flips.popleft()
                if flipped.set_running_or_notify_cancel():
                    flipped.set_exception(StoppedError("no sample is answered any more"))

    def _answer(self, pipeline: Pipeline, items: list[Queued]) -> None:
        batches = [items] if len(items) >= BATCH_FROM else [[item] for item in items]
        for batch in batches:
            self._busy_since_s = time.monotonic()
            try:
                outcomes = _process(pipeline, batch)
            except Exception as error:  # noqa: BLE001 - a thread that dies answers nothing for ever
                self._give_up(pipeline, batch, error)
                continue
            for item, outcome in zip(batch, outcomes, strict=True):
                # Before the answer leaves, so that a label for it finds the sample.
                self._show(item, outcome)
                self._publish(outcome)
                self._tally.count_outcome(pipeline, outcome)
                self._finish(pipeline, item, outcome)

    def _show(self, item: Queued, outcome: Outcome) -> None:
        if self._observe is None:
            return
        try:
            self._observe(item.model, item.sample, outcome)
        except Exception:
            # Whoever learns from samples must not keep them from being answered.
            if self._burst.note(now_s=time.monotonic()) is not None:
                log.exception("sample not learned from sensor=%s", item.sample.sensor)

    def _finish(self, pipeline: Pipeline, item: Queued, outcome: Outcome) -> None:
        if outcome.case is None:
            item.ticket.finish()
            return
        committed = self._submit(pipeline, outcome.case)
        # Failed or not: the answer is out, and the spool has counted what it could not take.
        committed.add_done_callback(lambda _: item.ticket.finish())

    def _give_up(self, pipeline: Pipeline, items: list[Queued], error: Exception) -> None:
        for item in items:
            self._on_failed(pipeline)
            item.ticket.finish()
        if self._burst.note(now_s=time.monotonic()) is not None:
            log.error("sample failed sensor=%s error=%r", items[0].sample.sensor, error)
        log.debug("sample failed", exc_info=error)


def _process(pipeline: Pipeline, items: list[Queued]) -> list[Outcome]:
    if len(items) == 1:
        return [pipeline.process(items[0].sample)]
    return pipeline.process_batch([item.sample for item in items])
