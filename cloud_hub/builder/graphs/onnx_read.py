"""Reads a user's ONNX file: sizes before content, external data from the file's own folder only.

External data may lie beside the file under a plain name. A path, a link of either kind or a special file is
refused (CVE-2024-27318, CVE-2025-51480, CVE-2026-27489), and so is whatever lies past the end of it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from cloud_hub.errors import BuildError

MAX_FILE_BYTES = (1 << 31) - 1
"""Protobuf's own limit: a larger file cannot be a model with its weights inside."""
MAX_EXTERNAL_BYTES = 1 << 30

_PLAIN_NAME = re.compile(r"[^/\\\0]{1,255}")


def read_model(source: str | Path | bytes) -> onnx.ModelProto:
    """A model with all its weights inside.

    Raises:
        BuildError: when it cannot be read, is too large, is not ONNX or reaches for other files.
    """
    if isinstance(source, bytes):
        return _load_external(_parse(source), None)
    path = Path(source)
    return _load_external(_parse(_read(path, MAX_FILE_BYTES)), path.parent)


def _parse(data: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError) as error:
        raise BuildError("not an ONNX file: export the model with torch.onnx.export or skl2onnx") from error
    # Most short texts parse as a protobuf of unknown fields.
    if not model.graph.node or not model.opset_import:
        raise BuildError("not an ONNX model, or one without a single operator")
    if any(isinstance(text, bytes) for text in _texts(model)):
        raise BuildError("not an ONNX file: a name in it is no text")
    return model


def _texts(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """All names; protobuf gives bytes where they are no UTF-8."""
    for entry in model.opset_import:
        yield entry.domain
    for function in model.functions:
        yield from (function.domain, function.name, *function.input, *function.output)
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        yield value.name
    for tensor in model.graph.initializer:
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))


def _read(path: Path, limit: int) -> bytes:
    try:
        # Not to hang on a pipe, not to follow a link put there afterwards.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BuildError("not a regular file")
            if status.st_size > limit:
                raise BuildError(
                    f"{status.st_size:,} bytes, more than the {limit:,} that are read: give a smaller model"
                )
            return file.read(limit + 1)
    except OSError as error:
        raise BuildError(f"cannot be read: {error.strerror}") from error


def _load_external(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    files: dict[str, bytes] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if folder is None:
            raise BuildError(f"its weights lie in another file ({location}): give the path, not the bytes")
        if location not in files:
            files[location] = _read_beside(folder, location)
        data = files[location]
        start, length = _number(entries, "offset", 0), _number(entries, "length", size_bytes_of(tensor))
        if length != size_bytes_of(tensor) or start + length > len(data):
            raise BuildError(f"{location}: does not hold the weight {tensor.name}: export the model again")
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
        tensor.raw_data = data[start : start + length]
    return model


def _read_beside(folder: Path, location: str) -> bytes:
    if not _PLAIN_NAME.fullmatch(location) or location in {".", ".."}:
        raise BuildError(f"external data at {location!r}: only a file in the same folder is read")
    path = folder / location
    try:
        status = path.lstat()
    except OSError as error:
        raise BuildError(f"its weights are in {location}, which is not beside it: copy both files") from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise BuildError(f"external data at {location!r}: a link or no regular file; copy the file itself")
    try:
        return _read(path, MAX_EXTERNAL_BYTES)
    except BuildError as error:
        raise BuildError(f"{location}: {error}") from error


def size_bytes_of(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's elements.

    Raises:
        BuildError: for a type or dims that do not exist.
    """
    try:
        itemsize = int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError as error:
        raise BuildError(f"the weight {tensor.name} is of an unknown type {tensor.data_type}") from error
    size = itemsize
    for dim in tensor.dims:
        if dim < 0:
            raise BuildError(f"the weight {tensor.name} has the dim {dim}")
        size *= dim
    return size


def _number(entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise BuildError(f"external data with the {key} {text[:40]!r}, which is no number")
    return int(text)
