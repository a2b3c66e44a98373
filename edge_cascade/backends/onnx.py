"""Stages on onnxruntime. The only module of ours that imports it.

Wheels from 1.29 on report to their vendor unless a variable is set *before* the first import; setting it
here, where the import is, makes that hold by construction.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, RuntimeException

from edge_cascade.bundle import StageModel
from edge_cascade.errors import BackendError, first_line
from edge_cascade.manifest import STAGE_FEATURES, STAGE_HEAD, STAGE_INPUT, STAGE_TEMPERATURE
from edge_cascade.onnx_file import Limits, inspect_model
from edge_cascade.scores import HEAD_WIDTH
from edge_cascade.train_step import (
    LEARNING_RATE,
    LOSS,
    MOMENTUM,
    PROXIMAL,
    SAMPLE_WEIGHT,
    TARGETS,
    TrainStepModel,
    base_name,
    momentum_name,
    updated_name,
)

Array = NDArray[np.float32]

FULL_INPUT: Final = "x"
FULL_LOGITS: Final = "logits"

# A hub has the memory for what no board could hold; its full model is a file of the operator's own.
FULL_MODEL_LIMITS: Final = Limits(max_bytes=1 << 30, max_inline_bytes=1 << 30)

_PROVIDERS: Final = ["CPUExecutionProvider"]
_ERRORS: Final = (Fail, InvalidArgument, InvalidGraph, RuntimeException, RuntimeError, ValueError)


class BoundStage:
    """A stage with fixed buffers for one sample: `run` reads and writes them in place, allocating nothing."""

    __slots__ = ("_binding", "_options", "_owned", "_run", "features", "head")

    def __init__(
        self, session: Any, x: Array, temperature: float, feature_shape: tuple[int, ...] | None
    ) -> None:
        self.head: Array = np.zeros((1, HEAD_WIDTH), dtype=np.float32)
        self.features: Array | None = (
            None if feature_shape is None else np.zeros((1, *feature_shape), dtype=np.float32)
        )
        scale = np.array([temperature], dtype=np.float32)
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in ((STAGE_INPUT, x), (STAGE_TEMPERATURE, scale), (STAGE_HEAD, self.head))
        }
        binding = session.io_binding()
        binding.bind_ortvalue_input(STAGE_INPUT, values[STAGE_INPUT])
        binding.bind_ortvalue_input(STAGE_TEMPERATURE, values[STAGE_TEMPERATURE])
        binding.bind_ortvalue_output(STAGE_HEAD, values[STAGE_HEAD])
        if self.features is not None:
            values[STAGE_FEATURES] = onnxruntime.OrtValue.ortvalue_from_numpy(self.features)
            binding.bind_ortvalue_output(STAGE_FEATURES, values[STAGE_FEATURES])
        # An OrtValue made from an array aliases it and does not keep it alive.
        self._owned = (session, x, scale, values, binding)
        # The wrapper around this call costs as much as a tiny stage.
        self._run = session._sess.run_with_iobinding
        self._binding = binding._iobinding
        self._options = onnxruntime.RunOptions()

    def run(self) -> None:
        """Run the stage on what is in the input buffer now.

        Raises:
            BackendError: with the runtime's own words.
        """
        try:
            self._run(self._binding, self._options)
        except _ERRORS as error:
            raise BackendError(f"stage failed: {first_line(error)}") from error


class OnnxStage:
    """One stage at one precision in a session of its own, its weights handed over from memory."""

    def __init__(self, stage: StageModel, feature_shape: tuple[int, ...] | None, *, threads: int = 1) -> None:
        self._feature_shape = feature_shape
        self._where = f"stage {stage.stage} in {stage.precision}"
        options = _session_options(threads)
        # The session reads these arrays for as long as it lives.
        self._weights = _ort_values(stage.weights)
        if self._weights:
            options.add_external_initializers(list(self._weights), list(self._weights.values()))
        self._session = _open_session(stage.model, options, self._where)

    def bind(self, x: Array, temperature: float) -> BoundStage:
        """Buffers for one sample: `x` (1, *input_shape) is read in place at every run."""
        return BoundStage(self._session, x, temperature, self._feature_shape)

    def run_batch(self, x: Array, temperature: float) -> tuple[Array | None, Array]:
        """Features `(n, *feature_shape)` (None for the last stage) and head `(n, 5)` of `(n, *input_shape)`.

        Raises:
            BackendError: with the runtime's own words.
        """
        names = [STAGE_HEAD] if self._feature_shape is None else [STAGE_HEAD, STAGE_FEATURES]
        feed = {STAGE_INPUT: x, STAGE_TEMPERATURE: np.array([temperature], dtype=np.float32)}
        try:
            outputs = self._session.run(names, feed)
        except _ERRORS as error:
            raise BackendError(f"{self._where}: {first_line(error)}") from error
        return (None if len(outputs) == 1 else outputs[1]), outputs[0]


class OnnxTrainStep:
    """A train step on onnxruntime; implements `training.TrainStep`. Parameters go in and out by value."""

    def __init__(self, step: TrainStepModel, *, threads: int = 1) -> None:
        self._names = tuple(step.shapes)
        self._outputs = [
            *(updated_name(name) for name in self._names),
            *(updated_name(momentum_name(name)) for name in self._names),
            LOSS,
        ]
        self._session = _open_session(step.model, _session_options(threads), "train step")
        self._feed: dict[str, Array] = {}

    def begin(self, base: Mapping[str, Array]) -> None:
        """See `TrainStep.begin`. Reads what it needs of `base`, which may hold more."""
        self._feed = {}
        for name in self._names:
            self._feed[name] = base[name]
            self._feed[base_name(name)] = base[name]
            self._feed[momentum_name(name)] = np.zeros_like(base[name])

    def step(
        self,
        x: Array,
        targets: Array,
        sample_weight: Array,
        *,
        learning_rate: float,
        momentum: float,
        proximal: float,
    ) -> float:
        """See `TrainStep.step`."""
        feed = self._feed | {
            STAGE_INPUT: x,
            TARGETS: targets,
            SAMPLE_WEIGHT: sample_weight,
            LEARNING_RATE: np.asarray(learning_rate, np.float32),
            MOMENTUM: np.asarray(momentum, np.float32),
            PROXIMAL: np.asarray(proximal, np.float32),
        }
        try:
            outputs = self._session.run(self._outputs, feed)
        except _ERRORS as error:
            raise BackendError(f"train step: {first_line(error)}") from error
        count = len(self._names)
        for index, name in enumerate(self._names):
            self._feed[name] = outputs[index]
            self._feed[momentum_name(name)] = outputs[count + index]
        return float(outputs[-1])

    def gradients(
        self, weights: Mapping[str, Array], x: Array, targets: Array, sample_weight: Array
    ) -> tuple[float, dict[str, Array]]:
        """The loss of a batch at some weights and its gradient, for a rule of descent other than the graph's.

        Raises:
            BackendError: with the runtime's own words.
        """
        self.begin(weights)
        loss = self.step(x, targets, sample_weight, learning_rate=0.0, momentum=0.0, proximal=0.0)
        # A momentum buffer that began empty and forgets all is the gradient, to the bit.
        return loss, {name: self._feed[momentum_name(name)] for name in self._names}

    def weights(self) -> dict[str, Array]:
        """See `TrainStep.weights`."""
        return {name: self._feed[name].copy() for name in self._names}


def open_whole_model(model: bytes, *, threads: int = 1) -> Callable[[Array], Array]:
    """A self-contained model: `(n, *input_shape)` normalised float32 in, `(n, classes)` logits out.

    Raises:
        BackendError: when the runtime refuses it, or its input or output has another name.
        HostileFileError: when the file asks for something no honest file needs.
    """
    summary = inspect_model(model, FULL_MODEL_LIMITS)
    inputs = [value.name for value in summary.inputs]
    outputs = [value.name for value in summary.outputs]
    if inputs != [FULL_INPUT] or FULL_LOGITS not in outputs or summary.external:
        raise BackendError(
            f"full model takes {inputs} and gives {outputs}; expected {FULL_INPUT!r} and {FULL_LOGITS!r}, "
            "with its weights inside the file"
        )
    session = _open_session(model, _session_options(threads), "full model")

    def run(x: Array) -> Array:
        try:
            logits: Array = session.run([FULL_LOGITS], {FULL_INPUT: x})[0]
        except _ERRORS as error:
            raise BackendError(f"full model: {first_line(error)}") from error
        return logits

    return run


def _session_options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool burns most of a core between samples that come 20 ms apart.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def _open_session(model: bytes, options: Any, where: str) -> Any:
    try:
        return onnxruntime.InferenceSession(model, options, providers=_PROVIDERS)
    except Exception as error:  # the runtime raises a dozen unrelated types here
        raise BackendError(f"{where}: onnxruntime refused it: {first_line(error)}") from error


def _ort_values(weights: Mapping[str, NDArray[np.generic]]) -> dict[str, Any]:
    return {
        # np.asarray, because ascontiguousarray turns a scalar into a vector; the copy is ours to keep.
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(np.asarray(array), order="C", copy=True))
        for name, array in weights.items()
    }
