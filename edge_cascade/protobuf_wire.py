"""Read protobuf's wire format against a schema, strictly. No I/O, no recursion, no generated code.

A stranger's bytes are read here, so what a parser may forgive is refused: unknown fields, fields that occur
twice where once is meant (parsers keep the last or merge), groups, over-long numbers, text that is no UTF-8.
Two parsers that agree on the rest agree on all of it. A nested message comes back as its span; whoever wants
its fields asks again, so the depth is the caller's and the bytes of a tensor are never looped over.

Source: https://protobuf.dev/programming-guides/encoding/ (varints, packed fields, last one wins).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NoReturn

from edge_cascade.errors import BundleError, HostileFileError

Span = tuple[int, int]  # start and end within the file

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_WIRE_NAMES = {
    _VARINT: "a varint",
    _FIXED64: "8 bytes",
    _DELIMITED: "length-delimited",
    3: "a group",
    4: "the end of a group",
    _FIXED32: "4 bytes",
}
# What a byte means within a varint: c = it goes on, otherwise it ends with these bits.
_CLASSES = bytes(b"01x"[min(byte, 2)] if byte < 0x80 else ord("c") for byte in range(256))


class Kind(Enum):
    """What a field holds, and how much of it is read."""

    INT64 = auto()  # decoded
    INT32 = auto()  # decoded; enums too
    TEXT = auto()  # decoded
    MESSAGE = auto()  # span
    BYTES = auto()  # span
    VARINTS = auto()  # counted
    FIXED32 = auto()  # counted
    FIXED64 = auto()  # counted


_WIRES = {
    Kind.INT64: _VARINT,
    Kind.INT32: _VARINT,
    Kind.VARINTS: _VARINT,
    Kind.FIXED32: _FIXED32,
    Kind.FIXED64: _FIXED64,
    Kind.TEXT: _DELIMITED,
    Kind.MESSAGE: _DELIMITED,
    Kind.BYTES: _DELIMITED,
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a schema; `refused` is the reason why it may not occur at all."""

    name: str
    kind: Kind
    repeated: bool = False
    refused: str = ""


def one(name: str, kind: Kind) -> Field:
    """A field that occurs at most once."""
    return Field(name, kind)


def many(name: str, kind: Kind) -> Field:
    """A field that may occur any number of times; numbers also packed."""
    return Field(name, kind, repeated=True)


def refused(name: str, reason: str) -> Field:
    """A field that is known, and may not occur."""
    return Field(name, Kind.BYTES, repeated=True, refused=reason)


@dataclass(frozen=True, slots=True)
class Schema:
    """A message's name and its fields by number."""

    name: str
    fields: Mapping[int, Field]
    by_tag: dict[int, Field] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for number, known in self.fields.items():
            wire = _WIRES[known.kind]
            self.by_tag[number << 3 | wire] = known
            if known.repeated and wire != _DELIMITED:
                self.by_tag[number << 3 | _DELIMITED] = known  # the same numbers, packed


@dataclass(slots=True)
class Message:
    """The fields of one message by name; an absent field reads as protobuf's default."""

    where: str
    seen: set[str] = field(default_factory=set)
    numbers: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def number(self, name: str) -> int:
        """A single integer, 0 if absent."""
        values = self.numbers.get(name)
        return values[0] if values else 0

    def text(self, name: str) -> str:
        """A single text, empty if absent."""
        values = self.texts.get(name)
        return values[0] if values else ""

    def span(self, name: str) -> Span | None:
        """A single nested message or byte field, None if absent."""
        values = self.spans.get(name)
        return values[0] if values else None


def quote(text: str) -> str:
    """A stranger's text, escaped and short enough for a log line."""
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}... ({len(text)} characters)"


