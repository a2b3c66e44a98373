"""When work that can wait is in the way of no answer: right after one.

Threads of one interpreter run Python one at a time, and a board may have one core. Sensors mostly send at a
steady pace, so the time until the next sample is longest when one has just been answered. Work in pieces of a
millisecond or two, each of them begun then, is felt by next to no sample; the same work in one go is felt by
all that come meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Final

REST_S: Final = 0.001
"""The answer is out of the inference thread by then, but its network thread may still have to write it."""
MOST_S: Final = 0.02
"""With so few samples that none was answered meanwhile there is little to be in the way of."""


class Lull:
    """Where threads wait for the moment after an answer; any of them may."""

    def __init__(self, *, rest_s: float = REST_S, most_s: float = MOST_S) -> None:
        """`rest_s` passes after the answer; `most_s` is waited for one."""
        self._rest_s = rest_s
        self._most_s = most_s
        self._waiting: deque[threading.Event] = deque()

    def wait(self) -> bool:
        """Block until a sample has been answered, for `most_s` at most; whether one was."""
        answered = threading.Event()
        self._waiting.append(answered)
        if answered.wait(self._most_s):
            time.sleep(self._rest_s)
            return True
        with contextlib.suppress(ValueError):
            self._waiting.remove(answered)
        return False

    @property
    def waiting(self) -> int:
        """How many threads wait."""
        return len(self._waiting)

    def note_answer(self) -> None:
        """All that was asked is answered for now (on the inference thread: one look where nobody waits)."""
        while self._waiting:
            self._waiting.popleft().set()
