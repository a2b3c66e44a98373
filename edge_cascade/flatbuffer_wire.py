"""Reads flatbuffer tables from bytes that nobody vouches for. No I/O, no `flatbuffers`.

A runtime follows offsets without looking back, so every offset, length and alignment that it would follow is
checked here first: each part of a table, a vector or a string lies within the file, and numbers lie where
processors may read them. A slot that the caller's table does not list is refused. Sharing is allowed, as
writers reuse vectors; what is read in all is bounded, which bounds time and memory.

Source: https://flatbuffers.dev/internals/
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade.errors import HostileFileError
from edge_cascade.tflite_schema import Field
from edge_cascade.tflite_schema import Table as Schema

_SCALARS: Final = {"int8": "<b", "uint8": "<B", "int32": "<i", "uint32": "<I", "float32": "<f", "bool": "<?"}
_VECTORS: Final = {"bytes": "<u1", "int32s": "<i4", "int64s": "<i8", "float32s": "<f4"}
_OFFSET: Final = 4
_MAX_TEXT_BYTES: Final = 1024


class FlatReader:
    """One file, with what is left of its limit: tables, slots and vectors read in all."""

    def __init__(self, data: bytes, *, max_reads: int) -> None:
        self._data = data
        self._left = max_reads

    def root(self, schema: Schema, where: str) -> FlatTable:
        """The table that the file begins with."""
        return self.table(0, schema, where)

    def table(self, position: int, schema: Schema, where: str) -> FlatTable:
        """The table that the offset at `position` leads to.

        Raises:
            HostileFileError: when any part of it lies outside of the file, or it has a slot not listed.
        """
        start = position + int(self.number(position, "uint32", where))
        vtable = start - int(self.number(start, "int32", where))
        size_bytes = self._u16(vtable, where)
        if size_bytes < 4 or size_bytes % 2:
            raise HostileFileError(f"{where}: a table of slots of {size_bytes} bytes")
        listed = {entry.slot for entry in schema.values()}
        places: dict[int, int] = {}
        for slot in range((size_bytes - 4) // 2):
            distance = self._u16(vtable + 4 + 2 * slot, where)
            if not distance:
                continue
            if slot not in listed:
                raise HostileFileError(f"{where}: has slot {slot}, which no stage needs")
            places[slot] = start + distance
        return FlatTable(self, schema, places, where)

    def number(self, position: int, kind: str, where: str) -> int | float:
        """The number at a position."""
        self._spend(where)
        form = _SCALARS[kind]
        size_bytes = struct.calcsize(form)
        if position % size_bytes or not 0 <= position <= len(self._data) - size_bytes:
            raise HostileFileError(f"{where}: a number at byte {position} is not within the file, or crooked")
        value: int | float = struct.unpack_from(form, self._data, position)[0]
        return value

    def vector(self, position: int, itemsize: int, where: str) -> tuple[int, int]:
        """First byte and length of the vector that the offset at `position` leads to."""
        start = position + int(self.number(position, "uint32", where))
        length = int(self.number(start, "uint32", where))
        first = start + _OFFSET
        if first + length * itemsize > len(self._data) or (length and first % itemsize):
            raise HostileFileError(
                f"{where}: {length} items at byte {first} are not within the file, or crooked"
            )
        return first, length

    def slice(self, first: int, size_bytes: int) -> memoryview:
        """Bytes that a checked vector covers."""
        return memoryview(self._data)[first : first + size_bytes]

    def _u16(self, position: int, where: str) -> int:
        self._spend(where)
        if position % 2 or not 0 <= position <= len(self._data) - 2:
            raise HostileFileError(
                f"{where}: its slots at byte {position} are not within the file, or crooked"
            )
        value: int = struct.unpack_from("<H", self._data, position)[0]
        return value

    def _spend(self, where: str) -> None:
        self._left -= 1
        if self._left < 0:
            raise HostileFileError(f"{where}: the file has more parts than any stage")


class FlatTable:
    """One table; its fields are read when they are asked for, by the schema's names."""

    def __init__(self, reader: FlatReader, schema: Schema, places: dict[int, int], where: str) -> None:
        self._reader = reader
        self._schema = schema
        self._places = places
        self.where = where

    def number(self, name: str) -> int | float:
        """A number, or its default."""
        entry = self._schema[name]
        place = self._places.get(entry.slot)
        return entry.default if place is None else self._reader.number(place, entry.kind, self._at(name))

    def integer(self, name: str) -> int:
        """A whole number, or its default."""
        return int(self.number(name))

    def text(self, name: str) -> str:
        """A short UTF-8 text, empty if absent."""
        place = self._place(name, "text")
        if place is None:
            return ""
        first, length = self._reader.vector(place, 1, self._at(name))
        # A runtime takes these for C strings: the zero behind them must be there.
        content = bytes(self._reader.slice(first, min(length, _MAX_TEXT_BYTES) + 1))
        if content[length:] != b"\0":
            raise HostileFileError(f"{self._at(name)}: a text of {length} bytes, or one without an end")
        try:
            return content[:-1].decode()
        except UnicodeDecodeError as error:
            raise HostileFileError(f"{self._at(name)}: no UTF-8") from error

    def numbers(self, name: str) -> NDArray[Any]:
        """A vector of numbers, empty if absent; a view of the file."""
        entry = self._schema[name]
        dtype = np.dtype(_VECTORS[entry.kind])
        place = self._place(name, entry.kind)
        if place is None:
            return np.empty(0, dtype)
        first, length = self._reader.vector(place, dtype.itemsize, self._at(name))
        return np.frombuffer(self._reader.slice(first, length * dtype.itemsize), dtype)

    def table(self, name: str, schema: Schema) -> FlatTable | None:
        """A table within, if there is one."""
        place = self._place(name, "table")
        return None if place is None else self._reader.table(place, schema, self._at(name))

    def tables(self, name: str, schema: Schema, *, most: int) -> list[FlatTable]:
        """A vector of tables, empty if absent.

        Raises:
            HostileFileError: also when there are more than `most`.
        """
        place = self._place(name, "tables")
        if place is None:
            return []
        first, length = self._reader.vector(place, _OFFSET, self._at(name))
        if length > most:
            raise HostileFileError(f"{self._at(name)}: {length} of them, more than {most}")
        return [
            self._reader.table(first + _OFFSET * index, schema, f"{self._at(name)} {index}")
            for index in range(length)
        ]

    def _place(self, name: str, kind: str) -> int | None:
        entry: Field = self._schema[name]
        assert entry.kind == kind
        return self._places.get(entry.slot)

    def _at(self, name: str) -> str:
        return f"{self.where} {name}".strip()
