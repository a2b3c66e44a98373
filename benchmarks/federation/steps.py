"""One step of training beside torch eager, and how long its graph takes to make. One thread each, turn by turn."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.federation.bench import Bench
from benchmarks.federation.learner import Learner
from benchmarks.federation.sets import TINY_NETWORK
from benchmarks.harness import print_table
from cloud_hub.builder.joined import train_step_of
from cloud_hub.builder.networks.export import export_staged
from cloud_hub.builder.networks.family import default_family
from cloud_hub.builder.networks.network import Network, initial_parameters
from edge_cascade.backends.onnx import OnnxTrainStep
from edge_cascade.timing import Case, Stopwatch, collector_off, measure_tight
from edge_cascade.training import TrainStep, one_hot

BATCHES: Final = (8, 32)
BOUNDS: Final = {8: 1.3, 32: 1.8}
_MODELS: Final = Path(__file__).parents[2] / "models"


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians. `ratio` is ours / torch within a round, `lowest` and `highest` the rounds' extremes of it."""

    network: str
    parameters: int
    batch: int
    ours_us: float
    torch_us: float
    ratio: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class Building:
    """Seconds from a network's graph to its train step, and from there to a session."""

    network: str
    graph_s: float
    session_s: float


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    networks = {"tiny": TINY_NETWORK} if bench.is_quick else _networks()
    building = [_build(name, network) for name, network in networks.items()]
    print_table(
        "A train step's making",
        ("", "graph, ms", "session, ms"),
        [(each.network, f"{1e3 * each.graph_s:.0f}", f"{1e3 * each.session_s:.0f}") for each in building],
    )
    if find_spec("torch") is None:
        print("steps: torch is not installed, so there is nothing to compare with")
        return {"building": msgspec.to_builtins(building)}
    times = []
    for name, network in networks.items():
        for batch in BATCHES:
            times.append(
                _compare(name, network, batch, rounds=bench.some(9, 1), seconds=bench.some(1.0, 0.02))
            )
            bench.console.print(f"{name}, batch of {batch}: {times[-1].ratio:.2f}")
    _print(times)
    return {"building": msgspec.to_builtins(building), "steps": msgspec.to_builtins(times)}


def _networks() -> dict[str, Network]:
    return {
        "digits, as shipped": _shipped("digits"),
        "vibration, as shipped": _shipped("vibration"),
        "Fashion-MNIST, medium": default_family((1, 28, 28), 10)[1].network,
        "CWRU, medium": default_family((1, 1024), 16)[1].network,
    }


def _shipped(model: str) -> Network:
    spec = importlib.util.spec_from_file_location(f"recipe_of_{model}", _MODELS / model / "recipe.py")
    assert spec is not None, "a file of this checkout"
    assert spec.loader is not None, "a file of this checkout"
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    edge: Network = recipe.EDGE
    return edge


def _build(name: str, network: Network) -> Building:
    learner = Learner(network)
    staged = export_staged(network, initial_parameters(network, np.random.default_rng(0)))
    graphs, sessions = [], []
    for _ in range(5):
        started = time.perf_counter()
        train_step_of(staged)
        graphs.append(time.perf_counter() - started)
        started = time.perf_counter()
        OnnxTrainStep(learner.model)
        sessions.append(time.perf_counter() - started)
    return Building(name, median(graphs), median(sessions))


def _compare(name: str, network: Network, batch: int, *, rounds: int, seconds: float) -> StepTimes:
    from benchmarks.federation.torch_twin import TorchStep, one_thread

    learner = Learner(network)
    rng = np.random.default_rng(0)
    weights = learner.fresh(rng)
    x = rng.standard_normal((batch, *network.input_shape)).astype(np.float32)
    targets = one_hot(rng.integers(0, network.classes, batch), network.classes)
    rivals: dict[str, TrainStep] = {"ours": learner.step, "torch": TorchStep(network)}

    def case(key: str, step: TrainStep) -> Case[str]:
        weight = np.ones(batch, np.float32)
        step.begin(weights)
        # So slow that nothing diverges, whatever the number of steps.
        return Case(
            key, lambda: step.step(x, targets, weight, learning_rate=1e-5, momentum=0.9, proximal=0.0)
        )

    cases = [case(key, step) for key, step in rivals.items()]
    with one_thread(), collector_off():
        taken = [measure_tight(cases, seconds, Stopwatch()) for _ in range(rounds)]
    ours, theirs = ([timings[key].p50_us for timings in taken] for key in rivals)
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return StepTimes(
        name,
        network.parameter_count,
        batch,
        median(ours),
        median(theirs),
        median(ratios),
        min(ratios),
        max(ratios),
    )


def _print(times: list[StepTimes]) -> None:
    print_table(
        "One step of descent (forward, backward, SGD with momentum), one thread, microseconds",
        ("", "parameters", "batch", "ours", "torch eager", "ours / torch", "range over rounds", "bound"),
        [
            (
                each.network,
                f"{each.parameters:,}",
                str(each.batch),
                f"{each.ours_us:.0f}",
                f"{each.torch_us:.0f}",
                f"{each.ratio:.2f}",
                f"{each.lowest:.2f} to {each.highest:.2f}",
                f"{BOUNDS[each.batch]}",
            )
            for each in times
        ],
    )
