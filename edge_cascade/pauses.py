"""Pauses between pieces of work, for whoever must not be in somebody's way for long."""

from __future__ import annotations

from collections.abc import Callable

Pause = Callable[[], object]
"""Called between pieces of a millisecond or two."""


def no_pause() -> None:
    """Go on at once."""
