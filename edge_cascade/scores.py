"""Uncertainty of one exit's answer, and the vector in which a stage's graph hands it over. No I/O.

The scores are computed inside the stage's ONNX graph, because a softmax and an entropy in numpy cost more
than a small stage. `head_of_logits` is the same arithmetic in numpy: the definition that the graphs are
tested against, and the one the hub uses on the full model's logits.

Sources: entropy as in BranchyNet (arXiv 1709.01686, section III), margin as the breaking-ties rule of
active learning (Luo et al. 2005), max-prob as in Hendrycks and Gimpel (arXiv 1610.02136).
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

ScoreName = Literal["entropy", "margin", "max_prob"]
SCORE_NAMES: Final[tuple[ScoreName, ...]] = get_args(ScoreName)

# The columns of a head's output, `(batch, 5) float32`.
LABEL: Final = 0
PROBABILITY: Final = 1
SCORE_COLUMN: Final[dict[ScoreName, int]] = {"entropy": 2, "margin": 3, "max_prob": 4}
HEAD_WIDTH: Final = 5

# log(0) must not meet 0 * log(0); float32 has nothing smaller that still divides cleanly.
SMALLEST_PROBABILITY: Final = 1e-12


def softmax(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Probabilities of `(batch, classes)` logits divided by `temperature` (Guo et al. 2017, section 4.2)."""
    scaled = logits / np.float32(temperature)
    exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float32] = (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities


def head_of_logits(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """What a head says of `(batch, classes)` logits: `(batch, 5)` of label, probability and three scores.

    Every score lies in 0..1 and is 0 for a certain answer. Needs at least two classes.
    """
    probabilities = softmax(logits, temperature)
    top_two = np.sort(probabilities, axis=1)[:, :-3:-1]
    log_probabilities = np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))
    entropy = -(probabilities * log_probabilities).sum(axis=1) / np.log(probabilities.shape[1])
    head = np.empty((len(logits), HEAD_WIDTH), dtype=np.float32)
    head[:, LABEL] = probabilities.argmax(axis=1)
    head[:, PROBABILITY] = top_two[:, 0]
    head[:, SCORE_COLUMN["entropy"]] = entropy
    head[:, SCORE_COLUMN["margin"]] = 1.0 - top_two[:, 0] + top_two[:, 1]
    head[:, SCORE_COLUMN["max_prob"]] = 1.0 - top_two[:, 0]
    return head
