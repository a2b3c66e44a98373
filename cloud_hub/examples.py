"""Cases with a verdict as arrays: what the hub trains on, what the guard and the certificate judge by.

A person's label outranks the full model's. What another full model than the present one said counts for
nothing: the file was replaced for a reason. Tensors are read a page at a time, each pack once a page, so that
memory is bounded by the page, or by `limit` where all is wanted at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import RowMapping

from cloud_hub.errors import NotFoundError
from cloud_hub.models import HubModel
from cloud_hub.store.blobs import Blobs
from cloud_hub.store.database import Database
from cloud_hub.store.examples import ExampleFilter, count_examples, example_page, oldest_of_newest
from edge_cascade.errors import ProtocolError
from edge_cascade.messages import Source, Use
from edge_cascade.packing import unpack_probabilities
from edge_cascade.tensors import decode_tensor, inflate_bytes

log = logging.getLogger(__name__)

PAGE: Final = 256
MAX_SPAN_BYTES: Final = 8 * 2**20
"""Neighbours in a pack are read together, up to so much at once."""

UNKNOWN: Final = -1
"""In `LabelledCases.model_labels`: the full model has said nothing."""


class CaseStore(Protocol):
    """The parts of `store.store.Store` that are read. A command beside a running hub brings its own."""

    @property
    def database(self) -> Database:
        """Open."""
        ...

    @property
    def blobs(self) -> Blobs:
        """The packs that the database names."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LabelledCases:
    """Cases in the order of their `ids` (n,) int64.

    `x` (n, *input_shape) float32 in the sensor's unit, as it came off the wire. `labels` (n,) int64 are a
    person's where `is_human` (n,) bool, else the full model's. `probabilities` (n, classes) float32 are the
    full model's, NaN where it was outranked or has said nothing; `model_labels` (n,) int64 what it said,
    `UNKNOWN` for nothing. `damaged` cases more have a verdict and a tensor that cannot be read.
    """

    ids: NDArray[np.int64]
    x: NDArray[np.float32]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    is_human: NDArray[np.bool_]
    model_labels: NDArray[np.int64]
    damaged: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> LabelledCases:
        """Some of the cases."""
        return LabelledCases(
            self.ids[index],
            self.x[index],
            self.labels[index],
            self.probabilities[index],
            self.is_human[index],
            self.model_labels[index],
        )


def read_examples(
    store: CaseStore,
    model: HubModel,
    use: Use,
    *,
    after_id: int = 0,
    upto_id: int | None = None,
    limit: int | None = None,
    audits_only: bool = False,
) -> LabelledCases:
    """The newest `limit` cases of a use, or all, with ids above `after_id` and up to `upto_id`.

    Raises:
        StoreError: when the store cannot be read now.
    """
    wanted = ExampleFilter(model.name, use, model.full_model, after_id, upto_id, audits_only)
    if limit is not None:
        oldest = store.database.run(partial(oldest_of_newest, wanted=wanted, count=max(limit, 1)))
        wanted = replace(wanted, after_id=max(after_id, oldest - 1))
    return joined_cases(model, list(example_pages(store, model, wanted)))


def count_cases(
    store: CaseStore, model: HubModel, use: Use, *, after_id: int = 0, upto_id: int | None = None
) -> int:
    """How many cases with a verdict `read_examples` would find, damaged ones among them."""
    wanted = ExampleFilter(model.name, use, model.full_model, after_id, upto_id)
    return store.database.run(lambda c: count_examples(c, wanted))


def example_pages(
    store: CaseStore, model: HubModel, wanted: ExampleFilter, *, page: int = PAGE
) -> Iterator[LabelledCases]:
    """The same, a page at a time.

    Raises:
        StoreError: when the store cannot be read now.
    """
    while True:
        rows = store.database.run(partial(example_page, wanted=wanted, limit=page))
        if rows:
            yield _read_page(store.blobs, model, rows)
        if len(rows) < page:
            return
        wanted = replace(wanted, after_id=int(rows[-1]["id"]))


