"""The MQTT topic tree between device and hub, built and parsed in one place. No I/O.

    {prefix}/v1/{device}/up/{cases|update|status|telemetry}      device -> hub
    {prefix}/v1/{device}/down/{acks|verdicts|desired|round}      hub -> device

`status`, `desired` and `round` are retained. The broker's access rules hang on this shape: a device may
write its own `up/#` and read its own `down/#`, nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from edge_cascade.errors import ProtocolError

Up = Literal["cases", "update", "status", "telemetry"]
Down = Literal["acks", "verdicts", "desired", "round"]
Direction = Literal["up", "down"]
Channel = Up | Down

UP: Final[tuple[Up, ...]] = get_args(Up)
DOWN: Final[tuple[Down, ...]] = get_args(Down)
VERSION_LEVEL: Final = "v1"
DEFAULT_PREFIX: Final = "edge"

_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PREFIX = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


@dataclass(frozen=True, slots=True)
class Topic:
    """A parsed topic of the tree."""

    device: str
    direction: Direction
    channel: Channel


def check_device_id(device: str) -> str:
    """The id, if it can be a topic level and a broker's user name.

    Raises:
        ProtocolError: naming the id and what is allowed.
    """
    if not _DEVICE.fullmatch(device):
        raise ProtocolError(
            f"device id {device!r} is not 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
        )
    return device


def check_prefix(prefix: str) -> str:
    """The prefix, if it can start a topic (no wildcards, no empty level, no `$`).

    Raises:
        ProtocolError: naming the prefix.
    """
    if not _PREFIX.fullmatch(prefix) or len(prefix) > 256:
        raise ProtocolError(f"topic prefix {prefix!r} must be levels of letters, digits, '.', '_' or '-'")
    return prefix


def up_topic(prefix: str, device: str, channel: Up) -> str:
    """Where `device` publishes `channel`."""
    return f"{prefix}/{VERSION_LEVEL}/{device}/up/{channel}"


def down_topic(prefix: str, device: str, channel: Down) -> str:
    """Where the hub publishes `channel` for `device`."""
    return f"{prefix}/{VERSION_LEVEL}/{device}/down/{channel}"


def fleet_filter(prefix: str, channel: Up) -> str:
    """The hub's subscription to one channel of every device."""
    return f"{prefix}/{VERSION_LEVEL}/+/up/{channel}"


def parse_topic(prefix: str, topic: str) -> Topic:
    """Take a topic of the tree apart.

    Raises:
        ProtocolError: for any other topic.
    """
    start = f"{prefix}/{VERSION_LEVEL}/"
    levels = topic[len(start) :].split("/") if topic.startswith(start) else []
    if len(levels) != 3:
        raise ProtocolError(f"topic {topic[:200]!r} is not of the tree {start}<device>/<up|down>/<channel>")
    device, direction, channel = levels
    check_device_id(device)
    for name in UP:
        if direction == "up" and channel == name:
            return Topic(device, "up", name)
    for other in DOWN:
        if direction == "down" and channel == other:
            return Topic(device, "down", other)
    raise ProtocolError(f"topic {topic[:200]!r} has no channel {direction}/{channel}")
