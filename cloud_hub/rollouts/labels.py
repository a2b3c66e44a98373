"""Labels of devices, by which groups and waves are chosen. Functions of the connection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection

from cloud_hub.errors import RolloutError
from cloud_hub.store.acts import note_act
from cloud_hub.store.rollouts import set_labels

MAX_VALUE: Final = 128

_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def read_label(text: str) -> tuple[str, str]:
    """Key and value of `key=value`.

    Raises:
        RolloutError: when it is none.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise RolloutError(f"label {text[:80]!r} is not KEY=VALUE")
    check_label(key, value)
    return key, value


def check_label(key: str, value: str) -> None:
    """See that a label can be kept.

    Raises:
        RolloutError: naming what is allowed.
    """
    if not _KEY.fullmatch(key):
        raise RolloutError(f"label {key[:80]!r}: a key is 1 to 64 letters, digits, '.', '_' or '-'")
    if len(value) > MAX_VALUE or not value.isprintable():
        raise RolloutError(f"label {key!r}: a value is at most {MAX_VALUE} printable characters")


def change_labels(
    connection: Connection, device: str, changes: Mapping[str, str | None], *, by: str, now_ms: int
) -> dict[str, str]:
    """Set labels, take away those that are None; all labels of the device then.

    Raises:
        NotFoundError: when no such device was ever heard of.
        RolloutError: for a label that cannot be kept.
    """
    for key, value in changes.items():
        check_label(key, value or "")
    labels = set_labels(connection, device, changes)
    if changes:
        detail = " ".join(f"{key}={value or ''}" for key, value in sorted(changes.items()))
        note_act(connection, by, "device.label", f"device {device}", detail, now_ms=now_ms)
    return labels
