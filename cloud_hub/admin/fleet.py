"""What boards fetch of releases: signed metadata, files by their digest, differences of weights.

Nothing here says what to trust: a board believes signatures alone. Files are served by Range, and a file of a
digest never changes, so a download that was cut goes on where it was.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Final

from aiohttp import web

from cloud_hub.admin.ranges import send_file
from cloud_hub.admin.route import JSON, Context, Route
from cloud_hub.errors import NotFoundError
from cloud_hub.releases.layout import METADATA
from cloud_hub.rollouts.settings import TUF

OCTETS: Final = "application/octet-stream"

_METADATA_NAME = re.compile(r"(?:timestamp|[1-9][0-9]{0,9}\.[a-z]{1,32})\.json")
_DIGEST = re.compile(r"[0-9a-f]{64}")


async def _metadata(hub: Context, request: web.Request) -> web.StreamResponse:
    name = request.match_info["file"]
    path = hub.store.state_dir / TUF / METADATA / name
    content = None
    if _METADATA_NAME.fullmatch(name):
        # Whole: the file of this name is replaced at every renewal.
        with suppress(FileNotFoundError):
            content = await asyncio.get_running_loop().run_in_executor(None, path.read_bytes)
    if content is None:
        raise NotFoundError(f"there are no metadata {name[:64]!r}")
    return web.Response(body=content, content_type=JSON, headers={"Cache-Control": "no-cache"})


async def _blob(hub: Context, request: web.Request) -> web.StreamResponse:
    digest = request.match_info["sha256"]
    path = None
    if _DIGEST.fullmatch(digest):
        path = await asyncio.get_running_loop().run_in_executor(None, hub.blobs.find, digest)
    if path is not None:
        with suppress(FileNotFoundError):
            return await send_file(request, path, digest, OCTETS)
    raise NotFoundError(f"no release has a file {digest[:64]!r}")


async def _delta(hub: Context, request: web.Request) -> web.StreamResponse:
    held, wanted = request.match_info["held"], request.match_info["wanted"]
    if _DIGEST.fullmatch(held) and _DIGEST.fullmatch(wanted):
        loop = asyncio.get_running_loop()
        made = None
        kept = await loop.run_in_executor(None, hub.blobs.kept_delta, held, wanted)
        if kept is None:
            async with hub.delta_turns:
                made = await loop.run_in_executor(None, hub.blobs.delta, held, wanted)
            kept = await loop.run_in_executor(None, hub.blobs.kept_delta, held, wanted)
        if kept is not None and kept.size_bytes:
            # From the disk: a whole fleet that fetches slowly must not have a copy each in memory.
            with suppress(FileNotFoundError):
                return await send_file(request, kept.path, kept.sha256, OCTETS)
        elif made is not None:
            return web.Response(body=made, content_type=OCTETS)
    raise NotFoundError("no difference leads there; fetch the whole file")


FLEET_ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "GET", "/v1/fleet/metadata/{file}", _metadata, "fetch", "Signed metadata of releases (TUF)",
        "fleet", None, path_parameters=("file",), errors=(404,),
    ),
    Route(
        "GET", "/v1/fleet/blobs/{sha256}", _blob, "fetch", "A file of a release, whole or by Range",
        "fleet", None, OCTETS, path_parameters=("sha256",), errors=(404,), also=(206,),
    ),
    Route(
        "GET", "/v1/fleet/deltas/{model}/{held}/{wanted}", _delta, "fetch",
        "The difference of two weights parts", "fleet", None, OCTETS,
        path_parameters=("model", "held", "wanted"), errors=(404,), also=(206,),
    ),
)  # fmt: skip
