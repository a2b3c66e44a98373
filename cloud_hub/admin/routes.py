"""The REST interface's one table: it registers the routes and writes the OpenAPI paths: no drift."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

import msgspec
import numpy as np
from aiohttp import web

from cloud_hub.admin import documents as doc
from cloud_hub.admin.answering import json_response, read_query
from cloud_hub.admin.fleet import FLEET_ROUTES
from cloud_hub.admin.metrics import METRICS_TYPE, render_metrics, stats_document
from cloud_hub.admin.openapi import openapi_document
from cloud_hub.admin.problems import ProblemError
from cloud_hub.admin.releases import RELEASE_ROUTES
from cloud_hub.admin.rollouts import ROLLOUT_ROUTES
from cloud_hub.admin.rounds import ROUND_ROUTES
from cloud_hub.admin.route import JSON, TOKEN, Context, Route
from cloud_hub.errors import ConfigError, HubError, ModelError, NotFoundError, RolloutError, RoundError
from cloud_hub.models import HubModel
from cloud_hub.store.deliveries import Place
from cloud_hub.store.queries import CaseFilter, find_cases, get_case, list_devices, totals
from cloud_hub.store.store import Store
from cloud_hub.store.verdicts import label_case
from edge_cascade.errors import ProtocolError
from edge_cascade.messages import Source
from edge_cascade.packing import pack_probabilities
from edge_cascade.tensors import decode_tensor

NPY: Final = "application/octet-stream"


async def _devices(hub: Context, request: web.Request) -> web.Response:
    query = read_query(request, doc.DeviceQuery)
    rows = await hub.store.database.run_async(
        lambda c: list_devices(c, after=query.cursor, limit=query.limit + 1)
    )
    page = [doc.device_document(row) for row in rows[: query.limit]]
    return json_response(doc.Devices(devices=page, next=page[-1].name if len(rows) > query.limit else None))


async def _cases(hub: Context, request: web.Request) -> web.Response:
    query = read_query(request, doc.CaseQuery)
    wanted = CaseFilter(
        device=query.device,
        model=query.model,
        label=_label_filter(hub.models, query),
        source=None if query.source is None else Source[query.source.upper()],
        escalated=query.escalated,
        audited=query.audited,
        since_ms=query.since,
        until_ms=query.until,
        has_verdict=query.verdict,
    )
    before = None if query.cursor is None else int(query.cursor)
    rows = await hub.store.database.run_async(
        lambda c: find_cases(c, wanted, before=before, limit=query.limit + 1)
    )
    page = [doc.case_document(row, hub.models.get(row["model"])) for row in rows[: query.limit]]
    return json_response(doc.Cases(cases=page, next=str(page[-1].id) if len(rows) > query.limit else None))


async def _case(hub: Context, request: web.Request) -> web.Response:
    row, labels = await hub.store.database.run_async(lambda c: get_case(c, _case_id(request)))
    model = hub.models.get(row["model"])
    return json_response(
        doc.CaseDetail(
            case=doc.case_document(row, model), labels=[doc.label_document(one, model) for one in labels]
        )
    )


async def _tensor(hub: Context, request: web.Request) -> web.Response:
    row, _ = await hub.store.database.run_async(lambda c: get_case(c, _case_id(request)))
    place = Place(row["blob"], row["blob_offset"], row["blob_length"])
    try:
        # Up to some MiB to read and inflate: not on the loop that everybody's requests are on.
        content = await asyncio.get_running_loop().run_in_executor(
            None, _npy, hub.store, place, row["tensor_bytes"]
        )
    except ProtocolError as error:
        raise ProblemError(
            HTTPStatus.INTERNAL_SERVER_ERROR, f"the stored tensor is damaged: {error}"
        ) from error
    name = f"case-{row['id']}.npy"
    return web.Response(
        body=content,
        content_type=NPY,
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def _npy(store: Store, place: Place, tensor_bytes: int) -> bytes:
    file = io.BytesIO()
    np.save(file, decode_tensor(store.tensor_bytes(place, tensor_bytes)), allow_pickle=False)
    return file.getvalue()


async def _label(hub: Context, request: web.Request) -> web.Response:
    case_id = _case_id(request)
    try:
        asked = msgspec.json.decode(await request.read(), type=doc.LabelRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProblemError(
            HTTPStatus.BAD_REQUEST, f'the body must be like {{"label": "name"}}: {error}'
        ) from error
    row, _ = await hub.store.database.run_async(lambda c: get_case(c, case_id))
    model = hub.models.get(row["model"])
    if model is None:
        raise ProblemError(
            HTTPStatus.CONFLICT,
            f"this hub has no model {row['model']!r}, so it does not know its labels; add it to [[models]]",
        )
    try:
        label = model.label_index(asked.label)
    except ModelError as error:
        raise ProblemError(HTTPStatus.BAD_REQUEST, str(error)) from error
    # A person's word is certain: all probability on one label.
    certain = pack_probabilities([float(index == label) for index in range(len(model.labels))])
    speaker = request[TOKEN].name
    now_ms = time.time_ns() // 1_000_000
    revision = await hub.store.database.run_async(
        lambda c: label_case(
            c,
            case_id,
            label,
            probabilities=certain,
            full_model=model.full_model,
            labelled_by=speaker,
            now_ms=now_ms,
        )
    )
    hub.on_labelled(row["device"])
    return json_response(
        doc.Labelled(case=case_id, label=label, label_name=model.labels[label], revision=revision)
    )


async def _stats(hub: Context, _: web.Request) -> web.Response:
    found = await hub.store.database.run_async(totals)
    return json_response(stats_document(found, hub.vitals(), hub.models))


async def _metrics(hub: Context, _: web.Request) -> web.Response:
    found = await hub.store.database.run_async(totals)
    stats = stats_document(found, hub.vitals(), hub.models)
    return web.Response(
        body=render_metrics(stats, hub.vitals(), set(hub.models)),
        headers={"Content-Type": METRICS_TYPE},
    )


async def _healthz(_: Context, __: web.Request) -> web.Response:
    return json_response(doc.Health(status="ok", problems=[]))


async def _readyz(hub: Context, _: web.Request) -> web.Response:
    problems = hub.problems()
    health = doc.Health(status="unready" if problems else "ok", problems=problems)
    return json_response(health, HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK)


async def _openapi(_: Context, __: web.Request) -> web.Response:
    return web.Response(body=msgspec.json.encode(openapi_document(ROUTES)), content_type=JSON)


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "GET", "/v1/devices", _devices, "read", "Boards that were ever heard of, by name", "fleet",
        doc.Devices, query=doc.DeviceQuery, errors=(400,),
    ),
    Route(
        "GET", "/v1/cases", _cases, "read", "Cases, the newest first", "cases",
        doc.Cases, query=doc.CaseQuery, errors=(400,),
    ),
    Route(
        "GET", "/v1/cases/{id}", _case, "read", "One case, and what people said of it", "cases",
        doc.CaseDetail, path_parameters=("id",), errors=(404,),
    ),
    Route(
        "GET", "/v1/cases/{id}/tensor", _tensor, "read", "The sample as a .npy file (float32, never pickled)",
        "cases", None, answer_type=NPY, path_parameters=("id",), errors=(404,),
    ),
    Route(
        "POST", "/v1/cases/{id}/label", _label, "label", "Say what a case shows; outranks the full model",
        "cases", doc.Labelled, body=doc.LabelRequest, path_parameters=("id",), errors=(400, 404, 409, 413),
    ),
    *RELEASE_ROUTES,
    *ROUND_ROUTES,
    *ROLLOUT_ROUTES,
    *FLEET_ROUTES,
    Route("GET", "/v1/stats", _stats, "read", "The hub in numbers", "fleet", doc.Stats),
    Route("GET", "/v1/openapi.json", _openapi, "read", "This document", "hub", None),
    Route("GET", "/healthz", _healthz, None, "Whether the process lives", "hub", doc.Health),
    Route("GET", "/readyz", _readyz, None, "Whether it can do its work", "hub", doc.Health, also=(503,)),
    Route(
        "GET", "/metrics", _metrics, None, "Prometheus metrics", "hub", None, answer_type="text/plain"
    ),
)  # fmt: skip


def _case_id(request: web.Request) -> int:
    text = request.match_info["id"]
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise NotFoundError(f"there is no case {text[:40]!r}; ids are numbers")
    return int(text)


def _label_filter(models: Mapping[str, HubModel], query: doc.CaseQuery) -> int | None:
    if query.label is None:
        return None
    if query.label.isascii() and query.label.isdecimal():
        return min(int(query.label), 2**31 - 1)
    model = models.get(query.model or "")
    if model is None:
        raise ProblemError(
            HTTPStatus.BAD_REQUEST, "label by name needs `model`, and it must be one that this hub runs"
        )
    return model.label_index(query.label)


def status_of(error: HubError) -> HTTPStatus:
    """The status for an error that a handler let through."""
    if isinstance(error, NotFoundError):
        return HTTPStatus.NOT_FOUND
    if isinstance(error, ModelError | ConfigError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, RoundError | RolloutError):
        return HTTPStatus.CONFLICT
    return HTTPStatus.SERVICE_UNAVAILABLE
