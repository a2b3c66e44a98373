"""Reads a user's data: an `.npz` file, a single `.npy`, or a folder with one sub-folder per class.

An `.npz` holds `x` and `y`, or one such pair per part: `x_train`/`y_train`, `x_calibration` (or `x_cal`,
`x_val`)/..., `x_test`/...; beside them `groups` or `groups_train`, ..., and the labels' names as `labels` or
`classes`. Labels are whole numbers from 0 or text; text without names takes the order of the alphabet, as
scikit-learn's LabelEncoder does. Without any `y` the data is unlabelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.samples.arrays import MAX_DATA_BYTES, Array, list_arrays, read_arrays
from cloud_hub.builder.samples.data import Dataset, Labels, Parts, check_samples
from cloud_hub.builder.samples.folders import load_folder
from cloud_hub.errors import BuildError
from edge_cascade.manifest import MAX_LABELS

NUMBERS: Final = "biuf"
TEXT: Final = "US"
_NOT_NAMES = "; if it labels the samples, say --y-key {}"

_SUFFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("_train", ""),
    "calibration": ("_calibration", "_cal", "_val"),
    "test": ("_test",),
}


@dataclass(frozen=True, slots=True)
class Keys:
    """What a file's arrays are called, without the part's suffix. None: the usual name, if it is there."""

    x: str = "x"
    y: str | None = None
    groups: str | None = None
    names: str | None = None


def load_parts(path: Path, *, keys: Keys | None = None, max_bytes: int = MAX_DATA_BYTES) -> Parts:
    """All that a source holds; labels and groups mean the same in every part.

    Raises:
        BuildError: in one line, for whatever cannot be used.
    """
    if path.is_dir():
        return load_folder(path, max_bytes=max_bytes)
    keys = keys or Keys()
    found = list_arrays(path, max_bytes=max_bytes)
    wanted = _choose_arrays(found, keys, path)
    arrays = read_arrays(
        path, {name for part in wanted.values() for name in part.values()}, max_bytes=max_bytes
    )
    raw = {part: {role: arrays[name] for role, name in roles.items()} for part, roles in wanted.items()}
    named = _names_array(found, keys)
    if named in {name for part in wanted.values() for name in part.values()}:
        raise BuildError(f"{path}: {named!r} cannot hold the labels and their names at once")
    names = None if named is None else _names(read_arrays(path, [named], max_bytes=max_bytes)[named], named)
    return _assemble(raw, wanted, names, path)


def load_dataset(path: Path, *, keys: Keys | None = None, max_bytes: int = MAX_DATA_BYTES) -> Dataset:
    """The samples of a source that are there to judge by: its test part, else the whole of it.

    Raises:
        BuildError: in one line, for whatever cannot be used.
    """
    parts = load_parts(path, keys=keys, max_bytes=max_bytes)
    chosen = parts.test or parts.train
    if chosen is None:
        raise BuildError(f"{path}: neither x_test nor x is there")
    return chosen


def _choose_arrays(found: Mapping[str, object], keys: Keys, path: Path) -> dict[str, dict[str, str]]:
    """By part the names of the arrays `x`, `y` and `groups`, as far as they are there."""
    chosen: dict[str, dict[str, str]] = {}
    for part, suffixes in _SUFFIXES.items():
        there = [suffix for suffix in suffixes if keys.x + suffix in found]
        if len(there) > 1:
            both = " and ".join(repr(keys.x + suffix) for suffix in there)
            raise BuildError(f"{path}: holds {both}: which of them is the {part} data?")
        if there:
            roles = {"x": keys.x, "y": keys.y or "y", "groups": keys.groups or "groups"}
            chosen[part] = {role: key + there[0] for role, key in roles.items() if key + there[0] in found}
    if not chosen:
        raise BuildError(
            f"{path}: no array {keys.x!r} or {keys.x + '_train'!r}, it holds "
            f"{', '.join(map(repr, sorted(found))) or 'nothing'}: name it with --x-key"
        )
    for role, key in (("y", keys.y), ("groups", keys.groups)):
        if key is not None and not any(role in roles for roles in chosen.values()):
            raise BuildError(f"{path}: no array {key!r} goes with any {keys.x!r}")
    return chosen


def _names_array(found: Mapping[str, object], keys: Keys) -> str | None:
    if keys.names is not None:
        return keys.names
    return next((name for name in ("labels", "classes") if name in found and name != keys.y), None)


def _assemble(
    raw: Mapping[str, Mapping[str, Array]],
    wanted: Mapping[str, Mapping[str, str]],
    names: tuple[str, ...] | None,
    path: Path,
) -> Parts:
    samples = {part: _samples(arrays["x"], wanted[part]["x"]) for part, arrays in raw.items()}
    for part, arrays in raw.items():
        for role in ("y", "groups"):
            _check_length(arrays, wanted[part], role, path)
    labels, names = encode_labels(
        {wanted[part]["y"]: arrays["y"] for part, arrays in raw.items() if "y" in arrays}, names
    )
    groups = encode_groups(
        {wanted[part]["groups"]: arrays["groups"] for part, arrays in raw.items() if "groups" in arrays}
    )
    return Parts(
        **{
            part: Dataset(
                x=samples[part],
                y=labels.get(wanted[part].get("y", "")),
                groups=groups.get(wanted[part].get("groups", "")),
                names=names,
                stored_as=arrays["x"].dtype.name,
            )
            for part, arrays in raw.items()
        }
    )


def _check_length(arrays: Mapping[str, Array], names: Mapping[str, str], role: str, path: Path) -> None:
    if role in arrays and arrays[role].shape not in {(len(arrays["x"]),), (len(arrays["x"]), 1)}:
        hint = ": one label per sample, as argmax gives it" if arrays[role].ndim == 2 else ""
        raise BuildError(
            f"{path}: {names[role]} is {arrays[role].shape} for {len(arrays['x'])} samples of "
            f"{names['x']}{hint}"
        )


def _samples(array: Array, name: str) -> NDArray[np.float32]:
    if array.dtype.kind not in NUMBERS:
        raise BuildError(f"{name} holds {array.dtype.name}: samples are numbers")
    # What float32 cannot hold becomes an infinity, which is refused by name.
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.asarray(array, np.float32, order="C")
    check_samples(x, name)
    return x


def _names(array: Array, key: str) -> tuple[str, ...]:
    if array.ndim != 1 or not 2 <= len(array) <= MAX_LABELS:
        raise BuildError(
            f"{key} is {array.shape}: expected the names of 2 to {MAX_LABELS} labels{_NOT_NAMES.format(key)}"
        )
    names = tuple(_as_text(array, key))
    if len(set(names)) != len(names) or "" in names:
        raise BuildError(f"{key} holds a name twice, or an empty one{_NOT_NAMES.format(key)}")
    return names


def encode_labels(
    raw: Mapping[str, Array], names: Sequence[str] | None
) -> tuple[dict[str, Labels], tuple[str, ...] | None]:
    """Labels as numbers by array name, and the names: those given, else those that the text itself holds.

    Raises:
        BuildError: for a label that is no whole number from 0, or not among the names.
    """
    if raw and all(array.dtype.kind in TEXT for array in raw.values()):
        texts = {key: _as_text(array, key) for key, array in raw.items()}
        if names is None and not _is_numbered(texts.values()):
            names = sorted({label for column in texts.values() for label in column})
            if len(names) > MAX_LABELS:
                raise BuildError(f"{min(raw)}: {len(names)} different labels, at most {MAX_LABELS} are used")
        if names is not None:
            places = {name: index for index, name in enumerate(names)}
            return {key: _looked_up(column, places, key) for key, column in texts.items()}, tuple(names)
        raw = {key: np.array([int(label) for label in column]) for key, column in texts.items()}
    labels = {key: _whole_numbers(array, key) for key, array in raw.items()}
    limit = MAX_LABELS if names is None else len(names)
    for key, column in labels.items():
        outside = np.flatnonzero((column < 0) | (column >= limit))
        if len(outside):
            raise BuildError(
                f"{key} holds the label {column[outside[0]]} (sample {outside[0]}): "
                + (
                    f"labels are 0 to {limit - 1}; leave samples without a label out"
                    if names is None or column[outside[0]] < 0
                    else f"there are {len(names)} names, so labels are 0 to {limit - 1}"
                )
            )
    return labels, None if names is None else tuple(names)


def encode_groups(raw: Mapping[str, Array]) -> dict[str, Labels]:
    """Groups, numbers or text, as numbers from 0 by array name; what is equal stays equal in all of them."""
    if not raw:
        return {}
    columns: dict[str, list[str]] | dict[str, list[int]]
    if any(array.dtype.kind in TEXT for array in raw.values()):
        columns = {key: _as_text(array, key) for key, array in raw.items()}
    else:
        columns = {key: _whole_numbers(array, key).tolist() for key, array in raw.items()}
    values = sorted(set().union(*columns.values()))
    places = {value: index for index, value in enumerate(values)}
    return {key: np.array([places[value] for value in column], np.int64) for key, column in columns.items()}


def _is_numbered(columns: Iterable[Sequence[str]]) -> bool:
    """Whether text holds nothing but small numbers: these are labels, not names to be sorted as words."""
    return all(label.isdecimal() and len(label) < 10 for column in columns for label in set(column))


def _looked_up(column: Sequence[str], places: Mapping[str, int], key: str) -> Labels:
    for row, label in enumerate(column):
        if label not in places:
            raise BuildError(f"{key} holds {label[:40]!r} (sample {row}), which is no name of a label")
    return np.array([places[label] for label in column], np.int64)


def _whole_numbers(array: Array, key: str) -> Labels:
    flat = array.reshape(-1)
    if flat.dtype.kind not in NUMBERS:
        raise BuildError(f"{key} holds {flat.dtype.name} where other parts hold numbers")
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(
            ~(np.abs(flat.astype(np.float64)) < 2**53) | (flat != np.rint(flat.astype(np.float64)))
        )
    if len(wrong):
        raise BuildError(f"{key} holds {flat[wrong[0]]} (sample {wrong[0]}), which is no whole number")
    return flat.astype(np.int64)


def _as_text(array: Array, key: str) -> list[str]:
    flat = array.reshape(-1)
    try:
        if flat.dtype.kind == "S":
            return [bytes(value).decode() for value in flat.tolist()]
        return [str(value) for value in flat.tolist()]
    except ValueError as error:  # bytes that are no UTF-8, code points that no text has
        raise BuildError(f"{key} holds text that is no Unicode") from error
