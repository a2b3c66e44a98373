"""The REST server: who may ask, how much, and how every error is said.

Bound to loopback by default. `/healthz`, `/readyz` and `/metrics` need no token from a loopback address: a
reverse proxy on the same machine must not pass them on. Everything else needs a bearer token. An address that
shows wrong ones has to wait, but for tokens that were right before: behind a proxy, or one router of a site,
everybody has one address.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler as AiohttpHandler

from cloud_hub.admin.listener import Listener
from cloud_hub.admin.metrics import Vitals
from cloud_hub.admin.problems import ProblemError, problem_response
from cloud_hub.admin.route import TOKEN, Context, RolloutParts, Route
from cloud_hub.admin.routes import ROUTES, status_of
from cloud_hub.admin.tls import Certificate
from cloud_hub.admin.tokens import check_token
from cloud_hub.core.failures import FailureLimit
from cloud_hub.errors import HubError, ListenError
from cloud_hub.models import HubModel
from cloud_hub.releases.blobs import ReleaseBlobs
from cloud_hub.store.store import Store

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 16 * 1024
SHUTDOWN_S: Final = 2.0
KEPT_ALIVE_S: Final = 75.0
MAX_RIGHT: Final = 4096
"""Tokens that are remembered as right; every use is checked all the same."""


class Service:
    """The REST interface of a hub. `start` and `stop` it on the event loop."""

    def __init__(
        self,
        store: Store,
        models: Mapping[str, HubModel],
        *,
        vitals: Callable[[], Vitals],
        problems: Callable[[], list[str]],
        on_labelled: Callable[[str], None],
        on_series: Callable[[], None] = lambda: None,
        rollouts: RolloutParts | None = None,
    ) -> None:
        self._context = Context(
            store,
            ReleaseBlobs(
                store.state_dir,
                [model.directory for model in models.values() if model.directory is not None],
            ),
            models,
            vitals,
            problems,
            on_labelled,
            on_series,
            rollouts or RolloutParts(),
        )
        self._failures = FailureLimit()
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._runner: web.AppRunner | None = None
        self._listener: Listener | None = None

    async def start(self, host: str, port: int, certificate: Certificate | None = None) -> int:
        """Listen, over TLS with a certificate; the port, which matters when 0 asked for any.

        Raises:
            ListenError: when the address cannot be had.
        """
        runner = web.AppRunner(
            self.application(),
            access_log=None,
            # Bodies are small, and what is packed small may be large.
            auto_decompress=False,
            keepalive_timeout=KEPT_ALIVE_S,
            shutdown_timeout=SHUTDOWN_S,
            handle_signals=False,
        )
        await runner.setup()
        assert runner.server is not None
        listener = Listener(runner.server)
        try:
            found = await listener.start(host, port, None if certificate is None else certificate.context())
        except OSError as error:
            await runner.cleanup()
            raise ListenError(
                f"http.host = {host!r}, http.port = {port}: cannot listen: {error.strerror or error}"
            ) from error
        self._runner, self._listener = runner, listener
        return found

    async def stop(self) -> None:
        """Stop listening; requests at hand have two seconds."""
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def application(self) -> web.Application:
        """The application with every route of the table."""
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_say_errors])
        for route in ROUTES:
            application.router.add_route(route.method, route.path, partial(self._serve, route))
        return application

    async def _serve(self, route: Route, request: web.Request) -> web.StreamResponse:
        if route.scope is not None or not _is_loopback(request.remote):
            await self._authorise(route, request)
        if self._listener is not None:
            self._listener.trust(request.protocol)
        return await route.handler(self._context, request)

    async def _authorise(self, route: Route, request: web.Request) -> None:
        address = request.remote or ""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        wait_s = self._failures.wait_s(address, now_s=time.monotonic())
        if wait_s and digest not in self._right:
            raise ProblemError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"too many wrong tokens from {address}; wait {wait_s} s",
                headers={"Retry-After": str(wait_s)},
            )
        known = None
        if token:
            now_ms = time.time_ns() // 1_000_000
            known = await self._context.store.database.run_async(
                lambda c: check_token(c, token, now_ms=now_ms)
            )
            self._note_token(address, digest, is_right=known is not None)
        if known is None:
            raise ProblemError(
                HTTPStatus.UNAUTHORIZED,
                "a valid token is needed: `Authorization: Bearer <token>`, from `cloud-hub token create`",
                headers={"WWW-Authenticate": 'Bearer realm="cloud-hub"'},
            )
        needed = route.scope or "read"
        if not known.allows(needed):
            raise ProblemError(
                HTTPStatus.FORBIDDEN,
                f"token {known.name!r} lacks the scope {needed!r}; it has: {', '.join(known.scopes)}",
            )
        request[TOKEN] = known

    def _note_token(self, address: str, digest: bytes, *, is_right: bool) -> None:
        self._right.pop(digest, None)
        if is_right:
            self._right[digest] = None
            while len(self._right) > MAX_RIGHT:
                self._right.popitem(last=False)
        else:
            self._failures.note_failure(address, now_s=time.monotonic())


@web.middleware
async def _say_errors(request: web.Request, handler: AiohttpHandler) -> web.StreamResponse:
    """Whatever goes wrong becomes a problem document."""
    try:
        return await handler(request)
    except ConnectionError:
        log.debug("whoever asked is gone path=%s", request.path)
        return problem_response(HTTPStatus.BAD_REQUEST, "the connection ended before the body did")
    except Exception as error:
        problem = _problem_of(error, request)
        if problem.status is HTTPStatus.INTERNAL_SERVER_ERROR:
            log.exception("request failed method=%s path=%s", request.method, request.path)
        return problem_response(problem.status, problem.detail, headers=problem.headers)


def _problem_of(error: Exception, request: web.Request) -> ProblemError:
    headers: dict[str, str] = {}
    match error:
        case ProblemError():
            status, detail, headers = error.status, error.detail, error.headers
        case HubError():
            status, detail = status_of(error), str(error)
        case web.HTTPRequestEntityTooLarge():
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            detail = f"the body is larger than {MAX_BODY_BYTES} bytes"
        case web.HTTPMethodNotAllowed():
            status = HTTPStatus.METHOD_NOT_ALLOWED
            headers = {"Allow": ", ".join(sorted(error.allowed_methods))}
            detail = f"{request.path} takes {headers['Allow']}"
        case web.HTTPNotFound():
            status, detail = HTTPStatus.NOT_FOUND, "there is nothing here; see /v1/openapi.json"
        case web.HTTPException():
            status, detail = HTTPStatus(error.status), error.reason
        case _:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            detail = "an error of the hub's own; its log has the details"
    return ProblemError(status, detail, headers=headers)


def _is_loopback(address: str | None) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
