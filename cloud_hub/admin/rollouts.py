"""The REST interface to rollouts, labels and the audit log. Whatever changes something needs `admin`."""

from __future__ import annotations

import time
from typing import Annotated, Final

from aiohttp import web
from msgspec import Meta, field

from cloud_hub.admin.answering import json_response, read_body, read_query
from cloud_hub.admin.documents import MAX_PAGE
from cloud_hub.admin.route import TOKEN, Context, Handler, Route
from cloud_hub.core.rollout.findings import HealthRules
from cloud_hub.core.rollout.state import MAX_SCENE_S, SCENE_S, RolloutLimits
from cloud_hub.core.rollout.waves import DEFAULT_WAVES, Wave
from cloud_hub.documents import Document, Heard, Number
from cloud_hub.errors import NotFoundError
from cloud_hub.rollouts.figures import (
    ActPage,
    RolloutDetail,
    RolloutPage,
    act_page,
    rollout_detail,
    rollout_page,
)
from cloud_hub.rollouts.labels import change_labels
from cloud_hub.rollouts.orders import MAX_REASON, OrderKind, order
from cloud_hub.rollouts.start import start_rollout
from cloud_hub.store.rollouts import labels_of

Cursor = Annotated[str, Meta(pattern="^[0-9]{1,18}$", description="`next` of the page before")]


class RolloutQuery(Heard, frozen=True):
    """Which rollouts."""

    model: Annotated[str, Meta(max_length=64)] | None = None
    cursor: Cursor | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50


class ActQuery(Heard, frozen=True):
    """Which acts; `subject` is for example `rollout 3f2a`."""

    subject: Annotated[str, Meta(max_length=128)] | None = None
    cursor: Cursor | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50


class StartRollout(Heard, frozen=True):
    """A release for the boards with these labels; waves, limits and what health tolerates have defaults."""

    release: Number
    group: dict[str, str] = field(default_factory=dict)
    waves: Annotated[list[Wave], Meta(max_length=64)] | None = None
    limits: RolloutLimits | None = None
    health: HealthRules | None = None
    scene_s: Annotated[int, Meta(ge=1, le=MAX_SCENE_S)] = SCENE_S
    same_canaries: bool = False


class OrderRollout(Heard, frozen=True):
    """Why, for people; for `approve` the index of the wave, by default the next one."""

    reason: Annotated[str, Meta(max_length=MAX_REASON)] = ""
    wave: Number | None = None


class ChangeLabels(Heard, frozen=True):
    """Labels to set; null takes one away."""

    labels: Annotated[dict[str, str | None], Meta(max_length=64)]


class AskedRollout(Document, frozen=True):
    """The hub takes it up within a second or two."""

    rollout: str


class DeviceLabels(Document, frozen=True):
    """All labels of a device."""

    device: str
    labels: dict[str, str]


async def _rollouts(hub: Context, request: web.Request) -> web.Response:
    query = read_query(request, RolloutQuery)
    offset = 0 if query.cursor is None else int(query.cursor)
    return json_response(
        await hub.store.database.run_async(
            lambda c: rollout_page(c, model=query.model, offset=offset, limit=query.limit)
        )
    )


async def _rollout(hub: Context, request: web.Request) -> web.Response:
    name = _rollout_id(request)
    return json_response(
        await hub.store.database.run_async(lambda c: rollout_detail(c, name, now_s=time.time()))
    )


async def _start_rollout(hub: Context, request: web.Request) -> web.Response:
    asked = await read_body(request, StartRollout, '{"release": 5}')
    speaker, now_ms, parts = request[TOKEN].name, time.time_ns() // 1_000_000, hub.rollouts
    rollout = await hub.store.database.run_async(
        lambda c: start_rollout(
            c,
            asked.release,
            by=speaker,
            now_ms=now_ms,
            is_signed=parts.is_signed,
            waves=DEFAULT_WAVES if asked.waves is None else asked.waves,
            group=asked.group,
            limits=asked.limits,
            health=asked.health,
            scene_s=asked.scene_s,
            rules=parts.rules,
            same_canaries=asked.same_canaries,
        )
    )
    parts.wake()
    return json_response(AskedRollout(rollout=rollout))


