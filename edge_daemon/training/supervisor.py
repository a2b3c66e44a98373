"""Starts a child process, hears of its end, kills it. Its failure is a value, never an error.

Training runs in one, and the trial of a new bundle (`releases.trial`).

The child gets an environment of its own, no descriptor but a pipe and its log, and no argument but its
directory. It is never waited for on the thread that asks for its end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from edge_cascade.errors import ProtocolError
from edge_cascade.messages import RoundTerms
from edge_daemon.training.child import EXIT_DIVERGED, EXIT_DONE, EXIT_FAILED, give_way
from edge_daemon.training.job import LOG_FILE, Result, read_result

log = logging.getLogger(__name__)

JOB_PREFIX: Final = "job-"
_LAST_WORDS_BYTES: Final = 4096
_LONGEST_WORDS: Final = 300
_KEPT_VARIABLES: Final = ("PATH", "LD_LIBRARY_PATH")
_OWN_VARIABLES: Final = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Running(Protocol):
    """A job that was started."""

    @property
    def pid(self) -> int:
        """The process that does it."""

    def kill(self) -> None:
        """End it at once; its end is told all the same."""


Launch = Callable[[Path, Callable[[int], None]], Running]
"""Start the job in a directory; once it has ended, the callback gets the return code, on another thread."""


class ChildProcess:
    """One run of a module that takes a directory and a niceness; implements `Running`."""

    def __init__(
        self,
        directory: Path,
        on_end: Callable[[int], None],
        *,
        nice: int,
        module: str = "edge_daemon.training.child",
    ) -> None:
        """Start it. `nice`: see `child.lower_priority`.

        Raises:
            OSError: when no process can be made.
        """
        self._on_end = on_end
        with (directory / LOG_FILE).open("wb") as words:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", module, str(directory), str(nice)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=words,
                env=_environment(),
                cwd=directory,
                close_fds=True,
                # A group of its own, so that Ctrl-C ends the daemon alone; no session of its own: with the
                # kernel's autogroups (sched(7)) niceness only counts within a session.
                process_group=0,
            )
        # By itself it does so only once Python runs, and by then has been felt on a board of one core.
        give_way(self._process.pid, nice)
        threading.Thread(target=self._wait, name=module.rpartition(".")[2], daemon=True).start()

    @property
    def pid(self) -> int:
        """The process that does it."""
        return self._process.pid

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _wait(self) -> None:
        code = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._on_end(code)


def make_job_directory(parent: Path) -> Path:
    """An empty directory for one job.

    Raises:
        OSError: when the disk does not give it.
    """
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Path(tempfile.mkdtemp(prefix=JOB_PREFIX, dir=parent))


def remove_jobs(parent: Path) -> None:
    """Remove what jobs of an earlier start have left."""
    for directory in parent.glob(f"{JOB_PREFIX}*"):
        shutil.rmtree(directory, ignore_errors=True)


def outcome_of(directory: Path, code: int, terms: RoundTerms) -> Result | str:
    """The result of a job whose child has ended, or why there is none, in words."""
    if code == EXIT_DONE:
        try:
            return read_result(directory, terms)
        except (OSError, ProtocolError) as error:
            return f"the result cannot be read: {error}"
    words = last_words(directory / LOG_FILE)
    if code in {EXIT_FAILED, EXIT_DIVERGED}:
        return words or "the child said nothing"
    if code < 0:
        return f"the child was ended by {signal_name(-code)}"
    return f"the child ended with {code}: {words}"


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, **_OWN_VARIABLES}


def last_words(path: Path) -> str:
    """The last line that a child said on stderr; empty where it said none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - _LAST_WORDS_BYTES, 0))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:_LONGEST_WORDS] if lines else ""


def signal_name(number: int) -> str:
    """`SIGSEGV`, say."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
