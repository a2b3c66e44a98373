"""The REST interface's view of the registry."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Annotated, Final

from aiohttp import web
from msgspec import Meta, field

from cloud_hub.admin.answering import json_response, read_body, read_query
from cloud_hub.admin.documents import MAX_PAGE
from cloud_hub.admin.rollouts import AskedRollout
from cloud_hub.admin.route import TOKEN, Context, Route
from cloud_hub.core.collecting import DAY_S, CollectRules
from cloud_hub.documents import Document, Heard, Number
from cloud_hub.errors import NotFoundError
from cloud_hub.registry import Release, UnreadableRelease, release_of, releases_of
from cloud_hub.releases.collect import Collected, collect
from cloud_hub.rollouts.orders import MAX_REASON
from cloud_hub.rollouts.releases import halt_release, promote, retire
from cloud_hub.store.releases import get_release, list_releases


class Releases(Document, frozen=True):
    """A page of releases, the newest first; `next` is the `cursor` of the following one."""

    releases: list[Release]
    unreadable: list[UnreadableRelease]
    next: str | None


class ReleaseQuery(Heard, frozen=True):
    """Which releases."""

    model: Annotated[str, Meta(max_length=64)] | None = None
    cursor: Annotated[str, Meta(pattern="^[0-9]{1,18}$", description="`next` of the page before")] | None = (
        None
    )
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50


async def _releases(hub: Context, request: web.Request) -> web.Response:
    query = read_query(request, ReleaseQuery)
    before = None if query.cursor is None else int(query.cursor)
    rows = await hub.store.database.run_async(
        lambda c: list_releases(c, model=query.model, before=before, limit=query.limit + 1)
    )
    page = rows[: query.limit]
    releases, unreadable = releases_of(page)
    following = str(page[-1]["id"]) if len(rows) > query.limit else None
    return json_response(Releases(releases=releases, unreadable=unreadable, next=following))


class Promote(Heard, frozen=True):
    """To the boards with these labels; none: to all."""

    group: dict[str, str] = field(default_factory=dict)


class Reason(Heard, frozen=True):
    """Why, for people."""

    reason: Annotated[str, Meta(max_length=MAX_REASON)] = ""


class Collect(Heard, frozen=True):
    """How many of each model are kept that nothing points at, and how old any must be to go."""

    keep_live: Annotated[int, Meta(ge=1)] = 3
    keep_drafts: Annotated[int, Meta(ge=0)] = 5
    min_age_days: Annotated[float, Meta(ge=0, le=36_500)] = 7.0
    dry_run: bool = False


class CollectedReleases(Document, frozen=True):
    """The releases whose files went, or would."""

    collected: list[Collected]


class RetiredRelease(Document, frozen=True):
    """A release that is never offered again."""

    release: Number


async def _release(hub: Context, request: web.Request) -> web.Response:
    number = _number(request)
    return json_response(release_of(await hub.store.database.run_async(lambda c: get_release(c, number))))


async def _promote(hub: Context, request: web.Request) -> web.Response:
    number, asked = _number(request), await read_body(request, Promote, '{"group": {"site": "hamburg"}}')
    speaker, now_ms, parts = request[TOKEN].name, time.time_ns() // 1_000_000, hub.rollouts
    rollout = await hub.store.database.run_async(
        lambda c: promote(c, number, by=speaker, now_ms=now_ms, is_signed=parts.is_signed, group=asked.group)
    )
    parts.wake()
    return json_response(AskedRollout(rollout=rollout))


async def _halt(hub: Context, request: web.Request) -> web.Response:
    number, asked = _number(request), await read_body(request, Reason, '{"reason": "text"}')
    speaker, now_ms = request[TOKEN].name, time.time_ns() // 1_000_000
    rollout = await hub.store.database.run_async(
        lambda c: halt_release(c, number, by=speaker, now_ms=now_ms, reason=asked.reason)
    )
    hub.rollouts.wake()
    return json_response(AskedRollout(rollout=rollout))


async def _retire(hub: Context, request: web.Request) -> web.Response:
    number, asked = _number(request), await read_body(request, Reason, '{"reason": "text"}')
    speaker, now_ms = request[TOKEN].name, time.time_ns() // 1_000_000
    await hub.store.database.run_async(
        lambda c: retire(c, number, by=speaker, now_ms=now_ms, reason=asked.reason)
    )
    return json_response(RetiredRelease(release=number))


async def _collect(hub: Context, request: web.Request) -> web.Response:
    asked = await read_body(request, Collect, '{"dry_run": true}')
    rules = CollectRules(asked.keep_live, asked.keep_drafts, asked.min_age_days * DAY_S)
    collecting = partial(
        collect,
        hub.store.database,
        hub.store.state_dir,
        rules,
        by=request[TOKEN].name,
        now_ms=time.time_ns() // 1_000_000,
        dry_run=asked.dry_run,
    )
    # Files are removed on the way.
    collected = await asyncio.get_running_loop().run_in_executor(None, collecting)
    return json_response(CollectedReleases(collected=collected))


def _number(request: web.Request) -> int:
    text = request.match_info["id"]
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise NotFoundError(f"there is no release {text[:40]!r}; ids are numbers")
    return int(text)


RELEASE_ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "GET", "/v1/releases", _releases, "read", "Releases, the newest first", "releases",
        Releases, query=ReleaseQuery, errors=(400,),
    ),
    Route(
        "GET", "/v1/releases/{id}", _release, "read", "Where a release comes from, what was measured of it",
        "releases", Release, path_parameters=("id",), errors=(404,),
    ),
    Route(
        "POST", "/v1/releases/{id}/promote", _promote, "admin", "Offer a release to all boards at once",
        "releases", AskedRollout, body=Promote, path_parameters=("id",), errors=(400, 404, 409, 413),
    ),
    Route(
        "POST", "/v1/releases/{id}/halt", _halt, "admin", "Halt the rollout that carries a release",
        "releases", AskedRollout, body=Reason, path_parameters=("id",), errors=(400, 404, 409, 413),
    ),
    Route(
        "POST", "/v1/releases/{id}/retire", _retire, "admin", "Never offer a release again",
        "releases", RetiredRelease, body=Reason, path_parameters=("id",), errors=(400, 404, 409, 413),
    ),
    Route(
        "POST", "/v1/registry/collect", _collect, "admin", "Remove the files of releases that nobody needs",
        "releases", CollectedReleases, body=Collect, errors=(400, 413),
    ),
)  # fmt: skip
