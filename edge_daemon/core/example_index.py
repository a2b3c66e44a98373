"""Which examples there are, without their tensors: found by name, counted, added up. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from edge_daemon.core.examples import ExampleRow, Origin

Name = tuple[bytes, int]
"""Boot and seq: what a case, its answer and its verdict are known by."""


@dataclass(frozen=True, slots=True)
class Named:
    """A row, what it is known by and where it came from."""

    name: Name
    sensor: str
    row: ExampleRow


class ExampleIndex:
    """All rows of a store."""

    def __init__(self) -> None:
        self._rows: dict[int, Named] = {}
        self._ids: dict[Name, int] = {}
        self._drawable: Counter[tuple[str, Origin]] = Counter()
        self._pending: Counter[str] = Counter()
        self._last_id = 0
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """What all rows count against the limit."""
        return self._size_bytes

    @property
    def next_id(self) -> int:
        """An id above all that were added."""
        return self._last_id + 1

    def put(self, named: Named) -> None:
        """Add a row, or put it in the place of the one with its id."""
        self.remove(named.row.id)
        self._rows[named.row.id] = named
        self._ids[named.name] = named.row.id
        self._last_id = max(self._last_id, named.row.id)
        self._count(named.row, 1)

    def remove(self, row_id: int) -> None:
        """Forget a row, if it is there."""
        named = self._rows.pop(row_id, None)
        if named is not None:
            del self._ids[named.name]
            self._count(named.row, -1)

    def find(self, name: Name | None) -> Named | None:
        """The row of that name."""
        return None if name is None or name not in self._ids else self._rows[self._ids[name]]

    def rows(self, model: str | None = None) -> list[ExampleRow]:
        """The rows of one model, or all, by age of their last change."""
        return [named.row for named in self._rows.values() if model in {None, named.row.model}]

    def drawable(self) -> Mapping[tuple[str, Origin], int]:
        """How many may be drawn, by model and origin."""
        return +self._drawable

    def pending(self) -> Mapping[str, int]:
        """How many wait for their verdict, by model."""
        return +self._pending

    def drawable_of(self, model: str) -> int:
        """How many of `model` may be drawn."""
        return sum(self._drawable[model, origin] for origin in Origin)

    def _count(self, row: ExampleRow, sign: int) -> None:
        self._size_bytes += sign * row.size_bytes
        if row.is_pending or row.label is None:
            self._pending[row.model] += sign
        else:
            self._drawable[row.model, row.label.origin] += sign
