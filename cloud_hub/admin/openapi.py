"""The OpenAPI 3.1 document: paths from the route table, schemas from the types. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec

from cloud_hub.admin.documents import Problem
from cloud_hub.admin.problems import PROBLEM_JSON
from cloud_hub.admin.route import Route

API_VERSION: Final = "1"
_REFERENCE: Final = "#/components/schemas/{name}"
# Any operation may end so: no token, wrong scope, too many wrong tokens, a store that is away.
_COMMON_ERRORS: Final = (401, 403, 429, 500, 503)


def openapi_document(routes: Sequence[Route]) -> dict[str, Any]:
    """The document for a table of routes."""
    types: list[Any] = [Problem]
    for route in routes:
        types += [kind for kind in (route.answer, route.body) if kind is not None]
    _, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cloud-hub",
            "version": API_VERSION,
            "description": "Cases that a fleet was unsure of, and what the hub and people say of them.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token of `cloud-hub token create`: read, label, fetch, admin.",
                }
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__.lstrip("_"),
        "summary": route.summary,
        "tags": [route.tag],
        "responses": _responses(route),
    }
    if route.scope is None:
        operation["description"] = "From a loopback address without a token; from elsewhere scope `read`."
        operation["security"] = [{}, {"bearer": []}]
    else:
        operation["description"] = f"Needs a token with scope `{route.scope}` or `admin`."
    parameters = [_path_parameter(name) for name in route.path_parameters]
    if route.query is not None:
        parameters += _query_parameters(route.query)
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(route.body)}},
        }
    return operation


def _responses(route: Route) -> dict[str, Any]:
    if route.answer is not None:
        schema = _reference(route.answer)
    elif route.answer_type == "application/json":
        schema = {"type": "object"}
    elif route.answer_type == "text/plain":
        schema = {"type": "string"}
    else:
        schema = {}
    content = {route.answer_type: {"schema": schema}}
    responses = {
        str(status): {"description": HTTPStatus(status).phrase, "content": content}
        for status in (200, *route.also)
    }
    for status in sorted({*route.errors, *_COMMON_ERRORS}):
        error = {PROBLEM_JSON: {"schema": _reference(Problem)}}
        entry = responses.setdefault(str(status), {"description": HTTPStatus(status).phrase, "content": {}})
        entry["content"] = {**entry["content"], **error}  # type: ignore[dict-item]
    return responses


def _path_parameter(name: str) -> dict[str, Any]:
    """An `id` is a number, any other name a text."""
    schema: dict[str, Any] = {"type": "integer", "minimum": 1} if name == "id" else {"type": "string"}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameters(kind: type[msgspec.Struct]) -> list[dict[str, Any]]:
    _, components = msgspec.json.schema_components([kind], ref_template=_REFERENCE)
    properties: dict[str, Any] = components[kind.__name__]["properties"]
    return [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]


def _reference(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}
