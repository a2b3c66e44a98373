"""What time it is at least, by what the hub's timestamp role has signed. Never the wall clock.

A board's clock may be anywhere: no battery, a wrong NTP server. Were it believed, a jump forward would make
all metadata expire and bar every release, a jump back would unfreeze what has expired. So time is the
greatest `issued` of a verified timestamp, and what the monotonic clock has counted since; it is written down,
and goes on from there after a restart. It runs behind by the time that the board was off.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from edge_cascade.durable import write_durably
from edge_daemon.ports import Clock

LONGEST_RUN: timedelta = timedelta(days=3650)


class _Seen(msgspec.Struct, frozen=True):
    """What is on disk: seconds since 1970, the greatest version of a timestamp, and by which keys."""

    seconds: float = 0.0
    version: int = 0
    keys: tuple[str, ...] = ()


class TrustedTime:
    """The time of one trust root. Methods raise `OSError` where the disk does not take it."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._seen = _read(path)
        self._since_s = clock.monotonic_s()

    @property
    def version(self) -> int:
        """The greatest version of a timestamp that was believed, 0 for none."""
        return self._seen.version

    def now(self) -> datetime:
        """The least that it can be; 1970 where nothing was ever signed for this board."""
        return datetime.fromtimestamp(0, UTC) + timedelta(seconds=self._now_s())

    def follow_keys(self, keys: tuple[str, ...]) -> None:
        """Begin anew where the timestamp role has other keys: the old ones may have signed the year 3000.

        The counterpart of TUF's recovery from a fast-forward attack (specification 1.0, section 5.3.11).
        """
        if keys == self._seen.keys:
            return
        if self._seen.keys:
            self._seen = _Seen(keys=keys)
            self._since_s = self._clock.monotonic_s()
        else:
            self._seen = msgspec.structs.replace(self._seen, keys=keys)
        self.keep()

    def advance(self, issued: datetime | None, version: int) -> None:
        """A timestamp was verified: time is no less than when it was made."""
        now_s = self._now_s()
        issued_s = issued.timestamp() if issued is not None else 0.0
        self._seen = msgspec.structs.replace(
            self._seen, seconds=max(now_s, issued_s), version=max(self._seen.version, version)
        )
        self._since_s = self._clock.monotonic_s()
        self.keep()

    def keep(self) -> None:
        """Write down how far time has come."""
        seen = msgspec.structs.replace(self._seen, seconds=self._now_s())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._path, msgspec.json.encode(seen))

    def _now_s(self) -> float:
        # Before the first timestamp nothing has begun to run.
        if self._seen.seconds <= 0:
            return 0.0
        run_s = max(self._clock.monotonic_s() - self._since_s, 0.0)
        return self._seen.seconds + min(run_s, LONGEST_RUN.total_seconds())


def _read(path: Path) -> _Seen:
    try:
        seen = msgspec.json.decode(path.read_bytes(), type=_Seen)
        datetime.fromtimestamp(seen.seconds, UTC)
    except (OSError, msgspec.MsgspecError, ValueError, OverflowError, UnicodeDecodeError):
        # Written durably, so this is a disk's fault; the metadata beside it still refuse a rollback.
        return _Seen()
    return seen
