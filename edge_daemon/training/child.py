"""The program that trains, `python -I -m edge_daemon.training.child JOB_DIR NICE`. No network, no secrets.

It lowers itself before it loads anything heavy, so that answering is not slowed: the scheduler's idle class,
niceness, the disk's idle class, first to go when memory is short, bounded memory and processor time. What
the system does not permit is told in the result and done without.

Its standard input is a pipe that nobody writes to: once the other end is gone, so is the daemon, and the
training ends with the next batch.

Exit codes: 0 there is a result; 3 there is none, and 4 there is none because training made the weights worse
on the board's own examples: the last line of stderr says why. Anything else is a crash.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edge_daemon.training.job import Job

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 3
EXIT_DIVERGED: Final = 4
JUDGED_EXAMPLES: Final = 512
"""As many are looked at before and after: enough to tell ruin from learning, however many train."""
IDLE_NICE: Final = 19
_FIRST_TO_GO: Final = "1000"
_MAX_FILE_BYTES: Final = 2**30


def main(arguments: list[str]) -> int:
    """Run the job in a directory. `arguments`: the directory, and the niceness, 0 to 19."""
    started_s = time.monotonic()
    if len(arguments) != 2 or not arguments[1].isdecimal():
        sys.stderr.write("usage: python -I -m edge_daemon.training.child JOB_DIR NICE\n")
        return EXIT_FAILED
    directory = Path(arguments[0])
    # Before anything heavy is loaded.
    refused = lower_priority(int(arguments[1]))
    from edge_cascade.errors import CascadeError, DivergedError, first_line
    from edge_daemon.training.job import read_job

    try:
        job = read_job(directory)
        refused += bound(job.max_memory_bytes, job.max_seconds)
        run_job(directory, job, refused, started_s=started_s)
    except (CascadeError, OSError, MemoryError) as error:
        what = "out of the memory it may use" if isinstance(error, MemoryError) else first_line(error)
        sys.stderr.write(f"{what}\n")
        return EXIT_DIVERGED if isinstance(error, DivergedError) else EXIT_FAILED
    return EXIT_DONE


def run_job(directory: Path, job: Job, refused: list[str], *, started_s: float) -> None:
    """Train, make the update, leave the result.

    Raises:
        DivergedError: when the weights are worse after training.
        CascadeError: for a job that is damaged, or from which nothing can be learned.
        OSError: when the disk does not take or give something.
    """
    import numpy as np

    from edge_cascade.backends.onnx import OnnxTrainStep
    from edge_cascade.onnx_file import inspect_model
    from edge_cascade.round_terms import MILLION
    from edge_cascade.train_step import read_train_step
    from edge_cascade.training import Schedule, mean_loss, refuse_worse, train
    from edge_daemon.training.arrays import dump_arrays
    from edge_daemon.training.job import (
        STEP_FILE,
        Result,
        read_base,
        read_examples,
        read_residual,
        read_step,
        write_result,
    )
    from edge_daemon.training.targets import make_examples
    from edge_daemon.training.updates import make_update

    terms = job.terms
    content = read_step(directory)
    model = read_train_step(
        content, inspect_model(content), input_shape=job.input_shape, classes=job.classes, where=STEP_FILE
    )
    base = read_base(directory)
    _check_base({name: array.shape for name, array in base.items()}, dict(model.shapes))
    drawn = read_examples(directory, classes=job.classes)
    examples = make_examples(drawn, terms, job.preprocess, classes=job.classes)
    judges = examples.take(np.random.default_rng(job.seed + 1).permutation(len(examples))[:JUDGED_EXAMPLES])
    step = OnnxTrainStep(model)
    before = mean_loss(step, base, judges, batch_size=terms.batch_size)
    trained = train(
        step,
        base,
        examples,
        Schedule(
            epochs=terms.epochs,
            batch_size=terms.batch_size,
            learning_rate=terms.learning_rate_ppm / MILLION,
            momentum=terms.momentum_ppm / MILLION,
            prox_mu=terms.prox_mu_ppm / MILLION,
        ),
        rng=np.random.default_rng(job.seed),
        on_batch=_parent_watch(),
    )
    refuse_worse(before, mean_loss(step, trained.weights, judges, batch_size=terms.batch_size))
    made = make_update(
        base,
        trained.weights,
        terms,
        residual=read_residual(directory),
        head_parameters=job.head_parameters,
        noise=np.random.default_rng(int.from_bytes(job.noise_seed, "little")),
    )
    write_result(
        directory,
        Result(
            delta=made.delta,
            num_examples=len(examples),
            first_loss=trained.first_loss,
            last_loss=trained.last_loss,
            seconds=time.monotonic() - started_s,
            residual=None if made.residual is None else dump_arrays(made.residual),
            heads=dump_arrays(made.heads) if made.heads else None,
            refused=tuple(refused),
        ),
    )


def give_way(pid: int, nice: int) -> list[str]:
    """Lower a process's niceness and scheduling class; the names of what the system does not permit."""
    lower_class = _idle_class if nice >= IDLE_NICE else _batch_class
    return _refused({"nice": lambda: _renice(pid, nice), "idle class": lambda: lower_class(pid)})


def lower_priority(nice: int) -> list[str]:
    """Give way to all others as far as the system lets us; the names of what it does not permit.

    `nice` 19 asks for the idle classes as well.
    """
    return _refused({"oom_score_adj": _go_first, "idle io": _idle_io}) + give_way(0, nice)


def bound(max_memory_bytes: int, max_seconds: int) -> list[str]:
    """Limit what may be allocated, computed and written; the names of what the system does not permit."""
    return _refused(
        {
            "memory limit": lambda: _limit(resource.RLIMIT_DATA, max_memory_bytes),
            "cpu limit": lambda: _limit(resource.RLIMIT_CPU, max_seconds),
            "file limit": lambda: _limit(resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
            "core limit": lambda: _limit(resource.RLIMIT_CORE, 0),
        }
    )


def _refused(attempts: Mapping[str, Callable[[], None]]) -> list[str]:
    refused = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except (OSError, ValueError):
            refused.append(name)
    return refused


def _go_first() -> None:
    Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO, encoding="ascii")


def _limit(which: int, most: int) -> None:
    _, hard = resource.getrlimit(which)
    bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (bound, hard))


def _renice(pid: int, nice: int) -> None:
    os.setpriority(os.PRIO_PROCESS, pid, max(nice, os.getpriority(os.PRIO_PROCESS, pid)))


def _idle_class(pid: int) -> None:
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        return
    _batch_class(pid)


def _batch_class(pid: int) -> None:
    os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


def _idle_io() -> None:
    import psutil

    try:
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    except psutil.Error as error:
        raise PermissionError(str(error)) from error


def _parent_watch() -> Callable[[], None]:
    """Called before each batch: raises once the daemon is gone."""
    from edge_cascade.errors import TrainingError

    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLHUP)

    def look() -> None:
        if poll.poll(0):
            raise TrainingError("the daemon is gone")

    return look


def _check_base(given: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    from edge_cascade.errors import ProtocolError

    if given != wanted:
        odd = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
        raise ProtocolError(f"the base does not fit the train step: {odd[:3]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
