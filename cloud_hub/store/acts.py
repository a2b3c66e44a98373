"""The audit log: who did what to what, and when. Rows are only ever added. Functions of the connection."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, RowMapping, insert, select

from cloud_hub.store import schema

_acts = schema.acts

BY_RULES = "the rules"
"""Who acted where nobody did."""


def note_act(
    connection: Connection, act_by: str, act: str, subject: str, detail: str, *, now_ms: int
) -> None:
    """Note that somebody did something; overlong names are cut."""
    connection.execute(
        insert(_acts).values(
            at_ms=now_ms, act_by=act_by[:128], act=act[:64], subject=subject[:128], detail=detail
        )
    )


def is_noted(connection: Connection, act: str, subject: str, detail: str) -> bool:
    """Whether this very act was noted."""
    query = select(_acts.c.id).where(
        _acts.c.act == act[:64], _acts.c.subject == subject[:128], _acts.c.detail == detail
    )
    return connection.execute(query.limit(1)).first() is not None


def list_acts(
    connection: Connection, *, subject: str | None = None, before: int | None = None, limit: int | None = None
) -> Sequence[RowMapping]:
    """Acts, the newest first."""
    query = select(_acts).order_by(_acts.c.id.desc()).limit(limit)
    if subject is not None:
        query = query.where(_acts.c.subject == subject)
    if before is not None:
        query = query.where(_acts.c.id < before)
    return connection.execute(query).mappings().all()
