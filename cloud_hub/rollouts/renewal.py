"""Keeps the online signatures fresh: boards refuse metadata that are too old. One thread, mostly asleep.

A hub that signs nothing (no `tuf` in its state directory) imports nothing here and looks once an hour.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cloud_hub.errors import HubError
from cloud_hub.rollouts.settings import TUF
from cloud_hub.thread_loop import ThreadLoop

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


class Renewal(ThreadLoop):
    """Renews once a day, and at the start; what failed is tried again within the hour."""

    def __init__(self, state_dir: Path, renew: Renew = renew_online) -> None:
        super().__init__("renewal")
        self._directory = state_dir / TUF
        self._renew = renew

    def run_once(self) -> float:
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
