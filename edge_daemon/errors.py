"""The device's errors, and the exit codes that its commands end with.

EdgeError
├── ConfigError          a configuration that cannot be meant: one line with file, key, value and fix
├── ModelError           a bundle that is missing, damaged or not for this daemon
├── ListenError          an address that cannot be listened on
├── SimulationError      something that `--simulate` needs is missing or did not start
├── DataError            samples for `bench` that do not fit the bundle (`bench.samples`)
├── OutputError          a file that `bench` or `profile` cannot write (`bench.commands`)
├── ReleaseError         a release that this board does not take
│   ├── RefusedError         for what it is: names the attack, the file or the limit
│   └── StoppedError         asked to stop before it was there
└── SpoolError           the queue on disk did not take, find or give up something
    ├── SpoolFullError       more waiting than memory may hold
    │   └── ItemTooLargeError    one item above the spool's whole limit: it will never be taken
    ├── SpoolClosedError     asked after `close` or before `open`
    ├── SpoolInUseError      another process holds the file
    └── SpoolVersionError    written by a newer daemon: going back needs an empty state directory

Exit codes (`edge-daemon run`, `check-config`; sysexits.h is not used, its meanings are those of mail):

    0   ended as asked (SIGTERM, or nothing to complain about)
    1   a defect in the daemon itself: the traceback is in the log
    2   wrong command line, DataError
    10  ConfigError, a broker's credentials that cannot be read, OutputError
    11  ModelError; `bench`: golden outputs were not reproduced
    12  ListenError
    13  ReleaseError
    20  SpoolError at start; later ones are counted and lived with
    30  `--simulate` lost or duplicated something
    31  SimulationError
    32  `--simulate --rollout`: the release ended otherwise than such a one should
"""

from __future__ import annotations

from typing import ClassVar, Final

from edge_daemon.core.swap_events import Failure

EXIT_OK: Final = 0
EXIT_DEFECT: Final = 1
EXIT_USAGE: Final = 2
EXIT_CONFIG: Final = 10
EXIT_MODEL: Final = 11
EXIT_LISTEN: Final = 12
EXIT_RELEASE: Final = 13
EXIT_SPOOL: Final = 20
EXIT_LOST: Final = 30
EXIT_SIMULATION: Final = 31
EXIT_UNEXPECTED: Final = 32


class EdgeError(Exception):
    """Base of every error that `edge_daemon` raises on purpose."""

    exit_code: ClassVar[int] = EXIT_DEFECT


class ConfigError(EdgeError):
    """A configuration that cannot be meant; the message is one line."""

    exit_code = EXIT_CONFIG


class ModelError(EdgeError):
    """A bundle that is missing, damaged or not for this daemon."""

    exit_code = EXIT_MODEL


class ListenError(EdgeError):
    """An address that cannot be listened on."""

    exit_code = EXIT_LISTEN


class SimulationError(EdgeError):
    """Something that the simulation needs is missing or did not start: says what to do."""

    exit_code = EXIT_SIMULATION


class ReleaseError(EdgeError):
    """A release that this board does not take."""

    exit_code = EXIT_RELEASE


class RefusedError(ReleaseError):
    """A release refused for what it is: asking again for the same one helps nothing by itself."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(detail)
        self.failure = failure
        self.detail = detail


class StoppedError(ReleaseError):
    """Asked to stop before the release was there; what is on disk is used next time."""


class SpoolError(EdgeError):
    """The queue on disk did not take, find or give up something."""

    exit_code = EXIT_SPOOL


class SpoolFullError(SpoolError):
    """More items wait for the disk than memory may hold."""


class ItemTooLargeError(SpoolFullError):
    """An item above the spool's whole limit; it will never be taken."""


class SpoolClosedError(SpoolError):
    """The spool was asked before `open` or after `close`."""


class SpoolInUseError(SpoolError):
    """Another process holds the spool's file."""


class SpoolVersionError(SpoolError):
    """The spool was written by a newer daemon."""
