"""Tries a bundle in a child process before it may answer: golden outputs, latency, memory. Blocks its thread.

With a bundle to compare with there are two children: one that weighs the old bundle, one that tries the new.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final, Literal

import msgspec

from edge_cascade.durable import crash_point
from edge_cascade.pauses import Pause, no_pause
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError, StoppedError
from edge_daemon.releases.trial_child import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_MEMORY,
    JOB_FILE,
    RESULT_FILE,
    TrialJob,
    TrialResult,
)
from edge_daemon.training.child import IDLE_NICE
from edge_daemon.training.job import LOG_FILE
from edge_daemon.training.supervisor import (
    ChildProcess,
    Launch,
    last_words,
    make_job_directory,
    remove_jobs,
    signal_name,
)

CHILD_MODULE: Final = "edge_daemon.releases.trial_child"
MAX_RESULT_BYTES: Final = 2**20
_LOOK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class TrialLimits:
    """What a new bundle may take of the old one's time and memory, and how long a child may run at all.

    Whatever the factor says, `least_slower_s` more a sample is no reason: from 0.02 to 0.05 ms is noise.
    """

    max_latency_factor: float = 1.5
    least_slower_s: float = 0.0005
    max_memory_factor: float = 1.5
    max_memory_bytes: int = 2**31
    max_trial_s: float = 120.0
    max_idle_s: float = 30.0
    """After so long a trial that only gets what answers leave is begun again, with a share of its own."""


@dataclass(frozen=True, slots=True)
class TriedAs:
    """How a model is served: see `ModelConfig`."""

    plan: str | None = None
    point: int | None = None
    runtime: Literal["onnxruntime", "litert"] = "onnxruntime"


launch_trial: Launch = partial(ChildProcess, nice=IDLE_NICE, module=CHILD_MODULE)
"""In what the answers leave of the processor: latency is compared by medians, of both bundles in turns."""
launch_again: Launch = partial(ChildProcess, nice=10, module=CHILD_MODULE)
"""For a board that leaves nothing: that it did not end there must speak against no bundle."""


class Trial:
    """Runs trials, one at a time, in directories below `parent`."""

    def __init__(
        self,
        parent: Path,
        limits: TrialLimits,
        *,
        launch: Launch = launch_trial,
        again: Launch | None = None,
        pause: Pause = no_pause,
    ) -> None:
        """What `launch` has started and does not end within `max_idle_s` has another go, by `again`.

        `pause` is called before each: until a process runs its program, all threads of its parent wait.
        """
        self._parent = parent
        self._limits = limits
        self._pause = pause
        self._goes = [(launch, limits.max_trial_s)]
        if again is not None:
            self._goes = [(launch, limits.max_idle_s), (again, limits.max_trial_s)]

    def clear(self) -> None:
        """Remove what trials of an earlier start have left."""
        remove_jobs(self._parent)

    def run(self, bundle: Path, against: Path | None, how: TriedAs, stop: threading.Event) -> TrialResult:
        """Try the bundle in a directory. Blocks.

        `against` is the one that answers; None for one that has answered here itself: what it computes and
        takes on this board is known, and only whether it still runs is asked.

        Raises:
            RefusedError: what speaks against it.
            StoppedError: `stop` was set; the child is gone.
            OSError: when no child can be started, which is none of the bundle's fault.
        """
        if against is None:
            crash_point("swap.trial")
            return self._child(bundle, None, how, stop)
        weighed = None
        # The old one failing here says nothing against the new.
        with contextlib.suppress(RefusedError):
            weighed = self._child(against, None, how, stop)
        crash_point("swap.trial")
        result = self._child(bundle, against if weighed is not None else None, how, stop)
        _check_golden(result, weighed)
        if weighed is not None:
            _check_cost(result, weighed, self._limits)
        return result

    def _child(self, bundle: Path, against: Path | None, how: TriedAs, stop: threading.Event) -> TrialResult:
        limits = self._limits
        job = TrialJob(
            bundle=str(bundle.absolute()),
            against=None if against is None else str(against.absolute()),
            plan=how.plan,
            point=how.point,
            runtime=how.runtime,
            max_memory_bytes=limits.max_memory_bytes,
            max_seconds=int(limits.max_trial_s) + 1,
        )
        for launch, most_s in self._goes:
            with contextlib.suppress(TimeoutError):
                return self._go(job, launch, most_s, stop)
        raise RefusedError(Failure.LATENCY, f"its trial did not end within {limits.max_trial_s:.0f} s")

    def _go(self, job: TrialJob, launch: Launch, most_s: float, stop: threading.Event) -> TrialResult:
        directory = make_job_directory(self._parent)
        try:
            (directory / JOB_FILE).write_bytes(msgspec.json.encode(job))
            self._pause()
            return _result(directory, _wait(launch, most_s, directory, stop))
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _wait(launch: Launch, most_s: float, directory: Path, stop: threading.Event) -> int:
    """The return code of a child that is started in a directory.

    Raises:
        StoppedError: `stop` was set.
        TimeoutError: it took too long.
    """
    codes: SimpleQueue[int] = SimpleQueue()
    running = launch(directory, codes.put)
    left_s = most_s
    while True:
        try:
            return codes.get(timeout=min(_LOOK_S, max(left_s, 0.0)))
        except Empty:
            left_s -= _LOOK_S
        if stop.is_set() or left_s <= 0:
            running.kill()
            codes.get()
            if stop.is_set():
                raise StoppedError("the trial was stopped")
            raise TimeoutError


def _check_golden(result: TrialResult, weighed: TrialResult | None) -> None:
    """Refuse what computes something else here than where it was built.

    On a processor whose int8 kernels round in another way, the bundle that answers deviates too, and was let
    off with a warning at start: the new one may then deviate as much, and by its own tolerance more.
    """
    for precision, deviation in result.deviation.items():
        tolerated = result.tolerance[precision]
        known = None if weighed is None else weighed.deviation.get(precision)
        if weighed is not None and known is not None and known > weighed.tolerance[precision]:
            tolerated += known
        if deviation is None or deviation > tolerated:
            far = "NaN" if deviation is None else f"{deviation:.4f}"
            raise RefusedError(
                Failure.GOLDEN,
                f"{precision} deviates by {far} from the golden outputs, {tolerated:.4f} is tolerated",
            )


def _check_cost(result: TrialResult, weighed: TrialResult, limits: TrialLimits) -> None:
    before_s = result.against_seconds
    if before_s is not None:
        most_s = max(before_s * limits.max_latency_factor, before_s + limits.least_slower_s)
        if result.seconds > most_s:
            raise RefusedError(
                Failure.LATENCY, f"{result.seconds * 1e6:.0f} us a sample, {before_s * 1e6:.0f} us before"
            )
    if result.peak_bytes > weighed.peak_bytes * limits.max_memory_factor:
        raise RefusedError(
            Failure.MEMORY,
            f"{result.peak_bytes // 2**20} MiB at most, {weighed.peak_bytes // 2**20} MiB before",
        )


def read_result(directory: Path) -> TrialResult | None:
    """What a child that ended well has left; None for anything else."""
    try:
        with (directory / RESULT_FILE).open("rb") as file:
            return msgspec.json.decode(file.read(MAX_RESULT_BYTES), type=TrialResult)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _result(directory: Path, code: int) -> TrialResult:
    words = last_words(directory / LOG_FILE)
    if code == EXIT_DONE:
        result = read_result(directory)
        if result is None:
            raise RefusedError(Failure.CRASH, "its trial left no result")
        return result
    raise RefusedError(*_refusal(code, words))


_FAILURES: Final[dict[int, Failure]] = {
    EXIT_FAILED: Failure.LOAD,
    EXIT_MEMORY: Failure.MEMORY,
    # Nobody but the kernel does this, and it does so when memory is short.
    -signal.SIGKILL: Failure.MEMORY,
    -signal.SIGXCPU: Failure.LATENCY,
    -signal.SIGALRM: Failure.LATENCY,
}


def _refusal(code: int, words: str) -> tuple[Failure, str]:
    said = words if code >= 0 else f"its trial was ended by {signal_name(-code)}: {words}"
    if "alloc" in words:
        # `std::bad_alloc` and OpenBLAS end the process by themselves.
        return Failure.MEMORY, said
    return _FAILURES.get(code, Failure.CRASH), said
