"""Federated averaging on public data, by the project's own parts in one process, beside Flower where it is installed.

    python -m benchmarks.federation --data DIR [--only PART ...] [--processes N] [--json FILE]
    python -m benchmarks.federation --quick

`DIR` holds `fashion_mnist.npz`, `uci_har_subset.npz` and `cwru_12kde.npz` (see `sets`). Reported are seeds from 0 on;
rates and epochs were chosen on seeds from 100 on, but on the same test parts. `--quick` runs everything for a moment on
random data: it shows that it runs, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks.federation import (
    flower,
    guard,
    har,
    large_fleet,
    loop,
    memory,
    personal,
    poison,
    privacy,
    steps,
    targets,
)
from benchmarks.federation.bench import Bench
from benchmarks.harness import machine_line, parse_options, write_json

PARTS: Final[Mapping[str, Callable[[Bench], dict[str, Any]]]] = {
    "har": har.run,
    "fashion": targets.run_fashion,
    "digits": targets.run_digits,
    "flower": flower.run,
    "memory": memory.run,
    "poison": poison.run,
    "guard": guard.run,
    "loop": loop.run,
    "privacy": privacy.run,
    "personal": personal.run,
    "steps": steps.run,
    "large-fleet": large_fleet.run,
}


def main() -> None:
    """Measure and print part by part."""
    options = _parse()
    bench = Bench(None if options.quick else options.data, options.processes, Console(stderr=True))
    print(machine_line())
    figures = {}
    for part in options.only:
        bench.console.rule(part)
        figures[part] = PARTS[part](bench)
    write_json(options.json, figures)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("EDGE_DATA_DIR"), metavar="DIR")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*PARTS],
        default=[*PARTS],
        metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run on random data")
    options = parse_options(parser)
    if options.data is None and not options.quick:
        parser.error("--data DIR or EDGE_DATA_DIR: where the public data is, or --quick for random data")
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: at least 1")
    return options


if __name__ == "__main__":
    main()
