"""What memory costs answers: given back after a swap, and collected without holding up a thread."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from typing import Final

SWITCH_S: Final = 0.0002
"""For how long a thread that computes in Python may keep one waiting that has a sample to answer."""


def give_back_memory() -> None:
    """Return to the system what closed sessions held; glibc keeps it for itself otherwise.

    Nothing that holds a session is part of a cycle, so nothing needs to be collected: a collection stops
    every thread for as long as it takes to look at all objects.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def favour_answers() -> None:
    """Set up this process, once what stays is made, so that its threads hold up each other only for moments.

    From now on collections look only at what is made later: at everything, tens of milliseconds pass in which
    no thread answers.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_S)
