"""Series and rounds, as functions of the connection. What a state means is in `core.federation`.

States are kept as the JSON that their machines write; whoever changes one keeps it in the transaction of
what caused the change.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, func, select, update

from cloud_hub.errors import NotFoundError
from cloud_hub.store import schema

ASKED: Final = "asked"
"""The phase of a series that the coordinator has not seen yet."""

_series = schema.series
_rounds = schema.rounds


@dataclass(frozen=True, slots=True)
class SeriesRow:
    """A series that is open, as the coordinator needs it."""

    id: int
    model: str
    settings: str
    phase: str
    machine: str | None
    abort_reason: str | None
    graph: bytes
    first_base: bytes | None
    base: bytes | None
    window_start: int


@dataclass(frozen=True, slots=True)
class RoundRow:
    """A round that has not ended."""

    id: str
    series: int
    number: int
    base: bytes
    state: str
    result: bytes | None


# --- series ------------------------------------------------------------------------------------------------


def insert_series(
    connection: Connection, *, model: str, settings: str, graph: bytes, created_by: str, now_ms: int
) -> int:
    """Ask for a series; its id. The guard's window ends at the newest case of now.

    A second one for the same model while one is open is refused by the database.
    """
    newest = select(func.max(schema.cases.c.id)).where(schema.cases.c.model == model)
    row = {
        "model": model,
        "settings": settings,
        "phase": ASKED,
        "created_by": created_by,
        "created_at_ms": now_ms,
        "graph": graph,
        "window_start": connection.execute(newest).scalar() or 0,
    }
    return int(connection.execute(_series.insert().returning(_series.c.id), row).scalar_one())


def open_series_rows(connection: Connection) -> list[SeriesRow]:
    """Every series that has not ended, the oldest first."""
    columns = [_series.c[name] for name in SeriesRow.__slots__]
    query = select(*columns).where(_series.c.ended_at_ms.is_(None)).order_by(_series.c.id)
    return [SeriesRow(*row) for row in connection.execute(query)]


def open_series_of(connection: Connection, model: str) -> int | None:
    """The id of the model's open series, None if there is none."""
    query = select(_series.c.id).where(_series.c.model == model, _series.c.ended_at_ms.is_(None))
    return connection.execute(query).scalar()


def save_series(connection: Connection, series_id: int, **values: Any) -> None:
    """Change columns of a series."""
    connection.execute(update(_series).where(_series.c.id == series_id).values(**values))


def ask_to_abort(connection: Connection, series_id: int, reason: str) -> bool:
    """Ask for the end of a series; False when it has ended already. The first reason stays.

    Raises:
        NotFoundError: when there is no such series.
    """
    row = get_series(connection, series_id)
    if row["ended_at_ms"] is not None:
        return False
    if row["abort_reason"] is None:
        save_series(connection, series_id, abort_reason=reason)
    return True


def get_series(connection: Connection, series_id: int) -> RowMapping:
    """A series.

    Raises:
        NotFoundError: when there is none of this id.
    """
    row = connection.execute(select(_series).where(_series.c.id == series_id)).mappings().first()
    if row is None:
        raise NotFoundError(f"there is no series {series_id}; `cloud-hub round list` shows them")
    return row


def list_series(connection: Connection, *, before: int | None, limit: int) -> Sequence[RowMapping]:
    """Series with an id below `before`, the newest first."""
    query = select(_series).order_by(_series.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(_series.c.id < before)
    return connection.execute(query).mappings().all()


# --- rounds ------------------------------------------------------------------------------------------------


def next_round_number(connection: Connection, model: str) -> int:
    """The number of the model's next round, over all its series."""
    query = (
        select(func.max(_rounds.c.number))
        .join_from(_rounds, _series, _rounds.c.series == _series.c.id)
        .where(_series.c.model == model)
    )
    return int(connection.execute(query).scalar() or 0) + 1


def insert_round(connection: Connection, row: RoundRow, *, now_ms: int) -> None:
    """Open a round."""
    values = {
        "id": row.id,
        "series": row.series,
        "number": row.number,
        "base": row.base,
        "state": row.state,
        "opened_at_ms": now_ms,
    }
    connection.execute(_rounds.insert(), values)


def save_round(connection: Connection, round_id: str, **values: Any) -> None:
    """Change columns of a round."""
    connection.execute(update(_rounds).where(_rounds.c.id == round_id).values(**values))


def open_round_of(connection: Connection, series_id: int) -> RoundRow | None:
    """The round of a series that has not ended."""
    columns = [_rounds.c[name] for name in RoundRow.__slots__]
    query = select(*columns).where(_rounds.c.series == series_id, _rounds.c.outcome.is_(None))
    row = connection.execute(query).first()
    return None if row is None else RoundRow(*row)


def end_open_round(connection: Connection, series_id: int, why: str, *, now_ms: int) -> None:
    """Abort the round of a series that can go on no more, if one is open."""
    connection.execute(
        update(_rounds)
        .where(_rounds.c.series == series_id, _rounds.c.outcome.is_(None))
        .values(outcome="aborted", why=why, closed_at_ms=now_ms)
    )


def round_of_number(connection: Connection, series_id: int, number: int) -> RowMapping | None:
    """A round of a series by its number, ended or not."""
    query = select(_rounds).where(_rounds.c.series == series_id, _rounds.c.number == number)
    return connection.execute(query).mappings().first()


def series_of_rounds(connection: Connection, round_ids: Collection[str]) -> dict[str, tuple[int, str]]:
    """Series and model of each of these rounds that there is."""
    query = (
        select(_rounds.c.id, _series.c.id, _series.c.model)
        .join_from(_rounds, _series, _rounds.c.series == _series.c.id)
        .where(_rounds.c.id.in_(sorted(round_ids)))
    )
    return {row[0]: (row[1], row[2]) for row in connection.execute(query)}


def committed_rounds(connection: Connection, series_id: int) -> Sequence[RowMapping]:
    """The rounds of a series that were committed, in order."""
    query = (
        select(_rounds)
        .where(_rounds.c.series == series_id, _rounds.c.outcome == "committed")
        .order_by(_rounds.c.number)
    )
    return connection.execute(query).mappings().all()


def list_rounds(
    connection: Connection, *, series_id: int | None, before: tuple[int, int] | None, limit: int
) -> Sequence[RowMapping]:
    """Rounds with their model, the newest first; `before`: series and number of the last one of a page."""
    query = select(_rounds, _series.c.model).join_from(_rounds, _series, _rounds.c.series == _series.c.id)
    if series_id is not None:
        query = query.where(_rounds.c.series == series_id)
    if before is not None:
        series, number = before
        is_older = _rounds.c.series < series
        query = query.where(is_older | ((_rounds.c.series == series) & (_rounds.c.number < number)))
    query = query.order_by(_rounds.c.series.desc(), _rounds.c.number.desc()).limit(limit)
    return connection.execute(query).mappings().all()


def get_round(connection: Connection, round_id: str) -> RowMapping:
    """A round with its model.

    Raises:
        NotFoundError: when there is none of this id.
    """
    query = (
        select(_rounds, _series.c.model)
        .join_from(_rounds, _series, _rounds.c.series == _series.c.id)
        .where(_rounds.c.id == round_id)
    )
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFoundError(f"there is no round {round_id[:64]!r}")
    return row
