"""What the recipes of shipped models share: train both networks, compare them, certify, write the bundle.

    python models/NAME/recipe.py [--out DIR] [--seeds N] [--json FILE]

The bundle is always that of the first seed; more seeds only fill the table. Test data is looked at for the
table and the card and for nothing else: quantisation reads training data, thresholds and certificates read
calibration data. From the trained networks on it is `cloud-hub build`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cloud_hub.builder.assemble import FULL_MODEL, Declaration, cut_network
from cloud_hub.builder.build import Built, complete
from cloud_hub.builder.edge_network import REPRESENTATIVE, EdgeNetwork, litert_of
from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.networks.export import export_full, export_staged
from cloud_hub.builder.networks.network import Network
from cloud_hub.builder.networks.training import (
    Augment,
    Distillation,
    Schedule,
    predict,
    train_edge,
    train_full,
)
from cloud_hub.builder.prepare import Prepared
from cloud_hub.builder.reports.summary import print_summary
from cloud_hub.builder.request import BuildRequest, make_request
from cloud_hub.builder.samples.data import Dataset, Parts
from cloud_hub.builder.samples.splits import split_parts
from edge_cascade.manifest import Preprocess, Window, Wire
from edge_cascade.preprocess import normalise
from edge_cascade.tensors import through_wire

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Samples:
    """`x` (n, *input_shape) float32 in the sensor's unit, `y` (n,) int64."""

    x: Floats
    y: Labels


@dataclass(frozen=True, slots=True)
class Sets:
    """Three sets that share no group: machine, writer or whatever the recipe divides by.

    Calibration samples are independent of each other, which is what its certificate counts.
    """

    train: Samples
    calibration: Samples
    test: Samples


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that makes one model. `full` has one stage; seeds in the schedules are replaced by the run's."""

    model: str
    labels: tuple[str, ...]
    full: Network
    edge: Network
    full_schedule: Schedule
    edge_schedule: Schedule
    distillation: Distillation
    wire: Wire
    window: Window | None
    epsilon: float
    load: Callable[[], Sets]
    augment: Augment | None = None
    version: str = "1.0.0"


@dataclass(frozen=True, slots=True)
class Trained:
    """One seed's networks and their accuracy on test data; the full model's copy went over the wire."""

    seed: int
    full: Mapping[str, Floats]
    edge: Mapping[str, Floats]
    full_accuracy: float
    exit_accuracy: tuple[float, ...]
    seconds: float


def run(recipe: Recipe, out: Path, arguments: Sequence[str] | None = None) -> Path:
    """The command of a recipe: train, print, write `bundle/`, `full.onnx` and the card into `out` or `--out`.

    Returns the directory that was written into.
    """
    options = _parse(recipe, out, arguments)
    console = Console()
    sets = recipe.load()
    preprocess = _preprocess_of(sets.train.x)
    runs = [train(recipe, sets, preprocess, seed=0)]
    built = _build(recipe, sets, preprocess, runs[0], options.out)
    print_summary(built)
    runs += [train(recipe, sets, preprocess, seed) for seed in range(1, options.seeds)]
    console.print(_table(recipe, runs))
    if options.json is not None:
        options.json.write_text(json.dumps(_as_json(recipe, runs, built), indent=2) + "\n")
    written: Path = options.out
    return written


def train(recipe: Recipe, sets: Sets, preprocess: Preprocess, seed: int) -> Trained:
    """Train the full model, then the device's network under it, and try both on the test data."""
    started = time.monotonic()
    x, y = normalise(sets.train.x, preprocess), sets.train.y
    full = train_full(
        recipe.full, x, y, schedule=replace(recipe.full_schedule, seed=seed), augment=recipe.augment
    )
    edge = train_edge(
        recipe.edge,
        x,
        y,
        schedule=replace(recipe.edge_schedule, seed=seed),
        distillation=recipe.distillation,
        teacher_logits=predict(recipe.full, full, x)[-1],
        augment=recipe.augment,
    )
    received = np.stack([through_wire(sample, recipe.wire) for sample in sets.test.x])
    full_logits = predict(recipe.full, full, normalise(received, preprocess))[-1]
    exit_logits = predict(recipe.edge, edge, normalise(sets.test.x, preprocess))
    return Trained(
        seed=seed,
        full=full,
        edge=edge,
        full_accuracy=_accuracy(full_logits, sets.test.y),
        exit_accuracy=tuple(_accuracy(logits, sets.test.y) for logits in exit_logits),
        seconds=time.monotonic() - started,
    )


