"""The public data that federation is measured on, and the ways to spread it over devices; nothing is made up.

UCI HAR (Anguita et al. 2013), a part of it: windows of 9 channels x 128 values, six activities, 30 subjects. 21 are in
the training part, about 114 windows each, nine in the test part. Subject 1 trains the weak start; the other 20 of the
training part are 20 devices, a subject each: nobody is divided or joined. Channels are normalised by the mean and
deviation of subject 1, which is all that is known before there is a fleet.

Fashion-MNIST (Xiao et al. 2017) and scikit-learn's digits (Alpaydin and Kaynak 1998), spread by a Dirichlet draw
(Hsu 2019) and in shards of sorted labels (McMahan 2017).

`tiny_*` are random: they stand in for the files in smoke runs, and what is measured on them means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.federation.learner import Labelled
from cloud_hub.builder.networks.network import (
    AveragePool,
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    MaxPool,
    Network,
    Relu,
    Stage,
)

Parts = tuple[Labelled, ...]

HAR_FILE: Final = "uci_har_subset.npz"
FASHION_FILE: Final = "fashion_mnist.npz"
WEAK_SUBJECT: Final = 1
DEVICES: Final = 20

_TINY_SEED: Final = 7


def _pooled(classes: int) -> tuple[GlobalAveragePool, Dense]:
    return (GlobalAveragePool(), Dense(classes))


HAR_NETWORK: Final = Network(
    (9, 128),
    6,
    (
        Stage((Conv(24, 9, 2), Relu(), MaxPool(2)), _pooled(6)),
        Stage((Conv(48, 5), Relu(), MaxPool(2)), _pooled(6)),
        Stage((Conv(80, 5), Relu()), _pooled(6)),
    ),
)
"""Three exits, 28 k parameters."""

HAR_TEACHER: Final = Network(
    (9, 128),
    6,
    (Stage((Conv(48, 9, 2), Relu(), Conv(96, 5, 2), Relu(), Conv(128, 5, 2), Relu()), _pooled(6)),),
)
"""A full model: 89 k parameters."""

FASHION_NETWORK: Final = Network(
    (1, 28, 28),
    10,
    (
        Stage(
            (
                *(Conv(6, 5, batch_norm=False), Relu(), MaxPool(2)),
                *(Conv(16, 5, batch_norm=False), Relu(), MaxPool(2)),
                *(Flatten(), Dense(120), Relu(), Dense(84), Relu()),
            ),
            (Dense(10),),
        ),
    ),
)
"""As in Flower's `niid_bench`, but for padded convolutions: 108 k parameters."""

DIGITS_NETWORK: Final = Network((64,), 10, (Stage((Dense(64), Relu()), (Dense(10),)),))

TINY_NETWORK: Final = Network(
    (3, 16), 3, (Stage((Conv(6, 5, 2), Relu()), _pooled(3)), Stage((Conv(8, 3), Relu()), (AveragePool(4), Flatten(), Dense(3))))
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Subjects:
    """HAR by subject: whose windows train the weak start, those of each device's subject, and the test part."""

    network: Network
    teacher: Network
    weak: Labelled
    devices: Parts
    test: Labelled


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A set that is not spread yet."""

    network: Network
    train: Labelled
    test: Labelled


@cache
def har(folder: Path | None) -> Subjects:
    """From the file in this folder, or random without one."""
    if folder is None:
        return _tiny_subjects()
    with np.load(folder / HAR_FILE, allow_pickle=False) as data:
        x, subject = data["x_train"], data["subject_train"]
        weak = subject == WEAK_SUBJECT
        axes = (0, 2)
        mean = x[weak].mean(axes, keepdims=True)
        std = x[weak].std(axes, keepdims=True)
        everyone = _labelled((x - mean) / std, data["y_train"])
        test = _labelled((data["x_test"] - mean) / std, data["y_test"])
    others = [each for each in np.unique(subject) if each != WEAK_SUBJECT]
    return Subjects(
        HAR_NETWORK,
        HAR_TEACHER,
        everyone.rows(weak),
        tuple(everyone.rows(subject == each) for each in others),
        test,
    )


@cache
def fashion(folder: Path | None) -> Whole:
    """Grey levels normalised as in `benchmarks.cascade`; 60,000 images train, 10,000 test."""
    if folder is None:
        return _tiny_whole()
    with np.load(folder / FASHION_FILE, allow_pickle=False) as data:
        x = {part: (data[f"x_{part}"][:, np.newaxis].astype(np.float32) - 72.9) / 90.0 for part in _PARTS}
        return Whole(FASHION_NETWORK, *(_labelled(x[part], data[f"y_{part}"]) for part in _PARTS))


@cache
def digits(*, tiny: bool = False) -> Whole:
    """scikit-learn's 1,797 images in 0..1 as vectors: four in five train, the others test."""
    if tiny:
        return _tiny_whole()
    from sklearn.datasets import load_digits

    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.target))
    whole = _labelled(source.data / 16.0, source.target).rows(order)
    cut = len(whole) * 4 // 5
    return Whole(DIGITS_NETWORK, whole.rows(np.arange(cut)), whole.rows(np.arange(cut, len(whole))))