def _ordering(kind: OrderKind) -> Handler:
    async def handle(hub: Context, request: web.Request) -> web.Response:
        name = _rollout_id(request)
        asked = await read_body(request, OrderRollout, '{"reason": "text"}')
        speaker, now_ms = request[TOKEN].name, time.time_ns() // 1_000_000
        await hub.store.database.run_async(
            lambda c: order(c, name, kind, by=speaker, now_ms=now_ms, reason=asked.reason, wave=asked.wave)
        )
        hub.rollouts.wake()
        return json_response(AskedRollout(rollout=name))

    # What the OpenAPI document calls the operation.
    handle.__name__ = f"{kind}_rollout"
    return handle


async def _acts(hub: Context, request: web.Request) -> web.Response:
    query = read_query(request, ActQuery)
    before = None if query.cursor is None else int(query.cursor)
    return json_response(
        await hub.store.database.run_async(
            lambda c: act_page(c, subject=query.subject, before=before, limit=query.limit)
        )
    )


async def _device_labels(hub: Context, request: web.Request) -> web.Response:
    device = request.match_info["device"]
    labels = await hub.store.database.run_async(lambda c: labels_of(c, device))
    return json_response(DeviceLabels(device=device, labels=labels))


async def _change_labels(hub: Context, request: web.Request) -> web.Response:
    device = request.match_info["device"]
    asked = await read_body(request, ChangeLabels, '{"labels": {"site": "hamburg", "line": null}}')
    speaker, now_ms = request[TOKEN].name, time.time_ns() // 1_000_000
    labels = await hub.store.database.run_async(
        lambda c: change_labels(c, device, asked.labels, by=speaker, now_ms=now_ms)
    )
    return json_response(DeviceLabels(device=device, labels=labels))


def _rollout_id(request: web.Request) -> str:
    name = request.match_info["rollout"]
    if not (name.isascii() and name.isalnum() and len(name) <= 64):
        raise NotFoundError(f"there is no rollout {name[:64]!r}")
    return name


def _order_route(kind: OrderKind, summary: str) -> Route:
    return Route(
        "POST", f"/v1/rollouts/{{rollout}}/{kind}", _ordering(kind), "admin", summary, "rollouts",
        AskedRollout, body=OrderRollout, path_parameters=("rollout",), errors=(400, 404, 409, 413),
    )  # fmt: skip


ROLLOUT_ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "GET", "/v1/rollouts", _rollouts, "read", "Releases on their way through the fleet", "rollouts",
        RolloutPage, query=RolloutQuery, errors=(400,),
    ),
    Route(
        "POST", "/v1/rollouts", _start_rollout, "admin", "Take a signed release through the fleet",
        "rollouts", AskedRollout, body=StartRollout, errors=(400, 404, 409, 413),
    ),
    Route(
        "GET", "/v1/rollouts/{rollout}", _rollout, "read", "What a rollout waits for, and what happened",
        "rollouts", RolloutDetail, path_parameters=("rollout",), errors=(404,),
    ),
    _order_route("approve", "Let the next wave open"),
    _order_route("pause", "Offer the release to no more boards"),
    _order_route("resume", "Let a paused rollout go on"),
    _order_route("halt", "Take the release back from every board"),
    _order_route("kill", "Take the release back for good, even after the rollout is done"),
    Route(
        "GET", "/v1/acts", _acts, "read", "Who did what to releases and rollouts, the newest first", "hub",
        ActPage, query=ActQuery, errors=(400,),
    ),
    Route(
        "GET", "/v1/devices/{device}/labels", _device_labels, "read", "A board's labels", "fleet",
        DeviceLabels, path_parameters=("device",),
    ),
    Route(
        "POST", "/v1/devices/{device}/labels", _change_labels, "admin", "Set a board's labels", "fleet",
        DeviceLabels, body=ChangeLabels, path_parameters=("device",), errors=(400, 404, 409, 413),
    ),
)  # fmt: skip
