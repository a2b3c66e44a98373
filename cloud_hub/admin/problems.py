"""Errors as RFC 9457 problems: a sentence each, never a traceback."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from aiohttp import web

from cloud_hub.admin.documents import Problem

PROBLEM_JSON = "application/problem+json"


class ProblemError(Exception):
    """Ends a request with a problem."""

    def __init__(self, status: HTTPStatus, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}


def problem_response(
    status: HTTPStatus, detail: str, *, headers: dict[str, str] | None = None
) -> web.Response:
    """The response for a problem."""
    problem = Problem(title=status.phrase, status=status.value, detail=detail)
    return web.Response(
        status=status.value,
        body=msgspec.json.encode(problem),
        content_type=PROBLEM_JSON,
        headers=headers,
    )
