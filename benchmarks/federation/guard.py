"""What the guard costs where nobody attacks: HAR by subject, 20 rounds, with and without it.

As `har`, but that a tenth of every device's windows is the holdout, which trains nothing: for that alone figures differ from
those of `har`, so both columns are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.federation.bench import Bench, percent
from benchmarks.federation.fleet import Fleet, Manner, Run, run_fleet
from benchmarks.federation.har import ROUNDS, SEEDS, series, weak_start
from benchmarks.federation.poison import parts_of
from benchmarks.federation.sets import har
from benchmarks.harness import print_table

ENCODINGS: Final = ("fp32", "int8", "sign")


@dataclass(frozen=True, slots=True)
class Row:
    """An encoding over its seeds; `rolled_back` is a mean of rounds."""

    encoding: str
    without: tuple[float, ...]
    guarded: tuple[float, ...]
    served: tuple[float, ...]
    rolled_back: float


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    seeds = bench.seeds(SEEDS)
    rounds = bench.some(ROUNDS, 2)
    jobs = [
        (one, (bench.data, encoding, is_guarded, rounds, seed))
        for encoding in ENCODINGS
        for is_guarded in (False, True)
        for seed in seeds
    ]
    results: list[Run] = bench.run("guard", jobs)
    size = 2 * len(seeds)
    rows = [
        _row(encoding, results[index * size : (index + 1) * size]) for index, encoding in enumerate(ENCODINGS)
    ]
    _print(rows, len(seeds))
    return {"rows": msgspec.to_builtins(rows)}


def one(data: Path | None, encoding: str, is_guarded: bool, rounds: int, seed: int) -> Run:
    """One seed, with the guard or without."""
    subjects = har(data)
    parts, holdout = parts_of(subjects, "by subject", seed)
    fleet = Fleet(
        subjects.network,
        weak_start(subjects, seed),
        tuple(part.examples(subjects.network.classes) for part in parts),
        subjects.test,
        holdout,
    )
    settings = series(rounds=rounds, encoding=encoding, min_holdout=100 if rounds == ROUNDS else 5)
    return run_fleet(fleet, settings, seed=seed, manner=Manner(guarded=is_guarded))


def _row(encoding: str, runs: Sequence[Run]) -> Row:
    without, guarded = runs[: len(runs) // 2], runs[len(runs) // 2 :]
    return Row(
        encoding,
        tuple(each.final for each in without),
        tuple(each.final for each in guarded),
        tuple(each.served for each in guarded if each.served is not None),
        float(np.mean([each.ended("rolled back") for each in guarded])),
    )


def _print(rows: Sequence[Row], seeds: int) -> None:
    print_table(
        f"HAR by subject, nobody attacks: accuracy after {ROUNDS} rounds, percent, {seeds} seeds",
        ("updates", "without guard", "with guard", "difference", "served", "rolled back"),
        [
            (
                row.encoding,
                percent(row.without),
                percent(row.guarded),
                f"{100 * (np.mean(row.guarded) - np.mean(row.without)):+.2f}",
                percent(row.served),
                f"{row.rolled_back:.1f}",
            )
            for row in rows
        ],
    )
