"""What the commands that report on a bundle are given: the bundle, its full model and samples, run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from cloud_hub.builder.assemble import FULL_MODEL
from cloud_hub.builder.calibration.outcomes import Labels, Outcomes
from cloud_hub.builder.collect import StageRuns, full_labels, received, stages_of_bundle
from cloud_hub.builder.reports.traffic import PlanRun
from cloud_hub.builder.samples.data import Dataset, Parts, fit_parts, label_names
from cloud_hub.builder.samples.load import Keys, load_dataset
from cloud_hub.errors import BuildError
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.manifest import GraphManifest
from edge_cascade.policy import Plan, Rung
from edge_cascade.preprocess import normalise
from edge_cascade.shipped import find_bundle

MAX_FULL_MODEL_BYTES: Final = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Inputs:
    """A bundle with samples of its shape, the full model's answers to them, and its stages ready to run."""

    bundle: Bundle
    data: Dataset
    full_labels: Labels
    stages: StageRuns

    def run(self, plan: str | None) -> PlanRun:
        """A plan, by default the bundle's own, on all samples.

        Raises:
            BundleError: naming the plans there are.
        """
        chosen = self.bundle.plan(plan)
        return PlanRun(self.bundle, chosen, self.data.x, self.outcomes(chosen.rungs))

    def other_plans(self, plan: str) -> Mapping[str, tuple[tuple[Rung, ...], Outcomes]]:
        """The ladders of the bundle's other plans on the same samples."""
        others = (each for each in self.bundle.weights.plans if each.name != plan)
        return {each.name: (each.rungs, self.outcomes(each.rungs)) for each in others}

    def uncalibrated(self, rungs: tuple[Rung, ...]) -> Outcomes:
        """A ladder on the same samples without its temperatures."""
        return self.outcomes(tuple(msgspec.structs.replace(rung, temperature=1.0) for rung in rungs))

    def outcomes(self, rungs: tuple[Rung, ...]) -> Outcomes:
        """What rungs say of all samples.

        Raises:
            BackendError: when a stage does not run.
        """
        return Outcomes(self.stages.climb(rungs), self.full_labels, self.data.y, self.data.groups)

    def outcomes_of(self, bundle: str, plan: Plan) -> Outcomes:
        """What the plan of the same name in another bundle says of the same samples.

        Raises:
            BuildError: when the other bundle has another full model, other inputs or another ladder.
        """
        other = load_bundle(find_bundle(bundle))
        own = other.plan(plan.name)
        for name, first, second in (
            ("full model", self.bundle.graph.full_model_sha256[:12], other.graph.full_model_sha256[:12]),
            ("preprocessing", self.bundle.graph.preprocess, other.graph.preprocess),
            ("wire encoding", self.bundle.graph.wire, other.graph.wire),
            ("number of rungs", len(plan.rungs), len(own.rungs)),
        ):
            if first != second:
                raise BuildError(
                    f"{bundle}: its {name} is {second}, that of the bundle {first}: build it alike"
                )
        given = normalise(self.data.x, other.graph.preprocess)
        heads = StageRuns(stages_of_bundle(other), given).climb(own.rungs)
        return Outcomes(heads, self.full_labels, self.data.y, self.data.groups)


def read_inputs(bundle: str, data: Path, full: Path | None, keys: Keys | None = None) -> Inputs:
    """Read a bundle, samples and the full model (by default the one beside the bundle), and run the last.

    `keys` are what the data's arrays are called.

    Raises:
        BuildError, BundleError, BackendError: in one line, for what cannot be read or run.
    """
    directory = find_bundle(bundle)
    found = load_bundle(directory)
    samples = load_samples(data, found.graph, keys)
    model = read_full_model(full or directory.parent / FULL_MODEL, found.graph)
    given = received(samples.x, found.graph.preprocess, found.graph.wire)
    runs = StageRuns(stages_of_bundle(found), normalise(samples.x, found.graph.preprocess))
    return Inputs(found, samples, full_labels(model, given), runs)


def read_full_model(path: Path, graph: GraphManifest) -> bytes:
    """The full model that the bundle was measured against.

    Raises:
        BuildError: when there is none, or it is another one: what it says would be no measure.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FULL_MODEL_BYTES:
            raise BuildError(f"{path}: {size} bytes, at most {MAX_FULL_MODEL_BYTES} are read")
        model = path.read_bytes()
    except OSError as error:
        raise BuildError(f"full model {path}: {error.strerror}: name it with --full FILE") from error
    found = hashlib.sha256(model).hexdigest()
    if found != graph.full_model_sha256:
        raise BuildError(
            f"{path} ({found[:12]}) is not the full model that the bundle was measured against "
            f"({graph.full_model_sha256[:12]}): give the {FULL_MODEL} that its build wrote"
        )
    return model


def load_samples(path: Path, graph: GraphManifest, keys: Keys | None = None) -> Dataset:
    """Samples in the bundle's shape, their labels in the order of the bundle's.

    Raises:
        BuildError: in one line, for data that the bundle cannot be held against.
    """
    data = load_dataset(path, keys=keys)
    if not len(data):
        raise BuildError(f"{path}: holds no samples")
    network_shape = graph.preprocess.network_shape(graph.input_shape)
    fitted = fit_parts(Parts(test=data), network_shape, graph.preprocess.layout).test
    assert fitted is not None
    label_names(Parts(test=replace(fitted, names=None)), len(graph.labels))
    return replace(fitted, y=_in_bundle_order(fitted, graph.labels, path), names=graph.labels)


def _in_bundle_order(data: Dataset, labels: tuple[str, ...], path: Path) -> Labels | None:
    if data.y is None or data.names is None or data.names == labels or _are_numbers(labels):
        return data.y
    missing = [name for name in data.names if name not in labels]
    if missing:
        raise BuildError(
            f"{path}: the label {missing[0]!r} is none of the bundle's ({', '.join(labels[:8])}...)"
        )
    places = np.array([labels.index(name) for name in data.names], np.int64)
    return places[data.y]


def _are_numbers(labels: tuple[str, ...]) -> bool:
    """Whether the bundle's labels never had names: then the data's cannot be compared with them."""
    return labels == tuple(str(index) for index in range(len(labels)))
