"""Reads the daemon's configuration: one TOML file, overrides from the environment, every error in one line.

`EDGE_DAEMON__HUB__BROKER__PORT=1884` sets `hub.broker.port`, see `settings`. Only the file itself is read:
neither bundles nor password files are touched here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from edge_cascade.errors import ProtocolError, SettingsError
from edge_cascade.setting_errors import Origin
from edge_cascade.setting_rules import LOOPBACK, check_broker, check_each_once, check_topic_prefix
from edge_cascade.settings import read_settings
from edge_cascade.topics import VERSION_LEVEL, check_device_id
from edge_daemon.config import Config
from edge_daemon.errors import ConfigError
from edge_daemon.inlet.sources import SENSOR_LEVEL

ENVIRONMENT_PREFIX: Final = "EDGE_DAEMON__"

_PUBLIC_KEY = re.compile(r"[0-9A-Fa-f]{64}")
_HOURS = re.compile(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d")
_EXAMPLES: Final[Mapping[str, str]] = {
    "device": ', e.g. [device] with id = "press-3"',
    "device.id": ', e.g. id = "press-3"',
    "models": ', e.g. [[models]] with bundle = "vibration"',
    "inlet": ', e.g. [[inlet.sources]] with topic = "sensors/{sensor}"',
    "inlet.sources": ', e.g. [[inlet.sources]] with topic = "sensors/{sensor}"',
}


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read and check a configuration.

    Raises:
        ConfigError: in one line: file (or variable), key, value, what is allowed, and the fix where known.
    """
    try:
        return read_settings(
            path, environ, Config, prefix=ENVIRONMENT_PREFIX, examples=_EXAMPLES, check=_check
        )
    except SettingsError as error:
        raise ConfigError(str(error)) from error


def warnings_about(config: Config) -> list[str]:
    """What is allowed but deserves a second look, a line each."""
    found = []
    if config.http.enabled and config.http.host not in LOOPBACK:
        found.append(
            f'http.host = "{config.http.host}": health and metrics are readable from the network without a '
            'password; "127.0.0.1" keeps them on this board'
        )
    if not config.hub.enabled and config.audit.rate > 0:
        found.append("hub.enabled = false: uncertain cases and audits are answered here and sent nowhere")
    return found


def _check(config: Config, origin: Origin) -> None:
    try:
        check_device_id(config.device.id)
    except ProtocolError as error:
        raise origin.error("device.id", f'{error}; e.g. "press-3"') from error
    check_topic_prefix("results.prefix", config.results.prefix, origin)
    check_topic_prefix("hub.prefix", config.hub.prefix, origin)
    check_topic_prefix("training.labels_prefix", config.training.labels_prefix, origin)
    check_broker("inlet.broker", config.inlet.broker, origin)
    check_broker("hub.broker", config.hub.broker, origin)
    check_each_once([model.bundle for model in config.models], origin)
    _check_sources(config, origin)
    _check_labels(config, origin)
    _check_training(config, origin)
    _check_releases(config, origin)
    if config.hub.max_batch_bytes * config.hub.max_in_flight_batches > config.spool.max_bytes:
        raise origin.wrong(
            "hub.max_batch_bytes",
            config.hub.max_batch_bytes,
            f"{config.hub.max_in_flight_batches} batches in flight would be more than the whole spool "
            f"(spool.max_bytes = {config.spool.max_bytes}); lower the one or raise the other",
        )


def _check_sources(config: Config, origin: Origin) -> None:
    only_shipped = all(model.is_shipped for model in config.models)
    names = [model.bundle for model in config.models]
    seen: dict[str, int] = {}
    for index, source in enumerate(config.inlet.sources):
        key = f"inlet.sources[{index}]"
        problem = _topic_problem(source.topic)
        if problem:
            raise origin.wrong(f"{key}.topic", source.topic, problem)
        first = seen.setdefault(source.topic_filter, index)
        if first != index:
            raise origin.wrong(
                f"{key}.topic", source.topic, f"the same topics as inlet.sources[{first}]; remove one"
            )
        for own, setting in _own_outputs(config):
            if filters_overlap(source.topic_filter, own):
                raise origin.wrong(
                    f"{key}.topic",
                    source.topic,
                    f"would read our own output {own} (from {setting}); narrow the topic or change {setting}",
                )
        if source.field is not None and source.format != "json":
            raise origin.error(
                f"{key}.field", f'only json has fields, format is "{source.format}"; remove field'
            )
        if source.model is None and len(names) > 1:
            raise origin.error(f"{key}.model", f"missing; with several models say which ({', '.join(names)})")
        # What a bundle in a directory is called stands in its manifest, which is not read here.
        if source.model is not None and only_shipped and source.model not in names:
            close = difflib.get_close_matches(source.model, names, n=1, cutoff=0.6)
            hint = f'did you mean "{close[0]}"?' if close else "add it to [[models]]"
            raise origin.wrong(f"{key}.model", source.model, f"no such model ({', '.join(names)}); {hint}")


