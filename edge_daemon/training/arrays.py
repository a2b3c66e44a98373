"""Float arrays by name <-> safetensors bytes. No I/O."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_cascade.errors import ProtocolError
from edge_cascade.weights import FloatArray


def dump_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    """All of them in one blob."""
    content: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return content


def load_any_arrays(content: bytes) -> dict[str, NDArray[np.generic]]:
    """The arrays of `dump_arrays`.

    Raises:
        ProtocolError: when these bytes are no such blob.
    """
    try:
        arrays: dict[str, NDArray[np.generic]] = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"no arrays: {error}") from error
    return arrays


def load_arrays(content: bytes) -> dict[str, FloatArray]:
    """The same where all are float32.

    Raises:
        ProtocolError: also for an array of another type.
    """
    arrays: dict[str, FloatArray] = {}
    for name, array in load_any_arrays(content).items():
        if array.dtype != np.float32:
            raise ProtocolError(f"array {name!r} is {array.dtype}, expected float32")
        arrays[name] = array.astype(np.float32, copy=False)
    return arrays