def _build(recipe: Recipe, sets: Sets, preprocess: Preprocess, trained: Trained, out: Path) -> Built:
    declaration = Declaration(
        model=recipe.model,
        labels=recipe.labels,
        input_shape=recipe.edge.input_shape,
        preprocess=preprocess,
        wire=recipe.wire,
        window=recipe.window,
        version=recipe.version,
    )
    full = adopt(
        export_full(recipe.full, trained.full), sample_shape=recipe.full.input_shape, role="full model"
    )
    parts = Parts(
        **{
            name: Dataset(part.x, part.y, names=recipe.labels)
            for name, part in (
                ("train", sets.train),
                ("calibration", sets.calibration),
                ("test", sets.test),
            )
        }
    )
    prepared = Prepared(declaration, full, full.to_bytes(), split_parts(parts), ())
    staged = export_staged(recipe.edge, trained.edge)
    cuts = cut_network(staged, prepared.splits.train.x[:REPRESENTATIVE], declaration)
    made_by = {
        "network": f"models/{recipe.model}/recipe.py",
        "parameters": f"{staged.parameter_count:,}",
        "training": f"{recipe.edge_schedule.epochs} epochs, distillation {recipe.distillation.share:g}",
    }
    network = EdgeNetwork(cuts.stages, made_by, litert_of(cuts))
    return complete(_request(recipe, out), prepared, network, Console(stderr=True))


def _request(recipe: Recipe, out: Path) -> BuildRequest:
    inside = str(out / FULL_MODEL)
    return make_request({"full": inside, "data": inside, "out": str(out), "epsilon": recipe.epsilon})


def _parse(recipe: Recipe, out: Path, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Train and write the {recipe.model} bundle.")
    parser.add_argument(
        "--out", type=Path, default=out, help="directory to write into (default: beside the recipe)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds to train for the table (default: 1)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"argument --seeds: {options.seeds} is less than 1")
    return options


def _preprocess_of(x: Floats) -> Preprocess:
    return Preprocess(mean=(round(float(x.mean()), 4),), std=(round(float(x.std()), 4),))


def _accuracy(logits: Floats, y: Labels) -> float:
    return float(np.mean(logits.argmax(axis=1) == y))


def _table(recipe: Recipe, runs: Sequence[Trained]) -> Table:
    exits = range(len(recipe.edge.stages))
    title = (
        f"{recipe.model}: accuracy on test data, percent; parameters: edge {recipe.edge.parameter_count:,}, "
        f"full {recipe.full.parameter_count:,}"
    )
    table = Table("seed", *[f"exit {index + 1}" for index in exits], "full", "full - last exit", title=title)
    rows = [(str(one.seed), (*one.exit_accuracy, one.full_accuracy)) for one in runs]
    if len(runs) > 1:
        rows.append(("mean", tuple(np.mean([values for _, values in rows], axis=0).tolist())))
    for name, values in rows:
        table.add_row(name, *[f"{100 * value:.2f}" for value in (*values, values[-1] - values[-2])])
    return table


def _as_json(recipe: Recipe, runs: Sequence[Trained], built: Built) -> dict[str, Any]:
    seen = built.card.evaluation
    return {
        "model": recipe.model,
        "parameters": {"edge": recipe.edge.parameter_count, "full": recipe.full.parameter_count},
        "mult_adds": {"edge": list(recipe.edge.mult_adds), "full": sum(recipe.full.mult_adds)},
        "seeds": [
            {
                "seed": one.seed,
                "exits": list(one.exit_accuracy),
                "full": one.full_accuracy,
                "seconds": round(one.seconds, 1),
            }
            for one in runs
        ],
        "bundle_id": built.bundle_id,
        "full_model_bytes": (built.out / FULL_MODEL).stat().st_size,
        "plan": seen.plan,
        "test": {
            "full": seen.full_accuracy,
            "edge": seen.edge_accuracy,
            "cascade": seen.cascade_accuracy,
            "upload_share": seen.upload_share,
        },
    }
