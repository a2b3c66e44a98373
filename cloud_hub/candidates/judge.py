"""Old and new weights on the same holdout samples: what every exit says of them. No files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.collect import StageRuns, Stages
from edge_cascade.bundle import Bundle
from edge_cascade.policy import Rung
from edge_cascade.preprocess import normalise
from edge_cascade.scores import LABEL

Labels = NDArray[np.int64]


def labels_as_shipped(
    bundle: Bundle, stages: Stages, rungs: Sequence[Rung], x: NDArray[np.float32]
) -> Labels:
    """What every rung says `(rungs, n)` of samples in the sensor's unit.

    Raises:
        BackendError: when a stage does not run.
    """
    heads = StageRuns(stages, normalise(x, bundle.graph.preprocess)).climb(rungs)
    labels: Labels = heads[:, :, LABEL].astype(np.int64)
    return labels
