"""What a board learns from: which samples are kept, which label counts, which rows go first. No I/O.

A sample that was sent is *pending* until its verdict comes: whether it belongs to the holdout, which never
trains, is known only then. All others may be drawn once they have a label.
"""

from __future__ import annotations

import enum
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

SECONDS_A_MINUTE: Final = 60.0


class Origin(enum.IntEnum):
    """Who gave a label; a greater one outranks a lesser one."""

    SELF = 1
    """The board's own answer, which nobody has confirmed."""
    MODEL = 2
    """A verdict of the full model."""
    HUMAN = 3
    """A verdict that a human gave, or a label from the site."""


class ExampleDrop(enum.StrEnum):
    """Why a sample is not, or no longer, kept."""

    LIMIT = "limit"
    """A newer or more trusted one took its place."""
    EXPIRED = "expired"
    """Too many were sent after it before its verdict came."""
    HOLDOUT = "holdout"
    """Its verdict says that it judges, and so it must not train."""
    BUSY = "busy"
    """More came within a second than are kept."""
    DISK = "disk"
    """The disk did not take it."""
    DAMAGED = "damaged"
    """Its bytes on disk are no sample of this model any more."""
    RENAMED = "renamed"
    """The model's classes are others than those that its label was given among."""


class LabelOutcome(enum.StrEnum):
    """What became of a label from the site."""

    USED = "used"
    UNMATCHED = "unmatched"
    """The board does not have the sample that it is about."""
    UNKNOWN = "unknown"
    """The model has no such class."""


@dataclass(frozen=True, slots=True)
class Label:
    """A class, who says so, and which revision of that it is (a site's label: None, the latest)."""

    index: int
    origin: Origin
    revision: int | None = 0


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """A kept sample, as far as it matters here. `id` grows with each that is stored."""

    id: int
    model: str
    label: Label | None
    is_pending: bool
    size_bytes: int

    @property
    def may_be_drawn(self) -> bool:
        """Whether it may train."""
        return self.label is not None and not self.is_pending


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Examples to learn from, newest first.

    `x` (n, *input_shape) float32 in the sensor's unit, as the wire leaves it; `labels` (n,) int64; `origins`
    (n,) uint8, see `Origin`; `probabilities` (n, classes) float32 of the full model, a row of NaN where they
    are not known; `confidence` (n,) float32: the probability of the board's own answer, NaN if it had none.
    """

    x: NDArray[np.float32]
    labels: NDArray[np.int64]
    origins: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    confidence: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """Where the store stands. `rows` may be drawn; `pending` wait for a verdict. The rest is since the start.

    `size_bytes` is what counts against the limit.
    """

    rows: Mapping[tuple[str, Origin], int] = field(default_factory=dict)
    pending: Mapping[str, int] = field(default_factory=dict)
    size_bytes: int = 0
    stored: int = 0
    labels: Mapping[LabelOutcome, int] = field(default_factory=dict)
    dropped: Mapping[ExampleDrop, int] = field(default_factory=dict)
    corruptions: int = 0

    def of(self, model: str, *, least: Origin = Origin.SELF) -> int:
        """How many of `model` may be drawn with a label of origin `least` or better."""
        return sum(self.rows.get((model, origin), 0) for origin in Origin if origin >= least)


@dataclass(slots=True)
class OwnPace:
    """Which of the board's own answers are kept: at most `per_minute`, a little more while classes are new.

    Every class has a turn of its own, so that a rare one is not crowded out by the usual one. After each that
    is kept the class pauses for one to two turns, by chance, so that nothing periodic is met in step.
    """

    per_minute: float
    chance: Callable[[], float]
    """Uniform in 0..1."""
    _due_s: dict[int, float] = field(default_factory=dict)

    def decide_keep(self, label: int, *, now_s: float) -> bool:
        """Whether to keep an answer with this label that was given at `now_s` (monotonic)."""
        due_s = self._due_s.get(label)
        if self.per_minute <= 0.0 or (due_s is not None and now_s < due_s):
            return False
        self._due_s.setdefault(label, now_s)
        turn_s = len(self._due_s) * SECONDS_A_MINUTE / self.per_minute
        self._due_s[label] = now_s + turn_s * (1.0 + self.chance())
        return True


def decide_label(known: Label | None, offered: Label) -> Label:
    """The label that counts: of the higher origin, of the later revision, of two equal ones the offered."""
    known_revision = 0 if known is None or known.origin != offered.origin else known.revision or 0
    if offered.revision is None:
        offered = Label(offered.index, offered.origin, known_revision)
    if known is None or offered.origin > known.origin:
        return offered
    return offered if offered.origin == known.origin and (offered.revision or 0) >= known_revision else known


def select_surplus(
    rows: Iterable[ExampleRow], *, excess_rows: int = 0, excess_bytes: int = 0
) -> list[ExampleRow]:
    """Rows to give up, in this order, so that so many rows and so many bytes become free.

    The fullest class gives first; in it the least trusted label, then the oldest. What is pending is a class
    of its own, of two equally full classes the first to give.
    """
    classes: defaultdict[tuple[str, int], list[ExampleRow]] = defaultdict(list)
    for row in rows:
        classes[row.model, _class_of(row)].append(row)
    fullest = [(-len(members), key) for key, members in classes.items()]
    heapq.heapify(fullest)
    sorted_ones: set[tuple[str, int]] = set()
    surplus: list[ExampleRow] = []
    while fullest and (excess_rows > 0 or excess_bytes > 0):
        _, key = fullest[0]
        members = classes[key]
        if key not in sorted_ones:
            members.sort(key=_worth, reverse=True)
            sorted_ones.add(key)
        row = members.pop()
        surplus.append(row)
        excess_rows -= 1
        excess_bytes -= row.size_bytes
        if members:
            heapq.heapreplace(fullest, (-len(members), key))
        else:
            heapq.heappop(fullest)
    return surplus


def select_drawn(
    rows: Iterable[ExampleRow], max_examples: int, *, least: Origin = Origin.SELF
) -> list[ExampleRow]:
    """At most `max_examples` of those that may be drawn, newest first.

    Each class gives the same number, or all it has; in it the most trusted labels, then the newest.
    """
    classes: defaultdict[int, list[ExampleRow]] = defaultdict(list)
    for row in rows:
        if row.may_be_drawn and row.label is not None and row.label.origin >= least:
            classes[row.label.index].append(row)
    ranked: list[tuple[int, int, ExampleRow]] = []
    for members in classes.values():
        members.sort(key=_worth, reverse=True)
        ranked += [(rank, -row.id, row) for rank, row in enumerate(members)]
    # Ids differ, so that rows themselves are never compared.
    ranked.sort()
    return sorted((row for _, _, row in ranked[:max_examples]), key=lambda row: row.id, reverse=True)


def _class_of(row: ExampleRow) -> int:
    return row.label.index if row.label is not None and not row.is_pending else -1


def _worth(row: ExampleRow) -> tuple[int, int]:
    return (0 if row.label is None else row.label.origin, row.id)
