"""What a setting's type takes: read from a configuration's own structs, checked, put into words. No I/O."""

from __future__ import annotations

from typing import Any

import msgspec


def table_type(kind: msgspec.inspect.Type) -> msgspec.inspect.StructType | None:
    """A table's type, None for what is none."""
    return kind if isinstance(kind, msgspec.inspect.StructType) else None


def item_type(kind: msgspec.inspect.Type) -> msgspec.inspect.Type | None:
    """What a list holds, None for what is no list."""
    return kind.item_type if isinstance(kind, msgspec.inspect.VarTupleType) else None


def field_names(table: msgspec.inspect.StructType) -> tuple[str, ...]:
    """The keys of a table."""
    return tuple(entry.encode_name for entry in table.fields)


def field_type(table: msgspec.inspect.StructType, name: str) -> msgspec.inspect.Type:
    """What one key takes."""
    return without_text(next(entry.type for entry in table.fields if entry.encode_name == name))


def without_text(kind: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """The type itself, where a description was wrapped around it."""
    return kind.type if isinstance(kind, msgspec.inspect.Metadata) else kind


def joined(key: str, step: str) -> str:
    """The key of a step inside of another."""
    return f"{key}.{step}" if key else step


def is_valid(value: object, kind: msgspec.inspect.Type) -> bool:  # noqa: PLR0911 - one return a type
    """Whether the type takes the value; of a table or a list only what is seen without looking inside."""
    match kind:
        case msgspec.inspect.UnionType():
            return any(is_valid(value, one) for one in kind.types)
        case msgspec.inspect.NoneType():
            return value is None
        case msgspec.inspect.BoolType():
            return isinstance(value, bool)
        case msgspec.inspect.StrType():
            return isinstance(value, str) and _within(len(value), kind.min_length, kind.max_length)
        case msgspec.inspect.IntType():
            return _is_number(value, int) and _in_range(value, kind)
        case msgspec.inspect.FloatType():
            return _is_number(value, (int, float)) and _in_range(value, kind)
        case msgspec.inspect.LiteralType():
            return value in kind.values
        case msgspec.inspect.VarTupleType():
            return isinstance(value, list) and _within(len(value), kind.min_length, kind.max_length)
        case msgspec.inspect.StructType():
            return isinstance(value, dict) and all(
                not entry.required or entry.encode_name in value for entry in kind.fields
            )
    return True


def _is_number(value: object, types: type | tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _within(length: int, lowest: int | None, highest: int | None) -> bool:
    return (lowest is None or length >= lowest) and (highest is None or length <= highest)


def _in_range(value: Any, kind: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> bool:
    return (
        (kind.ge is None or value >= kind.ge)
        and (kind.gt is None or value > kind.gt)
        and (kind.le is None or value <= kind.le)
        and (kind.lt is None or value < kind.lt)
    )


def described(kind: msgspec.inspect.Type) -> str:  # noqa: PLR0911 - one return a type
    """What a type takes, for people; empty where the sentence about the value says it."""
    match kind:
        case msgspec.inspect.LiteralType():
            return ", ".join(shown(value) for value in kind.values)
        case msgspec.inspect.BoolType():
            return "true, false"
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            noun = "a whole number" if isinstance(kind, msgspec.inspect.IntType) else "a number"
            return f"{noun}{_bounds(kind)}"
        case msgspec.inspect.StrType():
            return f"a string of 1 to {kind.max_length} characters" if kind.max_length else "a string"
        case msgspec.inspect.StructType():
            return "a table"
        case msgspec.inspect.VarTupleType():
            return f"a list of {_count(kind)}{_items(kind.item_type)}"
    return ""


def _bounds(kind: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> str:
    bounds = [
        f" {sign} {bound:g}" if isinstance(bound, float) else f" {sign} {bound}"
        for sign, bound in ((">=", kind.ge), (">", kind.gt), ("<=", kind.le), ("<", kind.lt))
        if bound is not None
    ]
    return " and".join(bounds)


def _count(kind: msgspec.inspect.VarTupleType) -> str:
    if kind.max_length is not None:
        return f"{kind.min_length or 0} to {kind.max_length} "
    return f"{kind.min_length} or more " if kind.min_length else ""


def _items(kind: msgspec.inspect.Type) -> str:
    """The plural of what a list holds."""
    match kind:
        case msgspec.inspect.StructType():
            return "tables"
        case msgspec.inspect.StrType():
            return "strings"
        case msgspec.inspect.IntType():
            return f"whole numbers{_bounds(kind)}"
        case msgspec.inspect.FloatType():
            return f"numbers{_bounds(kind)}"
        case msgspec.inspect.LiteralType():
            return f"entries of: {described(kind)}"
    return "entries"


def shown(value: object) -> str:
    """A value as it would be written, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 80 else f'"{value[:80]}..."'
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, dict):
        return "{...}"
    return "[...]" if isinstance(value, list) and value else str(value)
