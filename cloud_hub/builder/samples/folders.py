"""Reads a folder with one sub-folder per class, of images or arrays; the classes are the sub-folders' names.

    DATA/<class>/...            all samples, divided later
    DATA/train/<class>/...      with `calibration` (`cal`, `val`) and `test` beside it: divided already

An image or a `.npy` file is one sample, an `.npz` file holds several as `x`. Grey images are (height, width),
coloured ones (height, width, 3): a network of coloured images wants the layout channels_last.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Final

import numpy as np

from cloud_hub.builder.samples.arrays import MAX_DATA_BYTES, SINGLE, Array, list_arrays, read_arrays
from cloud_hub.builder.samples.data import Dataset, Parts, check_samples
from cloud_hub.errors import BuildError
from edge_cascade.manifest import MAX_LABELS

ARRAYS: Final = (".npy", ".npz")
IMAGES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

_PART_NAMES: Final[Mapping[str, str]] = {
    "train": "train",
    "calibration": "calibration",
    "cal": "calibration",
    "val": "calibration",
    "test": "test",
}
_MEASURED = ("I", "F", "I;16", "I;16L", "I;16B")
_GREY = ("1", "L", "LA")


def load_folder(path: Path, *, max_bytes: int = MAX_DATA_BYTES) -> Parts:
    """All samples below a folder, in the order of their files' names.

    Raises:
        BuildError: in one line, for whatever cannot be used.
    """
    try:
        return _load(path, max_bytes)
    except OSError as error:
        raise BuildError(f"{path}: cannot be read: {error}") from error


def _load(path: Path, max_bytes: int) -> Parts:
    folders = _folders(path)
    parts = {"train": path}
    if folders and all(folder.name in _PART_NAMES for folder in folders):
        parts = {_PART_NAMES[folder.name]: folder for folder in folders}
        if len(parts) != len(folders):
            raise BuildError(f"{path}: two folders are the calibration data: keep one of them")
    classes = {part: _folders(folder) for part, folder in parts.items()}
    names = tuple(sorted({folder.name for found in classes.values() for folder in found}))
    if not 2 <= len(names) <= MAX_LABELS:
        raise BuildError(
            f"{path}: {len(names)} folders of a class, expected one for each of 2 to {MAX_LABELS} classes"
        )
    remaining = max_bytes
    loaded = {}
    for part, found in classes.items():
        loaded[part] = _load_part(parts[part], found, names, remaining, max_bytes)
        remaining -= loaded[part].x.nbytes
    return Parts(**loaded)


def _load_part(
    path: Path, folders: Sequence[Path], names: Sequence[str], remaining: int, max_bytes: int
) -> Dataset:
    samples: list[Array] = []
    labels: list[int] = []
    dtypes: set[np.dtype[np.generic]] = set()
    for folder in folders:
        for file in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            x = _read_samples(file, remaining, max_bytes)
            remaining -= 4 * x.size
            if samples and x.shape[1:] != samples[0].shape[1:]:
                raise BuildError(
                    f"{file}: samples of {x.shape[1:]} where the first ones are {samples[0].shape[1:]}: "
                    "bring all to one size"
                )
            dtypes.add(x.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                samples.append(x.astype(np.float32))
            check_samples(samples[-1], str(file))
            labels.extend([names.index(folder.name)] * len(x))
    if not samples:
        raise BuildError(f"{path}: its class folders are empty")
    return Dataset(
        x=np.concatenate(samples),
        y=np.array(labels, np.int64),
        names=tuple(names),
        stored_as=np.result_type(*dtypes).name,
    )


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_samples(file: Path, remaining: int, max_bytes: int) -> Array:
    """The samples `(n, *shape)` of one file, if they take no more than `remaining` bytes as float32."""
    suffix = file.suffix.lower()
    if suffix in IMAGES:
        x: Array = _read_image(file, remaining, max_bytes)[np.newaxis]
    elif suffix in ARRAYS:
        headers = list_arrays(file, max_bytes=max_bytes)
        if SINGLE in headers and headers[SINGLE].memory_bytes > remaining:
            raise _too_large(file, max_bytes)
        x = read_arrays(file, [SINGLE], max_bytes=max_bytes)[SINGLE]
        x = x[np.newaxis] if suffix == ".npy" else x
    else:
        known = ", ".join(chain(ARRAYS, IMAGES))
        raise BuildError(f"{file}: neither an array nor an image ({known}): take it out of the folder")
    if x.dtype.kind not in "biuf":
        raise BuildError(f"{file}: holds {x.dtype.name}: samples are numbers")
    return x


def _read_image(file: Path, remaining: int, max_bytes: int) -> Array:
    try:
        from PIL import Image
    except ImportError as error:
        raise BuildError(f"{file}: reading images needs Pillow: pip install 'edge-daemon[build]'") from error
    try:
        # What Pillow calls a bomb is measured by our own bound, before a pixel is decoded.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                if 4 * 3 * prod(image.size) > remaining:
                    raise _too_large(file, max_bytes)
                if image.mode in _MEASURED:
                    return np.asarray(image)
                return np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))
    except BuildError:
        raise
    except Exception as error:  # Pillow's readers let through whatever a damaged file makes them trip over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BuildError(f"{file}: not a readable image: {reason[:200]}") from error


def _too_large(file: Path, max_bytes: int) -> BuildError:
    return BuildError(f"{file}: with it the data takes more than {max_bytes:,} bytes: raise --max-bytes")
