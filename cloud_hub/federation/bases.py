"""Training bases: the first from a bundle, each next one from the step that is sent, and the way to a board.

A next base is the last one plus its step as the boards will decode it, so that whoever adds the same step
holds the same base. Each is kept as that step and as the whole of it; a board is sent whichever is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from cloud_hub.errors import NotFoundError
from cloud_hub.store.bases import BaseRow, find_base, insert_base, lead_up_to
from cloud_hub.store.deliveries import Place, insert_blob
from cloud_hub.store.store import Store
from edge_cascade.delta_payloads import Encoding
from edge_cascade.deltas import decode_delta, encode_delta
from edge_cascade.messages import TrainingBase
from edge_cascade.weights import (
    FROM_ZEROS,
    FloatArray,
    Weights,
    climb_chain,
    difference,
    moved,
    shapes_of,
    size_bytes_of,
    weights_digest,
    zeros_of,
)

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class NewBase:
    """A base whose pack is in the blobs and whose row is not in the database yet. `extra` is in its pack."""

    row: BaseRow
    weights: dict[str, FloatArray]
    pack: str
    pack_bytes: int
    extra: Place | None

    @property
    def rule_columns(self) -> dict[str, object]:
        """Where `extra` lies, as a round's row says it."""
        if self.extra is None:
            return {}
        place = self.extra
        return {"rule_blob": place.blob, "rule_offset": place.offset, "rule_length": place.length}

    def keep(self, connection: Connection, *, now_ms: int) -> None:
        """Name the pack, and keep the base."""
        insert_blob(connection, self.pack, self.pack_bytes, now_ms=now_ms)
        insert_base(connection, self.row, now_ms=now_ms)


class Bases:
    """Makes, keeps and finds training bases."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def first(self, model: str, graph: bytes, parameters: Weights) -> NewBase:
        """The base that a bundle's parameters are.

        Raises:
            ProtocolError: when they are not finite.
            StoreError: when its pack cannot be written.
        """
        # A sum knows no negative zero: without this a board that starts from zeros would end elsewhere.
        weights = moved(parameters, zeros_of(shapes_of(parameters)))
        return self._new(model, graph, weights, origin=FROM_ZEROS, step=encode_delta(weights, "fp32"))

    def next(
        self,
        base: BaseRow,
        weights: Weights,
        wanted: Weights,
        encoding: Encoding,
        *,
        extra: bytes = b"",
    ) -> NewBase:
        """The base that boards reach from `weights` by the step towards `wanted`. `extra` shares its pack.

        Raises:
            ProtocolError: when the step is not finite.
            StoreError: when its pack cannot be written.
        """
        step = encode_delta(difference(wanted, weights), encoding)
        after = moved(weights, decode_delta(step, shapes_of(weights), max_bytes=base.size_bytes))
        return self._new(base.model, base.graph, after, origin=base.digest, step=step, extra=extra)

    def row(self, digest: bytes) -> BaseRow:
        """The row of a base.

        Raises:
            NotFoundError: when there is none.
        """
        row = self._store.database.run(lambda c: find_base(c, digest))
        if row is None:
            raise NotFoundError(f"there is no training base {digest.hex()[:12]}")
        return row

    def load(self, row: BaseRow, shapes: Shapes) -> dict[str, FloatArray]:
        """A base's weights.

        Raises:
            ProtocolError: when what is stored is not this base.
            StoreError: when it cannot be read.
        """
        whole = self._read(row.whole)
        return climb_chain(zeros_of(shapes), [whole], expected=row.digest, max_bytes=row.size_bytes)

    def way_to(self, digest: bytes, origin: bytes) -> TrainingBase | None:
        """What to send a board that holds `origin`; None for a base that is not there.

        The steps from there where they are shorter than the whole, else the whole from zeros.

        Raises:
            StoreError: when it cannot be read.
        """
        bases = self._store.database.run(lambda c: lead_up_to(c, digest))
        if not bases:
            return None
        chain = _chain(bases, origin)
        model = bases[0].model
        if chain and sum(base.step.length for base in chain) < bases[0].whole.length:
            return TrainingBase(model, digest, origin, [self._read(base.step) for base in chain])
        return TrainingBase(model, digest, FROM_ZEROS, [self._read(bases[0].whole)])

    def _new(
        self, model: str, graph: bytes, weights: Weights, *, origin: bytes, step: bytes, extra: bytes = b""
    ) -> NewBase:
        whole = step if origin == FROM_ZEROS else encode_delta(weights, "fp32")
        content = whole + (b"" if origin == FROM_ZEROS else step) + extra
        pack = self._store.blobs.put(content)
        whole_place = Place(pack, 0, len(whole))
        step_place = whole_place if origin == FROM_ZEROS else Place(pack, len(whole), len(step))
        row = BaseRow(
            weights_digest(weights),
            model,
            graph,
            origin,
            step_place,
            whole_place,
            size_bytes_of(shapes_of(weights)),
        )
        extra_place = Place(pack, len(content) - len(extra), len(extra)) if extra else None
        return NewBase(row, dict(weights), pack, len(content), extra_place)

    def _read(self, place: Place) -> bytes:
        return self._store.blobs.get(place.blob, place.offset, place.length)


def _chain(bases: list[BaseRow], origin: bytes) -> list[BaseRow]:
    """Of a base and those before it, those whose steps lead from `origin`, in order; none without a way."""
    for index, base in enumerate(bases):
        if base.origin == origin and origin != FROM_ZEROS:
            return bases[index::-1]
    return []
