"""What a long build has finished, kept beside its result so that an interrupted one goes on.

Every file is named by its step and by a digest of all that the step depends on, `VERSION` among it: another
seed, other data or another version never meets an old file. A file that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from cloud_hub.errors import BuildError
from edge_cascade.durable import write_durably

Arrays = dict[str, NDArray[np.generic]]

FOLDER: Final = ".build"
VERSION: Final = 1
"""Raised by hand in a change after which a step computes something else from the same inputs."""

_STATE: Final = "state"


class Steps:
    """The finished steps of one build, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def arrays(self, name: str, depends_on: object, compute: Callable[[Checkpoint], Arrays]) -> Arrays:
        """The step's arrays: read if it was finished on the same inputs, else computed and kept.

        `depends_on` is anything that JSON can hold. `compute` may keep its own progress in the checkpoint.
        """
        inputs = json.dumps([VERSION, name, depends_on], sort_keys=True)
        key = hashlib.sha256(inputs.encode()).hexdigest()[:24]
        finished = Checkpoint(self._directory / f"{name}-{key}.safetensors")
        kept = finished.load()
        if kept is not None:
            return kept[0]
        partial = Checkpoint(self._directory / f"{name}-{key}.partial.safetensors")
        made = compute(partial)
        finished.save(made, {})
        partial.discard()
        return made

    def discard(self) -> None:
        """Remove everything: the build is finished."""
        shutil.rmtree(self._directory, ignore_errors=True)


class Checkpoint:
    """Arrays and a JSON document in one file that is replaced whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, arrays: Mapping[str, NDArray[np.generic]], state: Mapping[str, Any]) -> None:
        """Replace what is kept.

        Raises:
            BuildError: when the disk is full, or cannot be written.
        """
        # np.asarray, because ascontiguousarray turns a scalar into a vector.
        content = {name: np.array(np.asarray(array), order="C") for name, array in arrays.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._path, save_safetensors(content, {_STATE: json.dumps(state)}))
        except OSError as error:
            raise BuildError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def load(self) -> tuple[Arrays, dict[str, Any]] | None:
        """What is kept; None where nothing is, or nothing that can be read."""
        try:
            with safe_open(self._path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                return arrays, dict(json.loads((file.metadata() or {})[_STATE]))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def discard(self) -> None:
        """Forget what is kept."""
        self._path.unlink(missing_ok=True)
