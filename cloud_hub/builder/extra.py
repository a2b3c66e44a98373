"""The commands of the builder need packages that a hub does without."""

from __future__ import annotations

import importlib.util
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
        raise _missing(str(error.name)) from error


def require_extra(module: str) -> None:
    """Say that a module is missing before the work begins that will need it at its end.

    Raises:
        BuildError: naming what is missing and how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise _missing(module)


def _missing(module: str) -> BuildError:
    return BuildError(f"this needs {module}: pip install 'edge-daemon[build]'")
