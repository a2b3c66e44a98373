"""Divides data into what trains, what chooses thresholds and what certifies them. No I/O; chance is seeded.

What trained never calibrates: exact copies of training samples are taken out of the calibration data, whole
groups stay in one part, and windows that share readings with a calibration window do not train. Calibration
samples are independent of each other but for their groups: of exact copies the first is kept, or its group.

Before the test nothing is looked at of the samples that certify but their bytes, to find copies, their
groups, and which classes are among their labels, to refuse a promise about a class that none of them has.

Of data that was never divided half trains, 15 % optimise the chain of thresholds and 35 % test it. A test at
epsilon 0.005 and delta 0.05 needs 600 samples without a loss, more for every plan that shares delta, and
grows sharper up to some 5,000; the chain, a dozen thresholds, settles on a third of that. Calibration data
that was given is divided in the same proportion of 15 to 35.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.samples.data import Dataset, Labels, Parts
from cloud_hub.errors import BuildError
from edge_cascade.manifest import Window

Index = NDArray[np.intp]

MIN_SAMPLES: Final = 10
"""Fewer samples in a part than this are a mistake, whatever they are meant for."""

DROPPED: Final = -1
"""The part of a sample that shares readings with another part's."""

_BLOCK_REACHES = 8
_NEW_CLASS_GAIN = 0.1
_NAMED_AT_MOST = 5


@dataclass(frozen=True, slots=True)
class Shares:
    """How data that was never divided is divided; the three make 1."""

    train: float = 0.50
    optimise: float = 0.15
    calibrate: float = 0.35

    def __post_init__(self) -> None:
        """Refuse shares that are none.

        Raises:
            BuildError: if one is not above 0 or they do not make 1.
        """
        shares = (self.train, self.optimise, self.calibrate)
        if not all(share > 0 for share in shares) or abs(sum(shares) - 1.0) > 1e-6:
            raise BuildError(f"shares of {shares} to train, optimise and calibrate: each above 0, together 1")


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """`train` for weights, `optimise` for thresholds, `calibrate` for the certificate, `test` for the report.

    Samples are in seeded random order. `notes` are lines for a person: what was dropped, what is missing.
    """

    train: Dataset
    optimise: Dataset
    calibrate: Dataset
    test: Dataset | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Copies:
    """How many calibration samples were dropped as exact copies, by what they are copies of."""

    of_training: int
    of_each_other: int


def split_parts(
    parts: Parts, *, seed: int = 0, shares: Shares | None = None, overlap: Window | None = None
) -> Splits:
    """Divide what a source holds. Calibration comes out of the training data where none is given.

    `overlap` says that consecutive samples are windows of one stream, in its order, and how they overlap;
    see `divide_stream`. Where there are groups it is not needed: windows overlap inside a recording, and that
    stays whole.

    Raises:
        BuildError: if a part is empty or too small, or knows a class less than the rest; if only one of
            training and calibration data has groups, or one group is in both.
    """
    shares = shares or Shares()
    rng = np.random.default_rng(seed)
    if parts.train is None:
        raise BuildError("the data has no training part: it needs an array x or x_train")
    if parts.calibration is None:
        all_shares = (shares.train, shares.optimise, shares.calibrate)
        (train, optimise, calibrate), twice = _divide(parts.train, all_shares, rng, overlap, trains=0)
    else:
        _check_groups_apart(parts.train, parts.calibration)
        train = parts.train.rows(rng.permutation(len(parts.train)))
        rest = shares.optimise + shares.calibrate
        two_shares = (shares.optimise / rest, shares.calibrate / rest)
        (optimise, calibrate), twice = _divide(parts.calibration, two_shares, rng, overlap, trains=None)
    test = parts.test
    if test is not None and overlap is not None and test.groups is None:
        test = test.rows(np.arange(0, len(test), _reach(overlap) + 1))

    seen = _digests(train)
    optimise, dropped_first = _without(optimise, seen)
    calibrate, dropped_second = _without(calibrate, seen)
    splits = Splits(train, optimise, calibrate, test)
    dropped = _Copies(dropped_first + dropped_second, twice)
    _check_sizes(splits, dropped)
    _check_classes(splits)
    return Splits(train, optimise, calibrate, test, tuple(_notes(parts, splits, seen, dropped)))


def divide_samples(y: Labels | None, count: int, shares: Sequence[float], rng: np.random.Generator) -> Index:
    """The part of each of `count` independent samples, every class by the same shares.

    Of a class too rare to be shared out the last parts get their sample first.
    """
    part = np.empty(count, np.intp)
    labels = np.zeros(count, np.int64) if y is None else y
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        # The sum of shares may miss a whole number by an ulp.
        cuts = np.floor(np.cumsum(shares)[:-1] * len(rows) + 1e-9).astype(np.intp)
        for index, chosen in enumerate(np.split(rows, cuts)):
            part[chosen] = index
    return part


