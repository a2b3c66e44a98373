"""Chooses the largest network of a family that a board can afford, by the clock of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from cloud_hub.builder.graphs.stages import cut_stages
from cloud_hub.builder.networks.export import export_staged
from cloud_hub.builder.networks.family import Candidate
from cloud_hub.builder.networks.network import initial_parameters
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import BoundStage, OnnxStage
from edge_cascade.bundle import StageModel
from edge_cascade.onnx_file import inspect_model

_WARM_UP_CLIMBS: Final = 5
_MIN_CLIMBS: Final = 15
_MEASURE_S: Final = 0.02


def select_candidate(
    candidates: Sequence[Candidate],
    *,
    budget_us: float | None,
    budget_bytes: int | None,
    measure: Callable[[Candidate], float],
) -> Candidate:
    """The candidate of most parameters within both budgets; None: that one does not bind.

    `measure` gives microseconds for a climb of all stages. It is asked only where the answer matters.

    Raises:
        BuildError: with what each candidate costs, if none fits.
    """
    costs: list[str] = []
    for candidate in sorted(candidates, key=lambda one: one.network.parameter_count, reverse=True):
        cost = f"{candidate.name} {candidate.weight_bytes:,} bytes"
        fits = budget_bytes is None or candidate.weight_bytes <= budget_bytes
        if budget_us is not None:
            took_us = measure(candidate)
            cost += f" and {took_us:,.0f} us"
            fits = fits and took_us <= budget_us
        if fits:
            return candidate
        costs.append(cost)
    asked = [f"{budget_bytes:,} bytes"] if budget_bytes is not None else []
    asked += [f"{budget_us:,.0f} us"] if budget_us is not None else []
    raise BuildError(
        f"no network fits into {' and '.join(asked)}: {'; '.join(reversed(costs)) or 'there are none'}; "
        "raise the budget, or bring a smaller network with --edge"
    )


def measure_candidate(candidate: Candidate, *, scale: float = 1.0) -> float:
    """Median microseconds of climbing all stages in fp32 with random weights, one sample at a time.

    On this machine, on one thread, in a tight loop of some 20 ms; `scale` is how many times longer the board
    takes (`edge-daemon profile`). Int8 rungs take other times, mostly shorter.

    Raises:
        BackendError: when the runtime refuses a stage.
    """
    stages = _bound_stages(candidate)
    took: list[float] = []
    deadline = time.perf_counter() + _MEASURE_S
    while len(took) < _WARM_UP_CLIMBS + _MIN_CLIMBS or time.perf_counter() < deadline:
        started = time.perf_counter()
        for stage in stages:
            stage.run()
        took.append(time.perf_counter() - started)
    return scale * 1e6 * statistics.median(took[_WARM_UP_CLIMBS:])


def _bound_stages(candidate: Candidate) -> list[BoundStage]:
    """Every stage on buffers of its own, each reading what the one before it wrote."""
    network = candidate.network
    rng = np.random.default_rng(0)
    staged = export_staged(network, initial_parameters(network, rng))
    given = rng.standard_normal((1, *network.input_shape)).astype(np.float32)
    bound: list[BoundStage] = []
    for index, cut in enumerate(cut_stages(staged)):
        model = StageModel(index, "fp32", cut.model, inspect_model(cut.model), cut.weights)
        stage = OnnxStage(model, staged.feature_shape_of(index)).bind(given, 1.0)
        bound.append(stage)
        if stage.features is not None:
            given = stage.features
    return bound
