"""Keeps the online signatures fresh: boards refuse metadata that are too old. One thread, mostly asleep.

A hub that signs nothing (no `tuf` in its state directory) imports nothing here and looks once an hour.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cloud_hub.errors import HubError
from cloud_hub.rollouts.settings import TUF

log = logging.getLogger(__name__)

DAY_S: Final = 86400.0
LOOK_AGAIN_S: Final = 3600.0

Renew = Callable[[Path, datetime], None]


def renew_online(directory: Path, now: datetime) -> None:
    """Sign timestamp and snapshot of a repository again.

    Raises:
        HubError: when its keys cannot be used.
    """
    from cloud_hub.releases.repository import SignedRepository

    SignedRepository(directory).renew_online(now)


class Renewal:
    """Renews once a day, and at the start; what failed is tried again within the hour."""

    def __init__(self, state_dir: Path, renew: Renew = renew_online) -> None:
        self._directory = state_dir / TUF
        self._renew = renew
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def take_turn(self) -> float:
        """Renew if there is anything; seconds until the next turn."""
        if not self._directory.is_dir():
            return LOOK_AGAIN_S
        try:
            self._renew(self._directory, datetime.now(UTC))
        except (HubError, OSError) as error:
            log.error("signatures not renewed, boards refuse them once they expire reason=%s", error)
            return LOOK_AGAIN_S
        except Exception:
            # A fault of ours must not end the thread: the signatures would expire unseen.
            log.exception("signatures not renewed, boards refuse them once they expire")
            return LOOK_AGAIN_S
        log.info("signatures renewed")
        return DAY_S

    def _run(self) -> None:
        while not self._stopping.wait(self.take_turn()):
            pass
