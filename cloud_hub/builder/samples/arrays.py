"""Reads `.npy` and `.npz` files whose sizes were looked at before anything was allocated. Never unpickles.

The header of an array (numpy.lib.format, NEP 1) is a Python literal. It is matched here rather than
evaluated, so that a damaged file can end in one line only.
"""

from __future__ import annotations

import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.errors import BuildError

Array = NDArray[np.generic]

MAX_DATA_BYTES: Final = 2 * 2**30
"""What the arrays of one source may take in memory, and its file on disk."""

SINGLE: Final = "x"
"""The name that the array of a `.npy` file goes by."""

_MAX_ARRAYS = 1_000
_MAX_AXES = 8
_MAX_HEADER_BYTES = 2**16
_CHUNK_BYTES = 2**20
_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    r"\s*\{\s*'descr'\s*:\s*'([^']{1,16})'\s*,"
    r"\s*'fortran_order'\s*:\s*(True|False)\s*,"
    r"\s*'shape'\s*:\s*\(([0-9L,\s]{0,400})\)\s*,?\s*\}\s*"
)
_PLAIN = re.compile(r"[<>|=]?[biufUS][0-9]{1,6}")
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    NotImplementedError,  # a compression that zipfile does not know
    RuntimeError,  # an encrypted member
)


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """What a file says of one of its arrays; `unreadable` says why it cannot be read, if so."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran_order: bool
    unreadable: str | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, uncompressed and without the header."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory, where numbers become float32."""
        return prod(self.shape) * max(self.dtype.itemsize, 4)


def list_arrays(path: Path, *, max_bytes: int = MAX_DATA_BYTES) -> dict[str, ArrayHeader]:
    """The headers of a file's arrays by name; a `.npy` file holds one, `x`.

    Raises:
        BuildError: if there is no such file, it is damaged, or it is larger than `max_bytes`.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise _too_large(path, size, max_bytes)
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return {SINGLE: _read_header(file)}
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename.removesuffix(".npy") for member in members]
            if len(members) > _MAX_ARRAYS or len(set(names)) != len(names):
                raise BuildError(f"{path}: more than {_MAX_ARRAYS} arrays, or two of one name")
            return {
                name: _member_header(archive, member)
                for name, member in zip(names, members, strict=True)
                if member.filename.endswith(".npy")
            }
    except FileNotFoundError as error:
        raise BuildError(f"{path}: no such file") from error
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def read_arrays(path: Path, names: Iterable[str], *, max_bytes: int = MAX_DATA_BYTES) -> dict[str, Array]:
    """Some of a file's arrays, after their sizes together were found to stay below `max_bytes`.

    Raises:
        BuildError: for an array that is missing, empty, too large, damaged, or neither numbers nor text.
    """
    headers = list_arrays(path, max_bytes=max_bytes)
    wanted = list(names)
    for name in wanted:
        _check_header(headers, name, path)
    needed = sum(headers[name].memory_bytes for name in wanted)
    if needed > max_bytes:
        raise _too_large(path, needed, max_bytes)
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return {name: _read_array(file) for name in wanted}
        with zipfile.ZipFile(path) as archive:
            return {name: _read_member(archive, name) for name in wanted}
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def _check_header(headers: dict[str, ArrayHeader], name: str, path: Path) -> None:
    if name not in headers:
        raise BuildError(f"{path}: no array {name!r}, it holds {', '.join(map(repr, sorted(headers)))}")
    header = headers[name]
    if header.unreadable is not None:
        raise BuildError(f"{path}: {name!r} {header.unreadable}")
    if not prod(header.shape) or not header.dtype.itemsize:
        raise BuildError(f"{path}: {name!r} is empty")


def _member_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> ArrayHeader:
    with archive.open(member) as file:
        header = _read_header(file)
        behind = member.file_size - file.tell()
    if header.unreadable is None and header.size_bytes > behind:
        raise ValueError(f"{member.filename!r} is shorter than its header says")
    return header


def _read_member(archive: zipfile.ZipFile, name: str) -> Array:
    member: AbstractContextManager[IO[bytes]] = archive.open(f"{name}.npy")
    with member as file:
        return _read_array(file)


def _read_header(file: IO[bytes]) -> ArrayHeader:
    start = file.read(len(_MAGIC) + 2)
    if start[:-2] != _MAGIC:
        raise ValueError("not a numpy array")
    length_format = "<H" if start[-2] == 1 else "<I"
    (length,) = struct.unpack(length_format, file.read(struct.calcsize(length_format)))
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"array header of {length} bytes")
    header = file.read(length).decode("latin-1")
    found = _HEADER.fullmatch(header)
    if found is None or not _PLAIN.fullmatch(found[1]):
        kind = "holds Python objects" if "'|O'" in header else "holds neither plain numbers nor text"
        return ArrayHeader((), np.dtype(np.uint8), False, f"{kind}: save it as an array of numbers")
    shape = tuple(int(size.strip().rstrip("L")) for size in found[3].split(",") if size.strip())
    if len(shape) > _MAX_AXES or max(shape, default=0) > 2**40:
        raise ValueError(f"an array of the shape {shape}")
    try:
        dtype = np.dtype(found[1])
    except TypeError as error:
        raise ValueError(f"unknown dtype {found[1]!r}") from error
    return ArrayHeader(shape, dtype, found[2] == "True")


def _read_array(file: IO[bytes]) -> Array:
    header = _read_header(file)
    flat = np.empty(prod(header.shape), header.dtype)
    raw = flat.view(np.uint8)
    filled = 0
    while filled < len(raw):
        chunk = file.read(min(_CHUNK_BYTES, len(raw) - filled))
        if not chunk:
            raise EOFError("an array ends too early")
        raw[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    # A member's checksum is compared when its end is reached, and only then.
    file.read(1)
    return flat.reshape(header.shape, order="F" if header.fortran_order else "C")


def _too_large(path: Path, size: int, max_bytes: int) -> BuildError:
    return BuildError(f"{path}: takes {size:,} bytes, at most {max_bytes:,} are read: raise --max-bytes")


def _damaged(path: Path, error: Exception) -> BuildError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if path.suffix not in {".npz", ".npy"}:
        return BuildError(
            f"{path}: no data: give an .npz or .npy file, or a folder with one sub-folder per class"
        )
    return BuildError(f"{path}: not a readable {path.suffix} file: {reason[:200]}")
