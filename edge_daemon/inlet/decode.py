"""Sensor payloads -> float32 arrays. No I/O; the size was bounded before a payload gets here.

Formats: `json` (nested or flat array, optionally under a dotted field path), `float32le` (raw values,
little-endian), `npy` (NumPy's format, version 1 to 3; never pickle).
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Format = Literal["json", "float32le", "npy"]
Decode = Callable[[bytes], Array]

MAX_NPY_HEADER_BYTES: Final = 4096
_NPY_MAGIC: Final = b"\x93NUMPY"
# The header is a Python literal, and its parser raises what Python's own does.
_NPY_ERRORS: Final = (
    *(ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError),
    tokenize.TokenError,
)
_FLOAT32LE: Final = np.dtype("<f4")


class SampleError(ValueError):
    """A payload that is no sample: says what was found and what was expected."""


_flat_decoder = msgspec.json.Decoder(list[float])


def make_decoder(format_: Format, field: str | None = None) -> Decode:
    """The function that decodes one source's payloads; `field` is a dotted path into a JSON object.

    It raises `SampleError` for anything that is no array of finite numbers.
    """
    if format_ == "float32le":
        return _decode_float32
    if format_ == "npy":
        return _decode_npy
    path = field.split(".") if field else []
    return lambda payload: _decode_json(payload, path)


def check_finite(x: Array) -> Array:
    """`x`, if every value is finite.

    Raises:
        SampleError: with the place of the first value that is not.
    """
    # For a short array `.all()` takes twice as long, a sum under `errstate` four times.
    place = np.isfinite(x).tobytes().find(0)
    if place >= 0:
        raise SampleError(f"value {place} is {x.flat[place]}")
    return x


def shape_sample(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` as one model input; a flat array is taken in C order.

    Raises:
        SampleError: when the number of values, or a nested array's own shape, does not fit.
    """
    if x.ndim == 1 or _squeezed(x.shape) == _squeezed(shape):
        try:
            return x.reshape(shape)
        except ValueError:
            pass
    raise SampleError(f"shape {x.shape} where the model takes {shape}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _decode_float32(payload: bytes) -> Array:
    if len(payload) % 4 or not payload:
        raise SampleError(f"{len(payload)} bytes are no whole number of float32 values")
    return check_finite(np.frombuffer(payload, _FLOAT32LE))


def _decode_json(payload: bytes, path: list[str]) -> Array:
    try:
        value: Any = msgspec.json.decode(payload) if path else _flat_or_nested(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SampleError(f"no JSON: {error}") from error
    for depth, name in enumerate(path):
        if not isinstance(value, dict) or name not in value:
            raise SampleError(f"no field {'.'.join(path[: depth + 1])!r}")
        value = value[name]
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise SampleError(f"no array of numbers: {str(error)[:100]}") from error
    if array.size and array.dtype.kind not in "fiu":
        raise SampleError(f"no array of numbers, but of {array.dtype}")
    if array.ndim == 0:
        array = array.reshape(1)
    if array.size == 0:
        raise SampleError("an empty array")
    with np.errstate(over="ignore"):
        return check_finite(array.astype(np.float32))


def _flat_or_nested(payload: bytes) -> Any:
    # A flat list of numbers is the common case, and typed decoding of it is twice as fast.
    try:
        return _flat_decoder.decode(payload)
    except msgspec.ValidationError:
        return msgspec.json.decode(payload)


def _decode_npy(payload: bytes) -> Array:
    if not payload.startswith(_NPY_MAGIC):
        raise SampleError("no NumPy file")
    file = io.BytesIO(payload)
    try:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read_header(file, max_header_size=MAX_NPY_HEADER_BYTES)
    except _NPY_ERRORS as error:
        raise SampleError(f"no NumPy file: {str(error).splitlines()[0][:100]}") from error
    if dtype.kind not in "fiu" or dtype.hasobject:
        raise SampleError(f"NumPy array of {dtype}, expected numbers")
    size = 1
    for length in shape:
        size *= length
    data = payload[file.tell() :]
    if size <= 0 or size * dtype.itemsize != len(data):
        raise SampleError(f"NumPy array {shape} of {dtype} does not fit its {len(data)} bytes")
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran_order else "C")
    with np.errstate(over="ignore", invalid="ignore"):
        return check_finite(np.ascontiguousarray(array.astype(np.float32)))
