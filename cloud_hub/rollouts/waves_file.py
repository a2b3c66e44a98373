"""Reads a rollout's plan from a TOML or JSON file. No other I/O."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from cloud_hub.core.rollout.findings import HealthRules
from cloud_hub.core.rollout.state import MAX_SCENE_S, SCENE_S, RolloutLimits
from cloud_hub.core.rollout.waves import DEFAULT_WAVES, Wave, check_waves
from cloud_hub.errors import RolloutError


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The waves, when a wave has had enough answers or too many bad ones, what health tolerates, and how long
    a scene of pairs lasts.
    """

    waves: tuple[Wave, ...] = DEFAULT_WAVES
    limits: RolloutLimits = RolloutLimits()
    health: HealthRules = HealthRules()
    scene_s: Annotated[int, Meta(ge=1, le=MAX_SCENE_S)] = SCENE_S


def read_plan(path: Path) -> Plan:
    """The plan in a file: `scene_s`, `[[waves]]`, `[limits]`, `[health]`; TOML unless it is called `.json`.

    Raises:
        RolloutError: when it cannot be read, or contradicts itself.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            plan = msgspec.json.decode(content, type=Plan)
        else:
            plan = msgspec.toml.decode(content, type=Plan)
        check_waves(plan.waves)
    except OSError as error:
        raise RolloutError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise RolloutError(f"{path}: {error}") from error
    return plan
