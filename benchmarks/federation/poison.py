"""A fifth of the devices mean harm: what each defence keeps, and what it costs when nobody does. HAR, 20 devices.

`by subject` and `IID` (the same windows, shuffled) are attacked; `two labels a device` is not: it shows what a defence costs
where honest devices differ. A tenth of every device's windows is the holdout: the guard judges on it, and nothing trains on
it. The first four devices attack (see `attacks`). Screening by norm and the counting of faults belong to `screened` alone;
median, trimmed mean and clipping are given everything that is finite, so that the table shows what they do themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

from benchmarks.federation.attacks import ATTACKS
from benchmarks.federation.bench import Bench, percent
from benchmarks.federation.fleet import Fleet, Manner, Run, run_fleet
from benchmarks.federation.har import weak_start
from benchmarks.federation.learner import Labelled
from benchmarks.federation.sets import Subjects, har, joined, spread_evenly, spread_in_shards
from benchmarks.harness import print_table
from cloud_hub.federation.settings import SeriesSettings

SEEDS: Final = 3
ROUNDS: Final = 10
HOLDOUT: Final = 0.1
MAX_VOTE_NORM: Final = 1.0
"""What clipping shortens to: about the middle length of honest updates in the first round (seeds from 100 on)."""

Split = Literal["by subject", "IID", "two labels a device"]

DEFENCES: Final = ("fedavg", "fedavg, guard", "fedavg, screened", "median", "trimmed mean", "clipped")
GUARDED: Final = "fedavg, guard"


@dataclass(frozen=True, slots=True)
class Cell:
    """One defence against one attack (None: nobody attacks) on one split, over its seeds.

    `rolled_back` and `lost` are means of rounds.
    """

    split: Split
    defence: str
    attack: str | None
    start: tuple[float, ...]
    final: tuple[float, ...]
    lowest: tuple[float, ...]
    rolled_back: float
    lost: float
    rejected: dict[str, int]
    holdout: tuple[float, float]
    """Before and after."""
    served: tuple[float, ...]
    """What would be served at the end; see `Run.served`."""


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    seeds = bench.seeds(SEEDS)
    rounds = bench.some(ROUNDS, 2)
    wanted = _wanted()
    if bench.is_quick:
        wanted = [each for each in wanted if each[2] in {None, "NaN", "100 times"} and each[0] != "IID"]
    jobs = [(one, (bench.data, *each, rounds, seed)) for each in wanted for seed in seeds]
    results: list[Run] = bench.run("poison", jobs)
    cells = [
        _cell(*each, results[index * len(seeds) : (index + 1) * len(seeds)])
        for index, each in enumerate(wanted)
    ]
    for split in ("by subject", "IID"):
        _print_split(split, [cell for cell in cells if cell.split == split], len(seeds))
    _print_unattacked(cells)
    _print_guard(cells)
    return {"cells": msgspec.to_builtins(cells)}


def _wanted() -> list[tuple[Split, str, str | None]]:
    wanted: list[tuple[Split, str, str | None]] = []
    for attack in (None, *ATTACKS):
        wanted += [("by subject", defence, attack) for defence in DEFENCES]
        wanted += [("IID", defence, attack) for defence in DEFENCES if defence != GUARDED]
    return [*wanted, *(("two labels a device", defence, None) for defence in DEFENCES if defence != GUARDED)]


def one(data: Path | None, split: Split, defence: str, attack: str | None, rounds: int, seed: int) -> Run:
    """One seed of one cell."""
    subjects = har(data)
    parts, holdout = parts_of(subjects, split, seed)
    fleet = Fleet(
        subjects.network,
        weak_start(subjects, seed),
        tuple(part.examples(subjects.network.classes) for part in parts),
        subjects.test,
        holdout,
    )
    manner = Manner(
        attack,
        screened=defence not in {"fedavg", GUARDED},
        guarded=defence == GUARDED,
    )
    return run_fleet(fleet, _settings(defence, rounds), seed=seed, manner=manner)


def _settings(defence: str, rounds: int) -> SeriesSettings:
    strategies: dict[str, Any] = {"median": "median", "trimmed mean": "trimmed", "clipped": "clipped"}
    return SeriesSettings(
        rounds=rounds,
        strategy=strategies.get(defence, "fedavg"),
        max_vote_norm=MAX_VOTE_NORM,
        # As good as none, where a defence is to stand by itself.
        norm_factor=4.0 if defence == "fedavg, screened" else 1e6,
        epochs=2,
        batch_size=16,
        learning_rate=0.01,
        momentum=0.9,
        min_examples=1,
        min_holdout=5 if rounds < ROUNDS else 100,
        encoding="int8",
    )


def parts_of(subjects: Subjects, split: Split, seed: int) -> tuple[Sequence[Labelled], Labelled]:
    """What each device learns from, and the holdout of them all."""
    rng = np.random.default_rng((seed, 8))
    parts: Sequence[Labelled] = subjects.devices
    if split == "IID":
        parts = spread_evenly(joined(subjects.devices), len(subjects.devices), rng)
    elif split == "two labels a device":
        parts = spread_in_shards(joined(subjects.devices), len(subjects.devices), rng)
    learn, judge = [], []
    for part in parts:
        order = rng.permutation(len(part))
        cut = round(HOLDOUT * len(part))
        judge.append(part.rows(order[:cut]))
        learn.append(part.rows(order[cut:]))
    return learn, joined(judge)


def _cell(split: Split, defence: str, attack: str | None, runs: Sequence[Run]) -> Cell:
    rejected: dict[str, int] = {}
    for each in runs:
        for turn in each.turns:
            for reason, count in turn.rejected.items():
                rejected[reason] = rejected.get(reason, 0) + count
    return Cell(
        split,
        defence,
        attack,
        tuple(each.accuracies[0] for each in runs),
        tuple(each.final for each in runs),
        tuple(min(each.accuracies) for each in runs),
        float(np.mean([each.ended("rolled back") for each in runs])),
        float(np.mean([each.ended("lost") for each in runs])),
        rejected,
        (
            float(np.mean([each.holdout[0] for each in runs if each.holdout])),
            float(np.mean([each.holdout[1] for each in runs if each.holdout])),
        ),
        tuple(each.served for each in runs if each.served is not None),
    )


def _print_split(split: str, cells: Sequence[Cell], seeds: int) -> None:
    attacks = [cell.attack for cell in cells if cell.defence == "fedavg"]
    rows = []
    for defence in DEFENCES:
        own = {cell.attack: cell for cell in cells if cell.defence == defence}
        if own:
            rows.append([defence, *(_said(own[attack]) for attack in attacks)])
    if rows:
        start = percent(cells[0].start)
        print_table(
            f"HAR {split}, a fifth of 20 devices attacks: accuracy after {ROUNDS} rounds, percent, {seeds} seeds; "
            f"start {start}. In brackets: rounds rolled back, rounds without a result",
            ("", *("nobody attacks" if attack is None else attack for attack in attacks)),
            rows,
        )


def _said(cell: Cell) -> str:
    text = percent(cell.final).split(" ")[0]
    notes = [f"{cell.rolled_back:.1f} back"] if cell.rolled_back else []
    notes += [f"{cell.lost:.1f} lost"] if cell.lost else []
    return f"{text} ({', '.join(notes)})" if notes else text


def _print_unattacked(cells: Sequence[Cell]) -> None:
    quiet = [cell for cell in cells if cell.attack is None and cell.defence != GUARDED]
    splits = list(dict.fromkeys(cell.split for cell in quiet))
    rows = []
    for defence in dict.fromkeys(cell.defence for cell in quiet):
        own = {cell.split: cell for cell in quiet if cell.defence == defence}
        rows.append([defence, *(percent(own[split].final) for split in splits)])
    print_table("Nobody attacks: what a defence costs, accuracy in percent", ("", *splits), rows)


def _print_guard(cells: Sequence[Cell]) -> None:
    print_table(
        "Plain FedAvg, unscreened, by subject: what the guard does, percent and rounds",
        (
            "",
            "test, without",
            "test, lowest without",
            "test, with guard",
            "test, lowest with",
            "test, served",
            "holdout before",
            "holdout after",
            "rolled back",
            "no result",
        ),
        [
            (
                "nobody attacks" if guarded.attack is None else guarded.attack,
                percent(plain.final),
                percent(plain.lowest),
                percent(guarded.final),
                percent(guarded.lowest),
                percent(guarded.served),
                percent(guarded.holdout[0]),
                percent(guarded.holdout[1]),
                f"{guarded.rolled_back:.1f}",
                f"{guarded.lost:.1f}",
            )
            for plain in cells
            for guarded in cells
            if (plain.defence, guarded.defence) == ("fedavg", GUARDED)
            and (plain.split, plain.attack) == (guarded.split, guarded.attack)
        ],
    )
