"""The composition root: puts the device together, starts it, takes it down without losing anything."""

from __future__ import annotations

import logging
import os
import random
from concurrent.futures import Future
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_cascade.bundle import Bundle
from edge_cascade.messages import (
    BOOT_BYTES,
    Case,
    DesiredState,
    Report,
    RoundOffer,
    RunningModel,
    TrainingBase,
    Verdict,
)
from edge_daemon import __version__
from edge_daemon.client_secret import client_secret
from edge_daemon.clock import SystemClock
from edge_daemon.config import Config
from edge_daemon.core.spooling import case_item, report_item
from edge_daemon.http_api import Health
from edge_daemon.inference import InferenceThread, Observe
from edge_daemon.inlet.labels import LabelInlet
from edge_daemon.inlet.mqtt import MqttInlet
from edge_daemon.inlet.queue import Queued, SampleQueue
from edge_daemon.installer import Installer
from edge_daemon.lull import Lull
from edge_daemon.metrics import Metrics
from edge_daemon.models import Numbering, open_ladder, open_pipelines, open_sources
from edge_daemon.past_life import note_start, note_stop, read_machine_boot
from edge_daemon.pipeline import Outcome, Pipeline, Sample
from edge_daemon.ports import Clock
from edge_daemon.results import Results
from edge_daemon.sensors import read_milli_celsius, read_rss_bytes
from edge_daemon.spool import SqliteSpool
from edge_daemon.stopping import stop_together
from edge_daemon.uplink import MqttUplink
from edge_daemon.watched import watch_parts

if TYPE_CHECKING:
    from edge_daemon.example_store import ExampleStore
    from edge_daemon.personal import Personal
    from edge_daemon.releases.swapper import Swapper
    from edge_daemon.releases.wiring import BoardReleases
    from edge_daemon.shadow import Shadow
    from edge_daemon.training.follower import Follower

log = logging.getLogger(__name__)

STUCK_S: Final = 10.0
"""A sample that takes longer is stuck: health fails and the watchdog is no longer fed."""

WORKERS_STOP_S: Final = 5.0
UPLINK_STOP_S: Final = 6.0
CLOSE_S: Final = 5.0
GOODBYE_S: Final = 3.0
"""What each step of a stop may take beside `device.drain_s` if all hangs; below TimeoutStopSec together."""

SPOOL_FILE: Final = "spool.sqlite"


