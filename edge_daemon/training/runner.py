"""The one training that runs: started, ended, its directory removed. Decides nothing; see `follower`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_cascade.messages import RoundTerms
from edge_daemon.training.learner import Learner
from edge_daemon.training.supervisor import Launch, Running


@dataclass(frozen=True, slots=True)
class ChildEnded:
    """A training process has ended."""

    number: int
    code: int


@dataclass(frozen=True, slots=True)
class RunningTraining:
    """The child that runs, and what for."""

    number: int
    learner: Learner
    terms: RoundTerms
    directory: Path
    running: Running


class Runner:
    """Used by the follower's thread, but for `kill`."""

    def __init__(self, launch: Launch, tell: Callable[[ChildEnded], None]) -> None:
        """`tell` is called on another thread."""
        self._launch = launch
        self._tell = tell
        self._started = 0
        self._stopped: dict[int, Path] = {}
        self.training: RunningTraining | None = None

    @property
    def pid(self) -> int | None:
        """The process that trains."""
        return None if self.training is None else self.training.running.pid

    def start(self, learner: Learner, terms: RoundTerms, directory: Path) -> None:
        """Run the job in a directory, which is removed with its end.

        Raises:
            OSError: when no process can be made.
        """
        assert self.training is None
        self._started += 1
        number = self._started
        try:
            running = self._launch(directory, lambda code: self._tell(ChildEnded(number, code)))
        except BaseException:
            _remove(directory)
            raise
        self.training = RunningTraining(number, learner, terms, directory, running)

    def take_ended(self, ended: ChildEnded) -> RunningTraining | None:
        """The training that ran until now, to be read and then removed; None for one that was stopped."""
        training = self.training
        if training is None or training.number != ended.number:
            if ended.number in self._stopped:
                _remove(self._stopped.pop(ended.number))
            return None
        self.training = None
        return training

    def remove(self, training: RunningTraining) -> None:
        """Remove the directory of one that was taken."""
        _remove(training.directory)

    def stop(self) -> None:
        """End what runs; nothing more is said of it."""
        training, self.training = self.training, None
        if training is not None:
            training.running.kill()
            # It is still written to until the process is gone.
            self._stopped[training.number] = training.directory

    def kill(self) -> None:
        """End what runs, from any thread."""
        training = self.training
        if training is not None:
            training.running.kill()


def _remove(directory: Path) -> None:
    # What is left, the next start removes.
    shutil.rmtree(directory, ignore_errors=True)