def divide_groups(
    groups: Labels, y: Labels | None, shares: Sequence[float], rng: np.random.Generator
) -> Index:
    """The part of each sample, no group in two of them: largest groups first, each to where it helps most.

    What helps is the sum over classes of squared distances to the shares, as fractions of the class, and a
    little for every class that a part did not have.

    Raises:
        BuildError: if there are fewer groups than parts.
    """
    names, inverse = np.unique(groups, return_inverse=True)
    if len(names) < len(shares):
        raise BuildError(
            f"{len(names)} groups cannot be divided into {len(shares)} parts without breaking one: "
            "give x_train and x_calibration, or a finer group"
        )
    labels = np.zeros(len(groups), np.int64) if y is None else np.unique(y, return_inverse=True)[1]
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (inverse, labels), 1.0)
    counts /= counts.sum(axis=0)
    order = rng.permutation(len(names))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]

    wanted = np.tile(np.array(shares)[:, np.newaxis], counts.shape[1])
    missing = wanted.copy()
    part_of = np.full(len(names), DROPPED, np.intp)
    for place, group in enumerate(order):
        gain = (missing**2 - (missing - counts[group]) ** 2).sum(axis=1)
        gain += _NEW_CLASS_GAIN * ((counts[group] > 0) & (missing == wanted)).sum(axis=1)
        empty = [index for index in range(len(shares)) if index not in part_of]
        if len(empty) == len(order) - place:
            gain[[index for index in range(len(shares)) if index not in empty]] = -np.inf
        chosen = int(gain.argmax())
        part_of[group] = chosen
        missing[chosen] -= counts[group]
    return part_of[inverse]


