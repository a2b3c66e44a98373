"""What noise hides and what it costs: accuracy on HAR beside epsilon, for fp32 and int8.

Twenty devices are too few for privacy: the noise that would hide one drowns all. What decides accuracy is the noise in the
mean, which falls with the square root of the votes; what decides epsilon is the noise of a device. So the table measures
accuracy here at some noise in the mean, and accounts for it twice: for these 20 devices, and for a cohort of 10,000 in a
fleet of 100,000 whose mean is as noisy (delta 1e-6, the same rounds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.federation.bench import Bench, percent
from benchmarks.federation.fleet import run_fleet
from benchmarks.federation.har import fleet_of, series
from benchmarks.federation.sets import DEVICES, har
from benchmarks.harness import print_table
from cloud_hub.core.federation.privacy import PrivacySpec, measure_privacy
from edge_cascade.delta_payloads import Encoding

SEEDS: Final = 2
ROUNDS: Final = 20
CLIP_NORM: Final = 1.0
MULTIPLIERS: Final = (0.0, 0.003, 0.01, 0.03, 0.1)
LARGE_COHORT: Final = 10_000
LARGE_FLEET: Final = 100_000
DELTA: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Row:
    """A level of noise: `multiplier` of each of 20 devices, and of each of a large cohort for the same mean.

    Epsilons: of one update, and of the aggregate of all rounds; infinite without noise.
    """

    multiplier: float
    fp32: tuple[float, ...]
    int8: tuple[float, ...]
    here: float
    large_multiplier: float
    large_update: float
    large_aggregate: float
    large_if_uniform: float


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    if find_spec("dp_accounting") is None:
        print("privacy: dp-accounting is not installed (pip install 'edge-daemon[hub]'): left out")
        return {}
    seeds = bench.seeds(SEEDS)
    rounds = bench.some(ROUNDS, 2)
    multipliers = bench.some(MULTIPLIERS, (0.0, 0.03))
    encodings: tuple[Encoding, ...] = ("fp32", "int8")
    results: list[float] = bench.run(
        "privacy",
        [
            (one, (bench.data, multiplier, encoding, rounds, seed))
            for multiplier in multipliers
            for encoding in encodings
            for seed in seeds
        ],
    )
    by_seed = [tuple(results[start : start + len(seeds)]) for start in range(0, len(results), len(seeds))]
    rows = [
        _row(multiplier, by_seed[2 * index], by_seed[2 * index + 1], rounds)
        for index, multiplier in enumerate(multipliers)
    ]
    _print(rows, rounds)
    return {"rows": msgspec.to_builtins(rows)}


def one(data: Path | None, multiplier: float, encoding: Encoding, rounds: int, seed: int) -> float:
    """Accuracy at the end."""
    settings = series(
        rounds=rounds,
        strategy="fedavg",
        encoding=encoding,
        clip_norm=CLIP_NORM,
        noise_multiplier=multiplier,
    )
    return run_fleet(fleet_of(har(data), seed), settings, seed=seed).final


def _row(multiplier: float, fp32: tuple[float, ...], int8: tuple[float, ...], rounds: int) -> Row:
    large = multiplier * math.sqrt(LARGE_COHORT / DEVICES)
    if multiplier == 0.0:
        return Row(multiplier, fp32, int8, math.inf, large, math.inf, math.inf, math.inf)
    here = measure_privacy(PrivacySpec(CLIP_NORM, multiplier, DEVICES, DEVICES, rounds, DELTA))
    there = measure_privacy(PrivacySpec(CLIP_NORM, large, LARGE_COHORT, LARGE_FLEET, rounds, DELTA))
    return Row(
        multiplier,
        fp32,
        int8,
        here.aggregate,
        large,
        there.update,
        there.aggregate,
        there.aggregate_if_uniform,
    )


def _print(rows: Sequence[Row], rounds: int) -> None:
    print_table(
        f"Clipped to {CLIP_NORM} and noised on the board, HAR by subject, {rounds} rounds, {len(rows[0].fp32)} seeds; "
        f"delta {DELTA:g}",
        (
            "noise, clip norms",
            "fp32, %",
            "int8, %",
            "epsilon, 20 of 20",
            "same mean: noise",
            "epsilon of an update",
            "of the aggregate",
            "if drawn uniformly",
        ),
        [
            (
                f"{row.multiplier:g}",
                percent(row.fp32),
                percent(row.int8),
                _epsilon(row.here),
                f"{row.large_multiplier:.2f}",
                _epsilon(row.large_update),
                _epsilon(row.large_aggregate),
                _epsilon(row.large_if_uniform),
            )
            for row in rows
        ],
    )


def _epsilon(value: float) -> str:
    return "none" if math.isinf(value) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