class Daemon:
    """One device; `start` and `stop` are called once each, between them it runs on threads of its own."""

    def __init__(
        self, config: Config, *, clock: Clock | None = None, rng: random.Random | None = None
    ) -> None:
        """Read the bundles and open the runtimes; nothing runs yet.

        Raises:
            ModelError: naming the bundle and what is wrong with it.
        """
        self._config = config
        self._clock = clock or SystemClock()
        self.boot = os.urandom(BOOT_BYTES)
        numbering = Numbering(self.boot, count().__next__)
        self._next_seq = numbering.next_seq
        client_id = f"{config.device.id}-{client_secret(Path(config.device.state_dir))}"
        self.metrics = Metrics()
        self._lull = Lull()
        rng = rng or random.SystemRandom()
        self._numbering = numbering
        self._releases = releases = self._open_releases()
        self._pipelines = open_pipelines(
            config.models,
            config.audit,
            numbering,
            rng=rng,
            now_s=self._clock.monotonic_s,
            in_place_of=lambda bundle: None if releases is None else releases.live_in_place_of(bundle),
        )
        self._model_configs = dict(zip(self._pipelines, config.models, strict=True))
        self.personal = self._make_personal()
        self.examples = self._make_examples(rng)
        self.queue = SampleQueue(config.inlet.queue_size, self._shed)
        self._inlet = MqttInlet(
            config.inlet.broker,
            f"{client_id}-inlet",
            open_sources(config.inlet.sources, self._bundles()),
            self.queue,
            max_payload_bytes=config.inlet.max_payload_bytes,
            on_malformed=self.metrics.malformed.add,
            labels=None if self.examples is None else self._labels_for(self.examples),
            now_s=self._clock.monotonic_s,
            now_ms=self._clock.wall_ms,
        )
        self._results = Results(
            self._inlet.session,
            config.results.prefix,
            config.results.qos,
            {name: pipeline.bundle.graph.labels for name, pipeline in self._pipelines.items()},
        )
        self._spool: SqliteSpool | None = None
        self.uplink: MqttUplink | None = None
        if config.hub.enabled:
            path = Path(config.device.state_dir) / SPOOL_FILE
            self._spool = SqliteSpool(path, config.spool_limits, self._clock)
            self.uplink = MqttUplink(
                config.hub,
                config.device.id,
                self.boot,
                self._spool,
                self._pass_on,
                self.running_models,
                client_id=f"{client_id}-uplink",
                clock=self._clock,
                daemon_version=__version__,
                on_desired=None if releases is None else self._hear_desired,
                on_round=None if self.examples is None else self._hear_round,
            )
        self.follower = self._make_follower()
        self.shadow = None if releases is None else self._make_shadow(rng)
        self._inference = InferenceThread(
            self._pipelines,
            self.queue,
            publish=self._publish,
            submit=self._submit,
            tally=self,
            on_failed=self._count_failed,
            observe=self._observers(),
            lull=self._lull,
        )
        self._installer = Installer(
            self._pipelines,
            self._inference,
            self._model_configs,
            numbering,
            self._clock,
            pause=self._lull.wait,
        )
        self.swapper = None if releases is None else self._make_swapper(releases)
        self._crashes = 0
        self._started_s = self._clock.monotonic_s()
        self._watch()

    def start(self) -> None:
        """Open the spool and start every thread; neither a broker nor the hub needs to be there.

        Raises:
            SpoolError: when the spool cannot be opened at all.
            BrokerConfigError: for credentials that cannot be read.
        """
        self._crashes = int(note_start(Path(self._config.device.state_dir), read_machine_boot()))
        self._started_s = self._clock.monotonic_s()
        if self._spool is not None:
            self._spool.open()
        if self.examples is not None:
            self.examples.open()
        self._inference.start()
        if self.follower is not None:
            self.follower.start()
        if self.swapper is not None:
            self.swapper.start()
        if self.shadow is not None:
            self.shadow.start()
        if self.personal is not None:
            self.personal.start()
        if self.uplink is not None:
            self.uplink.start()
        self._inlet.session.start()

    def stop(self) -> None:
        """Answer what is queued, commit and send what fits into `device.drain_s`, say goodbye.

        Messages that come meanwhile stay unacknowledged: the broker has them for the next start.
        """
        deadline_s = self._clock.monotonic_s() + self._config.device.drain_s
        self._inlet.pause()
        # Frees the processor for what is still to be answered; meanwhile it is.
        workers = (self.swapper, self.follower, self.personal, self.shadow)
        stop_together([each.stop for each in workers if each is not None], WORKERS_STOP_S)
        if not self._inference.stop(self._config.device.drain_s):
            log.warning("stopped with unanswered samples left=%d", len(self.queue))
        if self.uplink is not None:
            rest_s = max(deadline_s - self._clock.monotonic_s(), 0.0)
            stop_together([partial(self.uplink.stop, rest_s)], rest_s + UPLINK_STOP_S)
        # Commits what is open; the acknowledgements that this frees still go out below.
        kept = (self._spool, self.examples)
        stop_together([each.close for each in kept if each is not None], CLOSE_S)
        self._inlet.session.stop(GOODBYE_S)
        note_stop(Path(self._config.device.state_dir))

    def is_alive(self) -> bool:
        """Whether samples are answered, or could be: nothing outside this board can make it False."""
        return self._inference.is_alive and self._inference.stuck_s() < STUCK_S

    def health(self) -> Health:
        """Whether the device does all of its work, and what keeps it from that."""
        problems = []
        if not self.is_alive():
            problems.append("a sample is stuck")
        if not self._inlet.session.is_up:
            problems.append(f"sensors' broker: {self._inlet.session.problem or 'connecting'}")
        if self.uplink is not None and not self.uplink.is_up:
            problems.append(f"hub's broker: {self.uplink.problem or 'connecting'}")
        if self._releases is not None and self._releases.problem:
            problems.append(f"releases: {self._releases.problem}")
        return Health(ready=not problems, problems=tuple(problems))

    def spooled_rows(self) -> int:
        """Rows that the hub has not acknowledged yet."""
        return 0 if self._spool is None else self._spool.counts().rows

    def report(self) -> None:
        """Queue the counters for the hub."""
        if self._spool is None:
            return
        message = Report(
            device=self._config.device.id,
            boot=self.boot,
            seq=self._next_seq(),
            taken_at_ms=self._clock.wall_ms(),
            counters=self.metrics.snapshot(),
        )
        self._spool.append(report_item(message))

    def running_models(self) -> list[RunningModel]:
        """What this board serves, as its status says it."""
        return [
            RunningModel(
                name,
                bytes.fromhex(pipeline.bundle.bundle_id),
                pipeline.ladder.plan.name,
                pipeline.ladder.point,
                takes_releases=self.swapper is not None,
            )
            for name, pipeline in self._pipelines.items()
        ]

    def learning_models(self) -> list[str]:
        """The models that take part in rounds."""
        return [] if self.follower is None else self.follower.models

    def count_outcome(self, pipeline: Pipeline, outcome: Outcome) -> None:
        """Count one sample (on the inference thread)."""
        metrics, model = self.metrics, pipeline.bundle.graph.model
        if outcome.answer is None or (outcome.climb is not None and outcome.climb.failed):
            metrics.failed.add(model)
        answer = outcome.answer
        if self.swapper is not None:
            is_failed = answer is None or (outcome.climb is not None and outcome.climb.failed)
            self.swapper.count(model, pipeline.bundle.bundle_id, is_failed=is_failed)
        if answer is not None:
            metrics.samples.add(model, str(answer.exit), answer.precision)
            metrics.latency.observe(model, answer.latency_us * 1e-6)
            if answer.uncertified:
                metrics.uncertified.add(model)
            if answer.deferred:
                metrics.deferred.add(model)
        if outcome.case is not None:
            if outcome.case.escalated:
                metrics.escalated.add(model)
            if outcome.case.audited:
                metrics.audited.add(model)

    def _count_failed(self, pipeline: Pipeline) -> None:
        model = pipeline.bundle.graph.model
        self.metrics.failed.add(model)
        if self.swapper is not None:
            self.swapper.count(model, pipeline.bundle.bundle_id, is_failed=True)

    def _publish(self, outcome: Outcome) -> None:
        if outcome.answer is not None:
            self._results.publish_answer(outcome.answer)

    def _submit(self, pipeline: Pipeline, case: Case) -> Future[None]:
        if self._spool is None:
            nowhere: Future[None] = Future()
            nowhere.set_result(None)
            return nowhere
        return self._spool.append(
            case_item(
                case,
                boot=self.boot,
                model=pipeline.bundle.graph.model,
                bundle=bytes.fromhex(pipeline.bundle.bundle_id),
                plan=pipeline.ladder.plan.name,
            )
        )

    def _pass_on(self, model: str, full_model: bytes, verdict: Verdict) -> None:
        self._results.publish_verdict(model, full_model, verdict)
        self.metrics.verdicts.add(model, verdict.source.name.lower())
        if self.examples is not None:
            self.examples.verdict(model, verdict)

    def _make_examples(self, rng: random.Random) -> ExampleStore | None:
        if not self._config.training.enabled:
            return None
        # Not at the top: boards that do not train need none of it.
        from edge_daemon.training.wiring import make_examples

        on_truth = None if self.personal is None else self.personal.hear_truth
        return make_examples(self._config, self._bundles(), self.boot, rng, on_truth)

    def _make_personal(self) -> Personal | None:
        if not self._config.training.enabled:
            return None
        from edge_daemon.training.wiring import make_personal

        return make_personal(
            self._config,
            self._model_configs,
            self._bundles(),
            self._install_heads,
            clock=self._clock,
            numbering=self._numbering,
            pause=self._lull.wait,
        )

    def _install_heads(self, bundle: Bundle) -> Future[Pipeline]:
        # The installer is made later than who uses this.
        return self._installer.install_heads(bundle)

    def _make_follower(self) -> Follower | None:
        if self.examples is None or self._spool is None or self.uplink is None:
            return None
        from edge_daemon.training.wiring import make_follower

        return make_follower(
            self._config,
            self._bundles(),
            self.examples,
            self._spool,
            self.uplink,
            metrics=self.metrics,
            clock=self._clock,
            numbering=self._numbering,
            waiting=lambda: len(self.queue),
            personal=self.personal,
        )

    def _bundles(self) -> dict[str, Bundle]:
        return {name: pipeline.bundle for name, pipeline in self._pipelines.items()}

    def _open_releases(self) -> BoardReleases | None:
        if not (self._config.releases.enabled and self._config.hub.enabled):
            return None
        # Not at the top: boards that take no releases need none of it.
        from edge_daemon.releases.wiring import BoardReleases

        return BoardReleases(self._config, self._clock, self._lull.wait)

    def _make_swapper(self, releases: BoardReleases) -> Swapper:
        from edge_daemon.releases.wiring import Reporter

        assert self._spool is not None
        return releases.make_swapper(
            self._bundles(),
            self._installer.install,
            Reporter(self._config.device.id, self.boot, self._next_seq, self._spool, self._clock),
            self._now_serving,
            lambda shadowing: None if self.shadow is None else self.shadow.hear(shadowing),
        )

    def _make_shadow(self, rng: random.Random) -> Shadow:
        from edge_daemon.shadow import Shadow, Surroundings

        assert self._spool is not None
        return Shadow(
            Surroundings(
                device=self._config.device.id,
                boot=self.boot,
                next_seq=self._next_seq,
                spool=self._spool,
                clock=self._clock,
                open_ladder=lambda bundle: open_ladder(
                    bundle, self._model_configs[bundle.graph.model], pause=self._lull.wait
                ),
                pause=self._lull.wait,
            ),
            lambda model: self._pipelines[model].bundle,
            max_cases_per_hour=self._config.releases.max_shadow_per_hour,
            rng=random.Random(rng.random()),  # noqa: S311 - no secret
        )

    def _observers(self) -> Observe | None:
        """Whoever looks at answered samples, as one."""
        looks: list[Observe] = [] if self.examples is None else [self.examples.observe]
        if self.shadow is not None:
            looks.append(self._shadow_shared)
        if len(looks) < 2:
            return looks[0] if looks else None

        def observe(model: str, sample: Sample, outcome: Outcome) -> None:
            for look in looks:
                look(model, sample, outcome)

        return observe

    def _shadow_shared(self, model: str, sample: Sample, outcome: Outcome) -> None:
        # On the inference thread, which alone changes pipelines: this is the one that answered.
        if self.shadow is not None and not self._pipelines[model].is_personal:
            self.shadow.observe(model, sample, outcome)

    def _now_serving(self, bundle: Bundle) -> None:
        if self.personal is not None:
            self.personal.take_bundle(bundle)
        if self.follower is not None:
            self.follower.take_bundle(bundle)
        if self.uplink is not None:
            self.uplink.announce()

    def _hear_desired(self, message: DesiredState) -> None:
        asked = {each.model: each.audit_ppm for each in message.models}
        for name, pipeline in self._pipelines.items():
            pipeline.coin.raise_to(asked.get(name, 0) / 1e6)
        if self.personal is not None:
            self.personal.hear(message)
        if self.swapper is not None:
            self.swapper.hear(message)

    def _hear_round(self, message: RoundOffer | TrainingBase | None) -> None:
        if self.follower is not None:
            self.follower.hear(message)

    def _labels_for(self, examples: ExampleStore) -> LabelInlet:
        prefix = self._config.training.labels_prefix
        return LabelInlet(prefix, examples.label, self.metrics.malformed.add)

    def _shed(self, item: Queued) -> None:
        self.metrics.shed.add("queue_full")
        item.ticket.finish()

    def _watch(self) -> None:
        metrics = self.metrics
        if self._spool is not None:
            metrics.watch_spool(self._spool.counts)
        if self.uplink is not None:
            metrics.watch_uplink(self.uplink.counters)
        if self.examples is not None:
            metrics.watch_examples(self.examples.counts)
        watch_parts(
            metrics,
            follower=self.follower,
            swapper=self.swapper,
            releases=self._releases,
            shadow=self.shadow,
            personal=self.personal,
        )
        metrics.watch(
            "running_s",
            "Seconds since the start.",
            lambda: round(self._clock.monotonic_s() - self._started_s),
            is_total=False,
        )
        metrics.watch(
            "rss_bytes",
            "Memory of the daemon that is resident, without that of a bundle that is only compared.",
            lambda: read_rss_bytes() - (0 if self.shadow is None else self.shadow.held_bytes),
            is_total=False,
        )
        metrics.watch("celsius_milli", "Of the hottest sensor.", read_milli_celsius, is_total=False)
        metrics.watch(
            "crashes", "1 if this start followed a crash, else 0.", lambda: self._crashes, is_total=False
        )
        metrics.watch("queue_depth", "Samples that wait.", lambda: len(self.queue), is_total=False)
        metrics.watch(
            "results_unpublished", "Answers that no broker took.", lambda: self._results.unpublished
        )
