"""The program that tries a bundle, `python -I -m edge_daemon.releases.trial_child JOB_DIR NICE`. No secrets.

What it loads was signed, but its graph runs here for the first time: it may crash, hang, or take all memory.
So it runs here and not in the daemon, first to go when memory is short, bounded in memory and processor time,
in a network of its own (network_namespaces(7)) where the system lets it. What the system does not permit is
told in the result and done without. A daemon that is killed leaves it behind: an alarm ends it then.

`job.json` (`TrialJob`) -> `result.json` (`TrialResult`), only once all is done.

Exit codes: 0 there is a result; 3 the bundle could not be loaded or did not run, and 5 there was not enough
memory for it: the last line of stderr says why. Anything else is a crash.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

if TYPE_CHECKING:
    from edge_cascade.bundle import Bundle
    from edge_cascade.ladder import Ladder

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 3
EXIT_MEMORY: Final = 5
JOB_FILE: Final = "job.json"
RESULT_FILE: Final = "result.json"

MEASURED_RUNS: Final = 200
MEASURED_S: Final = 3.0
"""Measuring ends with the one or the other."""
_WARM_RUNS: Final = 5
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000


class TrialJob(msgspec.Struct, frozen=True):
    """The bundle to try, by its directory, and the one to compare its latency with, if any.

    `max_memory_bytes` bounds what may be allocated, `max_seconds` the processor time and the time at all.
    """

    bundle: str
    against: str | None
    plan: str | None
    point: int | None
    runtime: Literal["onnxruntime", "litert"]
    max_memory_bytes: int
    max_seconds: int


class TrialResult(msgspec.Struct, frozen=True):
    """`deviation` from the golden outputs (None where one is NaN) and what is tolerated, by precision.

    `peak_bytes` is the most that the process held with this one bundle; `seconds` and `against_seconds` are
    medians of one sample's way through the ladder. `refused`: what the system did not permit.
    """

    deviation: dict[str, float | None]
    tolerance: dict[str, float]
    peak_bytes: int
    seconds: float
    against_seconds: float | None
    refused: tuple[str, ...]


def main(arguments: list[str]) -> int:
    """Run the job in a directory. `arguments`: the directory, and the niceness, 0 to 19."""
    if len(arguments) != 2 or not arguments[1].isdecimal():
        sys.stderr.write("usage: python -I -m edge_daemon.releases.trial_child JOB_DIR NICE\n")
        return EXIT_FAILED
    directory = Path(arguments[0])
    from edge_daemon.training.child import bound, lower_priority

    # Before anything heavy is loaded.
    refused = lower_priority(int(arguments[1])) + leave_network()
    from edge_cascade.errors import CascadeError, first_line
    from edge_daemon.errors import EdgeError

    try:
        job = msgspec.json.decode((directory / JOB_FILE).read_bytes(), type=TrialJob)
        refused += bound(job.max_memory_bytes, job.max_seconds)
        # What only waits uses no processor time.
        signal.alarm(job.max_seconds)
        result = run_job(job, refused)
        (directory / RESULT_FILE).write_bytes(msgspec.json.encode(result))
    except MemoryError:
        sys.stderr.write("out of the memory it may use\n")
        return EXIT_MEMORY
    except (CascadeError, EdgeError, OSError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"{first_line(error)}\n")
        return EXIT_MEMORY if "alloc" in str(error) else EXIT_FAILED
    return EXIT_DONE


def run_job(job: TrialJob, refused: list[str]) -> TrialResult:
    """Load, compare with the golden outputs, measure.

    Raises:
        CascadeError: when a bundle is damaged or does not run.
        OSError: when the disk does not give it.
    """
    from edge_cascade.golden import golden_errors
    from edge_daemon.models import OPENERS

    bundle, ladder = _load(job.bundle, job)
    deviation = golden_errors(bundle, ladder.plan, OPENERS[job.runtime])
    for x in bundle.golden_inputs:
        ladder.climb(x)
    # Before the other one is loaded.
    peak_bytes = read_peak_bytes()
    other = None if job.against is None else _load(job.against, job)
    seconds, against_seconds = _measure((bundle, ladder), other)
    return TrialResult(
        deviation={str(name): error if math.isfinite(error) else None for name, error in deviation.items()},
        tolerance={str(name): bundle.weights.tolerance.get(name, 0.0) for name in deviation},
        peak_bytes=peak_bytes,
        seconds=seconds,
        against_seconds=against_seconds,
        refused=tuple(refused),
    )


def leave_network() -> list[str]:
    """Go where there is no network; the name of it when the system does not permit it."""
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET):
        try:
            if libc.unshare(flags) == 0:
                return []
        except AttributeError:
            break
    return ["own network"]


def read_peak_bytes() -> int:
    """The most memory that this process has held; what its parent held before does not count.

    Raises:
        OSError: where /proc is not there.
    """
    # `getrusage` also counts what stood in memory before exec.
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def _load(path: str, job: TrialJob) -> tuple[Bundle, Ladder]:
    from edge_cascade.bundle import load_bundle
    from edge_cascade.ladder import Ladder
    from edge_daemon.models import OPENERS

    bundle = load_bundle(Path(path))
    return bundle, Ladder(bundle, bundle.plan(job.plan), OPENERS[job.runtime], point=job.point)


def _measure(one: tuple[Bundle, Ladder], other: tuple[Bundle, Ladder] | None) -> tuple[float, float | None]:
    """Median seconds of each. In turns, so that a busy moment of the board meets both."""
    both = [one] if other is None else [one, other]
    taken: list[list[float]] = [[] for _ in both]
    ends_at = time.perf_counter() + MEASURED_S
    for run in range(_WARM_RUNS + MEASURED_RUNS):
        for (bundle, ladder), times in zip(both, taken, strict=True):
            x = bundle.golden_inputs[run % len(bundle.golden_inputs)]
            started = time.perf_counter()
            ladder.climb(x)
            if run >= _WARM_RUNS:
                times.append(time.perf_counter() - started)
        if run >= _WARM_RUNS and time.perf_counter() > ends_at:
            break
    medians = [sorted(times)[len(times) // 2] for times in taken]
    return medians[0], medians[1] if len(medians) > 1 else None


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # A runtime that crashes in its own end must not make a crash of a trial that is over.
    os._exit(code)
