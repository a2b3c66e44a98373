"""From weights before and after to what is sent: heads kept, clipped, noised, encoded. No I/O.

Differential privacy on the board (DP-FedAvg: McMahan, Ramage, Talwar, Zhang, ICLR 2018): the delta is
shortened to `clip_norm`, then each value gets Gaussian noise of the standard deviation `clip_norm *
noise_multiplier`, and what is encoded is that. Quantising comes afterwards and cannot take any of it back:
it is post-processing. What the hub makes of the multiplier (an epsilon) is in its accountant. The noise is
drawn in double precision from a generator that the caller seeds; it is not a discrete mechanism.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_cascade.deltas import Residual, encode_delta, layout_digest, with_feedback
from edge_cascade.messages import RoundTerms
from edge_cascade.round_terms import MILLION
from edge_cascade.weights import FloatArray, Weights, difference, shapes_of

WITH_FEEDBACK: Final = frozenset({"sign", "topk"})


@dataclass(frozen=True, slots=True, eq=False)
class MadeUpdate:
    """`delta` as it travels. `residual`: what it leaves out, None for encodings without error feedback.

    `heads`: the parameters that stay on the board, after training.
    """

    delta: bytes
    residual: Mapping[str, FloatArray] | None
    heads: Mapping[str, FloatArray]


def make_update(
    base: Weights,
    trained: Weights,
    terms: RoundTerms,
    *,
    residual: Weights,
    head_parameters: Collection[str],
    noise: np.random.Generator,
) -> MadeUpdate:
    """What a board sends of a training from `base` to `trained`.

    `residual` is what updates that the hub has have left out; one of another layout is none. `noise` is
    drawn from only if the terms ask for noise.

    Raises:
        ProtocolError: when nothing is left to be sent, or a value is not finite.
    """
    heads = set(head_parameters) if terms.private_heads else set()
    sent = {name: array for name, array in base.items() if name not in heads}
    delta = difference(trained, sent)
    if terms.clip_norm_ppm:
        delta = clipped(delta, terms.clip_norm_ppm / MILLION)
    if terms.noise_multiplier_ppm:
        deviation = terms.clip_norm_ppm / MILLION * (terms.noise_multiplier_ppm / MILLION)
        delta = noised(delta, deviation, noise)
    top_share = terms.top_share_ppm / MILLION
    left_out: Residual | None = None
    if terms.encoding in WITH_FEEDBACK:
        before = Residual(residual if _is_same_layout(residual, delta) else {})
        delta, left_out = with_feedback(delta, before, terms.encoding, top_share=top_share)
    return MadeUpdate(
        encode_delta(delta, terms.encoding, top_share=top_share),
        None if left_out is None else left_out.values,
        {name: trained[name] for name in sorted(heads)},
    )


def clipped(delta: Weights, max_norm: float) -> dict[str, FloatArray]:
    """The delta, shortened so that the Euclidean norm over all its values is at most `max_norm`."""
    norm = np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in delta.values()))
    if norm <= max_norm:
        return dict(delta)
    # A little more than needed: rounding to float32 must not lead above the bound.
    scale = max_norm / norm * (1.0 - 2.0**-22)
    return {name: (array.astype(np.float64) * scale).astype(np.float32) for name, array in delta.items()}


def noised(delta: Weights, deviation: float, rng: np.random.Generator) -> dict[str, FloatArray]:
    """The delta with Gaussian noise on every value, drawn by sorted name."""
    return {
        name: (delta[name] + rng.normal(0.0, deviation, delta[name].shape)).astype(np.float32)
        for name in sorted(delta)
    }


def _is_same_layout(residual: Weights, delta: Weights) -> bool:
    return bool(residual) and layout_digest(shapes_of(residual)) == layout_digest(shapes_of(delta))
