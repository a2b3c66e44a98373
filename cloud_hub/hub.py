"""The hub put together: the only place that names every part.

Threads: the store's one connection; ingest; the full model; the outbox; the coordinator of rounds; the
rollouts and what measures for them; the renewal of signatures; MQTT's network thread; and the event loop with
REST, signals and the watchdog. They hand over by queues and by what is committed, never by shared state.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from cloud_hub.admin.metrics import Vitals
from cloud_hub.admin.route import RolloutParts
from cloud_hub.admin.service import Service
from cloud_hub.admin.tls import certificate_of
from cloud_hub.config import Config
from cloud_hub.errors import ConfigError
from cloud_hub.federation.coordinator import Coordinator
from cloud_hub.federation.keys import private_key
from cloud_hub.federation.ports import CandidateOutcome, HubVote, Lineage
from cloud_hub.full_model import FullModelWorker
from cloud_hub.ingest import Ingest
from cloud_hub.models import HubModel, load_model, shapes_of
from cloud_hub.outbox import Outbox
from cloud_hub.reading import Reader
from cloud_hub.rollouts.renewal import Renewal
from cloud_hub.rollouts.runner import RolloutRunner
from cloud_hub.rollouts.settings import is_signed_in, rules_for, sizes_in
from cloud_hub.store.store import Store
from edge_cascade.mqtt import BrokerConfigError, Incoming, MqttSession
from edge_cascade.sdnotify import notify, watchdog_interval_s
from edge_cascade.topics import UP, fleet_filter
from edge_cascade.training import Schedule
from edge_cascade.weights import Weights

if TYPE_CHECKING:
    from cloud_hub.candidates.series import SeriesCandidates
    from cloud_hub.rollouts.ports import Evidence

log = logging.getLogger(__name__)


def load_models(config: Config) -> dict[str, HubModel]:
    """Every model of the configuration by its name.

    Raises:
        ModelError: for one that cannot be used.
        ConfigError: when two have one name.
    """
    models: dict[str, HubModel] = {}
    for section in config.models:
        model = load_model(section.bundle, section.full)
        if model.name in models:
            raise ConfigError(f"models.bundle = {section.bundle!r}: model {model.name!r} is there twice")
        log.info(
            "model loaded model=%s labels=%d full=%s",
            model.name,
            len(model.labels),
            model.full_model.hex()[:12],
        )
        models[model.name] = model
    return models


class Hub:
    """A running hub. `start` and `stop` it on the event loop."""

    def __init__(self, config: Config, models: Mapping[str, HubModel]) -> None:
        self._config = config
        self._models = models
        prefix = config.hub.prefix
        shapes = shapes_of(models)
        self.store = Store(config.state_dir, url=config.store.url)
        self._session = MqttSession(
            config.broker,
            # Two hubs must not take each other's session; nothing of ours is kept in it.
            f"hub-{secrets.token_hex(6)}",
            subscriptions=[fleet_filter(prefix, channel) for channel in UP],
            on_message=self._receive,
            on_up=self._greet,
        )
        self.outbox = Outbox(self.store.database, self._session.publish, prefix=prefix)
        self.coordinator = Coordinator(
            self.store,
            self._session.publish,
            models,
            prefix=prefix,
            private_key=lambda: private_key(config.state_dir),
            make_candidate=self._make_candidate,
            train_hub=self._train_hub,
        )
        self.rollouts = RolloutRunner(
            self.store,
            self._session.publish,
            lambda: self._evidence,
            prefix=prefix,
            size_of=sizes_in(config.state_dir, self.store.database),
            rules=rules_for(config),
            look_every_s=config.rollouts.look_every_s,
            hears=lambda: self._session.is_listening,
        )
        self.renewal = Renewal(config.state_dir)
        self.full_model = FullModelWorker(self.store, models, on_answered=self.outbox.hint)
        reader = Reader(
            prefix,
            holdout_share=config.hub.holdout_share,
            max_payload_bytes=config.hub.max_payload_bytes,
            shapes=lambda: shapes,
        )
        self.ingest = Ingest(
            self.store,
            reader,
            self._session.publish,
            prefix=prefix,
            on_cases=self.full_model.wake,
            on_online=self._came_online,
            on_updates=self.coordinator.wake,
            on_swaps=self.rollouts.wake,
            on_base_request=self.coordinator.ask_for_base,
        )
        self.service = Service(
            self.store,
            models,
            vitals=self.vitals,
            problems=self.problems,
            on_labelled=lambda device: self.outbox.hint([device]),
            on_series=self.coordinator.wake,
            rollouts=RolloutParts(is_signed_in(config.state_dir), rules_for(config), self.rollouts.wake),
        )
        self.http_port = 0

    def _greet(self) -> None:
        # Goes out behind the subscriptions on the same connection: whoever answers is heard.
        self.outbox.greet()
        self.coordinator.connected()
        self.rollouts.connected()

    def _came_online(self, devices: frozenset[str]) -> None:
        self.outbox.hint(devices)
        self.coordinator.came_online(devices)
        self.rollouts.came_online(devices)

    async def start(self) -> None:
        """Open the store, start every part. The broker may be away: the session waits for it.

        Raises:
            HubError: when the store, the credentials, the certificate or the REST address cannot be had.
        """
        http = self._config.http
        certificate = certificate_of(http)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.store.open)
        try:
            self.http_port = await self.service.start(http.host, http.port, certificate)
            self.full_model.start()
            self.outbox.start()
            self.coordinator.start()
            self.rollouts.start()
            self.renewal.start()
            self.ingest.start()
            try:
                self._session.start()
            except BrokerConfigError as error:
                raise ConfigError(f"broker: {error}") from error
        except BaseException:
            await self.stop()
            raise
        log.info("hub started http=%s:%d", self._config.http.host, self.http_port)

    async def stop(self) -> None:
        """Drain: take nothing more, commit and acknowledge what was taken, then close."""
        await self.service.stop()
        await asyncio.get_running_loop().run_in_executor(None, self._stop_threads)
        log.info("hub stopped")

    def vitals(self) -> Vitals:
        """What the running hub knows of itself."""
        return Vitals(
            broker_up=self._session.is_up,
            intake_waiting=self.ingest.waiting,
            not_taken=self.ingest.not_taken,
            acks_latency_s=self.ingest.latencies.quantiles(),
            verdicts_sent=self.outbox.verdicts_sent,
            ready=not self.problems(),
        )

    def problems(self) -> list[str]:
        """Why the hub cannot do its work, a sentence each; empty when it can."""
        found = []
        if not self._session.is_listening:
            found.append(f"broker: {self._session.problem or 'connecting'}")
        store_problem = self.ingest.problem or self.store.database.problem
        if store_problem is not None:
            found.append(str(store_problem))
        if self.renewal.problem is not None:
            found.append(self.renewal.problem)
        found += [
            f"thread {name} has ended"
            for name, part in (
                ("ingest", self.ingest),
                ("full-model", self.full_model),
                ("outbox", self.outbox),
                ("coordinator", self.coordinator),
                ("rollouts", self.rollouts),
                ("renewal", self.renewal),
            )
            if not part.is_alive
        ]
        return found

    def _receive(self, incoming: Incoming) -> None:
        self.ingest.offer(incoming)

    def _make_candidate(
        self, series_id: int, model: str, base_digest: bytes, weights: Weights, lineage: Lineage
    ) -> CandidateOutcome:
        return self._candidates.make(series_id, model, base_digest, weights, lineage)

    def _train_hub(
        self,
        model: str,
        base: Weights,
        schedule: Schedule,
        *,
        max_examples: int,
        soft_share: float,
        seed: int,
    ) -> HubVote | None:
        return self._candidates.train(
            model, base, schedule, max_examples=max_examples, soft_share=soft_share, seed=seed
        )

    @cached_property
    def _candidates(self) -> SeriesCandidates:
        # Only a hub whose rounds came so far pays for the builder's memory.
        from cloud_hub.candidates.series import SeriesCandidates

        return SeriesCandidates(self.store, self._config.state_dir, self._models)

    @cached_property
    def _evidence(self) -> Evidence:
        # Only a hub with a rollout pays for the bundles that it compares.
        from cloud_hub.rollouts.evidence import StoreEvidence

        return StoreEvidence(self.store, self._config.state_dir, self._models)

    def _stop_threads(self) -> None:
        drain_s = self._config.hub.drain_s
        self.ingest.stop(drain_s)
        self.full_model.stop(drain_s)
        self.outbox.stop(drain_s)
        self.coordinator.stop(drain_s)
        self.rollouts.stop(drain_s)
        self.renewal.stop(drain_s)
        self._session.stop()
        self.store.close()


async def run(config: Config) -> None:
    """Run a hub until SIGTERM or SIGINT.

    Raises:
        HubError: when it cannot start.
    """
    models = load_models(config)
    hub = Hub(config, models)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await hub.start()
    notify("READY=1")
    watchdog = asyncio.create_task(_feed_watchdog())
    try:
        await stop.wait()
        notify("STOPPING=1")
        log.info("stopping: no more is taken")
    finally:
        watchdog.cancel()
        await hub.stop()


async def _feed_watchdog() -> None:
    # From the event loop: a loop that stands still is what the watchdog is there to find.
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
