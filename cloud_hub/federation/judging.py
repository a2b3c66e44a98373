"""The guard's question put to the holdout: what old and new weights answer on the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.core.federation.guard import (
    CannotJudge,
    GuardFigures,
    GuardRules,
    Judgement,
    decide_guard,
    figures_of,
)
from cloud_hub.examples import LabelledCases, example_pages, joined_cases, read_examples
from cloud_hub.federation.evaluation import labels_of_exits
from cloud_hub.models import HubModel
from cloud_hub.store.examples import ExampleFilter
from cloud_hub.store.store import Store
from edge_cascade.bundle import Bundle
from edge_cascade.messages import Use
from edge_cascade.weights import Weights

MAX_SAMPLES: Final = 5_000
MAX_BYTES: Final = 256 * 2**20
"""Of holdout samples that are held at once, the newest."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The judgement, and the end of the guard's window, which grows where it held too few samples."""

    judgement: Judgement
    samples: int
    window_start: int

    @property
    def figures(self) -> GuardFigures:
        """As it is kept."""
        return figures_of(self.judgement, self.samples)


class HoldoutJudge:
    """Judges weights of one model. Keeps what the last base answered: it is asked again next round."""

    def __init__(self, store: Store, model: HubModel, bundle: Bundle) -> None:
        self._store = store
        self._model = model
        self._bundle = bundle
        self._known: tuple[bytes, NDArray[np.int64], NDArray[np.int64]] | None = None

    def judge(
        self, before: tuple[bytes, Weights], after: tuple[bytes, Weights], rules: GuardRules, window: int
    ) -> Judged:
        """Hold weights against those that they would replace, each with its digest.

        Raises:
            CascadeError, HubError: when they cannot be run.
            StoreError: when the samples cannot be read now.
        """
        cases, window = self._cases(rules.min_samples, window)
        if len(cases) < rules.min_samples:
            return Judged(CannotJudge(len(cases), rules.min_samples), len(cases), window)
        was = self._answers(before, cases)
        now = self._answers(after, cases)
        return Judged(decide_guard(was, now, cases.labels, rules), len(cases), window)

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

    def _answers(self, of: tuple[bytes, Weights], cases: LabelledCases) -> NDArray[np.int64]:
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
