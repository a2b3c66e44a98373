"""Stages on LiteRT (TensorFlow Lite). The only module of ours that imports its runtimes.

`ai_edge_litert` is tried first, then the older `tflite_runtime`. That one imports where it cannot work (its
last version and numpy 2), so a runtime counts as there once it has run a model of one operator.

A file is for one sample; a batch is a loop. Features between stages lie channels last, see
`edge_cascade.tflite_file.channels_last`: no other runtime may be fed with them.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import LitertModel, StageModel
from edge_cascade.errors import BackendError, first_line
from edge_cascade.manifest import STAGE_FEATURES, STAGE_HEAD, STAGE_INPUT, STAGE_TEMPERATURE
from edge_cascade.scores import HEAD_WIDTH
from edge_cascade.tflite_file import TensorSummary, digest_of_weights

Array = NDArray[np.float32]

RUNTIMES: Final = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")
_FIX: Final = "pip install 'edge-daemon[litert]'"
_THREADS: Final = 1

# One RELU from x (1,) to y (1,), written by `cloud_hub.builder.litert.writer`.
PROBE: Final = base64.b64decode(
    "GAAAAFRGTDMAAA4AGAAUABAADAAIAAQADgAAABQAAAAYAAAAIAAAACQAAAADAAAAAQAAACQAAAAFAAAAcHJvYmUAAAABAAAA"
    "OAAAAAEAAAAYAAAABAAEAAQAAAAMAAwACwAAAAAABAAMAAAAEwAAAAAAABMMABQAEAAMAAgABAAMAAAAEAAAABQAAAAYAAAA"
    "HAAAAAEAAAAsAAAAAQAAAAEAAAABAAAAAAAAAAIAAABYAAAALAAAAAAACgAMAAAACAAEAAoAAAAIAAAADAAAAAEAAAABAAAA"
    "AQAAAAAAAADk////CAAAAAwAAAABAAAAeQAAAAEAAAABAAAADAAMAAgAAAAAAAQADAAAAAgAAAAMAAAAAQAAAHgAAAABAAAA"
    "AQAAAA=="
)


class BoundStage:
    """A stage on one sample: `run` copies `x` in, and `head` and `features` out into buffers that stay."""

    __slots__ = ("_runner", "_temperature", "_x", "features", "head")

    def __init__(self, runner: _Runner, x: Array, temperature: float) -> None:
        self._runner = runner
        self._x = x
        self._temperature = np.array([temperature], dtype=np.float32)
        self.head: Array = np.zeros((1, HEAD_WIDTH), dtype=np.float32)
        self.features: Array | None = (
            None if runner.feature_shape is None else np.zeros(runner.feature_shape, dtype=np.float32)
        )

    def run(self) -> None:
        """Run the stage on what is in the input buffer now.

        Raises:
            BackendError: with the runtime's own words.
        """
        self._runner.run(self._x, self._temperature, self.head, self.features)


class LitertStage:
    """One stage at one precision in an interpreter of its own."""

    def __init__(self, stage: StageModel, feature_shape: tuple[int, ...] | None) -> None:
        """Open the stage's LiteRT file; `feature_shape` is the manifest's, the file has been held against it.

        Raises:
            BackendError: when there is no such file or no runtime, or the runtime refuses the file.
        """
        where = f"stage {stage.stage} in {stage.precision}"
        if stage.litert is None:
            raise BackendError(
                f"{where}: the bundle holds no LiteRT file for it; use the runtime onnxruntime, or build it "
                "with LiteRT"
            )
        if stage.litert.summary.weights_sha256 != digest_of_weights(stage.weights):
            raise BackendError(
                f"{where}: its LiteRT file was made of other weights than the bundle's; use the runtime "
                "onnxruntime, or a release that is not of weights only"
            )
        self._runner = _Runner(stage.litert, where)
        assert (feature_shape is None) == (self._runner.feature_shape is None)

    def bind(self, x: Array, temperature: float) -> BoundStage:
        """Buffers for one sample: `x` is read at every run; a sample, or the features of another stage."""
        self._runner.check(x.shape)
        return BoundStage(self._runner, x, temperature)

    def run_batch(self, x: Array, temperature: float) -> tuple[Array | None, Array]:
        """Features (n, ...), channels last (None for the last stage), and head (n, 5), sample by sample.

        Raises:
            BackendError: with the runtime's own words.
        """
        runner = self._runner
        runner.check((1, *x.shape[1:]))
        scale = np.array([temperature], dtype=np.float32)
        head: Array = np.empty((len(x), HEAD_WIDTH), dtype=np.float32)
        features: Array | None = None
        if runner.feature_shape is not None:
            features = np.empty((len(x), *runner.feature_shape[1:]), dtype=np.float32)
        for row in range(len(x)):
            one = slice(row, row + 1)
            runner.run(x[one], scale, head[one], None if features is None else features[one])
        return features, head


class _Runner:
    """An interpreter whose tensors are those that the file's own tables name."""

    def __init__(self, model: LitertModel, where: str) -> None:
        self._where = where
        interpreter_class = _find_interpreter()
        try:
            self._interpreter = interpreter_class(model_content=model.content, num_threads=_THREADS)
            self._interpreter.allocate_tensors()
            inputs = _indices(self._interpreter.get_input_details(), model.summary.inputs)
            outputs = _indices(self._interpreter.get_output_details(), model.summary.outputs)
        except Exception as error:  # the runtime raises what its C++ throws
            raise BackendError(f"{where}: LiteRT refused it: {first_line(error)}") from error
        shapes = {value.name: value.shape for value in (*model.summary.inputs, *model.summary.outputs)}
        self._input_shape = shapes[STAGE_INPUT]
        self.feature_shape = shapes.get(STAGE_FEATURES)
        self._x, self._temperature = inputs[STAGE_INPUT], inputs[STAGE_TEMPERATURE]
        self._head, self._features = outputs[STAGE_HEAD], outputs.get(STAGE_FEATURES)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse what is no input of this stage, the features of another runtime among it."""
        if shape != self._input_shape:
            raise BackendError(f"{self._where}: is given {shape}, takes {self._input_shape}")

    def run(self, x: Array, temperature: Array, head: Array, features: Array | None) -> None:
        interpreter = self._interpreter
        try:
            interpreter.set_tensor(self._x, x)
            interpreter.set_tensor(self._temperature, temperature)
            interpreter.invoke()
            head[...] = interpreter.get_tensor(self._head)
            if features is not None:
                features[...] = interpreter.get_tensor(self._features)
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"{self._where}: LiteRT failed: {first_line(error)}") from error


def _indices(details: list[dict[str, Any]], expected: tuple[TensorSummary, ...]) -> dict[str, int]:
    """The runtime's numbers of tensors, once they are what the file's tables say."""
    found = {
        TensorSummary(str(entry["name"]), np.dtype(entry["dtype"]).name, tuple(entry["shape"].tolist())): int(
            entry["index"]
        )
        for entry in details
    }
    if found.keys() != set(expected):
        raise ValueError(
            f"it sees {sorted(map(str, found))} where the file says {sorted(map(str, expected))}"
        )
    return {value.name: index for value, index in found.items()}


@functools.cache
def _find_interpreter() -> Any:
    """The class of the first runtime that works here.

    Raises:
        BackendError: saying what was wrong with each, and what to install.
    """
    problems = []
    for name in RUNTIMES:
        try:
            with _quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                interpreter_class = importlib.import_module(name).Interpreter
                probe = interpreter_class(model_content=PROBE, num_threads=_THREADS)
                probe.allocate_tensors()
                probe.invoke()
        except Exception as error:  # noqa: BLE001 - a runtime that is half there fails in any way
            problems.append(f"{name.partition('.')[0]}: {first_line(error.__cause__ or error)}")
        else:
            return interpreter_class
    raise BackendError(f"no LiteRT runtime works here ({'; '.join(problems)}); {_FIX}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what C++ writes to stderr: the notice at the first interpreter has no other switch."""
    try:
        kept = os.dup(2)
    except OSError:  # a process without stderr
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
