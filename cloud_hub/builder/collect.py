"""Runs the stages of a network on samples: what every rung of a ladder says of each. No files.

The stages are those that ship, quantised. They are given what a board gives them, the sample as the sensor
has it; the full model is given what a hub gives it, the sample after the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.outcomes import Floats, Labels, Outcomes
from cloud_hub.builder.calibration.temperature import fit_temperature
from cloud_hub.builder.graphs.stages import CutStage, logits_model_of
from cloud_hub.builder.samples.data import Dataset
from edge_cascade.backends.onnx import OnnxStage, open_whole_model
from edge_cascade.bundle import Bundle, StageModel
from edge_cascade.manifest import Preprocess, Wire
from edge_cascade.onnx_file import inspect_model
from edge_cascade.policy import SAMPLE, Plan, Precision, Rung
from edge_cascade.preprocess import normalise
from edge_cascade.tensors import through_wire

Shape = tuple[int, ...]
Step = tuple[int, Precision, int]
"""A rung before calibration: stage, precision, and the rung that feeds it."""
StagePath = tuple[tuple[int, Precision], ...]

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Stages:
    """A network's stages in every precision, with what its graph says of them."""

    models: Mapping[tuple[int, Precision], StageModel]
    feature_shapes: tuple[Shape | None, ...]
    mult_adds: tuple[int, ...]


def stages_of_bundle(bundle: Bundle) -> Stages:
    """The stages of a bundle that was read."""
    return Stages(
        models=bundle.stage_models,
        feature_shapes=tuple(stage.feature_shape for stage in bundle.graph.stages),
        mult_adds=tuple(stage.mult_adds for stage in bundle.graph.stages),
    )


def stages_of_cuts(
    cuts: Mapping[Precision, Sequence[CutStage]],
    feature_shapes: Sequence[Shape | None],
    mult_adds: Sequence[int],
) -> Stages:
    """The stages of a network that was just cut."""
    models = {
        (index, precision): StageModel(index, precision, cut.model, inspect_model(cut.model), cut.weights)
        for precision, stages in cuts.items()
        for index, cut in enumerate(stages)
    }
    return Stages(models, tuple(feature_shapes), tuple(mult_adds))


class StageRuns:
    """Runs stages on one set of normalised samples `(n, *input_shape)`, each path through them only once."""

    def __init__(self, stages: Stages, x: Floats, *, on_rung: Callable[[], None] = lambda: None) -> None:
        self._stages = stages
        self._features: dict[StagePath, Floats] = {(): x}
        self._on_rung = on_rung

    def calibrate(
        self, steps: Sequence[Step], reference: Labels, fit_rows: NDArray[np.intp]
    ) -> tuple[tuple[Rung, ...], Floats]:
        """Rungs, their temperatures fitted to `reference` on some rows, and all heads `(rungs, n, 5)`."""
        rungs: list[Rung] = []
        for stage, precision, feeds_from in steps:
            given = self._features_for(_path_to(rungs, feeds_from))
            model = self._stages.models[stage, precision]
            run = open_whole_model(logits_model_of(model.model, model.weights))
            logits = in_chunks(run, given[fit_rows])
            temperature = fit_temperature(logits, reference[fit_rows])
            rungs.append(Rung(stage, precision, feeds_from, temperature, self._stages.mult_adds[stage]))
        return tuple(rungs), self.climb(rungs)

    def climb(self, rungs: Sequence[Rung]) -> Floats:
        """Every rung's head on every sample `(rungs, n, 5)`, whether an earlier one would accept or not."""
        heads = []
        for rung in rungs:
            path = (*_path_to(rungs, rung.feeds_from), (rung.stage, rung.precision))
            heads.append(self._run(path, rung.temperature))
            self._on_rung()
        return np.stack(heads)

    def _features_for(self, path: StagePath) -> Floats:
        if path not in self._features:
            # Features do not depend on the temperature.
            self._run(path, 1.0)
        return self._features[path]

    def _run(self, path: StagePath, temperature: float) -> Floats:
        stage, precision = path[-1]
        given = self._features_for(path[:-1])
        runner = OnnxStage(self._stages.models[stage, precision], self._stages.feature_shapes[stage])
        parts = [runner.run_batch(chunk, temperature) for chunk in chunks(given)]
        if path not in self._features and self._stages.feature_shapes[stage] is not None:
            self._features[path] = np.concatenate([made for made, _ in parts if made is not None])
        return np.concatenate([head for _, head in parts])


def collect(bundle: Bundle, plan: Plan, data: Dataset, full: bytes) -> Outcomes:
    """What a plan's rungs and the full model say of samples of the bundle's shape.

    Raises:
        BackendError, BundleError: when a stage or the full model does not run.
    """
    graph = bundle.graph
    heads = StageRuns(stages_of_bundle(bundle), normalise(data.x, graph.preprocess)).climb(plan.rungs)
    answers = full_labels(full, received(data.x, graph.preprocess, graph.wire))
    return Outcomes(heads, answers, data.y, data.groups)


def full_logits(full: bytes, normalised: Floats) -> Floats:
    """The full model's logits `(n, classes)` of normalised samples."""
    return in_chunks(open_whole_model(full), normalised)


def full_labels(full: bytes, normalised: Floats) -> Labels:
    """The full model's answers `(n,)` to normalised samples."""
    labels: Labels = full_logits(full, normalised).argmax(axis=1).astype(np.int64)
    return labels


def off_the_wire(x: Floats, wire: Wire) -> Floats:
    """Samples as the hub gets them, still in the sensor's unit."""
    return np.stack([through_wire(sample, wire) for sample in x])


def received(x: Floats, preprocess: Preprocess, wire: Wire) -> Floats:
    """What the full model is given of samples in the sensor's unit: they passed through the wire."""
    return normalise(off_the_wire(x, wire), preprocess)


def in_chunks(run: Callable[[Floats], Floats], x: Floats) -> Floats:
    """Run on parts of the batch: activations of a whole calibration set would take gigabytes."""
    return np.concatenate([run(chunk) for chunk in chunks(x)])


def chunks(x: Floats) -> Iterator[Floats]:
    """Consecutive parts of a batch."""
    return (x[start : start + _CHUNK] for start in range(0, len(x), _CHUNK))


def _path_to(rungs: Sequence[Rung], feeds_from: int) -> StagePath:
    """The stages that lead to a rung's features."""
    path: StagePath = ()
    while feeds_from != SAMPLE:
        rung = rungs[feeds_from]
        path = ((rung.stage, rung.precision), *path)
        feeds_from = rung.feeds_from
    return path
