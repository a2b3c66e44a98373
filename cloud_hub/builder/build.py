"""From a trained network to a bundle on disk: the one entry for recipes, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from cloud_hub.builder.calibrate import (
    MAX_ACCEPT_SCORE,
    Outcomes,
    fit_temperature,
    make_plan,
    select_paying,
)
from cloud_hub.builder.export import export_whole
from cloud_hub.builder.network import Network, Parameters
from cloud_hub.builder.quantise import quantise
from cloud_hub.builder.stages import CutStage, cut_stages
from cloud_hub.builder.write import GraphPart, WeightsPart, write_bundle
from edge_cascade.backends.onnx import OnnxStage, open_whole_model
from edge_cascade.bundle import StageModel
from edge_cascade.durable import write_durably
from edge_cascade.manifest import Bounds, Preprocess, Stage, Window, Wire
from edge_cascade.onnx_file import inspect_model
from edge_cascade.policy import SAMPLE, Plan, Precision, Rung
from edge_cascade.preprocess import normalise
from edge_cascade.tensors import through_wire

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Step = tuple[int, Precision, int]
"""A rung before calibration: stage, precision, and the rung that feeds it."""

BUNDLE = "bundle"
FULL_MODEL = "full.onnx"

# fp32: other processors add in another order. int8: another kernel may round a half the other way, which
# moves a value by a whole step. onnxruntime's fused and unfused x86 kernels agree to 1e-6; ARM has its own.
TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-3, "int8": 0.05}

_GOLDEN_SAMPLES = 16
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Calibration:
    """Samples that trained nothing, in the sensor's unit: `x` (n, *input_shape) float32, `y` (n,) int64."""

    x: Floats
    y: Labels


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What was built. Accuracies are on the calibration data; `rung_accuracy` by plan name, rung by rung."""

    bundle_id: str
    directory: Path
    plans: tuple[Plan, ...]
    default_plan: str
    full_accuracy: float
    rung_accuracy: Mapping[str, tuple[float, ...]]


def build_bundle(
    network: Network,
    parameters: Parameters,
    *,
    model: str,
    labels: Sequence[str],
    full: onnx.ModelProto,
    representative: Floats,
    calibration: Calibration,
    preprocess: Preprocess,
    wire: Wire,
    out: Path,
    window: Window | None = None,
    version: str = "1.0.0",
    min_daemon: str = "0.1.0",
) -> BuildReport:
    """Quantise, cut, calibrate and write `out/bundle` and, for the hub, `out/full.onnx`.

    `representative` are training samples (n, *input_shape) in the sensor's unit, from which int8 takes its
    ranges; `full` comes from `export_full`. The same arguments give the same bytes on one machine.

    Raises:
        ValueError: if parameters do not fit the network.
    """
    whole = export_whole(network, parameters)
    cuts: dict[Precision, list[CutStage]] = {
        "fp32": cut_stages(whole, network),
        "int8": cut_stages(quantise(whole, _received(representative, preprocess, wire)), network),
    }
    full_model = full.SerializeToString(deterministic=True)
    x = _received(calibration.x, preprocess, wire)
    full_labels = _in_chunks(open_whole_model(full_model), x).argmax(axis=1).astype(np.int64)

    runs = {}
    for name, steps in _ladders(len(network.stages)).items():
        rungs, heads = _climb(network, cuts, steps, x, calibration.y)
        outcomes = Outcomes(heads, full_labels, calibration.y)
        runs[name] = (make_plan(name, rungs, outcomes), outcomes)
    plans, default_plan = select_paying([plan for plan, _ in runs.values()])

    files = {
        _file_name(index, precision): cut.model
        for precision, stages in cuts.items()
        for index, cut in enumerate(stages)
    }
    tensors = {
        f"{precision}/{name}": array
        for precision, stages in cuts.items()
        for cut in stages
        for name, array in cut.weights.items()
    }
    graph = GraphPart(
        model=model,
        version=version,
        labels=tuple(labels),
        preprocess=preprocess,
        window=window,
        wire=wire,
        stages=_stages(network),
        stage_files=files,
        golden_inputs=_off_the_wire(calibration.x[:_GOLDEN_SAMPLES], wire),
        full_model=full_model,
        bounds=Bounds(max_abs_weight=_weight_bound(tensors), max_accept_score=MAX_ACCEPT_SCORE),
        min_daemon=min_daemon,
    )
    golden = {
        f"{plan.name}/{rung}": np.ascontiguousarray(runs[plan.name][1].heads[rung, :_GOLDEN_SAMPLES])
        for plan in plans
        for rung in range(len(plan.rungs))
    }
    weights = WeightsPart(tensors, tuple(plans), default_plan, golden, TOLERANCE)
    out.mkdir(parents=True, exist_ok=True)
    bundle_id = write_bundle(out / BUNDLE, graph, weights)
    write_durably(out / FULL_MODEL, full_model)
    first_outcomes = next(iter(runs.values()))[1]
    return BuildReport(
        bundle_id=bundle_id,
        directory=out / BUNDLE,
        plans=tuple(plans),
        default_plan=default_plan,
        full_accuracy=first_outcomes.full_accuracy,
        rung_accuracy={plan.name: runs[plan.name][1].rung_accuracy for plan in plans},
    )


def _ladders(stages: int) -> dict[str, tuple[Step, ...]]:
    """The ladders that are tried: int8 alone, int8 with the last stage once more in fp32, fp32 alone."""
    int8: tuple[Step, ...] = tuple((stage, "int8", stage - 1) for stage in range(stages))
    fp32: tuple[Step, ...] = tuple((stage, "fp32", stage - 1) for stage in range(stages))
    again: Step = (stages - 1, "fp32", stages - 2)
    return {"int8": int8, "int8-fp32": (*int8, again), "fp32": fp32}


def _climb(
    network: Network,
    cuts: Mapping[Precision, Sequence[CutStage]],
    steps: Sequence[Step],
    x: Floats,
    y: Labels,
) -> tuple[list[Rung], Floats]:
    """Every rung on every sample: the rungs with their temperatures, and their heads `(rungs, n, 5)`."""
    rungs: list[Rung] = []
    heads: list[Floats] = []
    features: dict[int, Floats] = {SAMPLE: x}
    for index, (stage, precision, feeds_from) in enumerate(steps):
        cut, given = cuts[precision][stage], features[feeds_from]
        temperature = fit_temperature(_in_chunks(open_whole_model(cut.logits_model), given), y)
        made, head = _run_stage(
            network, cut, given, stage=stage, precision=precision, temperature=temperature
        )
        if made is not None:
            features[index] = made
        heads.append(head)
        rungs.append(Rung(stage, precision, feeds_from, temperature, network.mult_adds[stage]))
    return rungs, np.stack(heads)


def _run_stage(
    network: Network, cut: CutStage, x: Floats, *, stage: int, precision: Precision, temperature: float
) -> tuple[Floats | None, Floats]:
    is_last = stage == len(network.stages) - 1
    checked = StageModel(stage, precision, cut.model, inspect_model(cut.model), cut.weights)
    runner = OnnxStage(checked, None if is_last else network.feature_shapes[stage])
    parts = [runner.run_batch(chunk, temperature) for chunk in _chunks(x)]
    features = [made for made, _ in parts if made is not None]
    return (np.concatenate(features) if features else None), np.concatenate([head for _, head in parts])


def _in_chunks(run: Callable[[Floats], Floats], x: Floats) -> Floats:
    return np.concatenate([run(chunk) for chunk in _chunks(x)])


def _chunks(x: Floats) -> Iterator[Floats]:
    # Activations of a whole calibration set at once would take gigabytes.
    return (x[start : start + _CHUNK] for start in range(0, len(x), _CHUNK))


def _off_the_wire(x: Floats, wire: Wire) -> Floats:
    return np.stack([through_wire(sample, wire) for sample in x])


def _received(x: Floats, preprocess: Preprocess, wire: Wire) -> Floats:
    """What the network is given of samples in the sensor's unit: it must learn its ranges from the same."""
    return normalise(_off_the_wire(x, wire), preprocess)


def _stages(network: Network) -> tuple[Stage, ...]:
    last = len(network.stages) - 1
    shapes = (network.input_shape, *network.feature_shapes)
    return tuple(
        Stage(
            files={precision: _file_name(index, precision) for precision in ("fp32", "int8")},
            input_shape=shapes[index],
            feature_shape=None if index == last else shapes[index + 1],
            mult_adds=mult_adds,
        )
        for index, mult_adds in enumerate(network.mult_adds)
    )


def _file_name(stage: int, precision: Precision) -> str:
    return f"stage{stage}.{precision}.onnx"


def _weight_bound(tensors: Mapping[str, NDArray[np.generic]]) -> float:
    """A power of two, at least four times the largest weight: room to learn, none to overflow."""
    largest = max(float(np.abs(array).max()) for array in tensors.values() if array.dtype.kind == "f")
    return float(2.0 ** np.ceil(np.log2(4.0 * largest)))
