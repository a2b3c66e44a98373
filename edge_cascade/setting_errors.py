"""What is wrong with a setting, in one line: where it was set, key, value, what is allowed, fix. No I/O."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from edge_cascade.errors import SettingsError
from edge_cascade.setting_types import (
    described,
    field_names,
    field_type,
    is_valid,
    item_type,
    joined,
    shown,
    table_type,
    without_text,
)

_VALIDATION = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"[^.\[\]]+|\[[^\]]*\]")


class Origin:
    """Says where a key was set: in the file, or by which variable."""

    def __init__(self, file: str, variables: Mapping[str, str]) -> None:
        self._file = file
        self._variables = variables

    def wrong(self, key: str, value: object, problem: str) -> SettingsError:
        """One line about a value: what is allowed, or how it is mended."""
        return one_line(f"{self._source_of(key)}: {key} = {shown(value)}", problem)

    def error(self, key: str, problem: str) -> SettingsError:
        """One line about a key that has no value, or whose value is not the point."""
        return one_line(f"{self._source_of(key)}: {key}", problem)

    def _source_of(self, key: str) -> str:
        return next(
            (
                f"environment {variable}"
                for name, variable in self._variables.items()
                if name == key or name.startswith((f"{key}.", f"{key}["))
            ),
            self._file,
        )


def one_line(about: str, problem: str) -> SettingsError:
    """Whatever is said, in one line: what it is about, then the problem."""
    return SettingsError(" ".join(f"{about}: {problem}".split()))


def misread(variable: str, key: str, text: str, expected: str) -> SettingsError:
    """A variable's text is not what its key takes."""
    return one_line(f"environment {variable}: {key} = {shown(text)}", f"expected {expected}")


def unknown_keys(
    value: object, kind: msgspec.inspect.Type, key: str
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Each as the table's key, the step that it does not know, and what it does."""
    table, items = table_type(kind), item_type(kind)
    if table is not None and isinstance(value, dict):
        known = field_names(table)
        for step, inner in value.items():
            if step not in known:
                yield key, step, known
            else:
                yield from unknown_keys(inner, field_type(table, step), joined(key, step))
    elif items is not None and isinstance(value, list):
        for index, inner in enumerate(value):
            yield from unknown_keys(inner, items, f"{key}[{index}]")


def unknown_because(step: str, known: Sequence[str]) -> str:
    """What is said of a key that a table does not know."""
    close = difflib.get_close_matches(step, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else "remove it"
    return f"unknown key; {hint} (known here: {', '.join(known)})"


def explained(
    error: msgspec.ValidationError,
    document: object,
    root: msgspec.inspect.Type,
    origin: Origin,
    examples: Mapping[str, str],
) -> SettingsError:
    """What msgspec says of a document, said with key, value and what is allowed."""
    found = _VALIDATION.match(str(error))
    assert found is not None
    what, path = found["what"], (found["path"] or "").removeprefix(".")
    missing = re.match(r"Object missing required field `(.+)`", what)
    if missing:
        key = joined(path, missing[1])
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
            table, items = table_type(kind), item_type(kind)
            if step.startswith("[") and items is not None and isinstance(value, list):
                following += [(f"{key}[{index}]", inner, items) for index, inner in enumerate(value)]
            elif table is not None and isinstance(value, dict) and step in value:
                following.append((joined(key, step), value[step], field_type(table, step)))
        candidates = following
    for key, value, kind in candidates:
        if not is_valid(value, kind):
            return key, value
    return (candidates[0][0], candidates[0][1]) if candidates else (path, None)


def _allowed(key: str, root: msgspec.inspect.Type) -> str:
    """The whole of what a key takes, where that is more than the sentence about the value says."""
    kind = root
    for step in _STEP.findall(key):
        table, items = table_type(kind), item_type(kind)
        if step.startswith("[") and items is not None:
            kind = items
        elif table is not None:
            kind = field_type(table, step)
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    said = [text for one in kinds if (text := described(without_text(one)))]
    return f" (allowed: {' or '.join(said)})" if said else ""
