"""The REST interface to series and rounds. Starting and ending one needs the scope `admin`."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Annotated, Any, Final

import msgspec
from aiohttp import web
from msgspec import Meta, field

from cloud_hub.admin.answering import json_response, read_query
from cloud_hub.admin.documents import MAX_PAGE
from cloud_hub.admin.problems import ProblemError
from cloud_hub.admin.route import TOKEN, Context, Route
from cloud_hub.documents import Document, Heard, Number
from cloud_hub.errors import NotFoundError
from cloud_hub.federation.figures import (
    RoundDetail,
    RoundPage,
    SeriesPage,
    round_detail,
    round_page,
    series_page,
)
from cloud_hub.federation.settings import SeriesSettings, settings_of
from cloud_hub.federation.start import abort_series, start_series


class SeriesQuery(Heard, frozen=True):
    """Which page of series."""

    cursor: Annotated[str, Meta(pattern="^[0-9]{1,18}$", description="`next` of the page before")] | None = (
        None
    )
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50


class RoundQuery(Heard, frozen=True):
    """Which rounds."""

    series: Number | None = None
    cursor: (
        Annotated[str, Meta(pattern="^[0-9]{1,18}[.][0-9]{1,18}$", description="`next` of the page before")]
        | None
    ) = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50


class StartSeries(Heard, frozen=True):
    """A series of rounds of a model; what `settings` leaves out has its default."""

    model: Annotated[str, Meta(min_length=1, max_length=64)]
    settings: SeriesSettings = field(default_factory=SeriesSettings)


class AbortSeries(Heard, frozen=True):
    """Why, for people."""

    reason: Annotated[str, Meta(max_length=500)] = ""


class AskedSeries(Document, frozen=True):
    """What the coordinator will do within a second or two."""

    series: Number


class _Started(Heard, frozen=True):
    """As `StartSeries`, before its settings are explained."""

    model: Annotated[str, Meta(min_length=1, max_length=64)]
    settings: dict[str, Any] = field(default_factory=dict)


async def _series_page(hub: Context, request: web.Request) -> web.Response:
    query = read_query(request, SeriesQuery)
    before = None if query.cursor is None else int(query.cursor)
    return json_response(
        await hub.store.database.run_async(lambda c: series_page(c, before=before, limit=query.limit))
    )


async def _round_page(hub: Context, request: web.Request) -> web.Response:
    query = read_query(request, RoundQuery)
    before = None
    if query.cursor is not None:
        series, _, number = query.cursor.partition(".")
        before = (int(series), int(number))
    return json_response(
        await hub.store.database.run_async(
            lambda c: round_page(c, series_id=query.series, before=before, limit=query.limit)
        )
    )


async def _round(hub: Context, request: web.Request) -> web.Response:
    name = request.match_info["round"]
    if not (name.isascii() and name.isalnum() and len(name) <= 64):
        raise NotFoundError(f"there is no round {name[:64]!r}")
    return json_response(await hub.store.database.run_async(lambda c: round_detail(c, name)))


async def _start_series(hub: Context, request: web.Request) -> web.Response:
    try:
        asked = msgspec.json.decode(await request.read(), type=_Started)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProblemError(
            HTTPStatus.BAD_REQUEST, f'the body must be like {{"model": "name", "settings": {{}}}}: {error}'
        ) from error
    settings = settings_of(asked.settings)
    model = hub.models.get(asked.model)
    bundle = None if model is None else model.bundle
    if bundle is None:
        known = ", ".join(sorted(hub.models)) or "none"
        raise NotFoundError(f"this hub has no model {asked.model!r}; it has: {known}")
    speaker, now_ms = request[TOKEN].name, time.time_ns() // 1_000_000
    number = await hub.store.database.run_async(
        lambda c: start_series(c, bundle, settings, created_by=speaker, now_ms=now_ms)
    )
    hub.on_series()
    return json_response(AskedSeries(series=number))


async def _abort_series(hub: Context, request: web.Request) -> web.Response:
    text = request.match_info["id"]
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise NotFoundError(f"there is no series {text[:40]!r}; ids are numbers")
    try:
        asked = msgspec.json.decode(await request.read() or b"{}", type=AbortSeries)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProblemError(
            HTTPStatus.BAD_REQUEST, f'the body must be like {{"reason": "text"}}: {error}'
        ) from error
    reason = asked.reason or f"aborted by {request[TOKEN].name}"
    await hub.store.database.run_async(lambda c: abort_series(c, int(text), reason))
    hub.on_series()
    return json_response(AskedSeries(series=int(text)))


ROUND_ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "GET", "/v1/rounds", _round_page, "read", "Rounds of federated averaging, the newest first", "rounds",
        RoundPage, query=RoundQuery, errors=(400,),
    ),
    Route(
        "GET", "/v1/rounds/{round}", _round, "read", "A round, and the boards in it", "rounds",
        RoundDetail, path_parameters=("round",), errors=(404,),
    ),
    Route(
        "GET", "/v1/series", _series_page, "read", "Series of rounds, the newest first", "rounds",
        SeriesPage, query=SeriesQuery, errors=(400,),
    ),
    Route(
        "POST", "/v1/series", _start_series, "admin", "Start a series of rounds", "rounds",
        AskedSeries, body=StartSeries, errors=(400, 404, 409, 413),
    ),
    Route(
        "POST", "/v1/series/{id}/abort", _abort_series, "admin", "End a series and its open round", "rounds",
        AskedSeries, body=AbortSeries, path_parameters=("id",), errors=(400, 404, 409, 413),
    ),
)  # fmt: skip
