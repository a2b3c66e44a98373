"""The hub's configuration: one TOML file, overrides from the environment, every error in one line.

`CLOUD_HUB__HTTP__PORT=9000` sets `http.port`; a value for a table or a list is JSON. Only the file is read
here: neither bundles nor password files are touched. Relative paths start at the working directory.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, field

from cloud_hub.errors import ConfigError
from edge_cascade.errors import ProtocolError
from edge_cascade.mqtt import Broker
from edge_cascade.topics import DEFAULT_PREFIX, check_prefix

ENVIRONMENT_PREFIX: Final = "CLOUD_HUB__"
DEFAULT_PATH: Final = "hub.toml"

_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_VALIDATION = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)

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
    """The REST server. Port 0: any free one, told in the log."""

    host: Filled = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080


class StoreSection(Section, frozen=True):
    """The database. By default `hub.db` in the state directory."""

    url: Filled | None = None


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
    document = _read_toml(path)
    _override(document, os.environ if environ is None else environ)
    _refuse_unknown(document, Config, "", path)
    try:
        # Not strict: a variable of the environment is a text, whatever its key wants.
        config = msgspec.convert(document, Config, strict=False)
    except msgspec.ValidationError as error:
        raise _explained(error, document, path) from error
    _check(config, path)
    return config


def warnings_about(config: Config) -> list[str]:
    """What is allowed but deserves a second look, a line each."""
    found = []
    if config.http.host not in _LOOPBACK:
        found.append(
            f"http.host = {config.http.host!r}: tokens travel unencrypted; put a TLS proxy in front, or use "
            "127.0.0.1"
        )
    if not config.models:
        found.append("no [[models]]: cases are kept and acknowledged, but nothing answers them")
    return found


def _check(config: Config, path: Path) -> None:
    try:
        check_prefix(config.hub.prefix)
    except ProtocolError as error:
        raise ConfigError(f"{path}: hub.prefix: {error}; for example prefix = 'edge'") from error
    if not 1 <= config.broker.port <= 65535:
        raise ConfigError(f"{path}: broker.port = {config.broker.port}: expected 1 to 65535, usually 1883")
    if config.broker.password_file is not None and config.broker.username is None:
        raise ConfigError(f"{path}: broker.password_file without broker.username; add the user name")
    bundles = [model.bundle for model in config.models]
    for bundle in bundles:
        if bundles.count(bundle) > 1:
            raise ConfigError(f"{path}: models.bundle = {bundle!r} is there twice; remove one")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give it with --config FILE") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {' '.join(str(error).split())}") from error


def _override(document: dict[str, Any], environ: Mapping[str, str]) -> None:
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        *tables, key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        target = document
        for table in tables:
            inner = target.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{variable}: {table} is no table; set the whole list as JSON")
            target = inner
        text = environ[variable]
        target[key] = text
        if text[:1] in {"[", "{"}:
            try:
                target[key] = msgspec.json.decode(text)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{variable} = {text[:60]!r} is no JSON: {error}") from error


def _refuse_unknown(value: object, kind: type, where: str, path: Path) -> None:
    if not isinstance(value, dict):
        return
    fields = {entry.name: entry.type for entry in msgspec.structs.fields(kind)}
    for key, inner in value.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(fields)}"
            raise ConfigError(f"{path}: {where}{key} = {_shown(inner)}: unknown key; {fix}")
        if key == "models" and isinstance(inner, list):
            for index, model in enumerate(inner):
                _refuse_unknown(model, ModelSection, f"models[{index}].", path)
        elif isinstance(fields[key], type) and issubclass(fields[key], msgspec.Struct):
            _refuse_unknown(inner, fields[key], f"{where}{key}.", path)


def _explained(error: msgspec.ValidationError, document: object, path: Path) -> ConfigError:
    found = _VALIDATION.match(str(error))
    assert found is not None
    key = found["path"] or ""
    what = found["what"].replace("`", "")
    missing = re.match(r"Object missing required field (.+)", what)
    if missing:
        return ConfigError(f"{path}: {key}.{missing[1]}: missing; add it, for example bundle = 'digits'")
    value: Any = document
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    default = _default_of(key)
    fix = f"; the default is {_shown(default)}" if default is not None else ""
    return ConfigError(f"{path}: {key} = {_shown(value)}: {what[:1].lower()}{what[1:]}{fix}")


def _default_of(key: str) -> object:
    value: object = Config()
    for step in key.split("."):
        value = getattr(value, step, None)
    return value if isinstance(value, str | int | float) else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