def overlap_groups(count: int, window: Window) -> Labels:
    """Blocks of consecutive windows of one stream, `(count,)` from 0: what is divided instead of windows.

    Overlapping windows are a single chain from the first to the last, so a block has to cut it somewhere:
    windows near a cut share readings with the next block. A block is eight times as long as the overlap
    reaches, but never so long that there are fewer than 30.
    """
    independent = _reach(window) + 1
    block = max(independent, min(_BLOCK_REACHES * independent, count // 30))
    return np.arange(count, dtype=np.int64) // block


def divide_stream(
    count: int,
    window: Window,
    y: Labels | None,
    shares: Sequence[float],
    rng: np.random.Generator,
    *,
    dense: int | None,
) -> Index:
    """The part of each window of one stream, or `DROPPED`; only the part `dense` may overlap within itself.

    That is the one that trains; its windows that share a reading with another part's are dropped. The other
    parts keep one window of as many as overlap, so their samples need no group. Windows close in time may be
    alike all the same: where there are several recordings, groups are the safer choice.

    Raises:
        BuildError: if the stream is too short to be divided.
    """
    reach = _reach(window)
    blocks = overlap_groups(count, window)
    if blocks[-1] + 1 < len(shares):
        raise BuildError(f"a stream of {count} windows of {window.length} is too short to be divided")
    part = divide_groups(blocks, y, shares, rng)
    trains = np.zeros(count, bool) if dense is None else part == dense
    part[~trains & (np.arange(count) % (reach + 1) != 0)] = DROPPED
    for row in np.flatnonzero(~trains & (part != DROPPED)):
        near = slice(max(row - reach, 0), row + reach + 1)
        part[near][trains[near]] = DROPPED
    return part


def _reach(window: Window) -> int:
    """How many windows on, at most, one still shares a reading."""
    return -(-window.length // window.hop) - 1


def _divide(
    data: Dataset,
    shares: Sequence[float],
    rng: np.random.Generator,
    overlap: Window | None,
    *,
    trains: int | None,
) -> tuple[list[Dataset], int]:
    """The parts, and how many samples of those that do not train were dropped as copies of each other."""
    if data.groups is not None:
        part = divide_groups(data.groups, data.y, shares, rng)
    elif overlap is not None:
        part = divide_stream(len(data), overlap, data.y, shares, rng, dense=trains)
    else:
        part = divide_samples(data.y, len(data), shares, rng)
    judging = (part != DROPPED) if trains is None else (part != DROPPED) & (part != trains)
    copies = _copies(data, np.flatnonzero(judging))
    part[copies] = DROPPED
    parts = [data.rows(rng.permutation(np.flatnonzero(part == index))) for index in range(len(shares))]
    return parts, len(copies)


def _copies(data: Dataset, rows: Index) -> Index:
    """Those of some rows whose sample was there before: in another group, or anywhere if there are none."""
    groups = np.arange(len(data)) if data.groups is None else data.groups
    first: dict[bytes, int] = {}
    digests = _digests(data.rows(rows))
    again = [
        first.setdefault(digest, group) != group for digest, group in zip(digests, groups[rows], strict=True)
    ]
    return np.extract(again, rows)


def _digests(data: Dataset) -> list[bytes]:
    return [blake2b(sample.data, digest_size=16).digest() for sample in np.ascontiguousarray(data.x)]


def _without(data: Dataset, seen: Sequence[bytes]) -> tuple[Dataset, int]:
    """The samples that are no copies of those seen, and how many were."""
    known = set(seen)
    fresh = np.array([digest not in known for digest in _digests(data)], bool)
    return (data, 0) if fresh.all() else (data.rows(np.flatnonzero(fresh)), int((~fresh).sum()))


def _check_groups_apart(train: Dataset, calibration: Dataset) -> None:
    if train.groups is not None and calibration.groups is not None:
        shared = np.intersect1d(train.groups, calibration.groups)
        if len(shared):
            raise BuildError(
                f"{len(shared)} groups are in both x_train and x_calibration: give all samples as x, "
                "and they are divided by whole groups"
            )
    elif train.groups is not None:
        raise BuildError("training data has groups, calibration data has none: give groups_calibration")
    elif calibration.groups is not None:
        raise BuildError(
            "calibration data has groups, training data has none: give groups_train, so that none is in both"
        )


def _check_sizes(splits: Splits, dropped: _Copies) -> None:
    parts = {"train": splits.train, "optimise": splits.optimise, "calibrate": splits.calibrate}
    small = {name: len(data) for name, data in parts.items() if len(data) < MIN_SAMPLES}
    if small:
        told = ", ".join(f"{count} to {name}" for name, count in small.items())
        copies = dropped.of_training + dropped.of_each_other
        without = f", when {copies} exact copies are dropped" if copies else ""
        raise BuildError(f"too little data: {told}{without}, where each part needs {MIN_SAMPLES} at least")


def _check_classes(splits: Splits) -> None:
    """Nothing would be promised about a class that calibration never saw."""
    known = _classes(splits.train) | _classes(splits.optimise) | _classes(splits.calibrate)
    if splits.calibrate.y is not None and (missing := known - _classes(splits.calibrate)):
        fix = "add some"
        if splits.calibrate.groups is not None:
            fix = "all are in groups of other parts; add groups that have some, use finer groups"
        raise BuildError(
            f"no sample of {_told(missing, splits.train.names)} is left to calibrate on: {fix}, "
            "or leave the class out of the data"
        )


def _notes(parts: Parts, splits: Splits, seen: Sequence[bytes], dropped: _Copies) -> list[str]:
    notes = []
    if dropped.of_training:
        notes.append(
            f"{dropped.of_training} calibration samples are exact copies of training samples and were dropped"
        )
    if dropped.of_each_other:
        notes.append(
            f"{dropped.of_each_other} calibration samples are exact copies of others and were dropped: they "
            "are not independent"
        )
    if parts.calibration is None:
        notes.append(
            "calibration samples come out of the training data: a full model that learned from them answers "
            "them better than what comes later; give x_calibration if you have it"
        )
    held: Mapping[str, Dataset | None] = {
        "training": splits.train,
        "threshold": splits.optimise,
        "test": splits.test,
    }
    known = _classes(splits.calibrate)
    for name, data in held.items():
        if data is None:
            continue
        if data.y is None and splits.calibrate.y is not None:
            notes.append(f"the {name} samples have no labels")
        elif missing := known - _classes(data):
            notes.append(f"no {name} sample of {_told(missing, splits.calibrate.names)}")
    if splits.test is not None:
        notes.extend(_test_notes(splits.train, splits.test, seen))
    return notes


def _test_notes(train: Dataset, test: Dataset, seen: Sequence[bytes]) -> list[str]:
    notes = []
    copies = len(test) - len(_without(test, seen)[0])
    if copies:
        notes.append(f"{copies} of {len(test)} test samples are exact copies of training samples")
    if train.groups is not None and test.groups is not None:
        shared = np.intersect1d(train.groups, test.groups)
        if len(shared):
            notes.append(f"{len(shared)} groups are in both the training and the test samples")
    return notes


def _classes(data: Dataset) -> set[int]:
    return set() if data.y is None else {int(label) for label in np.unique(data.y)}


def _told(classes: set[int], names: Sequence[str] | None) -> str:
    told = [repr(names[label]) if names is not None else str(label) for label in sorted(classes)]
    more = f" and {len(told) - _NAMED_AT_MOST} more" if len(told) > _NAMED_AT_MOST else ""
    return f"class {', '.join(told[:_NAMED_AT_MOST])}{more}"
