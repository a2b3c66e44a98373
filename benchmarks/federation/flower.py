"""The same fleet twice: by the project's own parts, and trained by torch eager and averaged by Flower's FedAvg.

Both have the same partition, network, first weights, hyper-parameters, and order of batches; on our side the train step
on onnxruntime, fp32 both ways, screening and the whole of `fleet`; on theirs `flwr.server.strategy.FedAvg.aggregate_fit`,
called in this process. What is left between the curves is rounding, which training makes larger; what a seed does is the
measure for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.federation.bench import Bench, percent
from benchmarks.federation.fleet import Fleet, run_fleet
from benchmarks.federation.har import fleet_of
from benchmarks.federation.learner import learner_of
from benchmarks.federation.sets import DEVICES, digits, har, spread_in_shards
from benchmarks.harness import print_table
from cloud_hub.federation.settings import SeriesSettings, schedule_of
from edge_cascade.training import train
from edge_cascade.weights import FloatArray

SEEDS: Final = 3


@dataclass(frozen=True, slots=True)
class Curves:
    """Accuracy after each round, a row a seed."""

    name: str
    ours: tuple[tuple[float, ...], ...]
    theirs: tuple[tuple[float, ...], ...]


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    if find_spec("flwr") is None or find_spec("torch") is None:
        print("flower: needs flwr and torch (pip install flwr): left out")
        return {}
    seeds = bench.seeds(SEEDS)
    names = {"HAR by subject": _har_settings(bench), "digits in shards": _digits_settings(bench)}
    jobs = [(one, (bench.data, name, settings, seed)) for name, settings in names.items() for seed in seeds]
    results = bench.run("flower", jobs)
    curves = []
    for index, name in enumerate(names):
        ours, theirs = zip(*results[index * len(seeds) : (index + 1) * len(seeds)], strict=True)
        curves.append(Curves(name, tuple(ours), tuple(theirs)))
    _print(curves)
    return {"curves": msgspec.to_builtins(curves)}


def one(
    data: Path | None, name: str, settings: SeriesSettings, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both curves of one seed."""
    fleet = fleet_of(har(data), seed) if name.startswith("HAR") else _digits_fleet(data, seed)
    ours = run_fleet(fleet, settings, seed=seed).accuracies
    from benchmarks.federation.torch_twin import one_thread

    with one_thread():
        return ours, _flower_run(fleet, settings, seed)


def _har_settings(bench: Bench) -> SeriesSettings:
    return SeriesSettings(
        rounds=bench.some(20, 2),
        strategy="fedavg",
        epochs=2,
        batch_size=16,
        learning_rate=0.01,
        momentum=0.9,
        min_examples=1,
        encoding="fp32",
        base_encoding="fp32",
    )


def _digits_settings(bench: Bench) -> SeriesSettings:
    return SeriesSettings(
        rounds=bench.some(60, 2),
        strategy="fedavg",
        epochs=5,
        batch_size=10,
        learning_rate=0.1,
        momentum=0.0,
        min_examples=1,
        encoding="fp32",
        base_encoding="fp32",
    )


def _digits_fleet(data: Path | None, seed: int) -> Fleet:
    whole = digits(tiny=data is None)
    rng = np.random.default_rng((seed, 6))
    parts = spread_in_shards(whole.train, DEVICES, rng)
    devices = tuple(part.examples(whole.network.classes) for part in parts)
    return Fleet(whole.network, learner_of(whole.network).fresh(rng), devices, whole.test)


def _flower_run(fleet: Fleet, settings: SeriesSettings, seed: int) -> tuple[float, ...]:
    from benchmarks.federation.torch_twin import TorchStep

    learner, step = learner_of(fleet.network), TorchStep(fleet.network)
    weights = dict(fleet.start)
    names = sorted(weights)
    accuracies = [learner.accuracy(weights, fleet.test)]
    for number in range(settings.rounds):
        results = []
        for index, examples in enumerate(fleet.devices):
            # The seeds of `FleetRun`, and so its order of batches.
            rng = np.random.default_rng((seed, 2, number, index))
            trained = train(step, weights, examples, schedule_of(settings), rng=rng).weights
            results.append(fit_result([trained[name] for name in names], len(examples)))
        weights = dict(zip(names, fed_avg_of(results), strict=True))
        accuracies.append(learner.accuracy(weights, fleet.test))
    return tuple(accuracies)


def fit_result(arrays: Sequence[FloatArray], num_examples: int) -> Any:
    """What a client of Flower sends after training."""
    _import_flower()
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters

    return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(list(arrays)), num_examples, {})


def fed_avg_of(results: Sequence[Any]) -> list[FloatArray]:
    """What Flower's FedAvg makes of them, as it is by default."""
    _import_flower()
    from flwr.common import parameters_to_ndarrays
    from flwr.server.strategy import FedAvg

    # It does not look at who sent what; a round above the first spares us its warning about metrics.
    senders: list[Any] = [(None, result) for result in results]
    parameters, _ = FedAvg().aggregate_fit(2, senders, [])
    assert parameters is not None, "there are results"
    return [array.astype(np.float32) for array in parameters_to_ndarrays(parameters)]


def _import_flower() -> None:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")


def _print(curves: Sequence[Curves]) -> None:
    rows = []
    for each in curves:
        ours, theirs = np.array(each.ours), np.array(each.theirs)
        gap = (ours - theirs).mean(axis=0)[1:]
        spread = (
            np.sqrt((ours.var(axis=0, ddof=1) + theirs.var(axis=0, ddof=1)) / 2)[1:] if len(ours) > 1 else gap
        )
        rows.append(
            (
                each.name,
                str(ours.shape[1] - 1),
                percent(ours[:, -1]),
                percent(theirs[:, -1]),
                f"{100 * gap.mean():+.2f}",
                f"{100 * np.abs(gap).max():.2f}",
                f"{100 * spread.mean():.2f}",
            )
        )
    print_table(
        f"Beside Flower: accuracy in percent, {len(curves[0].ours)} seeds; differences of the means over seeds, in points",
        (
            "",
            "rounds",
            "ours at the end",
            "Flower at the end",
            "difference, all rounds",
            "largest in a round",
            "deviation over seeds",
        ),
        rows,
    )
