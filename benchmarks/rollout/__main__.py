"""The rollout's judges in simulated rollouts: what they halt, what they let pass, and what it costs to know.

    python -m benchmarks.rollout [--rollouts N] [--json FILE]

Three tables: how often the exits of the bundles that ship differ; rollouts of releases that are equally good
or worse by 0.5, 1 and 2 points (`quality`); boards that get sick or not (`boards`). Seeded: the same figures
every time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np

from benchmarks.harness import parse_options, print_table, write_json
from benchmarks.rollout.boards import SICKNESSES, STEPS, Found, Sickness
from benchmarks.rollout.boards import simulate as simulate_boards
from benchmarks.rollout.networks import Compared, compare_exits
from benchmarks.rollout.quality import BEFORE_HALF, ROLLOUTS, Canary, Case, Course, cases
from benchmarks.rollout.quality import simulate as simulate_quality
from cloud_hub.core.rollout.state import Phase

DROPS: Final = (0.0, 0.005, 0.01, 0.02)
DISCORDANCES: Final = (0.02, 0.05, 0.1)
SEED: Final = 20261127

_SHOWN: Final = {Canary.AUDITS: "audits", Canary.SHADOWS: "shadows", Canary.STANDS_STILL: "shadows, still"}


def main() -> None:
    """Simulate, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout")
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS, help="of each case (default %(default)s)")
    options = parse_options(parser)
    compared = list(compare_exits())
    print_table(
        "Pairs of real networks, percent of samples (true labels; in brackets by the full model)",
        ("old, new", "old right", "new right", "differ", "lost", "won", "samples"),
        [_compared_row(each) for each in compared],
    )
    tried = cases(DROPS, DISCORDANCES)
    with ProcessPoolExecutor() as pool:
        courses = list(pool.map(partial(simulate_quality, seed=SEED, rollouts=options.rollouts), tried))
        found = list(pool.map(partial(simulate_boards, seed=SEED, rollouts=options.rollouts), SICKNESSES))
    print_table(
        f"Quality: {options.rollouts} rollouts each; equally good may be halted in {_allowed(options.rollouts)}",
        (
            "worse by, of that differ in",
            "canary",
            "halted",
            "before 50 %",
            "done",
            "audits",
            "live pairs",
            "live sent",
            "hours",
        ),
        [_quality_row(*each) for each in zip(tried, courses, strict=True)],
    )
    looks = " and ".join(f"{looks} with {boards}" for boards, looks in STEPS)
    print_table(
        f"Health: {options.rollouts} rollouts each, hourly looks: {looks} of 100 boards",
        ("", "halted", "with one canary", "looks until then", "by"),
        [_health_row(*each) for each in zip(SICKNESSES, found, strict=True)],
    )
    write_json(options.json, {"pairs": compared, "quality": _figures(tried, courses), "health": found})


def _compared_row(each: Compared) -> tuple[str, ...]:
    pairs, by_full = each.pairs, each.by_full
    return (
        f"{each.model}: {each.old}, {each.new}",
        f"{100 * each.old_accuracy:.1f}",
        f"{100 * each.new_accuracy:.1f}",
        f"{100 * pairs.differing / pairs.count:.1f}",
        f"{100 * pairs.lost / pairs.count:.1f} ({100 * by_full.lost / pairs.count:.1f})",
        f"{100 * pairs.won / pairs.count:.1f} ({100 * by_full.won / pairs.count:.1f})",
        str(pairs.count),
    )


def _quality_row(case: Case, courses: Sequence[Course]) -> tuple[str, ...]:
    halted = [each for each in courses if each.phase is Phase.HALTED]
    return (
        f"{100 * case.drop:g} points, {100 * case.discordant:g} %",
        _SHOWN[case.canary],
        _share(len(halted), len(courses)),
        _share(sum(each.wave < BEFORE_HALF for each in halted), len(courses)),
        _share(sum(each.phase is Phase.DONE for each in courses), len(courses)),
        _spread([each.audits for each in courses]),
        _spread([each.shadowed for each in courses]) if case.canary != Canary.AUDITS else "-",
        _spread([each.differing for each in courses]) if case.canary != Canary.AUDITS else "-",
        _spread([each.hours for each in courses]),
    )


def _health_row(sickness: Sickness, found: Sequence[Found]) -> tuple[str, ...]:
    looks = [each.look for each in found if each.look is not None]
    metrics = sorted({str(metric) for each in found for metric in each.metrics})
    return (
        sickness.name,
        _share(len(looks), len(found)),
        _share(sum(look <= STEPS[0][1] for look in looks), len(found)),
        _spread(looks) if looks else "-",
        ", ".join(metrics) or "-",
    )


def _figures(tried: Sequence[Case], courses: Sequence[Sequence[Course]]) -> list[dict[str, Any]]:
    return [{"case": case, "courses": of_case} for case, of_case in zip(tried, courses, strict=True)]


def _share(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %"


def _spread(values: Sequence[float]) -> str:
    """Median and 95th percentile."""
    median, high = np.percentile(values, (50, 95))
    return f"{median:,.0f} ({high:,.0f})"


def _allowed(rollouts: int) -> str:
    """At most 5 %, and what chance adds to a count of so many (99 %, one-sided)."""
    return f"5 % + {100 * 2.33 * math.sqrt(0.05 * 0.95 / rollouts):.1f}"


if __name__ == "__main__":
    main()
