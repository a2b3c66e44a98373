"""What makes a board's MQTT client ids unguessable; one small file."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Final

from edge_cascade.durable import write_durably

log = logging.getLogger(__name__)

CLIENT_SECRET_FILE: Final = "client-secret"  # noqa: S105 - a name


def client_secret(state_dir: Path) -> str:
    """What makes this board's MQTT client ids unguessable, the same at every start.

    Whoever knows a client id can disconnect its session; the broker's access rules go by the user name and
    cannot prevent that. It must not change: under a new id the broker would keep what waits for the old one.
    A board that cannot write it has another one at each start.
    """
    path = state_dir / CLIENT_SECRET_FILE
    try:
        known = path.read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-f]{16}", known):
            return known
    except (OSError, UnicodeDecodeError) as error:
        log.debug("no client secret yet: %s", error)
    fresh = os.urandom(8).hex()
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        write_durably(path, f"{fresh}\n".encode(), mode=0o600)
    except OSError as error:
        log.warning("client ids will change at the next start: %s: %s", path, error.strerror)
    return fresh
