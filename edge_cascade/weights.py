"""The weights that a round starts from: their digest, and how one follows from another. No I/O.

A training base is a mapping from parameter names to float32 arrays. It travels as a chain of deltas (see
`deltas`) onto a base that the receiver has, or onto zeros. The hub makes each base from the one before by
decoding the very bytes that it sends, so both sides arrive at the same float32 values, and the digest says
so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade.deltas import decode_delta, layout_digest
from edge_cascade.errors import ProtocolError
from edge_cascade.messages import DIGEST_BYTES

FloatArray = NDArray[np.float32]
Weights = Mapping[str, FloatArray]

FROM_ZEROS: Final = bytes(DIGEST_BYTES)
"""The origin of a chain of deltas onto nothing: every value 0."""


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: array.shape for name, array in weights.items()}


def size_bytes_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """What tensors of these shapes take as float32."""
    return 4 * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())


def weights_digest(weights: Weights) -> bytes:
    """SHA-256 over the layout's digest and all values as little-endian float32, by sorted name, in C order.

    A zero counts as a zero whatever its sign: -0.0 cannot be reached by adding to 0.0.

    Raises:
        ProtocolError: when there is no tensor, one is empty, or one has a name that cannot be printed.
    """
    digest = hashlib.sha256(layout_digest(shapes_of(weights)))
    for name in sorted(weights):
        digest.update((np.asarray(weights[name], dtype="<f4") + np.float32(0.0)).tobytes())
    return digest.digest()


def zeros_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FloatArray]:
    """The weights that `FROM_ZEROS` stands for."""
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def moved(weights: Weights, step: Weights) -> dict[str, FloatArray]:
    """Weights plus a step of the same names and shapes, in float32."""
    return {name: weights[name] + step[name] for name in weights}


def difference(after: Weights, before: Weights) -> dict[str, FloatArray]:
    """What was learned: `after` minus `before`, in float32."""
    return {name: after[name] - before[name] for name in before}


def climb_chain(
    origin: Weights, steps: Iterable[bytes], *, expected: bytes, max_bytes: int
) -> dict[str, FloatArray]:
    """The base at the end of a chain of encoded deltas.

    Raises:
        TooLargeError, ProtocolError: for a step that does not fit, or an end that is not `expected`.
    """
    shapes = shapes_of(origin)
    reached = dict(origin)
    for step in steps:
        reached = moved(reached, decode_delta(step, shapes, max_bytes=max_bytes))
    if weights_digest(reached) != expected:
        raise ProtocolError("the training base that was sent is not the one that the offer names")
    return reached
