"""A TOML file and the environment -> a checked msgspec Struct, with every error in one line.

Knows no key of ours: the struct's own types say what is allowed, and the messages are made from them.
`PREFIX__HUB__BROKER__PORT=1884` sets `hub.broker.port`; list entries go by their number, one past the end
adds an entry. A value is read as the key's type asks; where the key takes a table or a list, as JSON.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_cascade.errors import SettingsError

_VALIDATION = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"[^.\[\]]+|\[[^\]]*\]")

StructT = TypeVar("StructT", bound=msgspec.Struct)


def read_settings(
    path: Path,
    environ: Mapping[str, str],
    kind: type[StructT],
    *,
    prefix: str,
    examples: Mapping[str, str],
    check: Callable[[StructT, Origin], None] | None = None,
) -> StructT:
    """The struct.

    `prefix` starts the variables that override (with its underscores); `examples` completes "missing; add
    it" by key; `check` raises what only the caller can find.

    Raises:
        SettingsError: in one line: file or variable, key, value, what is allowed, and the fix where known.
    """
    root = msgspec.inspect.type_info(kind)
    document = _read_toml(path)
    origin = Origin(str(path), _apply_environment(document, environ, prefix, root))
    for key, step, known in _unknown_keys(document, root, ""):
        raise origin.error(_joined(key, step), _unknown_because(step, known))
    try:
        settings = msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise _explained(error, document, root, origin, examples) from error
    if check is not None:
        check(settings, origin)
    return settings


def convert_settings(values: Mapping[str, Any], kind: type[StructT], *, source: str) -> StructT:
    """The struct from plain values that came from elsewhere than a file; `source` starts every error.

    Raises:
        SettingsError: in one line, as `read_settings` says it.
    """
    root = msgspec.inspect.type_info(kind)
    origin = Origin(source, {})
    for key, step, known in _unknown_keys(values, root, ""):
        raise origin.error(_joined(key, step), _unknown_because(step, known))
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise _explained(error, values, root, origin, {}) from error


class Origin:
    """Says where a key was set: in the file, or by which variable."""

    def __init__(self, file: str, variables: Mapping[str, str]) -> None:
        self._file = file
        self._variables = variables

    def wrong(self, key: str, value: object, problem: str) -> SettingsError:
        """One line about a value: what is allowed, or how it is mended."""
        return _line(f"{self._source_of(key)}: {key} = {_shown(value)}", problem)

    def error(self, key: str, problem: str) -> SettingsError:
        """One line about a key that has no value, or whose value is not the point."""
        return _line(f"{self._source_of(key)}: {key}", problem)

    def _source_of(self, key: str) -> str:
        return next(
            (
                f"environment {variable}"
                for name, variable in self._variables.items()
                if name == key or name.startswith((f"{key}.", f"{key}["))
            ),
            self._file,
        )


def _line(about: str, problem: str) -> SettingsError:
    return SettingsError(" ".join(f"{about}: {problem}".split()))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not TOML: {' '.join(str(error).split())}") from error


# --- environment ------------------------------------------------------------------------------------------


def _apply_environment(
    document: dict[str, Any], environ: Mapping[str, str], prefix: str, root: msgspec.inspect.Type
) -> dict[str, str]:
    """Write the overrides into `document`; returns key -> variable for those that were set."""
    origin: dict[str, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(prefix):
            continue
        steps = variable.removeprefix(prefix).lower().split("__")
        key = _override(document, root, steps, environ[variable], variable)
        origin[key] = variable
    return origin


def _override(
    document: dict[str, Any], root: msgspec.inspect.Type, steps: Sequence[str], text: str, variable: str
) -> str:
    """Set one value, making the tables on the way; returns its key."""
    target: Any = document
    kind, key = root, ""
    for position, step in enumerate(steps):
        kind, key, slot = _step_into(target, kind, key, step, variable)
        if position == len(steps) - 1:
            target[slot] = _typed(text, kind, key, variable)
        elif isinstance(target, dict):
            target = target.setdefault(slot, {} if _table_type(kind) is not None else [])
        else:
            target = target[slot]
    return key


def _step_into(
    target: Any, kind: msgspec.inspect.Type, key: str, step: str, variable: str
) -> tuple[msgspec.inspect.Type, str, Any]:
    """Type, key and slot of `step` inside `target`."""
    table, items = _table_type(kind), _item_type(kind)
    if table is not None and isinstance(target, dict):
        if step not in _field_names(table):
            because = _unknown_because(step, _field_names(table))
            raise _line(f"environment {variable}: {_joined(key, step)}", because)
        return _field_type(table, step), _joined(key, step), step
    if items is not None and isinstance(target, list):
        if not step.isdecimal() or int(step) > len(target):
            raise SettingsError(
                f"environment {variable}: {key} takes an entry's number, 0 to {len(target)}, not {step!r}"
            )
        if int(step) == len(target):
            target.append({})
        return items, f"{key}[{step}]", int(step)
    raise SettingsError(f"environment {variable}: {key} is one value and has no {step!r} inside")


def _typed(text: str, kind: msgspec.inspect.Type, key: str, variable: str) -> Any:
    """The text as the key's type reads it; what the type then says of the value is said with all others."""
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    for one in kinds:
        match one:
            case msgspec.inspect.BoolType():
                if text.lower() in {"true", "1", "yes", "on"}:
                    return True
                if text.lower() in {"false", "0", "no", "off"}:
                    return False
                raise _misread(variable, key, text, "true or false")
            case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
                try:
                    return int(text) if isinstance(one, msgspec.inspect.IntType) else float(text)
                except ValueError:
                    raise _misread(variable, key, text, "a number") from None
            case msgspec.inspect.LiteralType() if one.values and isinstance(one.values[0], int):
                return int(text) if text.isdecimal() else text
            case msgspec.inspect.StructType() | msgspec.inspect.VarTupleType():
                try:
                    return msgspec.json.decode(text)
                except (msgspec.DecodeError, UnicodeEncodeError):
                    raise _misread(variable, key, text, "JSON") from None
    return text


