"""The full model's answers: pending cases out of the store, in batches, on one thread of its own.

The list of what is to be done is a query, so a restart goes on where the last run stopped, and cases that
came before their model was known are found as soon as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.errors import NotFoundError
from cloud_hub.models import HubModel
from cloud_hub.store.deliveries import Place
from cloud_hub.store.store import Store
from cloud_hub.store.verdicts import Answered, PendingCase, insert_answers, mark_failed, pending_cases
from cloud_hub.thread_loop import ThreadLoop
from edge_cascade.errors import CascadeError
from edge_cascade.packing import pack_probabilities
from edge_cascade.preprocess import normalise
from edge_cascade.scores import softmax
from edge_cascade.tensors import decode_tensor

log = logging.getLogger(__name__)

MAX_BATCH: Final = 64
# Cases that share one query and one commit; the model sees them a batch at a time.
MAX_PER_COMMIT: Final = 256
MAX_WAIT_S: Final = 0.02
# Without any sign from ingest: cases that another worker took in, or a commit whose sign was lost.
LOOK_AGAIN_S: Final = 5.0


class CannotAnswerError(Exception):
    """The full model has no usable answer to this input."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The full model's answer to one sample."""

    label: int
    probabilities: bytes


class FullModelWorker(ThreadLoop):
    """Answers pending cases; `wake` says that there are new ones. `on_answered` is told whose cases got a
    verdict, after its commit.
    """

    def __init__(
        self,
        store: Store,
        models: Mapping[str, HubModel],
        *,
        on_answered: Callable[[frozenset[str]], None] = lambda _: None,
        max_batch: int = MAX_BATCH,
        max_wait_s: float = MAX_WAIT_S,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        super().__init__("full-model", gather_s=max_wait_s)
        self._store = store
        self._models = models
        self._on_answered = on_answered
        self._max_batch = max_batch
        self._clock_ms = clock_ms

    def run_once(self) -> float:
        """Answer one commit's worth of cases of every model; see `ThreadLoop`.

        Raises:
            StoreError: the cases stay pending.
        """
        largest = max((self.answer_some(model) for model in self._models.values()), default=0)
        return LOOK_AGAIN_S if largest < MAX_PER_COMMIT else 0.0

    def answer_some(self, model: HubModel) -> int:
        """Answer the oldest pending cases of a model, one commit's worth at most; how many there were.

        Raises:
            StoreError: the cases stay pending.
        """
        found = self._store.database.run(lambda c: pending_cases(c, model.name, MAX_PER_COMMIT))
        if not found:
            return 0
        samples: list[tuple[PendingCase, NDArray[np.float32]]] = []
        failures: list[tuple[PendingCase, str]] = []
        for case in found:
            try:
                samples.append((case, self._sample(case, model)))
            except (NotFoundError, CascadeError, CannotAnswerError) as error:
                failures.append((case, str(error)))
        answers: list[Answered] = []
        for start in range(0, len(samples), self._max_batch):
            batch = samples[start : start + self._max_batch]
            for (case, _), outcome in zip(batch, answer_batch(model, [x for _, x in batch]), strict=True):
                if isinstance(outcome, Answer):
                    answers.append(Answered(case, outcome.label, outcome.probabilities, model.full_model))
                else:
                    failures.append((case, str(outcome)))
        now_ms = self._clock_ms()
        if answers:
            self._store.database.run(lambda c: insert_answers(c, answers, now_ms=now_ms))
            self._on_answered(frozenset(answer.case.device for answer in answers))
        if failures:
            log.warning(
                "full model cannot answer model=%s cases=%d reason=%s",
                model.name,
                len(failures),
                failures[0][1],
            )
            self._store.database.run(lambda c: mark_failed(c, failures))
        return len(found)

    def _sample(self, case: PendingCase, model: HubModel) -> NDArray[np.float32]:
        place = Place(case.blob, case.offset, case.length)
        x = decode_tensor(self._store.tensor_bytes(place, case.tensor_bytes))
        if x.shape != model.input_shape:
            raise CannotAnswerError(f"tensor {x.shape}, model {model.name!r} takes {model.input_shape}")
        return x


def answer_batch(model: HubModel, samples: Sequence[NDArray[np.float32]]) -> list[Answer | CannotAnswerError]:
    """An answer, or the reason why there is none, per sample. One bad sample spoils no other."""
    if not samples:
        return []
    try:
        return list(_run_batch(model, np.stack(samples)))
    except CannotAnswerError as error:
        if len(samples) == 1:
            return [error]
    return [answer_batch(model, [sample])[0] for sample in samples]


def _run_batch(model: HubModel, x: NDArray[np.float32]) -> list[Answer]:
    try:
        logits = np.asarray(model.run(normalise(x, model.preprocess)))
    except Exception as error:
        # Whatever a runtime raises for an input, it must not end the thread.
        raise CannotAnswerError(f"{type(error).__name__}: {error}") from error
    if logits.shape != (len(x), len(model.labels)):
        raise CannotAnswerError(
            f"full model gave {logits.shape}, expected {(len(x), len(model.labels))} logits"
        )
    if not np.isfinite(logits).all():
        raise CannotAnswerError("the full model's logits are not finite")
    probabilities = softmax(logits.astype(np.float32, copy=False))
    return [Answer(int(row.argmax()), pack_probabilities(row.tolist())) for row in probabilities]
