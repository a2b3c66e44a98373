"""The examples as one thread sees them: what comes is written in one transaction, what is too much leaves.

Rules are in `core.examples`, statements in `example_file`; this holds the two together, with the rows' index
in memory. Disk and damage are lived with here: what could not be written is counted and forgotten.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, assert_never

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_cascade.burst import Burst
from edge_cascade.errors import ProtocolError
from edge_cascade.manifest import Wire
from edge_cascade.messages import BOOT_BYTES, Source, Use, Verdict
from edge_cascade.packing import unpack_probabilities
from edge_cascade.tensors import decode_tensor, encode_tensor
from edge_daemon.core.example_index import ExampleIndex, Name, Named
from edge_daemon.core.examples import (
    Drawn,
    ExampleCounts,
    ExampleDrop,
    ExampleRow,
    Label,
    LabelOutcome,
    Origin,
    decide_label,
    select_drawn,
    select_surplus,
)
from edge_daemon.example_file import ROW_OVERHEAD_BYTES, Content, ExampleFile
from edge_daemon.recent import Seen
from edge_daemon.sqlite_files import DamagedFileError, is_damage, move_aside

log = logging.getLogger(__name__)

REOPEN_S: Final = 30.0
"""How often a file that could not be opened is tried again."""
SLACK: Final = 32
"""Above a limit one row in so many leaves too, so that not every new row needs a selection."""


@dataclass(frozen=True, slots=True)
class ExampleModel:
    """What the store needs to know of a model."""

    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    wire: Wire


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict came."""

    model: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Labelled:
    """A label came from the site. Without `answer_id` it was for a last answer that nobody remembers."""

    sensor: str
    label: str
    answer_id: str | None
    seen: Seen | None


Event = Seen | Judged | Labelled


@dataclass(frozen=True, slots=True)
class Truth:
    """Somebody beside this board's own network has said what a sample is, which is not of the holdout."""

    model: str
    name: Name
    sensor: str
    label: int


OnTruth = Callable[[Truth, Callable[[], NDArray[np.float32] | None]], None]
"""Beside it, what reads the sample `(*input_shape) float32` as it is kept, off the wire; only at once."""


