"""The files that a configuration names, looked at before a hub is started. Nothing is started here."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cloud_hub.admin.tls import certificate_of
from cloud_hub.config import Config
from cloud_hub.errors import ConfigError
from edge_cascade.mqtt import BrokerConfigError, check_credentials

CREDENTIALS: Final = Path("/run/credentials")
"""Where systemd puts what `LoadCredential` names, as long as a unit runs and no longer."""


def check_files(config: Config) -> list[str]:
    """Read certificates, keys and passwords as `run` would; a line for each that is only there while it runs.

    Raises:
        ConfigError: for one that is missing, damaged, or does not belong to the others.
    """
    http, broker = config.http, config.broker
    of_http = _not_yet("http", http, ("certificate_file", "key_file"))
    of_broker = _not_yet("broker", broker, ("password_file", "ca_file", "certificate_file", "key_file"))
    if not of_http:
        certificate_of(http)
    if not of_broker:
        try:
            check_credentials(broker)
        except BrokerConfigError as error:
            raise ConfigError(f"broker: {error}") from error
    return [*of_http, *of_broker]


def _not_yet(table: str, section: object, keys: tuple[str, ...]) -> list[str]:
    named = {key: Path(value) for key in keys if (value := getattr(section, key)) is not None}
    return [
        f"{table}.{key} = '{path}': not checked, it is there while {path.parent.name} runs"
        for key, path in named.items()
        if path.is_relative_to(CREDENTIALS) and not path.parent.exists()
    ]
