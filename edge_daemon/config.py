"""What the daemon is told, table by table. No files: `config_file` reads one and checks it as a whole."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, field

from edge_cascade.mqtt import Broker
from edge_daemon.core.spooling import SpoolLimits
from edge_daemon.core.vitals import VitalsLimits
from edge_daemon.inlet.sources import filter_of

_SHIPPED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

Filled = Annotated[str, Meta(min_length=1, max_length=256)]
Runtime = Literal["onnxruntime", "litert"]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every table."""


class DeviceConfig(Section, frozen=True):
    """Who this board is. `drain_s`: how long a SIGTERM may wait for what is still to be sent."""

    id: str
    state_dir: Filled = "/var/lib/edge-daemon"
    drain_s: Annotated[float, Meta(ge=0, le=3600)] = 5.0


class ModelConfig(Section, frozen=True):
    """One model to serve: a shipped bundle's name or a directory. `plan` and `point`: the bundle's own.

    `runtime`: what runs it; `litert` needs a bundle that was built with LiteRT files.
    """

    bundle: Filled
    plan: Filled | None = None
    point: Annotated[int, Meta(ge=0, lt=2**16)] | None = None
    runtime: Runtime = "onnxruntime"

    @property
    def is_shipped(self) -> bool:
        """Whether `bundle` is a name rather than a path."""
        return _SHIPPED_NAME.fullmatch(self.bundle) is not None


class SourceConfig(Section, frozen=True):
    """Topics that carry one model's samples. `field` is a path in JSON; `window` follows the manifest's."""

    topic: Filled
    format: Literal["json", "float32le", "npy"] = "json"
    model: Filled | None = None
    field: Filled | None = None
    window: Literal["bundle"] | None = None

    @property
    def topic_filter(self) -> str:
        """The MQTT subscription: `{sensor}` is any one level."""
        return filter_of(self.topic)


class InletConfig(Section, frozen=True):
    """Where samples come from."""

    sources: Annotated[tuple[SourceConfig, ...], Meta(min_length=1, max_length=256)]
    broker: Broker = field(default_factory=Broker)
    queue_size: Annotated[int, Meta(ge=1, le=1_000_000)] = 4096
    max_payload_bytes: Annotated[int, Meta(ge=16, le=256 * 2**20)] = 1_048_576


class ResultsConfig(Section, frozen=True):
    """Where answers go: `<prefix>/<sensor>`, and verdicts to `<prefix>/<sensor>/verdict`."""

    prefix: str = "results"
    qos: Literal[0, 1] = 1


class HubConfig(Section, frozen=True):
    """The way to the hub, and how uncertain cases are gathered for it."""

    enabled: bool = True
    broker: Broker = field(default_factory=Broker)
    prefix: str = "edge"
    max_in_flight_batches: Annotated[int, Meta(ge=1, le=64)] = 4
    max_batch_items: Annotated[int, Meta(ge=1, le=1024)] = 64
    max_batch_bytes: Annotated[int, Meta(ge=1024, le=16 * 2**20)] = 98_304
    batch_linger_s: Annotated[float, Meta(ge=0, le=3600)] = 0.2
    ack_timeout_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0
    report_every_s: Annotated[float, Meta(gt=0, le=30 * 86400)] = 300.0


class SpoolConfig(Section, frozen=True):
    """The queue on disk. `max_age_s` counts time in which the daemon runs."""

    max_bytes: Annotated[int, Meta(ge=64 * 2**10, le=2**40)] = 64 * 2**20
    max_age_s: Annotated[float, Meta(gt=0, le=3650 * 86400)] = 7 * 86400.0
    commit_window_ms: Annotated[float, Meta(ge=0, le=20)] = 10.0


class AuditConfig(Section, frozen=True):
    """The share of samples that is sent whatever the gate says, and its caps.

    While a release is judged the hub may ask for a larger share; then `max_raised_per_hour` is the cap.
    """

    rate: Annotated[float, Meta(ge=0, le=1)] = 0.01
    max_per_hour: Annotated[float, Meta(ge=0, le=1e9)] = 60.0
    max_raised_per_hour: Annotated[float, Meta(ge=0, le=1e9)] = 600.0


