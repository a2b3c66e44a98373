"""Whether a series may be started, and the row that asks for it. Functions of the connection.

The command line and REST both come through here; neither needs the running hub's memory.
"""

from __future__ import annotations

import secrets
from typing import Final

import msgspec
from sqlalchemy import Connection

from cloud_hub.errors import ModelError, RoundError
from cloud_hub.federation.settings import SeriesSettings, check_settings
from cloud_hub.reading import MAX_FRAME_BYTES
from cloud_hub.store.examples import ExampleFilter, count_examples
from cloud_hub.store.rounds import ask_to_abort, insert_series, open_series_of
from edge_cascade.bundle import Bundle
from edge_cascade.codec import MAX_BODY_BYTES
from edge_cascade.deltas import most_delta_bytes
from edge_cascade.messages import Use
from edge_cascade.train_step import TrainStepModel
from edge_cascade.weights import size_bytes_of

ABORTED: Final = "aborted by hand"

_ROOM_BYTES: Final = 4096
"""For what is beside the delta in a frame."""


def start_series(
    connection: Connection, bundle: Bundle, settings: SeriesSettings, *, created_by: str, now_ms: int
) -> int:
    """Ask for a series of rounds of a bundle's network; its number.

    Raises:
        ConfigError: for settings that contradict each other.
        ModelError: when the bundle has no train step, or its network is too large to travel.
        RoundError: with an open series of the same model, or too few holdout samples for the guard.
    """
    check_settings(settings)
    model = bundle.graph.model
    if bundle.train_step is None:
        raise ModelError(f"model {model!r}: its bundle has no train step; build it again with this version")
    _check_size(model, bundle.train_step, settings)
    open_one = open_series_of(connection, model)
    if open_one is not None:
        raise RoundError(
            f"model {model!r} has an open series, {open_one}; wait, or `cloud-hub round abort {open_one}`"
        )
    judged_by = ExampleFilter(model, Use.HOLDOUT, bytes.fromhex(bundle.graph.full_model_sha256))
    has = count_examples(connection, judged_by)
    if has < settings.min_holdout:
        raise RoundError(
            f"model {model!r} has {has} holdout samples with a verdict, needs {settings.min_holdout}; let "
            "boards audit more, or lower min_holdout"
        )
    if settings.seed is None:
        # Drawn here and kept: after a restart the same cohorts are drawn.
        settings = msgspec.structs.replace(settings, seed=secrets.randbits(32))
    return insert_series(
        connection,
        model=model,
        settings=msgspec.json.encode(settings).decode(),
        graph=bytes.fromhex(bundle.graph_sha256),
        created_by=created_by,
        now_ms=now_ms,
    )


def _check_size(model: str, step: TrainStepModel, settings: SeriesSettings) -> None:
    """Refuse what boards would train for nothing: an update, or a base, that fits into no frame."""
    base_bytes = size_bytes_of(step.shapes)
    if base_bytes > MAX_BODY_BYTES - _ROOM_BYTES:
        raise ModelError(
            f"model {model!r}: {base_bytes:,} bytes of parameters are more than a training base may have, "
            f"{MAX_BODY_BYTES - _ROOM_BYTES:,}"
        )
    # How much topk sends depends on its share.
    update_bytes = 0 if settings.encoding == "topk" else most_delta_bytes(step.shapes, settings.encoding)
    if update_bytes > MAX_FRAME_BYTES - _ROOM_BYTES:
        raise ModelError(
            f"model {model!r}: an update in {settings.encoding} takes {update_bytes:,} bytes, at most "
            f"{MAX_FRAME_BYTES - _ROOM_BYTES:,} fit into a frame; use encoding int8, sign or topk"
        )


def abort_series(connection: Connection, series_id: int, reason: str = "") -> None:
    """Ask for the end of a series; the coordinator ends it within a second or two.

    Raises:
        NotFoundError: when there is no such series.
        RoundError: when it has ended already.
    """
    if not ask_to_abort(connection, series_id, reason.strip()[:500] or ABORTED):
        raise RoundError(f"series {series_id} has ended already; `cloud-hub round show {series_id}` says how")
