"""Reads a rollout's plan from a TOML or JSON file. No other I/O."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cloud_hub.core.rollout.state import RolloutLimits
from cloud_hub.core.rollout.waves import Wave, check_waves
from cloud_hub.errors import RolloutError


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The waves, and when a wave has had enough answers or too many bad ones."""

    waves: tuple[Wave, ...]
    limits: RolloutLimits = RolloutLimits()


def read_plan(path: Path) -> Plan:
    """The plan in a file: `[[waves]]` and `[limits]`, as TOML unless its name ends in `.json`.

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
