"""What a bundle as shipped answers to cases of the store, as a board would. No threads of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np
from sqlalchemy import RowMapping

from cloud_hub.errors import RolloutError
from cloud_hub.examples import read_tensors
from cloud_hub.store.blobs import Blobs
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.bundle import Bundle, StageModel
from edge_cascade.errors import CascadeError
from edge_cascade.ladder import Ladder, StageRunner

UNREADABLE: Final = -2
"""A label of a case whose tensor is damaged, or of a shape that the bundle does not take."""


class BundleAnswers:
    """Labels of one bundle at the chosen point of its default plan, kept by case: `max_kept` of them."""

    def __init__(self, bundle: Bundle, *, max_kept: int) -> None:
        """Open the bundle's stages.

        Raises:
            RolloutError: when the runtime refuses one.
        """
        self._shape = bundle.graph.input_shape
        self._name = f"bundle {bundle.bundle_id[:12]} of {bundle.graph.model!r}"
        try:
            self._ladder = Ladder(bundle, bundle.plan(), _open_stage)
        except CascadeError as error:
            raise RolloutError(f"{self._name} cannot be asked: {error}") from error
        self._labels: OrderedDict[int, int] = OrderedDict()
        self._max_kept = max_kept

    def missing(self, ids: Sequence[int]) -> list[int]:
        """Of these cases, those that it has not answered yet."""
        return [case_id for case_id in ids if case_id not in self._labels]

    def labels_of(self, blobs: Blobs, rows: Sequence[RowMapping]) -> list[int]:
        """Its labels for cases, in their order; `UNREADABLE` where there is nothing to answer.

        Raises:
            RolloutError: when a stage does not run.
        """
        wanted = set(self.missing([int(row["id"]) for row in rows]))
        fresh = dict.fromkeys(wanted, UNREADABLE)
        tensors = read_tensors(blobs, [row for row in rows if row["id"] in wanted]) if wanted else {}
        readable = sorted(case_id for case_id, x in tensors.items() if x.shape == self._shape)
        if readable:
            try:
                climbs = self._ladder.climb_batch(np.stack([tensors[case_id] for case_id in readable]))
            except CascadeError as error:
                raise RolloutError(f"{self._name} does not answer: {error}") from error
            fresh |= {case_id: climb.answer.label for case_id, climb in zip(readable, climbs, strict=True)}
        found = [fresh[row["id"]] if row["id"] in fresh else self._labels[row["id"]] for row in rows]
        self._labels.update(fresh)
        while len(self._labels) > self._max_kept:
            self._labels.popitem(last=False)
        return found


def _open_stage(stage: StageModel, feature_shape: tuple[int, ...] | None) -> StageRunner:
    return OnnxStage(stage, feature_shape)
