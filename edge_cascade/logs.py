"""How both daemons log: one line per event, key=value, UTC, on stderr, where systemd's journal takes it."""

from __future__ import annotations

import logging
import sys
import time


def start_logging(level: str) -> None:
    """Set the root logger up, once per process."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("time=%(asctime)s level=%(levelname)s at=%(name)s %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format, formatter.default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("aiohttp.server").addFilter(_is_ours)


def _is_ours(record: logging.LogRecord) -> bool:
    """Not what aiohttp says of a request that is no HTTP: a traceback that quotes it, tokens included."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__module__ != "aiohttp.http_exceptions"
