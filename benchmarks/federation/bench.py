"""What the parts of the benchmark share: where the data is, how much is run, processes, progress, means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a module, and its arguments: it may run in another process."""


@dataclass(frozen=True, slots=True)
class Bench:
    """`data`: the folder of the public data; None where random data stands in for it, for a smoke run."""

    data: Path | None
    processes: int
    console: Console

    @property
    def is_quick(self) -> bool:
        """Whether this only shows that everything runs."""
        return self.data is None

    def some(self, wanted: T, when_quick: T) -> T:
        """How much is run."""
        return when_quick if self.is_quick else wanted

    def seeds(self, count: int) -> range:
        """The seeds that are reported: from 0. Choices were made on those from 100 on."""
        return range(self.some(count, 1))

    def run(self, what: str, jobs: Sequence[Job]) -> list[Any]:
        """The results of all jobs, in their order; side by side in as many processes as were asked for."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=len(jobs))
            if self.processes == 1:
                results = []
                for function, arguments in jobs:
                    results.append(function(*arguments))
                    progress.advance(task)
                return results
            # Not forked: a runtime with threads does not survive that.
            with ProcessPoolExecutor(self.processes, mp_context=get_context("spawn")) as executor:
                futures = [executor.submit(function, *arguments) for function, arguments in jobs]
                for future in futures:
                    future.add_done_callback(lambda _: progress.advance(task))
                return [future.result() for future in futures]


def percent(values: Sequence[float] | NDArray[np.float64] | float, *, digits: int = 1) -> str:
    """The mean in percent, with the standard deviation where there are several."""
    given = np.atleast_1d(np.asarray(values, np.float64)) * 100
    text = f"{given.mean():.{digits}f}"
    return text if len(given) == 1 else f"{text} +-{given.std(ddof=1):.{digits}f}"


def kilobytes(size: float) -> str:
    """With as many digits as are worth reading."""
    return f"{size / 1000:.1f} kB" if size < 1e6 else f"{size / 1e6:.2f} MB"
