"""The thread that follows rounds: hears of offers, does what `core.rounds` asks for. In no answer's way.

It owns the learners' state and files. Others only put what they have heard into its inbox: the uplink (offers
and bases), the spool (what became of an update), the child that trains (that it has ended). One model trains
at a time. Whatever fails here is counted and said once; nothing of it reaches the answering of samples.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final, assert_never

from edge_cascade.bundle import Bundle
from edge_cascade.burst import Burst
from edge_cascade.durable import crash_point
from edge_cascade.errors import ProtocolError
from edge_cascade.messages import RoundOffer, RoundTerms, TrainingBase
from edge_daemon.core.rounds import RoundLimits, RoundsState, next_due_s, next_state
from edge_daemon.core.rounds_events import (
    AppendUpdate,
    BaseArrived,
    BaseFailed,
    Cleared,
    Declined,
    Effect,
    Event,
    Note,
    Offered,
    Phase,
    RequestBase,
    StartTraining,
    StopTraining,
    Survey,
    Surveyed,
    Tick,
    TrainingDone,
    TrainingFailed,
)
from edge_daemon.core.spooling import DropReason
from edge_daemon.core.vitals import Vitals, VitalsLimits, decide_may_train
from edge_daemon.training.child import EXIT_DIVERGED
from edge_daemon.training.delivery import Delivery
from edge_daemon.training.inbox import (
    Appended,
    FromHub,
    Gone,
    Inbox,
    Stop,
    Surroundings,
    Swapped,
)
from edge_daemon.training.learner import CostLimits, Finished, Learner
from edge_daemon.training.offers import Refused, read_offer
from edge_daemon.training.runner import ChildEnded, Runner
from edge_daemon.training.supervisor import outcome_of
from edge_daemon.training.targets import least_origin

log = logging.getLogger(__name__)

LONGEST_SLEEP_S: Final = 60.0
STOP_S: Final = 5.0
MAX_WAITING: Final = 64
"""What the hub sends beyond this many unread messages is forgotten: an offer comes again."""


class Follower:
    """Takes part in rounds; `start` and `stop` are called once each."""

    def __init__(
        self,
        device: str,
        bundles: Mapping[str, Bundle],
        directory: Path,
        around: Surroundings,
        *,
        hub_key: bytes,
        vitals: VitalsLimits,
        rounds: RoundLimits,
        costs: CostLimits,
        rng: random.Random | None = None,
    ) -> None:
        """`bundles`: what runs, by model; `directory`: where rounds are kept."""
        self._bundles = dict(bundles)
        self._around = around
        self._hub_key = hub_key
        self._vitals = vitals
        self._limits = rounds
        self._costs = costs
        # Spreads load, guards nothing.
        self._rng = rng or random.Random()  # noqa: S311
        self._learners = {
            model: Learner(bundle, device, directory)
            for model, bundle in bundles.items()
            if bundle.train_step is not None
        }
        self._inbox: queue.SimpleQueue[Inbox] = queue.SimpleQueue()
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._runner = Runner(around.launch, self._inbox.put)
        self._delivery = Delivery(around, self._inbox.put)
        self._wanted_bases: dict[str, bytes] = {}
        self._refusals = Burst()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)

    # --- any thread ----------------------------------------------------------------------------------------

    @property
    def models(self) -> list[str]:
        """Those that can learn."""
        return list(self._learners)

    def start(self) -> None:
        """Begin to follow; the spool is open by now."""
        self._around.spool.on_update_gone(self._update_gone)
        self._thread.start()

    def stop(self) -> None:
        """End the training that runs, at once, and the thread."""
        self._is_stopping = True
        self._runner.kill()
        self._inbox.put(Stop())
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def hear(self, message: RoundOffer | TrainingBase | None) -> None:
        """What came on down/round: an offer, a base, or None for an offer that was cleared."""
        if isinstance(message, TrainingBase):
            # Large, so that only one is taken for each request.
            if self._wanted_bases.get(message.model) != message.training_base:
                return
            self._wanted_bases.pop(message.model, None)
        if self._waiting.acquire(blocking=False):
            self._inbox.put(FromHub(message))

    def take_bundle(self, bundle: Bundle) -> None:
        """Another bundle answers for its model."""
        self._inbox.put(Swapped(bundle))

    def damaged_files(self) -> int:
        """State files that were found damaged since the start."""
        return sum(learner.damaged for learner in self._learners.values())

    def _update_gone(self, boot: bytes, seq: int, reason: DropReason | None) -> None:
        self._inbox.put(Gone(boot, seq, reason))

    # --- the follower's thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        for learner in self._learners.values():
            self._load(learner)
        while not self._is_stopping:
            try:
                with contextlib.suppress(queue.Empty):
                    self._hear(self._inbox.get(timeout=self._sleep_s()))
                self._tick()
            except Exception:
                # A defect in one round must not end all that follow.
                log.exception("defect in the rounds")
                self._begin_anew()
        self._runner.stop()

    def _load(self, learner: Learner) -> None:
        try:
            learner.load()
            if (heads := learner.heads()) is not None:
                self._around.on_heads(learner.model, heads)
        except OSError as error:
            log.warning("rounds of %s start without their files: %s", learner.model, error)
        except Exception:
            # Nor must a defect in one model's files end all that follow.
            log.exception("defect in the files of rounds model=%s", learner.model)
        self._delivery.append_pending(learner)

    def _begin_anew(self) -> None:
        """Wait for the next offer, with what must not be forgotten."""
        self._runner.stop()
        for learner in self._learners.values():
            before = learner.rounds
            learner.rounds = RoundsState(voted=before.voted, failures=before.failures, starts=before.starts)

    def _sleep_s(self) -> float:
        due = [due_s for each in self._learners.values() if (due_s := next_due_s(each.rounds)) is not None]
        if not due:
            return LONGEST_SLEEP_S
        return min(max(min(due) - self._around.clock.monotonic_s(), 0.0), LONGEST_SLEEP_S)

    def _tick(self) -> None:
        now_s = self._around.clock.monotonic_s()
        for learner in self._learners.values():
            due_s = next_due_s(learner.rounds)
            if due_s is not None and due_s <= now_s and not self._is_stopping:
                self._feed(learner, Tick())

    def _hear(self, heard: Inbox) -> None:
        match heard:
            case FromHub(message):
                self._waiting.release()
                self._receive(message)
            case Gone():
                self._settle(heard)
            case Appended(model, problem):
                learner = self._learners[model]
                self._feed(learner, self._delivery.appended(learner, problem))
            case ChildEnded():
                self._ended(heard)
            case Swapped(bundle):
                self._swapped(bundle)
            case Stop():
                pass
            case _:
                assert_never(heard)

    def _swapped(self, bundle: Bundle) -> None:
        model = bundle.graph.model
        learner = self._learners.get(model)
        if learner is None:
            # No examples of it are kept either.
            self._bundles.pop(model, None)
            return
        self._bundles[model] = bundle
        if learner.bundle.graph_sha256 == bundle.graph_sha256:
            learner.take_bundle(bundle)
        elif bundle.train_step is not None:
            self._learn_another_graph(learner, bundle)
        else:
            self._feed(learner, Cleared())

    def _learn_another_graph(self, before: Learner, bundle: Bundle) -> None:
        """Begin anew with another graph: all but what this board has voted and still has to send."""
        training = self._runner.training
        if training is not None and training.learner is before:
            log.info("training stopped model=%s reason=another graph answers", before.model)
            self._runner.stop()
        self._wanted_bases.pop(before.model, None)
        self._learners[before.model] = before.for_graph_of(bundle)
        self._load(self._learners[before.model])

    def _receive(self, message: RoundOffer | TrainingBase | None) -> None:
        match message:
            case None:
                for learner in self._learners.values():
                    self._feed(learner, Cleared())
            case RoundOffer():
                self._offered(message)
            case TrainingBase():
                self._base_came(message)
            case _:
                assert_never(message)

    def _offered(self, offer: RoundOffer) -> None:
        now_s = self._around.clock.monotonic_s()
        terms = read_offer(offer, self._hub_key, self._bundles)
        metrics = self._around.metrics
        if isinstance(terms, Refused):
            metrics.rounds_declined.add(terms.model, terms.why.value)
            kept_back = self._refusals.note(now_s=now_s)
            if kept_back is not None:
                log.warning(
                    "offer of a round refused reason=%s kept_back=%d: %s",
                    terms.why.value,
                    kept_back,
                    terms.detail,
                )
            return
        metrics.rounds_offered.add(terms.model)
        learner = self._learners[terms.model]
        if learner.pending is not None and learner.pending.update.round_id != terms.round_id:
            # A damaged spool tells of nothing; this makes it tell in the end.
            self._delivery.append_pending(learner)
        # The load is that since the reading before.
        self._read_vitals()
        self._feed(learner, Offered(terms, offer.seconds_left))

    def _base_came(self, message: TrainingBase) -> None:
        learner = self._learners.get(message.model)
        if learner is None or learner.rounds.phase is not Phase.FETCHING or learner.rounds.offer is None:
            return
        terms = learner.rounds.offer.terms
        if message.training_base != terms.training_base:
            # The answer to a request of an earlier round.
            return
        self._around.metrics.base_bytes.add(learner.model, n=sum(map(len, message.steps)))
        try:
            learner.take_base(message, terms)
        except (ProtocolError, OSError) as error:
            self._feed(learner, BaseFailed(str(error)))
        else:
            self._feed(learner, BaseArrived())

    def _feed(self, learner: Learner, event: Event) -> None:
        """One event, and all that follows from it."""
        events = [event]
        while events:
            learner.rounds, effects = next_state(
                learner.rounds,
                events.pop(0),
                now_s=self._around.clock.monotonic_s(),
                limits=self._limits,
                rng=self._rng,
            )
            for effect in effects:
                events += self._do(learner, effect)

    def _do(self, learner: Learner, effect: Effect) -> list[Event]:
        match effect:
            case Survey(terms):
                return [self._survey(learner, terms)]
            case RequestBase(terms, from_zeros):
                self._wanted_bases[learner.model] = terms.training_base
                self._around.ask_for_base(learner.request_for(terms, from_zeros=from_zeros))
            case StartTraining():
                return self._start_training(learner, effect)
            case StopTraining(reason):
                log.info("training stopped model=%s reason=%s", learner.model, reason)
                self._runner.stop()
            case AppendUpdate():
                refused = self._delivery.append(learner)
                return [] if refused is None else [refused]
            case Note(why, detail):
                self._around.metrics.rounds_declined.add(learner.model, why.value)
                log.info("round not worked on model=%s reason=%s: %s", learner.model, why.value, detail)
            case _:
                assert_never(effect)
        return []

    # --- before training -----------------------------------------------------------------------------------

    def _survey(self, learner: Learner, terms: RoundTerms) -> Surveyed:
        examples = self._around.examples.counts().of(learner.model, least=least_origin(terms))
        return Surveyed(examples, self._obstacle(learner), learner.has_base(terms))

    def _obstacle(self, learner: Learner) -> str | None:
        training = self._runner.training
        vitals = self._read_vitals()
        if training is not None and training.learner is not learner:
            return f"{training.learner.model} is being trained"
        if training is None and learner.pending is not None:
            return f"the update of round {learner.pending.update.round_id} has not left the spool"
        return decide_may_train(vitals, self._vitals)

    def _read_vitals(self) -> Vitals:
        return self._around.read_vitals(self._runner.pid)

    def _start_training(self, learner: Learner, start: StartTraining) -> list[Event]:
        now_s = self._around.clock.monotonic_s()
        try:
            directory = learner.prepare(
                start.terms,
                self._around.examples,
                start.max_examples,
                seconds=start.ends_at_s - now_s,
                costs=self._costs,
            )
            self._runner.start(learner, start.terms, directory)
        except (ProtocolError, OSError) as error:
            return [self._failed(learner, str(error))]
        self._around.metrics.rounds_joined.add(learner.model)
        log.info("training model=%s round=%s", learner.model, start.terms.round_id)
        return []

    # --- after training ------------------------------------------------------------------------------------

    def _ended(self, ended: ChildEnded) -> None:
        training = self._runner.take_ended(ended)
        if training is None:
            return
        learner = training.learner
        outcome = outcome_of(training.directory, ended.code, training.terms)
        self._runner.remove(training)
        if isinstance(outcome, str):
            why = Declined.DIVERGED if ended.code == EXIT_DIVERGED else Declined.FAILED
            self._feed(learner, self._failed(learner, outcome, why))
            return
        crash_point("device.round-trained")
        metrics = self._around.metrics
        metrics.training_ms.add(learner.model, n=round(outcome.seconds * 1000))
        metrics.training_examples.add(learner.model, n=outcome.num_examples)
        log.info(
            "trained model=%s round=%s examples=%d loss=%.4g->%.4g seconds=%.1f%s",
            learner.model,
            training.terms.round_id,
            outcome.num_examples,
            outcome.first_loss,
            outcome.last_loss,
            outcome.seconds,
            f" not permitted: {', '.join(outcome.refused)}" if outcome.refused else "",
        )
        learner.finished = Finished(training.terms, outcome)
        self._feed(learner, TrainingDone())

    def _failed(self, learner: Learner, reason: str, why: Declined = Declined.FAILED) -> TrainingFailed:
        self._around.metrics.trainings_failed.add(learner.model)
        log.warning("training failed model=%s: %s", learner.model, reason)
        return TrainingFailed(reason, why)

    def _settle(self, gone: Gone) -> None:
        for learner in self._learners.values():
            settled = self._delivery.settle(learner, gone)
            if settled is not None:
                self._feed(learner, settled)
