"""What a train step is called and takes: the names that its writer and its runners share. No I/O.

A train step is one ONNX graph, see `cloud_hub.builder.gradients.train_step`: parameters and a batch in,
parameters after one step of descent out. Any onnxruntime runs it; nothing in it knows that it trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edge_cascade.errors import BundleError
from edge_cascade.manifest import STAGE_INPUT
from edge_cascade.onnx_file import ModelSummary, ValueSpec

TARGETS: Final = "targets"
SAMPLE_WEIGHT: Final = "sample_weight"
LEARNING_RATE: Final = "learning_rate"
MOMENTUM: Final = "momentum"
PROXIMAL: Final = "proximal"
LOSS: Final = "loss"

_SCALARS: Final = (LEARNING_RATE, MOMENTUM, PROXIMAL)


def momentum_name(parameter: str) -> str:
    """The input that holds a parameter's momentum buffer."""
    return f"momentum.{parameter}"


def base_name(parameter: str) -> str:
    """The input that holds a parameter as it was when the round began."""
    return f"base.{parameter}"


def updated_name(name: str) -> str:
    """The output that holds a parameter, or momentum buffer, after the step."""
    return f"updated.{name}"


@dataclass(frozen=True, slots=True, repr=False)
class TrainStepModel:
    """A checked train step: the file, and the shapes of the parameters that it moves, by name.

    `input_shape` is what the network is given, channels first, without the batch axis.
    """

    model: bytes
    shapes: Mapping[str, tuple[int, ...]]
    input_shape: tuple[int, ...]
    classes: int

    def __repr__(self) -> str:
        return f"<TrainStepModel of {len(self.shapes)} parameters>"


def read_train_step(
    model: bytes, summary: ModelSummary, *, input_shape: tuple[int, ...], classes: int, where: str
) -> TrainStepModel:
    """The train step in a file that was inspected; `input_shape` is what the network is given, no batch axis.

    Raises:
        BundleError: when its inputs or outputs are not those of a train step of such a network.
    """
    inputs = {value.name: value for value in summary.inputs}
    parameters = {
        name: _fixed_shape(value, where) for name, value in inputs.items() if momentum_name(name) in inputs
    }
    wanted = {STAGE_INPUT, TARGETS, SAMPLE_WEIGHT, *_SCALARS}
    for name in parameters:
        wanted |= {name, momentum_name(name), base_name(name)}
    if not parameters or inputs.keys() != wanted or summary.external:
        odd = sorted(inputs.keys() ^ wanted)[:5]
        raise BundleError(f"{where}: is no train step: {len(parameters)} parameters, odd inputs {odd}")
    outputs = {value.name for value in summary.outputs}
    expected = {LOSS, *map(updated_name, parameters), *(updated_name(momentum_name(n)) for n in parameters)}
    if outputs != expected:
        raise BundleError(f"{where}: is no train step: odd outputs {sorted(outputs ^ expected)[:5]}")
    if any(value.dtype != "float32" for value in summary.inputs):
        raise BundleError(f"{where}: a train step takes float32 and nothing else")
    for name, shape in ((STAGE_INPUT, input_shape), (TARGETS, (classes,))):
        if inputs[name].shape[1:] != shape:
            raise BundleError(f"{where}: {name} is {inputs[name].shape}, expected (n, {shape})")
    for name, shape in parameters.items():
        for twin in (momentum_name(name), base_name(name)):
            if _fixed_shape(inputs[twin], where) != shape:
                raise BundleError(f"{where}: {twin} is not of the shape of its parameter")
    return TrainStepModel(model, parameters, input_shape, classes)


def _fixed_shape(value: ValueSpec, where: str) -> tuple[int, ...]:
    shape = tuple(size for size in value.shape if isinstance(size, int))
    if len(shape) != len(value.shape) or any(size < 1 for size in shape):
        raise BundleError(f"{where}: {value.name} has the shape {value.shape}, parameters' are fixed")
    return shape
