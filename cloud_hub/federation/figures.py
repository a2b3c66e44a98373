"""Series and rounds as they are shown, to people and to programs alike. Functions of the connection."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import Connection, Row, RowMapping

from cloud_hub.core.federation.guard import GuardFigures
from cloud_hub.core.federation.rounds import RoundState
from cloud_hub.core.federation.series import SeriesState
from cloud_hub.documents import Document, Hex, Number
from cloud_hub.federation.settings import SeriesSettings
from cloud_hub.store.members import MemberState, members_of, tally_members
from cloud_hub.store.rounds import get_round, get_series, list_rounds, list_series

SeriesPhaseName = Literal["asked", "running", "making", "made", "failed", "aborted"]
RoundPhaseName = Literal[
    "collecting",
    "aggregating",
    "judging",
    "committing",
    "rolling_back",
    "aborting",
    "committed",
    "rolled_back",
    "aborted",
]
MemberName = Literal["asked", "answered", "counted", "rejected", "late"]

MAX_ROUNDS_SHOWN: Final = 500


class Series(Document, frozen=True):
    """A series of rounds. `why` says how it ended, or what it waits for; `failures` are in a row."""

    id: Number
    model: str
    phase: SeriesPhaseName
    why: str
    committed: Number
    failures: Number
    first_base: Hex | None
    base: Hex | None
    window_start: Number
    release: str | None
    created_by: str
    created_at_ms: Number
    ended_at_ms: Number | None
    settings: SeriesSettings


class SeriesPage(Document, frozen=True):
    """A page of series, the newest first; `next` is the `cursor` of the following one."""

    series: list[Series]
    next: str | None


class Round(Document, frozen=True):
    """A round. Of those asked, `answered` are in the store and in time; after closing they are `counted` or
    `rejected`, by reason. `foreign`, `repeated` and `stale` updates changed nothing. Bytes up are of deltas,
    bytes down of offers and training bases.
    """

    id: str
    series: Number
    model: str
    number: Number
    phase: RoundPhaseName
    why: str
    opened_at_ms: Number
    closed_at_ms: Number | None
    base: Hex
    result: Hex | None
    asked: Number
    answered: Number
    counted: Number
    late: Number
    rejected: dict[str, int]
    foreign: Number
    repeated: Number
    stale: Number
    bytes_up: Number
    bytes_down: Number
    guard: GuardFigures | None


class RoundPage(Document, frozen=True):
    """A page of rounds, the newest first; `next` is the `cursor` of the following one."""

    rounds: list[Round]
    next: str | None


class RoundMember(Document, frozen=True):
    """How a board stands in a round."""

    device: str
    state: MemberName
    reason: str | None
    detail: str | None
    num_examples: Number | None
    bytes_up: Number
    bytes_down: Number


class RoundDetail(Document, frozen=True):
    """A round and the boards in it."""

    round: Round
    members: list[RoundMember]


class SeriesDetail(Document, frozen=True):
    """A series and its rounds, the first one first."""

    series: Series
    rounds: list[Round]


def series_page(connection: Connection, *, before: int | None, limit: int) -> SeriesPage:
    """Series with ids below `before`."""
    rows = list_series(connection, before=before, limit=limit + 1)
    page = [_series(row) for row in rows[:limit]]
    return SeriesPage(series=page, next=str(page[-1].id) if len(rows) > limit else None)


def series_detail(connection: Connection, series_id: int) -> SeriesDetail:
    """One series with its last rounds.

    Raises:
        NotFoundError: when there is none of this id.
    """
    row = get_series(connection, series_id)
    rows = list_rounds(connection, series_id=series_id, before=None, limit=MAX_ROUNDS_SHOWN)
    return SeriesDetail(series=_series(row), rounds=list(reversed(_rounds(connection, rows))))


def round_page(
    connection: Connection, *, series_id: int | None, before: tuple[int, int] | None, limit: int
) -> RoundPage:
    """Rounds older than series and number `before`."""
    rows = list_rounds(connection, series_id=series_id, before=before, limit=limit + 1)
    page = _rounds(connection, rows[:limit])
    last = page[-1] if len(rows) > limit else None
    return RoundPage(rounds=page, next=None if last is None else f"{last.series}.{last.number}")


def round_detail(connection: Connection, round_id: str) -> RoundDetail:
    """One round with its members.

    Raises:
        NotFoundError: when there is none of this id.
    """
    (shown,) = _rounds(connection, [get_round(connection, round_id)])
    members = [
        RoundMember(
            device=row["device"],
            state=row["state"],
            reason=row["reason"],
            detail=row["detail"],
            num_examples=row["num_examples"],
            bytes_up=row["bytes_up"],
            bytes_down=row["bytes_down"],
        )
        for row in members_of(connection, round_id)
    ]
    return RoundDetail(round=shown, members=members)


def _series(row: RowMapping) -> Series:
    machine = None if row["machine"] is None else msgspec.json.decode(row["machine"], type=SeriesState)
    return Series(
        id=row["id"],
        model=row["model"],
        phase=row["phase"],
        why=row["why"],
        committed=0 if machine is None else machine.committed,
        failures=0 if machine is None else machine.failures,
        first_base=_hex(row["first_base"]),
        base=_hex(row["base"]),
        window_start=row["window_start"],
        release=row["release"],
        created_by=row["created_by"],
        created_at_ms=row["created_at_ms"],
        ended_at_ms=row["ended_at_ms"],
        settings=msgspec.json.decode(row["settings"], type=SeriesSettings),
    )


def _rounds(connection: Connection, rows: Sequence[RowMapping]) -> list[Round]:
    tallies: defaultdict[str, list[Row[Any]]] = defaultdict(list)
    for tally in tally_members(connection, [row["id"] for row in rows]):
        tallies[tally.round_id].append(tally)
    return [_round(row, tallies[row["id"]]) for row in rows]


def _round(row: RowMapping, tallies: Sequence[Row[Any]]) -> Round:
    state = msgspec.json.decode(row["state"], type=RoundState)
    devices: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for tally in tallies:
        devices[tally.state] += tally.devices
        if tally.state == MemberState.REJECTED.value:
            rejected[tally.reason or "unknown"] += tally.devices
    return Round(
        id=row["id"],
        series=row["series"],
        model=row["model"],
        number=row["number"],
        phase=row["outcome"] or state.phase.value,
        why=row["why"],
        opened_at_ms=row["opened_at_ms"],
        closed_at_ms=row["closed_at_ms"],
        base=row["base"].hex(),
        result=_hex(row["result"]),
        asked=devices.total(),
        answered=len(state.votes),
        counted=devices[MemberState.COUNTED.value],
        late=devices[MemberState.LATE.value],
        rejected=dict(sorted(rejected.items())),
        foreign=state.foreign,
        repeated=state.repeated,
        stale=state.stale,
        bytes_up=sum(int(tally.bytes_up) for tally in tallies),
        bytes_down=sum(int(tally.bytes_down) for tally in tallies),
        guard=None if row["guard"] is None else msgspec.json.decode(row["guard"], type=GuardFigures),
    )


def _hex(digest: bytes | None) -> str | None:
    return None if digest is None else digest.hex()