# --- ways to spread it --------------------------------------------------------------------------------------


def joined(parts: Sequence[Labelled]) -> Labelled:
    """All of them as one set."""
    return Labelled(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts]))


def spread_evenly(whole: Labelled, devices: int, rng: np.random.Generator) -> Parts:
    """IID: shuffled and cut."""
    return tuple(whole.rows(rows) for rows in np.array_split(rng.permutation(len(whole)), devices))


def spread_in_shards(whole: Labelled, devices: int, rng: np.random.Generator, *, shards: int = 2) -> Parts:
    """By sorted labels: every device has `shards` runs of them (McMahan 2017, section 3)."""
    cut = np.array_split(np.argsort(whole.y, kind="stable"), devices * shards)
    order = rng.permutation(len(cut)).reshape(devices, shards)
    return tuple(whole.rows(np.concatenate([cut[shard] for shard in chosen])) for chosen in order)


def spread_by_dirichlet(
    whole: Labelled, devices: int, rng: np.random.Generator, *, alpha: float, least: int = 10
) -> Parts:
    """Each class by shares drawn from Dirichlet(alpha) over the devices; drawn anew until all have `least`."""
    while True:
        rows: list[list[NDArray[np.intp]]] = [[] for _ in range(devices)]
        for label in np.unique(whole.y):
            own = rng.permutation(np.flatnonzero(whole.y == label))
            cuts = (np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1] * len(own)).astype(np.intp)
            for device, part in zip(rows, np.split(own, cuts), strict=True):
                device.append(part)
        chosen = [np.concatenate(parts) for parts in rows]
        if min(map(len, chosen)) >= least:
            return tuple(whole.rows(each) for each in chosen)


_PARTS: Final = ("train", "test")


def _labelled(x: NDArray[Any], y: NDArray[Any]) -> Labelled:
    return Labelled(np.ascontiguousarray(x, np.float32), y.astype(np.int64))


def _tiny_subjects() -> Subjects:
    rng = np.random.default_rng(_TINY_SEED)
    weak, *devices, test = (_tiny_samples(rng, 24) for _ in range(7))
    return Subjects(TINY_NETWORK, TINY_NETWORK, weak, tuple(devices), test)


def _tiny_whole() -> Whole:
    rng = np.random.default_rng(_TINY_SEED)
    return Whole(TINY_NETWORK, _tiny_samples(rng, 120), _tiny_samples(rng, 60))


def _tiny_samples(rng: np.random.Generator, count: int) -> Labelled:
    """Noise around waves of three lengths."""
    y = np.arange(count) % 3
    waves = np.sin(np.outer(y + 1, np.arange(16)) * 0.7)[:, np.newaxis]
    return _labelled(waves + rng.normal(0.0, 0.7, (count, 3, 16)), y)


def sizes_of(parts: Sequence[Labelled]) -> Mapping[str, int]:
    """Of the smallest, the middle and the largest part."""
    sizes = sorted(map(len, parts))
    return {"least": sizes[0], "median": sizes[len(sizes) // 2], "most": sizes[-1]}
