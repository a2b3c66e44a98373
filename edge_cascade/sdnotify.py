"""Telling systemd how the service is: sd_notify(3) without libsystemd. Silent where nobody listens."""

from __future__ import annotations

import logging
import os
import socket
from typing import Final

# systemd drains its socket at once unless the machine is in trouble.
SEND_TIMEOUT_S: Final = 0.1

log = logging.getLogger(__name__)


def notify(state: str) -> bool:
    """Send one state, for example `READY=1` or `WATCHDOG=1\\nSTATUS=12 in the spool`; whether it was sent.

    Without NOTIFY_SOCKET nothing happens. It never raises, and gives up after `SEND_TIMEOUT_S`: a service
    must not fall or stand still because its supervisor is busy.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    # A name that begins with @ is in the abstract namespace, which the kernel spells with a NUL (unix(7)).
    target = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(SEND_TIMEOUT_S)
            sender.sendto(state.encode("utf-8", "replace"), target)
    except (OSError, ValueError) as error:
        log.debug("no word to systemd at %r: %s", address, error)
        return False
    return True


def watchdog_interval_s() -> float | None:
    """How often `WATCHDOG=1` is due: half of what systemd waits for; None where it does not wait.

    sd_watchdog_enabled(3): the variables count only in the process that WATCHDOG_PID names.
    """
    usec = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not usec.isascii() or not usec.isdecimal() or int(usec) == 0:
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(usec) / 2_000_000
