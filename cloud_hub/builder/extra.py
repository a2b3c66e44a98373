"""The commands of the builder need packages that a hub does without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cloud_hub.errors import BuildError


@contextmanager
def build_extra() -> Iterator[None]:
    """Around imports of what only the build extra brings.

    Raises:
        BuildError: naming what is missing and how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise BuildError(f"this command needs {error.name}: pip install 'edge-daemon[build]'") from error