def _check_labels(config: Config, origin: Origin) -> None:
    if not config.training.enabled:
        return
    labels = f"{config.training.labels_prefix}/+/#"
    for index, source in enumerate(config.inlet.sources):
        if filters_overlap(source.topic_filter, labels):
            raise origin.wrong(
                f"inlet.sources[{index}].topic",
                source.topic,
                f"would take labels for samples, {labels} (from training.labels_prefix); narrow the topic or "
                "change training.labels_prefix",
            )
    for own, setting in _own_outputs(config):
        if filters_overlap(labels, own):
            raise origin.wrong(
                "training.labels_prefix",
                config.training.labels_prefix,
                f"would read our own output {own} (from {setting}) as labels; choose another prefix",
            )


def _check_training(config: Config, origin: Origin) -> None:
    key = config.training.hub_key
    if key is not None and not _PUBLIC_KEY.fullmatch(key):
        raise origin.wrong(
            "training.hub_key",
            key,
            "expected 64 hexadecimal digits; `cloud-hub round key` prints them",
        )
    if not config.training.enabled:
        if config.training.serve_private_heads:
            raise origin.error(
                "training.serve_private_heads",
                "private heads come from rounds, and training.enabled is false; change one of the two",
            )
        return
    if not config.hub.enabled:
        raise origin.error(
            "training.enabled", "rounds come from the hub, and hub.enabled is false; change one of the two"
        )
    if key is None:
        raise origin.error(
            "training.hub_key",
            "missing; only rounds that this key has signed are joined, and `cloud-hub round key` prints it",
        )


def _check_releases(config: Config, origin: Origin) -> None:
    releases = config.releases
    if releases.hours is not None and not _HOURS.fullmatch(releases.hours):
        raise origin.wrong(
            "releases.hours", releases.hours, 'expected a stretch of a day such as "22:00-06:00"'
        )
    if releases.min_probation_s > releases.max_probation_s:
        raise origin.wrong(
            "releases.min_probation_s",
            releases.min_probation_s,
            f"more than releases.max_probation_s = {releases.max_probation_s:g}; lower the one or raise the "
            "other",
        )
    if not releases.enabled:
        return
    if not config.hub.enabled:
        raise origin.error(
            "releases.enabled",
            "releases come from the hub, and hub.enabled is false; change one of the two",
        )
    if not releases.root:
        raise origin.error(
            "releases.root",
            "missing; only what the keys named in this file have signed is run, and `cloud-hub keys root` "
            "prints it",
        )
    problem = _url_problem(releases.url)
    if problem is not None:
        raise origin.wrong("releases.url", releases.url, problem)


def _url_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.username:
        return 'expected an address such as "https://hub.example:8443/v1/fleet"'
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        return "would send the token in the clear; use https"
    return None


def _topic_problem(topic: str) -> str | None:
    levels = topic.split("/")
    if topic.startswith("$"):
        return "topics with $ belong to the broker; name the sensors' own topics"
    if "\0" in topic:
        return "holds a zero byte"
    if "#" in topic and (levels[-1] != "#" or topic.count("#") > 1):
        return "'#' may only be the last level, alone"
    if topic.count(SENSOR_LEVEL) > 1:
        return f"{SENSOR_LEVEL} may stand once"
    literal = [level for level in levels if level not in {"+", "#", SENSOR_LEVEL}]
    if any(character in level for level in literal for character in "+{}"):
        return f"'+' and {SENSOR_LEVEL} take a whole level, as in a/+/b and a/{SENSOR_LEVEL}/b"
    return None


def _own_outputs(config: Config) -> Iterator[tuple[str, str]]:
    """Our own output topics as filters, with the key that moves them. A sensor's name may have levels."""
    yield f"{config.results.prefix}/+/#", "results.prefix"
    if config.hub.enabled:
        yield f"{config.hub.prefix}/{VERSION_LEVEL}/#", "hub.prefix"


def filters_overlap(one: str, other: str) -> bool:
    """Whether some topic matches both MQTT filters (MQTT 5, section 4.7; `#` also matches its parent)."""
    left, right = one.split("/"), other.split("/")
    for position in range(max(len(left), len(right)) + 1):
        here = left[position] if position < len(left) else None
        there = right[position] if position < len(right) else None
        if "#" in (here, there):
            return True
        if here is None or there is None:
            return here is there
        if here != there and "+" not in (here, there):
            return False
    return True
