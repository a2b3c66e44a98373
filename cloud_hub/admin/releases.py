"""The REST interface's view of the registry."""

from __future__ import annotations

from typing import Annotated, Final

from aiohttp import web
from msgspec import Meta

from cloud_hub.admin.answering import json_response, read_query
from cloud_hub.admin.documents import MAX_PAGE
from cloud_hub.admin.route import Context, Route
from cloud_hub.documents import Document, Heard
from cloud_hub.errors import NotFoundError
from cloud_hub.registry import Release, release_of
from cloud_hub.store.releases import get_release, list_releases


class Releases(Document, frozen=True):
    """A page of releases, the newest first; `next` is the `cursor` of the following one."""

    releases: list[Release]
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
    page = [release_of(row) for row in rows[: query.limit]]
    return json_response(Releases(releases=page, next=str(page[-1].id) if len(rows) > query.limit else None))


async def _release(hub: Context, request: web.Request) -> web.Response:
    text = request.match_info["id"]
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise NotFoundError(f"there is no release {text[:40]!r}; ids are numbers")
    return json_response(release_of(await hub.store.database.run_async(lambda c: get_release(c, int(text)))))


RELEASE_ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "GET", "/v1/releases", _releases, "read", "Releases, the newest first", "releases",
        Releases, query=ReleaseQuery, errors=(400,),
    ),
    Route(
        "GET", "/v1/releases/{id}", _release, "read", "Where a release comes from, what was measured of it",
        "releases", Release, path_parameters=("id",), errors=(404,),
    ),
)  # fmt: skip
