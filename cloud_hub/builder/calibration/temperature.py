"""Fits the temperature of a rung, so that its probabilities mean what they say. No I/O."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.outcomes import Floats, Labels


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017, arXiv 1706.04599, section 4.2).

    Golden-section search over its logarithm, in which the loss has one minimum; four digits are kept.
    """
    low, high = np.log(0.05), np.log(20.0)
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    scaled = logits.astype(np.float64)
    while high - low > 1e-5:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _loss(scaled, labels, left) < _loss(scaled, labels, right):
            high = right
        else:
            low = left
    return float(f"{np.exp(0.5 * (low + high)):.4g}")


def _loss(logits: NDArray[np.float64], labels: Labels, log_temperature: float) -> float:
    scaled = logits / np.exp(log_temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    own = scaled[np.arange(len(labels)), labels]
    return float(np.mean(np.log(np.exp(scaled).sum(axis=1)) - own))
