"""The hub's errors and the exit codes that they end the process with.

HubError                     1
├── ConfigError              2   a key of the configuration that cannot be used
├── StoreError
│   ├── StoreVersionError    3   a database that another version wrote
│   ├── StoreBusyError       4   another hub holds the state directory
│   ├── StoreUnavailableError 5  disk full, I/O error, database away: the same call may succeed later
│   └── StoreRefusedError    6   the database will never take this
├── ModelError               7   a bundle or full model that cannot be used
├── NotFoundError            8   no such case, token or account
├── ListenError              9   the address of the REST server cannot be had
├── BuildError              10   a model, data or recipe that no bundle can be built from
│   └── CertificateError    11   the certificate that was asked for does not hold, or cannot be had
├── RoundError              12   a series of rounds that cannot be started or ended as asked
├── RolloutError            13   a rollout that cannot be started, or cannot do what was ordered
└── SigningError            14   keys or signed metadata that cannot be made, read or written
"""

from __future__ import annotations


class HubError(Exception):
    """Base of every error that `cloud_hub` raises on purpose. Its text is one line for a person."""

    exit_code = 1


class ConfigError(HubError):
    """A key of the configuration that cannot be used: names the key, the value and the fix."""

    exit_code = 2


class StoreError(HubError):
    """The store cannot do what was asked."""


class StoreVersionError(StoreError):
    """A database that another version of the hub wrote."""

    exit_code = 3

    def __init__(self, found: str, expected: int) -> None:
        newer = found.isdecimal() and int(found) > expected
        fix = "install the newer hub that wrote it" if newer else "restore it from a backup"
        super().__init__(f"the store has schema version {found}, this hub reads {expected}: {fix}")


class StoreBusyError(StoreError):
    """Another hub holds the state directory."""

    exit_code = 4


class StoreUnavailableError(StoreError):
    """Disk full, I/O error or database away: the same call may succeed later."""

    exit_code = 5


class StoreRefusedError(StoreError):
    """The database will never take this."""

    exit_code = 6


class ModelError(HubError):
    """A bundle or a full model that cannot be used."""

    exit_code = 7


class NotFoundError(HubError):
    """There is no such case, token or account."""

    exit_code = 8


class ListenError(HubError):
    """The address of the REST server cannot be had."""

    exit_code = 9


class BuildError(HubError):
    """A model, data or a recipe that no bundle can be built from: names the place and what can be done."""

    exit_code = 10


class CertificateError(BuildError):
    """The certificate that was asked for does not hold on this data, or cannot be had from so little."""

    exit_code = 11


class RoundError(HubError):
    """A series of rounds that cannot be started or ended as asked: says what there is and what is needed."""

    exit_code = 12


class SigningError(HubError):
    """Keys or signed metadata that cannot be made, read or written: says which file and what would help."""

    exit_code = 14


class RolloutError(HubError):
    """A rollout that cannot be started, or cannot do what was ordered: says why and what would help."""

    exit_code = 13
