"""Where the bundles that ship with the distribution are."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from edge_cascade.errors import BundleError

_INSTALLED: Final = Path(__file__).parent / "_models"
_CHECKOUT: Final = Path(__file__).parent.parent / "models"


def shipped_models() -> list[str]:
    """The names of the models that ship."""
    return sorted(path.parent.parent.name for path in _root().glob("*/bundle/graph"))


def shipped_model_dir(name: str) -> Path:
    """The directory of a shipped model: `bundle/`, `full.onnx`, for some `samples.npz`.

    Raises:
        BundleError: naming the models that ship.
    """
    if name not in shipped_models():
        raise BundleError(f"no model {name!r} ships; there are: {', '.join(shipped_models()) or 'none'}")
    return _root() / name


def find_bundle(name_or_path: str) -> Path:
    """The bundle's directory: a shipped model's by its name, one inside `path/bundle`, or `path` itself.

    Raises:
        BundleError: naming what was looked for.
    """
    if name_or_path in shipped_models():
        return shipped_model_dir(name_or_path) / "bundle"
    path = Path(name_or_path)
    for directory in (path / "bundle", path):
        if (directory / "graph").is_dir():
            return directory
    if "/" not in name_or_path and not path.is_dir():
        return shipped_model_dir(name_or_path)
    what = "no bundle in it" if path.is_dir() else "no such directory"
    raise BundleError(f"{path}: {what}; a bundle is a directory with 'graph' and 'weights'")


def _root() -> Path:
    return _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
