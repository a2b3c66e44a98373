"""The frame of the hub's threads: a turn whenever there is a sign, and now and then without. No I/O.

What is to be done lies in the store, and signs only say that it is worth a look: so one that is lost, a fault
of the store or a defect costs a little time and nothing else.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from typing import Final

from cloud_hub.errors import HubError

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0


class ThreadLoop(ABC):
    """Takes turns on one thread of its own, from `start` to `stop`, which are called once each.

    What comes within `gather_s` after a sign shares the turn.
    """

    def __init__(self, name: str, *, gather_s: float = 0.0) -> None:
        self._name = name
        self._gather_s = gather_s
        self._sign = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def run_once(self) -> float:
        """Do what there is to do; for how many seconds at most to wait for a sign before the next turn.

        Raises:
            HubError: it is said, and the next turn comes a little later; so for every other error.
        """

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Finish the turn at hand and end the thread."""
        self._stopping.set()
        self._sign.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def wake(self) -> None:
        """Give a sign: there may be something to do."""
        self._sign.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            # Before the turn: what comes while it is taken is worth another one.
            self._sign.clear()
            try:
                wait_s = self.run_once()
            except HubError as error:
                log.warning("%s waits reason=%s", self._name, error)
                self._stopping.wait(RETRY_S)
                continue
            except Exception:
                # A fault of ours must not end the thread: what is in the store is taken up again.
                log.exception("turn failed thread=%s", self._name)
                self._stopping.wait(RETRY_S)
                continue
            if wait_s > 0 and self._sign.wait(wait_s):
                self._stopping.wait(self._gather_s)
