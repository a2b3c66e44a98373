"""What was found in files that passed a check, by digest: the same content passes again, at no cost.

A device reads a bundle when it verifies it, when it serves it, and once more when it goes back; the next
release of the same graph brings most of the same files. Only findings are kept, not the files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

FindingT = TypeVar("FindingT")

MAX_KEPT: Final = 64
"""Two bundles of a dozen files, for a handful of models."""


class Inspected(Generic[FindingT]):
    """Findings of one kind of check; any thread may ask."""

    def __init__(self) -> None:
        self._found: dict[str, FindingT] = {}

    def of(self, sha256: str, inspect: Callable[[], FindingT]) -> FindingT:
        """What `inspect` finds in the content that has this digest.

        Raises:
            Whatever `inspect` does; that is not kept.
        """
        found = self._found.get(sha256)
        if found is None:
            found = inspect()
            if len(self._found) >= MAX_KEPT:
                self._found.clear()
            self._found[sha256] = found
        return found
