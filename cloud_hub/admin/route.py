"""What a route of the REST interface is, and what its handler is given. No I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from aiohttp import web

from cloud_hub.admin.metrics import Vitals
from cloud_hub.admin.tokens import Scope, TokenInfo
from cloud_hub.core.rollout.judge import JudgeRules
from cloud_hub.models import HubModel
from cloud_hub.releases.blobs import ReleaseBlobs
from cloud_hub.store.store import Store

JSON: Final = "application/json"
DELTAS_AT_ONCE: Final = 2

# Keys under which a request carries what the middleware found out.
TOKEN: Final = web.RequestKey("token", TokenInfo)


@dataclass(frozen=True, slots=True)
class RolloutParts:
    """What the routes of rollouts need. `is_signed`: of a model, the digests of its graph and its weights;
    `wake` is told that a rollout was started or something was ordered of one.
    """

    is_signed: Callable[[str, str, str], bool] = lambda *_: False
    rules: JudgeRules = field(default_factory=JudgeRules)
    wake: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of the hub that handlers ask. `on_labelled` is told whose case a person has labelled,
    `on_series` that a series was started or is to end.
    """

    store: Store
    blobs: ReleaseBlobs
    models: Mapping[str, HubModel]
    vitals: Callable[[], Vitals]
    problems: Callable[[], list[str]]
    on_labelled: Callable[[str], None]
    on_series: Callable[[], None]
    rollouts: RolloutParts = RolloutParts()
    delta_turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DELTAS_AT_ONCE))
    """Making a difference takes seconds of a thread: a fleet that asks must leave some for files."""


Handler = Callable[[Context, web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. `scope` None: no token on loopback, `read` from elsewhere."""

    method: str
    path: str
    handler: Handler
    scope: Scope | None
    summary: str
    tag: str
    answer: type[msgspec.Struct] | None
    """None where the answer is no JSON of ours; `answer_type` says what it is."""
    answer_type: str = JSON
    query: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    path_parameters: tuple[str, ...] = ()
    errors: tuple[int, ...] = ()
    also: tuple[int, ...] = ()
    """Other statuses with the same document."""
