"""What both halves ask of their settings, said in the same words. Reads no file and opens nothing.

Where a value alone tells that it is wrong, its type in the configuration says so, see `settings`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from edge_cascade.errors import ProtocolError
from edge_cascade.mqtt import Broker
from edge_cascade.setting_errors import Origin
from edge_cascade.topics import check_prefix

LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
"""Hosts that nobody else reaches."""


def check_topic_prefix(key: str, prefix: str, origin: Origin) -> None:
    """Whether topics may start with it.

    Raises:
        SettingsError: in one line.
    """
    try:
        check_prefix(prefix)
    except ProtocolError as error:
        raise origin.error(key, str(error)) from error


def check_broker(key: str, broker: Broker, origin: Origin) -> None:
    """Whether a broker could be reached like this; `key` is its table's.

    Raises:
        SettingsError: in one line.
    """
    if not broker.host or any(character.isspace() for character in broker.host):
        raise origin.wrong(f"{key}.host", broker.host, "expected a host name or an address")
    if not 1 <= broker.port <= 65535:
        raise origin.wrong(f"{key}.port", broker.port, "allowed are 1 to 65535; MQTT's are 1883 and 8883")
    if not 5 <= broker.keepalive_s <= 65535:
        raise origin.wrong(f"{key}.keepalive_s", broker.keepalive_s, "allowed are 5 to 65535")
    if broker.password_file is not None and broker.username is None:
        raise origin.error(f"{key}.password_file", "a password needs a name; add username")
    if (broker.certificate_file is None) != (broker.key_file is None):
        absent = "key_file" if broker.key_file is None else "certificate_file"
        raise origin.error(f"{key}.{absent}", "missing; certificate_file and key_file belong together")
    if broker.certificate_file is not None and broker.ca_file is None:
        raise origin.error(f"{key}.ca_file", "missing; a client certificate needs TLS, and TLS needs the CA")


def check_each_once(bundles: Sequence[str], origin: Origin) -> None:
    """Whether no two of `[[models]]` name the same bundle.

    Raises:
        SettingsError: in one line.
    """
    seen: dict[str, int] = {}
    for index, bundle in enumerate(bundles):
        first = seen.setdefault(os.path.normpath(bundle), index)
        if first != index:
            raise origin.wrong(
                f"models[{index}].bundle",
                bundle,
                f"models[{first}] is the same; a model is served once, remove one",
            )
