"""The public data that the cascade is measured on, cut into training, calibration and test; nothing is made up.

Fashion-MNIST (Xiao et al. 2017): 50,000 images train, 10,000 calibrate, the 10,000 of its own test set test.

CWRU (Case Western Reserve University bearing data, 12 kHz, drive end): 16 conditions under 4 loads, windows of
1,024 values that overlap by half. `in time`: of every recording the first 60 % train, the next 40 % calibrate,
what was recorded later tests; this is the easier split, because every recording is in all parts. `by load`:
loads 0 and 1 train, load 2 calibrates, load 3 tests: recordings that were never seen, but for the machine
without a fault, which was recorded under one load only and is divided in time. Where samples must be
independent (calibration and test) every other window is left out, so that none overlaps with another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]

_SEED: Final = 20_261


@dataclass(frozen=True, slots=True)
class MeasuredSet:
    """One data set: `load` gives the arrays of an `.npz` for `cloud-hub build`."""

    name: str
    file: str
    load: Callable[[Path], Arrays]
    mean: float
    std: float
    wire: str
    wire_scale: float | None
    raw_bytes: int
    """Of one sample in the type that its sensor gives."""


def fashion_mnist(file: Path) -> Arrays:
    """Images of 28x28 grey levels."""
    with np.load(file, allow_pickle=False) as data:
        x, y = data["x_train"], data["y_train"].astype(np.int64)
        test = {"x_test": data["x_test"], "y_test": data["y_test"].astype(np.int64)}
    order = np.random.default_rng(_SEED).permutation(len(x))
    train, calibration = order[:50_000], order[50_000:]
    return {
        "x_train": x[train],
        "y_train": y[train],
        "x_calibration": x[calibration],
        "y_calibration": y[calibration],
        **test,
    }


def cwru_in_time(file: Path) -> Arrays:
    """Every recording in all three parts, one after the other in time."""
    with np.load(file, allow_pickle=False) as data:
        train: list[NDArray[np.intp]] = []
        calibration: list[NDArray[np.intp]] = []
        for rows in _recordings(data, "train"):
            cut = int(0.6 * len(rows))
            train.append(rows[:cut])
            # The window at the cut overlaps with the last one that trains.
            calibration.append(rows[cut + 1 :: 2])
        test = np.concatenate([rows[::2] for rows in _recordings(data, "test")])
        rows_of = {"train": np.concatenate(train), "calibration": np.concatenate(calibration)}
        parts = {name: ("train", rows) for name, rows in rows_of.items()} | {"test": ("test", test)}
        return _parts(data, parts)


def cwru_by_load(file: Path) -> Arrays:
    """No recording in two parts: other loads, so other speeds and other noise."""
    with np.load(file, allow_pickle=False) as data:
        chosen: dict[str, list[NDArray[np.intp]]] = {"train": [], "calibration": [], "test": []}
        for rows in _recordings(data, "train"):
            if data["classes"][data["y_train"][rows[0]]] == "Normal":
                first, second = int(0.5 * len(rows)), int(0.75 * len(rows))
                chosen["train"].append(rows[:first])
                chosen["calibration"].append(rows[first + 1 : second : 2])
                chosen["test"].append(rows[second + 1 :: 2])
            elif data["load_train"][rows[0]] <= 1:
                chosen["train"].append(rows)
            else:
                part = "calibration" if data["load_train"][rows[0]] == 2 else "test"
                chosen[part].append(rows[::2])
        return _parts(data, {name: ("train", np.concatenate(rows)) for name, rows in chosen.items()})


def _recordings(data: Mapping[str, NDArray[np.generic]], part: str) -> list[NDArray[np.intp]]:
    """Rows of each recording, in time: the file has them class by class and load by load."""
    key = data[f"y_{part}"].astype(np.int64) * 4 + data[f"load_{part}"]
    return [np.flatnonzero(key == value) for value in np.unique(key)]


def _parts(
    data: Mapping[str, NDArray[np.generic]], parts: Mapping[str, tuple[str, NDArray[np.intp]]]
) -> Arrays:
    arrays: Arrays = {"labels": data["classes"]}
    for name, (source, rows) in parts.items():
        arrays[f"x_{name}"] = data[f"x_{source}"][rows]
        arrays[f"y_{name}"] = data[f"y_{source}"][rows].astype(np.int64)
    return arrays


FASHION: Final = MeasuredSet(
    "Fashion-MNIST", "fashion_mnist.npz", fashion_mnist, 72.9, 90.0, "uint8", 1.0, 28 * 28
)
CWRU_IN_TIME: Final = MeasuredSet(
    "CWRU, in time", "cwru_12kde.npz", cwru_in_time, 0.0, 0.67, "int8", None, 1024 * 4
)
CWRU_BY_LOAD: Final = MeasuredSet(
    "CWRU, by load", "cwru_12kde.npz", cwru_by_load, 0.0, 0.67, "int8", None, 1024 * 4
)
SETS: Final = {"fashion": FASHION, "cwru": CWRU_IN_TIME, "cwru-load": CWRU_BY_LOAD}
