"""What the benchmarks share: percentiles, tables, the JSON file, and a line about the machine."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

_console = Console(width=None if Console().is_terminal else 150)


@dataclass(frozen=True, slots=True)
class Spread:
    """What a set of measurements looks like; in the unit they were given in."""

    p50: float
    p99: float
    count: int


def spread_of(values: Sequence[float] | np.ndarray) -> Spread:
    """Median and 99th percentile."""
    p50, p99 = np.percentile(values, (50, 99))
    return Spread(float(p50), float(p99), len(values))


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the option that every benchmark has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Where this runs, with the load of the last minute: what else ran is part of the result."""
    return {
        "cpu": _cpu_name(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("onnxruntime", "numpy", "msgspec", "paho-mqtt")},
    }


def machine_line() -> str:
    """`machine`, to print above a table."""
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    _console.print(table)


def write_json(path: Path | None, figures: Any) -> None:
    """Write the figures and the machine, if a file was asked for."""
    if path is not None:
        document = {"machine": machine(), "figures": figures}
        path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
