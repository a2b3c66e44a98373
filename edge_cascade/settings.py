"""A TOML file and the environment -> a checked msgspec Struct, with every error in one line.

Knows no key of ours: the struct's own types say what is allowed, and the messages are made from them.
`PREFIX__HUB__BROKER__PORT=1884` sets `hub.broker.port`; list entries go by their number, one past the end
adds an entry. A value is read as the key's type asks; where the key takes a table or a list, as JSON.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_cascade.errors import SettingsError
from edge_cascade.setting_errors import (
    Origin,
    explained,
    misread,
    one_line,
    unknown_because,
    unknown_keys,
)
from edge_cascade.setting_types import field_names, field_type, item_type, joined, table_type

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
    document = _read_toml(path)
    overrides = _apply_environment(document, environ, prefix, msgspec.inspect.type_info(kind))
    origin = Origin(str(path), overrides)
    settings = _converted(document, kind, origin, examples)
    if check is not None:
        check(settings, origin)
    return settings


def convert_settings(values: Mapping[str, Any], kind: type[StructT], *, source: str) -> StructT:
    """The struct from plain values that came from elsewhere than a file; `source` starts every error.

    Raises:
        SettingsError: in one line, as `read_settings` says it.
    """
    return _converted(values, kind, Origin(source, {}), {})


def _converted(
    values: Mapping[str, Any], kind: type[StructT], origin: Origin, examples: Mapping[str, str]
) -> StructT:
    root = msgspec.inspect.type_info(kind)
    for key, step, known in unknown_keys(values, root, ""):
        raise origin.error(joined(key, step), unknown_because(step, known))
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise explained(error, values, root, origin, examples) from error


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
            target = target.setdefault(slot, {} if table_type(kind) is not None else [])
        else:
            target = target[slot]
    return key


def _step_into(
    target: Any, kind: msgspec.inspect.Type, key: str, step: str, variable: str
) -> tuple[msgspec.inspect.Type, str, Any]:
    """Type, key and slot of `step` inside `target`."""
    table, items = table_type(kind), item_type(kind)
    if table is not None and isinstance(target, dict):
        if step not in field_names(table):
            because = unknown_because(step, field_names(table))
            raise one_line(f"environment {variable}: {joined(key, step)}", because)
        return field_type(table, step), joined(key, step), step
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
                raise misread(variable, key, text, "true or false")
            case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
                try:
                    return int(text) if isinstance(one, msgspec.inspect.IntType) else float(text)
                except ValueError:
                    raise misread(variable, key, text, "a number") from None
            case msgspec.inspect.LiteralType() if one.values and isinstance(one.values[0], int):
                return int(text) if text.isdecimal() else text
            case msgspec.inspect.StructType() | msgspec.inspect.VarTupleType():
                try:
                    return msgspec.json.decode(text)
                except (msgspec.DecodeError, UnicodeEncodeError):
                    raise misread(variable, key, text, "JSON") from None
    return text
