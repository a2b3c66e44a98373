"""Rounds to a target accuracy from fresh weights: Fashion-MNIST by a Dirichlet draw, digits in shards of two labels.

Fashion-MNIST: Dirichlet(0.3) over 20 devices that all take part, one epoch of batches of 32 a round, 10,000 of the images.
Digits: 20 clients, a fifth of them in a round, 5 epochs of batches of 10, 200 rounds, plain descent at 0.1, by which others
measured (`PUBLISHED`). They draw cohorts uniformly, as the row `uniform cohorts` does; the others are `select_cohort`'s,
which asks those that waited longest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.federation.bench import Bench, kilobytes, percent
from benchmarks.federation.fleet import Fleet, Manner, Run, run_fleet
from benchmarks.federation.learner import learner_of
from benchmarks.federation.sets import (
    DEVICES,
    Whole,
    digits,
    fashion,
    sizes_of,
    spread_by_dirichlet,
    spread_evenly,
    spread_in_shards,
)
from benchmarks.harness import print_table
from cloud_hub.federation.settings import SeriesSettings

SEEDS: Final = 3
ALPHA: Final = 0.3
FASHION_IMAGES: Final = 10_000
FASHION_TARGETS: Final = (0.75, 0.80)
DIGITS_TARGETS: Final = (0.90,)
LAST_ROUNDS: Final = 20

PUBLISHED: Final = {
    "fp32, uniform cohorts": "41 / 34 / 44; 94.7",
    "top 10 % + error feedback": "94.7",
    "top 1 % + error feedback": "93.1",
    "top 1 % without": "87.6",
    "sign + error feedback": "89.9",
    "fp32, IID": "97.0",
}
"""Rounds to 90 % and the mean of the last 20 rounds, of the same task elsewhere."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One row."""

    name: str
    settings: SeriesSettings
    manner: Manner = Manner()  # noqa: RUF009 - frozen
    is_iid: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """An arm over its seeds; `rounds` by target."""

    name: str
    rounds: tuple[tuple[int | None, ...], ...]
    last: tuple[float, ...]
    up_bytes: float
    down_bytes: float
    curve: tuple[float, ...]


def run_fashion(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    settings = SeriesSettings(
        rounds=bench.some(20, 2),
        strategy="fedavg",
        epochs=1,
        batch_size=32,
        learning_rate=0.01,
        momentum=0.9,
        min_examples=1,
        max_examples=1_000_000,
        encoding="fp32",
    )
    arms = _arms(settings, ("fp32", "int8", "sign", "topk"))
    rows = _measured(bench, "fashion", arms, FASHION_TARGETS, last=5)
    sizes = [sizes_of(_fashion_parts(bench.data, seed)[1]) for seed in bench.seeds(SEEDS)]
    _print("Fashion-MNIST, Dirichlet(0.3), 20 devices", rows, FASHION_TARGETS, last=5, published={})
    print(f"images a device, a seed each: {'; '.join(str(each) for each in sizes)}")
    return {"rows": msgspec.to_builtins(rows), "sizes": sizes}


def run_digits(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    settings = SeriesSettings(
        rounds=bench.some(200, 3),
        cohort=DEVICES // 5,
        sleeper_share=0.0,
        strategy="fedavg",
        epochs=5,
        batch_size=10,
        learning_rate=0.1,
        momentum=0.0,
        min_examples=1,
        encoding="fp32",
    )
    arms = [
        *_arms(settings, ("fp32", "int8", "sign", "topk")),
        Arm("fp32, uniform cohorts", settings, Manner(uniform=True)),
        Arm("top 10 % + error feedback", _with(settings, encoding="topk", top_share=0.1)),
        Arm("top 1 % without", _with(settings, encoding="topk"), Manner(forgets=True)),
        Arm("sign without", _with(settings, encoding="sign"), Manner(forgets=True)),
        Arm("fp32, IID", settings, is_iid=True),
    ]
    last = bench.some(LAST_ROUNDS, 2)
    rows = _measured(bench, "digits", arms, DIGITS_TARGETS, last=last)
    _print(
        "Digits, two-label shards, 20 clients, 4 a round",
        rows,
        DIGITS_TARGETS,
        last=last,
        published=PUBLISHED,
    )
    return {"rows": msgspec.to_builtins(rows)}


def one(data: Path | None, what: str, arm: Arm, seed: int) -> Run:
    """One seed of one arm."""
    rng = np.random.default_rng((seed, 0))
    if what == "fashion":
        whole, parts = _fashion_parts(data, seed)
    else:
        whole = digits(tiny=data is None)
        parts = (
            spread_evenly(whole.train, DEVICES, rng)
            if arm.is_iid
            else spread_in_shards(whole.train, DEVICES, rng)
        )
    devices = tuple(part.examples(whole.network.classes) for part in parts)
    start = learner_of(whole.network).fresh(np.random.default_rng((seed, 7)))
    return run_fleet(
        Fleet(whole.network, start, devices, whole.test), arm.settings, seed=seed, manner=arm.manner
    )


def _fashion_parts(data: Path | None, seed: int) -> tuple[Whole, tuple[Any, ...]]:
    whole = fashion(data)
    rng = np.random.default_rng((seed, 0))
    chosen = whole.train.rows(rng.permutation(len(whole.train))[:FASHION_IMAGES])
    devices = DEVICES if data is not None else 4
    return whole, spread_by_dirichlet(chosen, devices, rng, alpha=ALPHA, least=2 if data is None else 10)


def _arms(settings: SeriesSettings, encodings: Sequence[str]) -> list[Arm]:
    names = {"sign": "sign + error feedback", "topk": "top 1 % + error feedback"}
    return [Arm(names.get(each, each), _with(settings, encoding=each)) for each in encodings]


def _with(settings: SeriesSettings, **changes: Any) -> SeriesSettings:
    return msgspec.structs.replace(settings, **changes)


def _measured(
    bench: Bench, what: str, arms: Sequence[Arm], targets: Sequence[float], *, last: int
) -> list[Row]:
    seeds = bench.seeds(SEEDS)
    results: list[Run] = bench.run(
        what, [(one, (bench.data, what, arm, seed)) for arm in arms for seed in seeds]
    )
    rows = []
    for index, arm in enumerate(arms):
        runs = results[index * len(seeds) : (index + 1) * len(seeds)]
        rows.append(
            Row(
                arm.name,
                tuple(tuple(run.rounds_to(target) for run in runs) for target in targets),
                tuple(float(np.mean(run.accuracies[-last:])) for run in runs),
                float(np.mean([run.up_bytes for run in runs])),
                float(np.mean([run.down_bytes for run in runs])),
                tuple(float(value) for value in np.mean([run.accuracies for run in runs], axis=0)),
            )
        )
    return rows


def _print(
    title: str, rows: Sequence[Row], targets: Sequence[float], *, last: int, published: dict[str, str]
) -> None:
    columns = ["", *(f"rounds to {target:.0%}, by seed" for target in targets)]
    columns += [f"mean of the last {last}, %", "up a device asked and round", "fewer", "down"]
    if published:
        columns.append("elsewhere")
    cells = []
    for row in rows:
        reached = [
            " / ".join("-" if each is None else str(each) for each in each_target)
            for each_target in row.rounds
        ]
        cell = [
            row.name,
            *reached,
            percent(row.last),
            kilobytes(row.up_bytes),
            f"{rows[0].up_bytes / row.up_bytes:.1f}",
            kilobytes(row.down_bytes),
        ]
        cells.append([*cell, published.get(row.name, "")] if published else cell)
    print_table(title, columns, cells)