class WireReader:
    """Reads the messages of one file; at most `max_fields` fields and packed numbers in all.

    Raises `BundleError` for bytes that are damaged, `HostileFileError` for those that no encoder writes.
    """

    def __init__(self, data: bytes, *, max_fields: int, max_string_bytes: int) -> None:
        self._data = data
        self._max_fields = max_fields
        self._fields_left = max_fields
        self._max_string_bytes = max_string_bytes

    def read(self, span: Span, schema: Schema, where: str) -> Message:
        """The fields of the message at `span`; `where` names it in errors."""
        pos, end = span
        message = Message(where)
        while pos < end:
            tag, pos = self._varint(pos, end, where)
            known = schema.by_tag.get(tag)
            if known is None:
                _refuse_tag(tag, schema, where)
            if known.refused:
                raise HostileFileError(f"{where}: {known.name} is refused: {known.refused}")
            if known.name in message.seen and not known.repeated:
                raise HostileFileError(
                    f"{where}: {known.name} occurs twice; parsers differ in which one they keep"
                )
            message.seen.add(known.name)
            self._spend(where)
            if tag & 7 == _DELIMITED:
                pos = self._read_delimited(message, known, pos, end)
            else:
                pos = self._read_number(message, known, pos, end)
        return message

    def _read_delimited(self, message: Message, known: Field, pos: int, end: int) -> int:
        place = message.where
        size, pos = self._varint(pos, end, place)
        stop = pos + size
        if stop > end:
            raise BundleError(f"{place}: {known.name} is cut off: {size} bytes announced, {end - pos} left")
        match known.kind:
            case Kind.TEXT:
                message.texts.setdefault(known.name, []).append(self._text(message, known, pos, stop))
            case Kind.MESSAGE | Kind.BYTES:
                message.spans.setdefault(known.name, []).append((pos, stop))
            case Kind.INT64 | Kind.INT32:
                while pos < stop:
                    pos = self._read_number(message, known, pos, stop)
                    self._spend(place)
            case Kind.VARINTS:
                self._count(message, known, self._count_varints(message, known, pos, stop))
            case Kind.FIXED32 | Kind.FIXED64:
                width = 4 if known.kind is Kind.FIXED32 else 8
                if size % width:
                    raise BundleError(
                        f"{place}: {known.name} packs {size} bytes into numbers of {width} bytes"
                    )
                self._count(message, known, size // width)
        return stop

    def _read_number(self, message: Message, known: Field, pos: int, end: int) -> int:
        if known.kind in (Kind.FIXED32, Kind.FIXED64):
            pos += 4 if known.kind is Kind.FIXED32 else 8
            if pos > end:
                raise BundleError(f"{message.where}: {known.name} is cut off")
            self._count(message, known, 1)
            return pos
        value, pos = self._varint(pos, end, message.where)
        if known.kind is Kind.VARINTS:
            self._count(message, known, 1)
            return pos
        if value >= 1 << 63:
            value -= 1 << 64
        if known.kind is Kind.INT32 and not -(1 << 31) <= value < 1 << 31:
            raise HostileFileError(f"{message.where}: {known.name} is {value}, more than 32 bits hold")
        message.numbers.setdefault(known.name, []).append(value)
        return pos

    @staticmethod
    def _count(message: Message, known: Field, count: int) -> None:
        message.counts[known.name] = message.counts.get(known.name, 0) + count

    def _spend(self, where: str) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise HostileFileError(f"{where}: the file has more than {self._max_fields} fields")

    def _text(self, message: Message, known: Field, start: int, stop: int) -> str:
        where = f"{message.where}: {known.name}"
        if stop - start > self._max_string_bytes:
            raise HostileFileError(f"{where} has {stop - start} bytes, more than {self._max_string_bytes}")
        try:
            text = self._data[start:stop].decode()
        except UnicodeDecodeError as error:
            raise HostileFileError(f"{where} is no UTF-8: {error.reason} at byte {error.start}") from error
        if "\0" in text:
            raise HostileFileError(f"{where} holds a NUL, where C code ends it early: {quote(text)}")
        return text

    def _count_varints(self, message: Message, known: Field, start: int, stop: int) -> int:
        if start == stop:
            return 0
        if self._data[stop - 1] >= 0x80:
            raise BundleError(f"{message.where}: {known.name} is cut off within a number")
        # Runs in C: tensors may hold millions. A tenth byte may only be 1, the 64th bit.
        classes = self._data[start:stop].translate(_CLASSES)
        tenth, tenth_is_1 = classes.count(b"c" * 9), classes.count(b"c" * 9 + b"1")
        if b"c0" in classes or b"c" * 10 in classes or tenth != tenth_is_1:
            raise HostileFileError(f"{message.where}: {known.name} holds an over-long number")
        return len(classes) - classes.count(b"c")

    def _varint(self, pos: int, end: int, where: str) -> tuple[int, int]:
        data = self._data
        if pos < end and data[pos] < 0x80:  # nearly always
            return data[pos], pos + 1
        value = shift = 0
        while pos < end:
            byte = data[pos]
            pos += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if (byte == 0 and shift) or value >> 64:
                    raise HostileFileError(f"{where}: an over-long number ends at byte {pos}")
                return value, pos
            shift += 7
            if shift == 70:
                raise HostileFileError(f"{where}: an over-long number at byte {pos}")
        raise BundleError(f"{where} is cut off within a number at byte {pos}")


def _refuse_tag(tag: int, schema: Schema, where: str) -> NoReturn:
    number, wire = tag >> 3, tag & 7
    written = _WIRE_NAMES.get(wire, f"wire type {wire}, which does not exist")
    known = schema.fields.get(number)
    if wire in (3, 4):
        raise HostileFileError(f"{where}: field {number} of {schema.name} is {written}; groups are refused")
    if known is None:
        raise HostileFileError(f"{where}: {schema.name} has no field {number} ({written})")
    raise HostileFileError(
        f"{where}: {known.name} (field {number} of {schema.name}) is written as {written}, not as "
        f"{_WIRE_NAMES[_WIRES[known.kind]]}"
    )