class TrainingConfig(Section, frozen=True):
    """What this board keeps to learn from, on its own disk, and when it trains.

    Off: nothing is kept, no label is read, no round is joined.

    `max_examples` is per model. `own_per_minute`: samples that it answered itself, whose answer had at least
    `own_min_probability`. Labels come on `<labels_prefix>/<sensor>` of the sensors' broker.

    `hub_key` is the public key of the hub whose rounds are joined. The limits from `max_temperature_celsius`
    to `max_queued` say when nothing is trained; those from `max_passes` on bound what a round may cost. With
    `serve_private_heads`, heads that rounds have left with this board answer while they answer better.
    """

    enabled: bool = False
    max_examples: Annotated[int, Meta(ge=16, le=100_000)] = 2000
    max_bytes: Annotated[int, Meta(ge=64 * 2**10, le=2**40)] = 64 * 2**20
    own_per_minute: Annotated[float, Meta(ge=0, le=6000)] = 60.0
    own_min_probability: Annotated[float, Meta(ge=0, le=1)] = 0.9
    labels_prefix: str = "labels"
    hub_key: str | None = None
    max_temperature_celsius: Annotated[float, Meta(gt=0, le=150)] = 75.0
    max_load: Annotated[float, Meta(ge=0, le=1)] = 0.5
    min_free_mb: Annotated[int, Meta(ge=0, le=2**20)] = 200
    on_battery: bool = False
    max_queued: Annotated[int, Meta(ge=0, le=1_000_000)] = 32
    max_passes: Annotated[int, Meta(ge=1, le=10**9)] = 1_000_000
    max_memory_mb: Annotated[int, Meta(ge=128, le=2**20)] = 512
    nice: Annotated[int, Meta(ge=0, le=19)] = 19
    serve_private_heads: bool = False

    @property
    def vitals_limits(self) -> VitalsLimits:
        """What `decide_may_train` takes."""
        return VitalsLimits(
            max_celsius=self.max_temperature_celsius,
            max_load=self.max_load,
            min_free_bytes=self.min_free_mb * 2**20,
            on_battery=self.on_battery,
            max_queued=self.max_queued,
        )

    @property
    def key_bytes(self) -> bytes:
        """The hub's public key; only of a configuration that was checked."""
        assert self.hub_key is not None
        return bytes.fromhex(self.hub_key)


class ReleasesConfig(Section, frozen=True):
    """Where better bundles come from, whom to believe, and what a trial may cost.

    `url` is the fleet's part of the hub's REST, e.g. `https://hub.example:8443/v1/fleet`; `root` is the file
    of the TUF root that this board trusts first. Downloads begin within `jitter_s` of being asked for, use at
    most `max_kbytes_per_s` (0: all there is), and pause outside of `hours` (local time, as `22:00-06:00`).
    A new bundle may take `max_latency_factor` of the old one's time and `max_memory_factor` of its memory.
    While a release is judged, at most `max_shadow_per_hour` inputs are sent because it differs from the one
    before.
    """

    enabled: bool = False
    url: str = ""
    root: str = ""
    token_file: str | None = None
    ca_file: str | None = None
    jitter_s: Annotated[float, Meta(ge=0, le=86400)] = 300.0
    max_kbytes_per_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    hours: str | None = None
    max_latency_factor: Annotated[float, Meta(ge=1, le=100)] = 1.5
    max_memory_factor: Annotated[float, Meta(ge=1, le=100)] = 1.5
    probation_samples: Annotated[int, Meta(ge=0, le=10**9)] = 200
    min_probation_s: Annotated[float, Meta(ge=0, le=30 * 86400)] = 60.0
    max_probation_s: Annotated[float, Meta(gt=0, le=30 * 86400)] = 86400.0
    max_failed_share: Annotated[float, Meta(ge=0, le=1)] = 0.02
    max_shadow_per_hour: Annotated[float, Meta(ge=0, le=10**6)] = 600.0


class HttpConfig(Section, frozen=True):
    """Health and metrics."""

    enabled: bool = True
    host: Filled = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 9464


class LogConfig(Section, frozen=True):
    """How much is said."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section, frozen=True):
    """Everything that one daemon is told."""

    device: DeviceConfig
    models: Annotated[tuple[ModelConfig, ...], Meta(min_length=1, max_length=64)]
    inlet: InletConfig
    results: ResultsConfig = field(default_factory=ResultsConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    spool: SpoolConfig = field(default_factory=SpoolConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    releases: ReleasesConfig = field(default_factory=ReleasesConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def spool_limits(self) -> SpoolLimits:
        """What `SqliteSpool` takes."""
        return SpoolLimits(
            max_bytes=self.spool.max_bytes,
            max_age_s=self.spool.max_age_s,
            commit_window_ms=self.spool.commit_window_ms,
            max_in_flight_batches=self.hub.max_in_flight_batches,
        )
