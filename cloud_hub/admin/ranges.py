"""A file that never changes, whole or in part (RFC 9110, sections 13, 14), its ETag the digest of its bytes.

aiohttp's own `FileResponse` makes its ETag of times and reads If-Range as a date alone: a client that resumes
would get a part of another file. Here If-Range with any other validator gets the whole file. One range is
answered; several, other units and what cannot be read are ignored, as section 14.2 permits.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import re
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final

from aiohttp import ETag, web

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 256 * 1024

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True, slots=True)
class Part:
    """What is sent: `size_bytes` from `start` on."""

    start: int
    size_bytes: int


def decide_part(asked: str | None, if_range: str | None, etag: str, size_bytes: int) -> Part | None:
    """What a request gets of a file of `size_bytes`: all of it where nothing valid is asked, or of another
    file; None where its range begins behind the end. `etag` is the quoted one; `asked` the field Range.
    """
    whole = Part(0, size_bytes)
    found = _RANGE.fullmatch(asked or "")
    if found is None or (if_range is not None and if_range.strip() != etag):
        return whole
    first, last = found.groups()
    if not first:
        length = min(int(last or 0), size_bytes)
        # "-" is no range; "-0" is one that nothing satisfies.
        return whole if not last else Part(size_bytes - length, length) if length else None
    start = int(first)
    if last and int(last) < start:
        return whole
    if start >= size_bytes:
        return None
    return Part(start, (min(int(last), size_bytes - 1) if last else size_bytes - 1) - start + 1)


async def send_file(request: web.Request, path: Path, sha256: str, content_type: str) -> web.StreamResponse:
    """Answer a GET with a file whose bytes have this digest.

    Raises:
        OSError: before anything is sent.
    """
    loop = asyncio.get_running_loop()
    file = await loop.run_in_executor(None, path.open, "rb")
    with file:
        size_bytes = os.fstat(file.fileno()).st_size
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        part = Part(0, 0)
        status = _precondition(request, sha256)
        if status is HTTPStatus.OK:
            asked, if_range = request.headers.get("Range"), request.headers.get("If-Range")
            found = decide_part(asked, if_range, headers["ETag"], size_bytes)
            if found is None:
                status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
                headers["Content-Range"] = f"bytes */{size_bytes}"
            else:
                part = found
                headers["Content-Type"] = content_type
                if part != Part(0, size_bytes):
                    status = HTTPStatus.PARTIAL_CONTENT
                    last = part.start + part.size_bytes - 1
                    headers["Content-Range"] = f"bytes {part.start}-{last}/{size_bytes}"
        response = web.StreamResponse(status=status, headers=headers)
        if status is not HTTPStatus.NOT_MODIFIED:
            response.content_length = part.size_bytes
        try:
            await response.prepare(request)
            await _copy(file, part, response)
        except ConnectionError:
            log.debug("whoever asked is gone path=%s", request.path)
        except OSError as error:
            # Too late for another answer: the connection ends before the announced length.
            response.force_close()
            log.error("file cannot be read on path=%s reason=%s", path, error)
    return response


def _precondition(request: web.Request, sha256: str) -> HTTPStatus:
    if request.if_match is not None and not _names(request.if_match, sha256, weakly=False):
        return HTTPStatus.PRECONDITION_FAILED
    if request.if_none_match is not None and _names(request.if_none_match, sha256, weakly=True):
        return HTTPStatus.NOT_MODIFIED
    return HTTPStatus.OK


def _names(tags: tuple[ETag, ...], sha256: str, *, weakly: bool) -> bool:
    return any(tag.value == "*" or (tag.value == sha256 and (weakly or not tag.is_weak)) for tag in tags)


async def _copy(file: io.BufferedReader, part: Part, response: web.StreamResponse) -> None:
    loop = asyncio.get_running_loop()
    file.seek(part.start)
    left = part.size_bytes
    while left:
        chunk = await loop.run_in_executor(None, file.read, min(left, CHUNK_BYTES))
        if not chunk:
            raise OSError("shorter than it was")
        left -= len(chunk)
        await response.write(chunk)