def _misread(variable: str, key: str, text: str, expected: str) -> SettingsError:
    return _line(f"environment {variable}: {key} = {_shown(text)}", f"expected {expected}")


# --- what msgspec says, said in one line with a fix --------------------------------------------------------


def _unknown_keys(
    value: object, kind: msgspec.inspect.Type, key: str
) -> Iterator[tuple[str, str, Sequence[str]]]:
    table, items = _table_type(kind), _item_type(kind)
    if table is not None and isinstance(value, dict):
        known = _field_names(table)
        for step, inner in value.items():
            if step not in known:
                yield key, step, known
            else:
                yield from _unknown_keys(inner, _field_type(table, step), _joined(key, step))
    elif items is not None and isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unknown_keys(inner, items, f"{key}[{index}]")


def _unknown_because(step: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(step, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else "remove it"
    return f"unknown key; {hint} (known here: {', '.join(known)})"


def _explained(
    error: msgspec.ValidationError,
    document: object,
    root: msgspec.inspect.Type,
    origin: Origin,
    examples: Mapping[str, str],
) -> SettingsError:
    found = _VALIDATION.match(str(error))
    assert found is not None
    what, path = found["what"], (found["path"] or "").removeprefix(".")
    missing = re.match(r"Object missing required field `(.+)`", what)
    if missing:
        key = _joined(path, missing[1])
        return origin.error(key, f"missing; add it{examples.get(key, '')}")
    # msgspec writes `[...]` for an entry of a list and does not say which.
    key, value = _find_culprit(document, path, root)
    what = what.replace("`", "").replace("Invalid enum value", "not one of the allowed values")
    return origin.wrong(key, value, f"{what[:1].lower()}{what[1:]}{_allowed(key, root)}")


def _find_culprit(document: object, path: str, root: msgspec.inspect.Type) -> tuple[str, object]:
    """The first value below `path` that its type refuses; the path of a list entry has no number in it."""
    candidates: list[tuple[str, object, msgspec.inspect.Type]] = [("", document, root)]
    for step in _STEP.findall(path):
        following: list[tuple[str, object, msgspec.inspect.Type]] = []
        for key, value, kind in candidates:
            table, items = _table_type(kind), _item_type(kind)
            if step.startswith("[") and items is not None and isinstance(value, list):
                following += [(f"{key}[{index}]", inner, items) for index, inner in enumerate(value)]
            elif table is not None and isinstance(value, dict) and step in value:
                following.append((_joined(key, step), value[step], _field_type(table, step)))
        candidates = following
    for key, value, kind in candidates:
        if not _is_valid(value, kind):
            return key, value
    return (candidates[0][0], candidates[0][1]) if candidates else (path, None)


def _is_valid(value: object, kind: msgspec.inspect.Type) -> bool:  # noqa: PLR0911 - one return a type
    match kind:
        case msgspec.inspect.UnionType():
            return any(_is_valid(value, one) for one in kind.types)
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


def _allowed(key: str, root: msgspec.inspect.Type) -> str:
    """The whole of what a key takes, where that is more than the sentence about the value says."""
    kind = root
    for step in _STEP.findall(key):
        table, items = _table_type(kind), _item_type(kind)
        if step.startswith("[") and items is not None:
            kind = items
        elif table is not None:
            kind = _field_type(table, step)
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    said = [text for one in kinds if (text := _described(_without_text(one)))]
    return f" (allowed: {' or '.join(said)})" if said else ""


def _described(kind: msgspec.inspect.Type) -> str:  # noqa: PLR0911 - one return a type
    match kind:
        case msgspec.inspect.LiteralType():
            return ", ".join(_shown(value) for value in kind.values)
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
            return f"entries of: {_described(kind)}"
    return "entries"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 80 else f'"{value[:80]}..."'
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, dict):
        return "{...}"
    return "[...]" if isinstance(value, list) and value else str(value)


def _table_type(kind: msgspec.inspect.Type) -> msgspec.inspect.StructType | None:
    return kind if isinstance(kind, msgspec.inspect.StructType) else None


def _item_type(kind: msgspec.inspect.Type) -> msgspec.inspect.Type | None:
    return kind.item_type if isinstance(kind, msgspec.inspect.VarTupleType) else None


def _field_names(table: msgspec.inspect.StructType) -> tuple[str, ...]:
    return tuple(entry.encode_name for entry in table.fields)


def _field_type(table: msgspec.inspect.StructType, name: str) -> msgspec.inspect.Type:
    return _without_text(next(entry.type for entry in table.fields if entry.encode_name == name))


def _without_text(kind: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """The type itself, where a description was wrapped around it."""
    return kind.type if isinstance(kind, msgspec.inspect.Metadata) else kind


def _joined(key: str, step: str) -> str:
    return f"{key}.{step}" if key else step
