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
from edge_cascade.errors import first_line

log = logging.getLogger(__name__)

DAY: Final = timedelta(days=1)
AGAIN: Final = timedelta(hours=1)
"""After what failed, by the wall clock: at once where that was set."""
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
        self._failed_at: datetime | None = None
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the signatures were not renewed; None where they were, or there are none."""
        return self._problem

    def run_once(self) -> float:
        """Renew if there is anything; seconds until the next turn."""
        if not self._directory.is_dir():
            return LOOK_AGAIN_S
        now = self._clock()
        if _is_within(now, self._renewed_at, DAY) or _is_within(now, self._failed_at, AGAIN):
            return LOOK_S
        try:
            self._renew(self._directory, now)
        except (HubError, OSError) as error:
            log.error("signatures not renewed, boards refuse them once they expire reason=%s", error)
            self._note_failure(error, now)
        except Exception as error:
            # A fault of ours must not end the thread: the signatures would expire unseen.
            log.exception("signatures not renewed, boards refuse them once they expire")
            self._note_failure(error, now)
        else:
            self._renewed_at, self._failed_at, self._problem = now, None, None
            log.info("signatures renewed")
        return LOOK_S

    def _note_failure(self, error: Exception, now: datetime) -> None:
        # The clock may have been what was wrong: whether it was set is looked at as often as ever.
        self._renewed_at, self._failed_at = None, now
        self._problem = f"signatures not renewed: {first_line(error)}"


def _is_within(now: datetime, at: datetime | None, span: timedelta) -> bool:
    """Not where the clock was set back."""
    return at is not None and at <= now < at + span
