"""Keeps the online signatures fresh: boards refuse metadata that are too old. One thread, mostly asleep.

A hub that signs nothing (no `tuf` in its state directory) imports nothing here and looks once an hour.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cloud_hub.errors import HubError
from cloud_hub.rollouts.settings import TUF
from cloud_hub.thread_loop import ThreadLoop

log = logging.getLogger(__name__)

DAY: Final = timedelta(days=1)
LOOK_AGAIN_S: Final = 3600.0
LOOK_S: Final = 60.0
"""At the clock: a wait does not go on while the machine sleeps, and clocks are set after the start."""

Renew = Callable[[Path, datetime], None]


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


def renew_online(directory: Path, now: datetime) -> None:
    """Sign timestamp and snapshot of a repository again.

    Raises:
        HubError: when its keys cannot be used.
    """
    from cloud_hub.releases.repository import SignedRepository

    SignedRepository(directory).renew_online(now)


class Renewal(ThreadLoop):
    """Renews once a day by the wall clock, at the start, and when the clock was set back; what failed is
    tried again within the hour.
    """

    def __init__(
        self, state_dir: Path, renew: Renew = renew_online, *, clock: Callable[[], datetime] = utc_now
    ) -> None:
        super().__init__("renewal")
        self._directory = state_dir / TUF
        self._renew = renew
        self._clock = clock
        self._renewed_at: datetime | None = None

    def run_once(self) -> float:
        """Renew if there is anything; seconds until the next turn."""
        if not self._directory.is_dir():
            return LOOK_AGAIN_S
        now = self._clock()
        if self._renewed_at is not None and self._renewed_at <= now < self._renewed_at + DAY:
            return LOOK_S
        try:
            self._renew(self._directory, now)
        except (HubError, OSError) as error:
            log.error("signatures not renewed, boards refuse them once they expire reason=%s", error)
            return LOOK_AGAIN_S
        except Exception:
            # A fault of ours must not end the thread: the signatures would expire unseen.
            log.exception("signatures not renewed, boards refuse them once they expire")
            return LOOK_AGAIN_S
        self._renewed_at = now
        log.info("signatures renewed")
        return LOOK_S
