"""The hub's configuration: one TOML file, overrides from the environment, every error in one line.

`CLOUD_HUB__HTTP__PORT=9000` sets `http.port`; a value for a table or a list is JSON. Only the file is read
here: neither bundles nor password files are touched. Relative paths start at the working directory.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, field

from cloud_hub.errors import ConfigError
from edge_cascade.errors import SettingsError
from edge_cascade.mqtt import Broker
from edge_cascade.setting_errors import Origin
from edge_cascade.setting_rules import LOOPBACK, check_broker, check_each_once, check_topic_prefix
from edge_cascade.settings import read_settings
from edge_cascade.topics import DEFAULT_PREFIX

ENVIRONMENT_PREFIX: Final = "CLOUD_HUB__"
DEFAULT_PATH: Final = "hub.toml"

_EXAMPLES: Final = {"models": ', e.g. [[models]] with bundle = "digits"'}

Filled = Annotated[str, Meta(min_length=1, max_length=512)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every table."""


class HubSection(Section, frozen=True):
    """What is kept where, and what is taken. `holdout_share`: of the audits, never used for training."""

    state_dir: Filled = "/var/lib/cloud-hub"
    prefix: str = DEFAULT_PREFIX
    holdout_share: Annotated[float, Meta(ge=0, le=1)] = 0.3
    max_payload_bytes: Annotated[int, Meta(ge=1024, le=256 * 2**20)] = 1_048_576
    drain_s: Annotated[float, Meta(ge=0, le=3600)] = 10.0


class ModelSection(Section, frozen=True):
    """One model to answer for: a shipped name or a path. `full`: by default `full.onnx` beside the bundle."""

    bundle: Filled
    full: Filled | None = None


class HttpSection(Section, frozen=True):
    """The REST server. Port 0: any free one, told in the log. The PEM files make it speak HTTPS."""

    host: Filled = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    certificate_file: Filled | None = None
    key_file: Filled | None = None


class StoreSection(Section, frozen=True):
    """The database. By default `hub.db` in the state directory."""

    url: Filled | None = None


class RolloutsSection(Section, frozen=True):
    """How releases are judged. `alpha`: how often one that loses at most `tolerated` (a share of all samples)
    is halted for its quality; `beta`: how often one that is worse by a wave's `max_drop` may pass it.
    """

    look_every_s: Annotated[float, Meta(ge=1, le=86400)] = 60.0
    alpha: Annotated[float, Meta(gt=0, lt=1)] = 0.04
    beta: Annotated[float, Meta(gt=0, lt=1)] = 0.05
    tolerated: Annotated[float, Meta(ge=0, lt=0.01)] = 0.0


class LogSection(Section, frozen=True):
    """How much is said."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section, frozen=True):
    """Everything that one hub is told."""

    hub: HubSection = field(default_factory=HubSection)
    broker: Broker = field(default_factory=Broker)
    models: Annotated[tuple[ModelSection, ...], Meta(max_length=64)] = ()
    http: HttpSection = field(default_factory=HttpSection)
    store: StoreSection = field(default_factory=StoreSection)
    rollouts: RolloutsSection = field(default_factory=RolloutsSection)
    log: LogSection = field(default_factory=LogSection)

    @property
    def state_dir(self) -> Path:
        """Where everything lies."""
        return Path(self.hub.state_dir)


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Give a command its `--config`."""
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(DEFAULT_PATH),
        metavar="FILE",
        help=f"the hub's configuration (default: {DEFAULT_PATH})",
    )


def load_config(path: Path, environ: Mapping[str, str] | None = None) -> Config:
    """Read and check a configuration.

    Raises:
        ConfigError: in one line: file, key, value, what is allowed, and the fix where known.
    """
    environ = os.environ if environ is None else environ
    try:
        return read_settings(
            path, environ, Config, prefix=ENVIRONMENT_PREFIX, examples=_EXAMPLES, check=_check
        )
    except SettingsError as error:
        raise ConfigError(str(error)) from error


def warnings_about(config: Config) -> list[str]:
    """What is allowed but deserves a second look, a line each."""
    found = []
    if config.http.host not in LOOPBACK and config.http.certificate_file is None:
        found.append(
            f'http.host = "{config.http.host}": tokens travel unencrypted; set http.certificate_file and '
            'http.key_file, or use "127.0.0.1"'
        )
    if not config.models:
        found.append("no [[models]]: cases are kept and acknowledged, but nothing answers them")
    return found


def _check(config: Config, origin: Origin) -> None:
    check_topic_prefix("hub.prefix", config.hub.prefix, origin)
    check_broker("broker", config.broker, origin)
    if (config.http.certificate_file is None) != (config.http.key_file is None):
        missing = "certificate_file" if config.http.certificate_file is None else "key_file"
        raise origin.error(f"http.{missing}", "missing; TLS needs a certificate and its key")
    check_each_once([model.bundle for model in config.models], origin)