def joined_cases(model: HubModel, pages: Sequence[LabelledCases]) -> LabelledCases:
    """Pages as one; none give arrays of no cases."""
    classes = len(model.labels)
    if not pages:
        return LabelledCases(
            np.zeros(0, np.int64),
            np.zeros((0, *model.input_shape), np.float32),
            np.zeros(0, np.int64),
            np.zeros((0, classes), np.float32),
            np.zeros(0, np.bool_),
            np.zeros(0, np.int64),
        )
    return LabelledCases(
        np.concatenate([page.ids for page in pages]),
        np.concatenate([page.x for page in pages]),
        np.concatenate([page.labels for page in pages]),
        np.concatenate([page.probabilities for page in pages]),
        np.concatenate([page.is_human for page in pages]),
        np.concatenate([page.model_labels for page in pages]),
        sum(page.damaged for page in pages),
    )


def _read_page(blobs: Blobs, model: HubModel, rows: Sequence[RowMapping]) -> LabelledCases:
    classes = len(model.labels)
    tensors = read_tensors(blobs, rows)
    kept: list[RowMapping] = []
    samples: list[NDArray[np.float32]] = []
    for row in rows:
        x = tensors.get(int(row["id"]))
        if x is not None and x.shape == model.input_shape and 0 <= row["label"] < classes:
            kept.append(row)
            samples.append(x)
    damaged = len(rows) - len(kept)
    if damaged:
        log.warning("examples left out model=%s damaged=%d", model.name, damaged)
    return LabelledCases(
        ids=np.array([row["id"] for row in kept], np.int64),
        x=np.stack(samples) if samples else np.zeros((0, *model.input_shape), np.float32),
        labels=np.array([row["label"] for row in kept], np.int64),
        probabilities=np.array([_probabilities(row, classes) for row in kept], np.float32).reshape(
            -1, classes
        ),
        is_human=np.array([row["source"] == int(Source.HUMAN) for row in kept], np.bool_),
        model_labels=np.array([_model_label(row, model) for row in kept], np.int64),
        damaged=damaged,
    )


def _probabilities(row: RowMapping, classes: int) -> Sequence[float]:
    """The full model's; a person's word has replaced them where there is one."""
    if row["source"] == int(Source.MODEL):
        found = unpack_probabilities(row["probabilities"])
        if len(found) == classes:
            return found
    return [float("nan")] * classes


def _model_label(row: RowMapping, model: HubModel) -> int:
    said = row["model_label"]
    is_ours = row["full_model"] == model.full_model and said is not None and 0 <= said < len(model.labels)
    return int(said) if is_ours else UNKNOWN


def read_tensors(blobs: Blobs, rows: Sequence[RowMapping]) -> dict[int, NDArray[np.float32]]:
    """Tensors by case id, without those that are damaged or missing."""
    found: dict[int, NDArray[np.float32]] = {}
    for span in _spans(rows):
        try:
            found.update(_read_span(blobs, span))
        except NotFoundError:
            # A pack that ends too early still holds what lies before its end.
            for row in span:
                try:
                    found.update(_read_span(blobs, [row]))
                except NotFoundError as error:
                    log.debug("case %d: %s", row["id"], error)
    return found


def _spans(rows: Sequence[RowMapping]) -> Iterator[list[RowMapping]]:
    """Rows whose tensors lie close together in one pack."""
    span: list[RowMapping] = []
    for row in sorted(rows, key=lambda row: (row["blob"], row["blob_offset"])):
        is_far = span and (
            row["blob"] != span[0]["blob"]
            or row["blob_offset"] + row["blob_length"] - span[0]["blob_offset"] > MAX_SPAN_BYTES
        )
        if is_far:
            yield span
            span = []
        span.append(row)
    if span:
        yield span


def _read_span(blobs: Blobs, span: Sequence[RowMapping]) -> dict[int, NDArray[np.float32]]:
    start = int(span[0]["blob_offset"])
    end = max(row["blob_offset"] + row["blob_length"] for row in span)
    content = blobs.get(span[0]["blob"], start, end - start)
    found = {}
    for row in span:
        first = row["blob_offset"] - start
        stored = content[first : first + row["blob_length"]]
        try:
            is_plain = row["blob_length"] == row["tensor_bytes"]
            encoded = stored if is_plain else inflate_bytes(stored, row["tensor_bytes"])
            found[int(row["id"])] = decode_tensor(encoded)
        except ProtocolError as error:
            log.debug("case %d: %s", row["id"], error)
    return found
