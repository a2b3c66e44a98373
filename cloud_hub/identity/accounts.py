"""What an account is, and which names it may have. No I/O.

The broker's access rules are patterns over the user name, and a pattern holds for every user. So one name is
one account whatever its role, a few names are taken, and every account that is no device is denied the rights
that its name would give it (see `broker_files`).

HubError
└── IdentityError   an account, a credential or a broker file that cannot be made: says which, and the fix
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from cloud_hub.errors import HubError
from edge_cascade.errors import ProtocolError
from edge_cascade.topics import check_device_id

Role = Literal["device", "sensor", "hub"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)

HUB_NAME: Final = "hub"
# `hub` is the hub's own account; the others are files that lie beside NAME.pem and NAME.key.
RESERVED_NAMES: Final = frozenset({HUB_NAME, "ca", "crl", "server"})
# First levels of the topics between sensors and devices: a prefix that began with one of them would let the
# pattern `sensors/%u/#` match the hub's tree for an account that is named like its next level.
SENSOR_TREES: Final = ("sensors", "results", "labels")


class IdentityError(HubError):
    """An account, a credential or a broker file that cannot be made: one line, with the fix."""


@dataclass(frozen=True, slots=True)
class Account:
    """One user of the broker. `device` is whom a sensor feeds; a device's own name; None for the hub."""

    name: str
    role: Role
    device: str | None
    password_hash: str | None
    certificate_fingerprint: str | None
    created_at_ms: int
    revoked_at_ms: int | None

    @property
    def is_active(self) -> bool:
        """Whether it may still log in."""
        return self.revoked_at_ms is None


def check_account_name(name: str) -> str:
    """The name, if a device or a sensor may have it.

    Raises:
        IdentityError: naming it and what is wrong with it.
    """
    try:
        check_device_id(name)
    except ProtocolError as error:
        raise IdentityError(str(error).replace("device id", "name", 1)) from error
    if name.lower() in RESERVED_NAMES:
        raise IdentityError(f"the name {name!r} is taken by the hub itself; choose another")
    return name


def check_tree(prefix: str) -> str:
    """The topic prefix, if the access rules of sensors cannot reach into it.

    Raises:
        IdentityError: naming it and the fix.
    """
    first = prefix.split("/", 1)[0]
    if first in SENSOR_TREES:
        raise IdentityError(
            f"topic prefix {prefix!r} begins with {first!r}, which belongs to sensors: choose another prefix"
        )
    return prefix
