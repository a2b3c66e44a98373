"""The guard's questions put to the holdout: what old, new and best weights answer on the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.core.federation.drift import Losses, bounded_losses, decide_drift
from cloud_hub.core.federation.guard import (
    CannotJudge,
    GuardFigures,
    GuardRules,
    Judgement,
    Kept,
    decide_guard,
    figures_of,
)
from cloud_hub.examples import LabelledCases, example_pages, joined_cases, read_examples
from cloud_hub.federation.evaluation import labels_of_exits, losses_of
from cloud_hub.models import HubModel
from cloud_hub.store.examples import ExampleFilter
from cloud_hub.store.store import Store
from edge_cascade.bundle import Bundle
from edge_cascade.messages import Use
from edge_cascade.weights import Weights

MAX_SAMPLES: Final = 5_000
MAX_BYTES: Final = 256 * 2**20
"""Of holdout samples that are held at once, the newest."""

Named = tuple[bytes, Weights]
"""Weights with their digest."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The judgement, and the end of the guard's window, which grows where it held too few samples."""

    judgement: Judgement
    samples: int
    window_start: int
    loss: float | None = None
    best_loss: float | None = None

    @property
    def figures(self) -> GuardFigures:
        """As it is kept."""
        return figures_of(self.judgement, self.samples, loss=self.loss, best_loss=self.best_loss)


class HoldoutJudge:
    """Judges weights of one model. Keeps what the last base answered: it is asked again next round."""

    def __init__(self, store: Store, model: HubModel, bundle: Bundle) -> None:
        self._store = store
        self._model = model
        self._bundle = bundle
        self._known: tuple[bytes, NDArray[np.int64], NDArray[np.int64]] | None = None

    def judge(self, before: Named, after: Named, best: Named, rules: GuardRules, window: int) -> Judged:
        """Hold weights against those that they would replace, and against the best of their series.

        Raises:
            CascadeError, HubError: when they cannot be run.
            StoreError: when the samples cannot be read now.
        """
        cases, window = self._cases(rules.min_samples, window)
        if len(cases) < rules.min_samples:
            return Judged(CannotJudge(len(cases), rules.min_samples), len(cases), window)
        was = self._answers(before, cases)
        now = self._answers(after, cases)
        compared = decide_guard(was, now, cases.labels, rules)
        best_losses, losses = self._losses(best, cases), self._losses(after, cases)
        drifted = decide_drift(best_losses, losses, max_drift=rules.max_drift)
        judgement = drifted if isinstance(compared, Kept) and drifted is not None else compared
        return Judged(judgement, len(cases), window, float(losses.mean()), float(best_losses.mean()))

    def _cases(self, needs: int, window: int) -> tuple[LabelledCases, int]:
        most = most_samples(self._model)
        cases = read_examples(self._store, self._model, Use.HOLDOUT, upto_id=window, limit=max(most, needs))
        if len(cases) >= needs:
            return cases, window
        newer = ExampleFilter(self._model.name, Use.HOLDOUT, self._model.full_model, window, None, False)
        found = [cases]
        for page in example_pages(self._store, self._model, newer):
            missing = needs - sum(map(len, found))
            found.append(page.rows(np.arange(min(missing, len(page)))))
            if missing <= len(page):
                break
        cases = joined_cases(self._model, found)
        return cases, max(window, int(cases.ids[-1]) if len(cases) else 0)

    def _losses(self, of: Named, cases: LabelledCases) -> Losses:
        found = losses_of(self._bundle, of[1], cases.x, cases.labels)
        return bounded_losses(found, len(self._bundle.graph.stages))

    def _answers(self, of: Named, cases: LabelledCases) -> NDArray[np.int64]:
        digest, weights = of
        if self._known is not None:
            known, ids, labels = self._known
            if known == digest and np.array_equal(ids, cases.ids):
                return labels
        labels = labels_of_exits(self._bundle, weights, cases.x)
        self._known = (digest, cases.ids, labels)
        return labels


def most_samples(model: HubModel) -> int:
    """How many samples of a model the guard reads."""
    sample_bytes = 4 * int(np.prod(model.input_shape, dtype=np.int64))
    return max(1, min(MAX_SAMPLES, MAX_BYTES // sample_bytes))
