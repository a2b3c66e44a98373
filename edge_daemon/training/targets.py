"""From kept examples to what a train step takes: normalised inputs, targets, weights. No I/O."""

from __future__ import annotations

import numpy as np

from edge_cascade.manifest import Preprocess
from edge_cascade.messages import RoundTerms, SelfLabels
from edge_cascade.preprocess import normalise
from edge_cascade.round_terms import MILLION
from edge_cascade.training import Examples, one_hot, softened
from edge_daemon.core.examples import Drawn, Origin


def least_origin(terms: RoundTerms) -> Origin:
    """Whose labels a round learns from at least."""
    return Origin.MODEL if terms.self_labels is SelfLabels.NONE else Origin.SELF


def make_examples(drawn: Drawn, terms: RoundTerms, preprocess: Preprocess, *, classes: int) -> Examples:
    """Examples of these terms, those without a usable label left out.

    A label of the full model becomes its class, mixed with the full model's probabilities by the share
    `soft_ppm` where they are known. A human's label is its class alone: the model may have been wrong. The
    board's own answers are hard or soft as `self_labels` says, and weigh `self_weight_ppm`.
    """
    is_usable = (drawn.labels >= 0) & (drawn.labels < classes) & (drawn.origins >= least_origin(terms))
    labels, origins = drawn.labels[is_usable], drawn.origins[is_usable]
    targets = one_hot(labels, classes)
    weight = np.ones(len(labels), np.float32)
    is_own = origins == Origin.SELF
    weight[is_own] = terms.self_weight_ppm / MILLION
    if terms.self_labels is SelfLabels.SOFT:
        confidence = drawn.confidence[is_usable]
        is_soft = is_own & np.isfinite(confidence)
        targets[is_soft] = softened(labels[is_soft], np.clip(confidence[is_soft], 0.0, 1.0), classes)
    share = np.float32(terms.soft_ppm / MILLION)
    total = drawn.probabilities[is_usable].sum(axis=1)
    is_mixed = (origins == Origin.MODEL) & np.isfinite(total) & (total > 0)
    if share > 0 and is_mixed.any():
        # They come rounded to 1/65535, so their sum is not quite one.
        soft = drawn.probabilities[is_usable][is_mixed] / total[is_mixed, np.newaxis]
        targets[is_mixed] = (1 - share) * targets[is_mixed] + share * soft
    return Examples(normalise(drawn.x[is_usable], preprocess), targets, weight)
