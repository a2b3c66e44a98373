"""What every handler of the REST interface does alike: read a query or a body, send a document."""

from __future__ import annotations

from http import HTTPStatus
from typing import TypeVar

import msgspec
from aiohttp import web

from cloud_hub.admin.problems import ProblemError
from cloud_hub.admin.route import JSON

HeardT = TypeVar("HeardT", bound=msgspec.Struct)


def read_query(request: web.Request, kind: type[HeardT]) -> HeardT:
    """The request's query as a value.

    Raises:
        ProblemError: naming the parameter.
    """
    given = request.query
    for key in given:
        if len(given.getall(key)) > 1:
            raise ProblemError(
                HTTPStatus.BAD_REQUEST, f"query parameter {key[:40]!r} is there more than once"
            )
    try:
        return msgspec.convert(dict(given), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ProblemError(HTTPStatus.BAD_REQUEST, f"query: {str(error).replace('$.', '')}") from error


async def read_body(request: web.Request, kind: type[HeardT], example: str) -> HeardT:
    """The request's body, which is JSON like `example`; an empty one is `{}`.

    Raises:
        ProblemError: saying what is wrong with it.
    """
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProblemError(HTTPStatus.BAD_REQUEST, f"the body must be like {example}: {error}") from error


def json_response(document: msgspec.Struct, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    """A document as an answer."""
    return web.Response(status=status.value, body=msgspec.json.encode(document), content_type=JSON)
