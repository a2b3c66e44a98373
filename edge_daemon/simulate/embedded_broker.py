"""The fall-back broker where mosquitto is not installed: amqtt on loopback, behind one password.

Run as a child: `python -m edge_daemon.simulate.embedded_broker PORT`, name and password in the environment.
amqtt speaks MQTT 3.1.1 only and has no access rules: good enough for a demonstration on one machine.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import sys
from typing import Any, Final

from amqtt.broker import Broker
from amqtt.plugins.base import BaseAuthPlugin

USERNAME_VARIABLE: Final = "EDGE_EMBEDDED_BROKER_USERNAME"
PASSWORD_VARIABLE: Final = "EDGE_EMBEDDED_BROKER_PASSWORD"


class OnePassword(BaseAuthPlugin):  # type: ignore[misc]  # amqtt is untyped
    """Lets in whoever has the name and the password of this run."""

    async def authenticate(self, *, session: Any) -> bool:
        """Whether this session may connect."""
        return hmac.compare_digest(
            f"{session.username}:{session.password}".encode(),
            f"{os.environ[USERNAME_VARIABLE]}:{os.environ[PASSWORD_VARIABLE]}".encode(),
        )


async def serve(port: int) -> None:
    """Run until the process is ended."""
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        # amqtt imports the plugin by its name, so not as a part of `__main__`.
        "plugins": {f"edge_daemon.simulate.embedded_broker.{OnePassword.__name__}": {}},
    }
    broker = Broker(config)
    await broker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(serve(int(sys.argv[1])))
