"""Made-up outcomes for tests of chains and certificates: no network runs."""

import numpy as np

from benchmarks.cascade.draws import Pool, PoolLadder
from cloud_hub.builder.calibration.outcomes import Outcomes
from edge_cascade.policy import Rung
from edge_cascade.scores import HEAD_WIDTH, LABEL, SCORE_COLUMN, head_of_logits

CLASSES = 10


def ladder_of(strengths, *, precision="int8", costs=None):
    """Rungs that are dearer the later they come."""
    return tuple(
        Rung(i, precision, i - 1, 1.0, 100 * (i + 1), cost_us=None if costs is None else costs[i])
        for i in range(len(strengths))
    )


def outcomes_of(count, strengths=(1.6, 2.4, 3.0), *, full=4.0, seed=0, labelled=True, group_size=None):
    """Samples of different difficulty, on which rungs err together, the stronger the less often.

    Samples of a group share what makes them hard and are lost together.
    """
    groups = None if group_size is None else np.arange(count) // group_size
    logits, full_labels, labels = _answers(count, strengths, full=full, seed=seed, groups=groups)
    heads = np.stack([head_of_logits(each) for each in logits])
    return Outcomes(heads, full_labels, labels if labelled else None, groups)


def pool_of(count, strengths=(1.6, 2.4, 3.0), *, seed=0):
    """The same samples without temperatures, under two ladders."""
    logits, full_labels, labels = _answers(count, strengths, full=4.0, seed=seed, groups=None)
    ladders = [PoolLadder(name, ladder_of(strengths, precision=name), logits) for name in ("int8", "fp32")]
    return Pool(tuple(ladders), full_labels, labels)


def _answers(count, strengths, *, full, seed, groups):
    """The rungs' logits, the full model's labels, and the true ones."""
    rng = np.random.default_rng(seed)
    of_group = np.arange(count) if groups is None else groups
    units = int(of_group[-1]) + 1
    labels = rng.integers(0, CLASSES, count)
    ease = 1.0 / (0.3 + rng.gamma(2.0, 0.5, units)[of_group, None])
    noise = 0.8 * rng.standard_normal((units, CLASSES))[of_group]

    def logits_of(strength):
        own = 0.8 * rng.standard_normal((count, CLASSES))
        return (1.5 * (3.0 * strength * ease * np.eye(CLASSES)[labels] + noise + own)).astype(np.float32)

    logits = np.stack([logits_of(strength) for strength in strengths])
    return logits, logits_of(full).argmax(axis=1), labels


def heads_of(labels, scores):
    """Heads `(rungs, n, 5)` with these labels and, in all three columns, these scores."""
    heads = np.zeros((*np.shape(labels), HEAD_WIDTH), np.float32)
    heads[:, :, LABEL] = labels
    for column in SCORE_COLUMN.values():
        heads[:, :, column] = scores
    return heads