class ExampleLedger:
    """One file of examples. No method raises because of a disk."""

    def __init__(
        self,
        path: Path,
        models: Mapping[str, ExampleModel],
        *,
        max_examples: int,
        max_bytes: int,
        on_truth: OnTruth | None = None,
    ) -> None:
        """`on_truth` is told of every label that comes from outside, of one sample perhaps several times."""
        self._on_truth = on_truth
        self._path = path
        self._models = models
        self._max_examples = max_examples
        self._max_bytes = max_bytes
        self._file: ExampleFile | None = None
        self._index = ExampleIndex()
        self._retry_at_s = 0.0
        self._burst = Burst()
        self._labels: Counter[LabelOutcome] = Counter()
        self._dropped: Counter[ExampleDrop] = Counter()
        self._stored = 0
        self._corruptions = 0
        self.counts = ExampleCounts()
        """As of the last change; any thread may read it."""

    def open(self) -> None:
        """Open the file; what is damaged is moved aside and begun anew."""
        self._open()
        self._note_counts()

    def close(self) -> None:
        """Give the file up; what was written stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, events: Sequence[Event]) -> None:
        """Take note of what happened, in this order and in one transaction, and make room for it."""
        file = self._file_now()
        before = self._labels.copy(), self._dropped.copy(), self._stored
        try:
            if file is None:
                self._dropped[ExampleDrop.DISK] += _samples_in(events)
            else:
                with file.transaction():
                    for event in events:
                        self._apply(file, event)
                    self._trim(file)
        except Exception as error:  # noqa: BLE001 - a defect must not end the thread either
            self._labels, self._dropped, self._stored = before
            self._dropped[ExampleDrop.DISK] += _samples_in(events)
            self._recover(error)
        self._note_counts()

    def draw(self, model: str, max_examples: int, least: Origin) -> Drawn:
        """Examples to learn from; see `ports.Examples`."""
        spec = self._models[model]
        file = self._file_now()
        chosen: list[ExampleRow] = []
        if file is not None:
            chosen = select_drawn(self._index.rows(model), max_examples, least=least)
        # Filled row by row: on disk they are small, as float32 they are the largest thing on this board.
        x = np.empty((len(chosen), *spec.input_shape), np.float32)
        found: list[tuple[ExampleRow, Content]] = []
        damaged: list[ExampleRow] = []
        try:
            if file is not None:
                for row in chosen:
                    content = file.content(row.id)
                    sample = None if content is None else _decoded(content, row, spec)
                    if content is None or sample is None:
                        damaged.append(row)
                    else:
                        x[len(found)] = sample
                        found.append((row, content))
                with file.transaction():
                    self._drop(file, damaged, ExampleDrop.DAMAGED)
        except sqlite3.Error as error:
            self._recover(error)
        self._note_counts()
        return _drawn(x[: len(found)], found, spec)

    # --- what happened -------------------------------------------------------------------------------------

    def _apply(self, file: ExampleFile, event: Event) -> None:
        match event:
            case Seen():
                own = event.label is not None and not event.is_sent
                self._add(file, event, Label(event.label or 0, Origin.SELF) if own else None)
            case Judged():
                self._judge(file, event)
            case Labelled():
                self._labels[self._label(file, event)] += 1
            case _:
                assert_never(event)

    def _add(self, file: ExampleFile, seen: Seen, label: Label | None) -> None:
        name = name_of(seen.answer_id)
        if name is None or self._index.find(name) is not None:
            return
        tensor = encode_tensor(seen.x, self._models[seen.model].wire, deflate=True)
        row = ExampleRow(
            self._index.next_id, seen.model, label, seen.is_sent, len(tensor) + ROW_OVERHEAD_BYTES
        )
        named = Named(name, seen.sensor, row)
        file.add(named, Content(tensor, b"", seen.probability))
        self._index.put(named)
        self._stored += 1
        self._tell(file, named)

    def _judge(self, file: ExampleFile, judged: Judged) -> None:
        verdict = judged.verdict
        named = self._index.find((verdict.boot, verdict.seq))
        classes = len(self._models[judged.model].labels)
        if named is None or named.row.model != judged.model:
            return
        if verdict.use is not Use.TRAIN:
            self._drop(file, [named.row], ExampleDrop.HOLDOUT)
            return
        if verdict.label >= classes:
            return
        origin = Origin.HUMAN if verdict.source is Source.HUMAN else Origin.MODEL
        label = decide_label(named.row.label, Label(verdict.label, origin, verdict.revision))
        probabilities = verdict.probabilities if len(verdict.probabilities) == 2 * classes else None
        self._change(file, named, replace(named.row, label=label, is_pending=False), probabilities)

    def _label(self, file: ExampleFile, labelled: Labelled) -> LabelOutcome:
        seen = labelled.seen
        named = self._index.find(None if labelled.answer_id is None else name_of(labelled.answer_id))
        model = named.row.model if named is not None else seen.model if seen is not None else None
        if model is None or (named is not None and named.sensor != labelled.sensor):
            return LabelOutcome.UNMATCHED
        spec = self._models.get(model)
        index = None if spec is None else _index_of(labelled.label, spec.labels)
        if index is None:
            self._warn("a label that is no class of model %s: %.80r", model, labelled.label)
            return LabelOutcome.UNKNOWN
        label = decide_label(None if named is None else named.row.label, Label(index, Origin.HUMAN, None))
        if named is not None:
            self._change(file, named, replace(named.row, label=label), None)
        elif seen is not None:
            self._add(file, seen, label)
        return LabelOutcome.USED

    def _change(self, file: ExampleFile, named: Named, row: ExampleRow, probabilities: bytes | None) -> None:
        size_bytes = file.relabel(row, probabilities)
        named = replace(named, row=replace(row, size_bytes=size_bytes))
        self._index.put(named)
        self._tell(file, named)

    def _tell(self, file: ExampleFile, named: Named) -> None:
        row = named.row
        # What waits for its verdict may turn out to be of the holdout.
        is_told = row.label is not None and row.may_be_drawn and row.label.origin is not Origin.SELF
        if self._on_truth is None or row.label is None or not is_told:
            return

        def read() -> NDArray[np.float32] | None:
            content = file.content(row.id)
            return None if content is None else _decoded(content, row, self._models[row.model])

        self._on_truth(Truth(row.model, named.name, named.sensor, row.label.index), read)

    # --- room ----------------------------------------------------------------------------------------------

    def _trim(self, file: ExampleFile) -> None:
        index = self._index
        for model in self._models:
            for is_pending, held in (
                (False, index.drawable_of(model)),
                (True, index.pending().get(model, 0)),
            ):
                if held > self._max_examples:
                    rows = [row for row in index.rows(model) if row.may_be_drawn is not is_pending]
                    excess = held - self._max_examples + self._max_examples // SLACK
                    self._make_room(file, select_surplus(rows, excess_rows=excess))
        if index.size_bytes > self._max_bytes:
            excess = index.size_bytes - self._max_bytes + self._max_bytes // SLACK
            self._make_room(file, select_surplus(index.rows(), excess_bytes=excess))

    def _make_room(self, file: ExampleFile, surplus: Sequence[ExampleRow]) -> None:
        self._drop(file, [row for row in surplus if not row.may_be_drawn], ExampleDrop.EXPIRED)
        self._drop(file, [row for row in surplus if row.may_be_drawn], ExampleDrop.LIMIT)

    def _drop(self, file: ExampleFile, rows: Sequence[ExampleRow], reason: ExampleDrop) -> None:
        file.remove(row.id for row in rows)
        for row in rows:
            self._index.remove(row.id)
        self._dropped[reason] += len(rows)

    def _note_counts(self) -> None:
        self.counts = ExampleCounts(
            rows=self._index.drawable(),
            pending=self._index.pending(),
            size_bytes=self._index.size_bytes,
            stored=self._stored,
            labels=self._labels.copy(),
            dropped=+self._dropped,
            corruptions=self._corruptions,
        )

    # --- a disk that refuses -------------------------------------------------------------------------------

    def _file_now(self) -> ExampleFile | None:
        if self._file is None and time.monotonic() >= self._retry_at_s:
            self._open()
        return self._file

    def _open(self) -> None:
        for _ in range(2):
            try:
                self._file = ExampleFile.open(self._path)
                self._load(self._file)
                self._forget_renamed(self._file)
            except (DamagedFileError, sqlite3.Error, OSError) as error:
                if not self._set_aside(error):
                    return
            else:
                return

    def _load(self, file: ExampleFile) -> None:
        index = ExampleIndex()
        for named in file.rows():
            index.put(named)
        self._index = index

    def _forget_renamed(self, file: ExampleFile) -> None:
        """A label is kept as a number, which means nothing among other classes."""
        with file.transaction():
            for model, spec in self._models.items():
                names = msgspec.msgpack.encode(spec.labels)
                if file.classes_of(model) != names:
                    self._drop(file, self._index.rows(model), ExampleDrop.RENAMED)
                    file.set_classes(model, names)

    def _recover(self, error: Exception) -> None:
        """What was written since the last commit is gone: read again what there is."""
        self._warn("examples were not taken: %r", error)
        log.debug("examples were not taken", exc_info=error)
        if self._file is not None and not _is_damage(error):
            try:
                self._load(self._file)
            except (DamagedFileError, sqlite3.Error) as second:
                error = second
            else:
                return
        if self._set_aside(error):
            self._open()

    def _set_aside(self, error: Exception) -> bool:
        """Move a damaged file out of the way; whether there may be a new one now."""
        self.close()
        self._index = ExampleIndex()
        if _is_damage(error):
            try:
                target = move_aside(self._path)
            except OSError as refused:
                error = refused
            else:
                self._corruptions += 1
                log.warning("damaged examples moved aside file=%s why=%s", target, error)
                return True
        self._retry_at_s = time.monotonic() + REOPEN_S
        self._warn("no examples are kept: %s: %s", self._path, error)
        return False

    def _warn(self, text: str, *values: object) -> None:
        kept_back = self._burst.note(now_s=time.monotonic())
        if kept_back is not None:
            log.warning(f"{text} kept_back=%d", *values, kept_back)  # noqa: G004 - the text is a constant


def _is_damage(error: Exception) -> bool:
    return isinstance(error, DamagedFileError) or (isinstance(error, sqlite3.Error) and is_damage(error))


def nothing_drawn(spec: ExampleModel) -> Drawn:
    """No examples of this model."""
    return _drawn(np.empty((0, *spec.input_shape), np.float32), (), spec)


def name_of(answer_id: str) -> Name | None:
    """Boot and seq of an answer's id, None for what is no id."""
    boot, _, seq = answer_id.partition("-")
    try:
        name = bytes.fromhex(boot), int(seq)
    except ValueError:
        return None
    return name if len(name[0]) == BOOT_BYTES and 0 <= name[1] < 2**63 else None


