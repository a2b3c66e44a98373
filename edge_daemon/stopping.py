"""Ending several things at once: all are asked first, then waited for until one deadline. Starts nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

Stop = Callable[[], object]


def stop_together(stops: Sequence[Stop], timeout_s: float) -> bool:
    """Call every one on a thread of its own; whether all had returned within `timeout_s`.

    What hangs is left behind, and holds up neither its neighbours nor what is ended after it.
    """
    threads = [threading.Thread(target=_guard, args=(stop,), name="stop", daemon=True) for stop in stops]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(deadline_s - time.monotonic(), 0.0))
    return not any(thread.is_alive() for thread in threads)


def _guard(stop: Stop) -> None:
    try:
        stop()
    except Exception:
        # A defect in one must not keep the others from being ended: the spool among them.
        log.exception("defect while stopping")
