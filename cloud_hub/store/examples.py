"""Which cases have a verdict that can teach or judge, page by page in the order of their ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, func, or_, select

from cloud_hub.store import schema
from edge_cascade.messages import Source, Use

_cases = schema.cases
_verdicts = schema.verdicts


@dataclass(frozen=True, slots=True)
class ExampleFilter:
    """Cases of a model and a use whose verdict is a person's, or one of the full model with this digest.

    Ids above `after_id`, up to `upto_id` where it is given.
    """

    model: str
    use: Use
    full_model: bytes
    after_id: int = 0
    upto_id: int | None = None
    audits_only: bool = False


def count_examples(connection: Connection, wanted: ExampleFilter) -> int:
    """How many there are."""
    query = select(func.count()).select_from(_cases).join(_verdicts, _verdicts.c.case_id == _cases.c.id)
    return connection.execute(query.where(*_conditions(wanted))).scalar_one()


def example_ids(connection: Connection, wanted: ExampleFilter) -> list[int]:
    """Their ids, ascending."""
    query = select(_cases.c.id).join(_verdicts, _verdicts.c.case_id == _cases.c.id)
    return list(connection.execute(query.where(*_conditions(wanted)).order_by(_cases.c.id)).scalars())


def oldest_of_newest(connection: Connection, wanted: ExampleFilter, count: int) -> int:
    """The id of the oldest of the newest `count`; 0 where there are fewer."""
    query = select(_cases.c.id).join(_verdicts, _verdicts.c.case_id == _cases.c.id)
    query = query.where(*_conditions(wanted)).order_by(_cases.c.id.desc()).offset(count - 1).limit(1)
    return connection.execute(query).scalar() or 0


def example_page(connection: Connection, wanted: ExampleFilter, limit: int) -> Sequence[RowMapping]:
    """The first `limit` of them: id, verdict, what the full model said, where the tensor lies."""
    query = (
        select(
            _cases.c.id,
            _verdicts.c.label,
            _verdicts.c.source,
            _verdicts.c.probabilities,
            _verdicts.c.model_label,
            _verdicts.c.full_model,
            _cases.c.blob,
            _cases.c.blob_offset,
            _cases.c.blob_length,
            _cases.c.tensor_bytes,
        )
        .join(_verdicts, _verdicts.c.case_id == _cases.c.id)
        .where(*_conditions(wanted))
        .order_by(_cases.c.id)
        .limit(limit)
    )
    return connection.execute(query).mappings().all()


def _conditions(wanted: ExampleFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [
        _cases.c.model == wanted.model,
        _cases.c.use == int(wanted.use),
        _cases.c.id > wanted.after_id,
        or_(
            _verdicts.c.source == int(Source.HUMAN),
            and_(_verdicts.c.source == int(Source.MODEL), _verdicts.c.full_model == wanted.full_model),
        ),
    ]
    if wanted.upto_id is not None:
        conditions.append(_cases.c.id <= wanted.upto_id)
    if wanted.audits_only:
        conditions.append(_cases.c.audit_ppm > 0)
    return conditions