def _samples_in(events: Sequence[Event]) -> int:
    return sum(isinstance(event, Seen) for event in events)


def _index_of(label: str, labels: Sequence[str]) -> int | None:
    if label in labels:
        return labels.index(label)
    is_index = label.isascii() and label.isdecimal() and len(label) <= 5
    return int(label) if is_index and int(label) < len(labels) else None


def _decoded(content: Content, row: ExampleRow, spec: ExampleModel) -> NDArray[np.float32] | None:
    if row.label is None or row.label.index >= len(spec.labels):
        return None
    try:
        x = decode_tensor(content.tensor)
    except ProtocolError as error:
        log.debug("damaged example id=%d: %s", row.id, error)
        return None
    return x if x.shape == spec.input_shape else None


def _drawn(x: NDArray[np.float32], found: Sequence[tuple[ExampleRow, Content]], spec: ExampleModel) -> Drawn:
    classes = len(spec.labels)
    probabilities = np.full((len(found), classes), np.nan, np.float32)
    for number, (_, content) in enumerate(found):
        if len(content.probabilities) == 2 * classes:
            probabilities[number] = unpack_probabilities(content.probabilities)
    given = [row.label for row, _ in found if row.label is not None]
    return Drawn(
        x=x,
        labels=np.array([label.index for label in given], np.int64),
        origins=np.array([label.origin for label in given], np.uint8),
        probabilities=probabilities,
        confidence=np.array([content.confidence for _, content in found], np.float32),
    )
