"""The examples' thread: what the board sees, hears from the hub and is told by the site becomes examples.

Whoever answers samples only leaves them here: nothing is encoded, nothing waits, no thread is woken. Once a
second the store's thread takes what has come and has the ledger write it in one transaction. Examples are
expendable: what comes faster than that, and what the disk refuses, is counted and forgotten.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from edge_cascade.messages import Use, Verdict
from edge_daemon.config import TrainingConfig
from edge_daemon.core.examples import Drawn, ExampleCounts, ExampleDrop, Origin, OwnPace
from edge_daemon.example_ledger import (
    Event,
    ExampleLedger,
    ExampleModel,
    Judged,
    Labelled,
    OnTruth,
    nothing_drawn,
)
from edge_daemon.pipeline import Outcome, Sample
from edge_daemon.recent import RecentSamples, Seen

log = logging.getLogger(__name__)

TURN_S: Final = 1.0
MAX_SAMPLES_A_TURN: Final = 256
MAX_WAITING_BYTES: Final = 16 * 2**20
MAX_WAITING_EVENTS: Final = 8192
"""Verdicts and labels that may wait for one turn."""

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class _Ask:
    """Examples that somebody waits for."""

    model: str
    max_examples: int
    least: Origin
    future: Future[Drawn]


class ExampleStore:
    """One SQLite file of examples; implements `ports.Examples`. `open` before use, `close` after."""

    def __init__(
        self,
        path: Path,
        limits: TrainingConfig,
        models: Mapping[str, ExampleModel],
        *,
        verdicts_come: bool,
        boot: bytes,
        chance: Callable[[], float],
        on_truth: OnTruth | None = None,
    ) -> None:
        """`models` are those that learn; `boot` is this start's; `chance` is uniform in 0..1.

        `on_truth` hears, on the store's thread, what others say of samples.
        """
        self._models = models
        self._boot = boot.hex()
        self._verdicts_come = verdicts_come
        self._min_probability = limits.own_min_probability
        self._paces = {model: OwnPace(limits.own_per_minute, chance) for model in models}
        self._recent = RecentSamples()
        largest = max((4 * int(np.prod(model.input_shape)) for model in models.values()), default=4)
        self._max_samples = max(1, min(MAX_SAMPLES_A_TURN, MAX_WAITING_BYTES // largest))
        # Only the inference thread adds to the first, so that its bound holds without a lock.
        self._samples: deque[Seen] = deque()
        self._too_many = 0
        self._told: deque[Event] = deque()
        self._asked: deque[_Ask] = deque()
        self._unheard = 0
        self._entry = threading.Lock()
        self._is_open = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        # From here on: the store's thread only.
        self._ledger = ExampleLedger(
            path, models, max_examples=limits.max_examples, max_bytes=limits.max_bytes, on_truth=on_truth
        )

    # --- any thread ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the thread, which opens, makes or replaces the file. A disk that refuses is no error here."""
        assert self._thread is None
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="examples", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what has come so far, and end."""
        with self._entry:
            self._is_open = False
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def observe(self, model: str, sample: Sample, outcome: Outcome) -> None:
        """Look at an answered sample (on the inference thread, before its answer leaves)."""
        pace = self._paces.get(model)
        if pace is None:
            return
        case, answer, climb = outcome.case, outcome.answer, outcome.climb
        is_sent = case is not None and self._verdicts_come
        if answer is None or climb is None:
            if case is not None and is_sent:
                nameless = f"{self._boot}-{case.seq}"
                self._keep(Seen(model, sample.sensor, nameless, sample.x, None, float("nan"), is_sent))
            return
        x = sample.x
        if x.base is not None and isinstance(x.base, np.ndarray) and x.base.nbytes > 2 * x.nbytes:
            # A window of a long message must not keep all of it.
            x = x.copy()
        seen = Seen(model, sample.sensor, answer.id, x, climb.answer.label, answer.probability, is_sent)
        self._recent.add(seen)
        if is_sent or (
            case is None
            and answer.probability >= self._min_probability
            and pace.decide_keep(climb.answer.label, now_s=sample.received_s)
        ):
            self._keep(seen)

    def verdict(self, model: str, verdict: Verdict) -> None:
        """Hear what the hub says of a sample that was sent. The holdout is forgotten at once."""
        if model not in self._models:
            return
        if verdict.use is not Use.TRAIN:
            self._recent.bar(verdict.sensor, f"{verdict.boot.hex()}-{verdict.seq}")
        self._tell(Judged(model, verdict))

    def label(self, sensor: str, label: str, answer_id: str | None) -> None:
        """Hear what the site says: the class's name or its index, of one answer or of the sensor's last."""
        seen = self._recent.find(sensor, answer_id)
        self._tell(Labelled(sensor, label, answer_id if seen is None else seen.answer_id, seen))

    def draw(self, model: str, max_examples: int, *, least: Origin = Origin.SELF) -> Drawn:
        """Examples to learn from, those that have just come included. See `ports.Examples`."""
        ask = _Ask(model, max_examples, least, Future())
        with self._entry:
            if self._is_open:
                self._asked.append(ask)
            else:
                ask.future.set_result(nothing_drawn(self._models[model]))
        self._wake.set()
        return ask.future.result()

    def counts(self) -> ExampleCounts:
        """Where the store stood after the last turn."""
        counts = self._ledger.counts
        busy = self._too_many + self._unheard
        return replace(counts, dropped={**counts.dropped, ExampleDrop.BUSY: busy}) if busy else counts

    def _keep(self, seen: Seen) -> None:
        if len(self._samples) < self._max_samples:
            self._samples.append(seen)
        else:
            self._too_many += 1

    def _tell(self, event: Event) -> None:
        with self._entry:
            if len(self._told) < MAX_WAITING_EVENTS:
                self._told.append(event)
            else:
                self._unheard += 1

    # --- the store's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._ledger.open()
            while self._is_open:
                self._wake.wait(TURN_S)
                self._wake.clear()
                self._turn()
        except Exception:
            log.exception("defect in the store of examples: no more are kept until the next start")
        with self._entry:
            # From here on nobody waits for this thread.
            self._is_open = False
        self._turn()
        self._ledger.close()

    def _turn(self) -> None:
        # In this order: who asks has what was told before, and a verdict finds the sample that it is about.
        asked = _taken(self._asked)
        told = _taken(self._told)
        events = [*_taken(self._samples), *told]
        if events:
            self._ledger.write(events)
        for ask in asked:
            try:
                ask.future.set_result(self._ledger.draw(ask.model, ask.max_examples, ask.least))
            except Exception as error:  # noqa: BLE001 - whoever asked must hear of it, whatever it was
                ask.future.set_exception(error)


def _taken(waiting: deque[ItemT]) -> list[ItemT]:
    return [waiting.popleft() for _ in range(len(waiting))]
