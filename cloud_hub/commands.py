"""What the commands of all areas share: a configuration's database, and how times and values are shown."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import Any

import msgspec

from cloud_hub.config import Config
from cloud_hub.errors import RolloutError
from cloud_hub.store.database import Database
from cloud_hub.store.store import database_url


def database_of(config: Config) -> Database:
    """The database of a configuration, not yet open."""
    return Database(database_url(config.state_dir, config.store.url))


def shown_time(at_ms: int | None) -> str:
    """A time in UTC as RFC 3339 says it, `-` for none."""
    return "-" if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def print_json(value: Any) -> None:
    """A value for programs."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())  # noqa: T201 - a command's result


def parse_label(text: str) -> tuple[str, str]:
    """`KEY=VALUE` on a command line.

    Raises:
        ArgumentTypeError: for anything else.
    """
    from cloud_hub.rollouts.labels import read_label

    try:
        return read_label(text)
    except RolloutError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
