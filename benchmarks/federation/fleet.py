"""One simulated fleet: rounds of federated averaging by the project's own parts, in one process and without MQTT.

A round goes the way that it goes in the field. Cohort by `select_cohort`; training by `training.train` on the
network's train step; `make_update` of the board for clipping, noise, error feedback and encoding; the hub
decodes, screens, combines, and makes the next base by the step that it sends. Bytes are those of whole frames,
chunks included. What is not there: the broker, the spool, the store, time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from benchmarks.federation.attacks import ATTACKS, Delta, Honest
from benchmarks.federation.learner import Labelled, learner_of
from cloud_hub.builder.networks.network import Network
from cloud_hub.core.federation.aggregation import AggregationError
from cloud_hub.core.federation.cohort import NEVER, Eligible, select_cohort
from cloud_hub.core.federation.drift import Losses, bounded_losses, decide_drift
from cloud_hub.core.federation.guard import Kept, decide_guard, is_better
from cloud_hub.core.federation.screening import Accepted, RoundSpec, Verdict, screen_cohort
from cloud_hub.core.federation.server import ServerState
from cloud_hub.core.federation.standing import Standing, next_standing
from cloud_hub.core.federation.strategies import Outcome
from cloud_hub.core.federation.update import Layout, Update
from cloud_hub.federation.closing import HUB
from cloud_hub.federation.evaluation import group_losses
from cloud_hub.federation.settings import (
    SeriesSettings,
    guard_rules_of,
    norm_rule_of,
    schedule_of,
    strategy_of,
    terms_of,
)
from edge_cascade.codec import encode, split_frame
from edge_cascade.deltas import decode_delta, encode_delta
from edge_cascade.errors import TrainingError
from edge_cascade.messages import ClientUpdate, Message, RoundOffer, RoundTerms, TrainingBase
from edge_cascade.round_terms import encode_terms
from edge_cascade.training import Examples, train
from edge_cascade.weights import (
    FROM_ZEROS,
    FloatArray,
    Weights,
    difference,
    moved,
    shapes_of,
    size_bytes_of,
    weights_digest,
)
from edge_daemon.training.updates import make_update

_MODEL: Final = "benchmark"
_GRAPH: Final = bytes(32)
_BOOT: Final = bytes(8)
_SIGNATURE: Final = bytes(64)


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """What a run starts from. `uploaded`: what the hub has to learn from, where it votes too."""

    network: Network
    start: Weights
    devices: tuple[Examples, ...]
    test: Labelled
    holdout: Labelled | None = None
    uploaded: Examples | None = None


@dataclass(frozen=True, slots=True)
class Manner:
    """What differs from a fleet in the field.

    `attack` (of `ATTACKS`) by the first devices, a share `attackers` of all. `forgets`: no error feedback.
    `uniform`: cohorts are drawn uniformly.
    """

    attack: str | None = None
    attackers: float = 0.2
    screened: bool = True
    guarded: bool = False
    forgets: bool = False
    uniform: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One round: bytes up and down, means over the devices asked, and what became of it."""

    up_bytes: float
    down_bytes: float
    counted: int
    rejected: dict[str, int]
    ended: str
    """`committed`, `rolled back` by the guard, or `lost`: no result."""


@dataclass(frozen=True, slots=True)
class Run:
    """Accuracy on the test part before the first round and after each, and each round's turn."""

    accuracies: tuple[float, ...]
    turns: tuple[Turn, ...]
    holdout: tuple[float, float] | None = None
    """Accuracy on the holdout, before and after all rounds."""
    served: float | None = None
    """On the test part, of what would be served: the last base where the holdout says better, else the start."""

    @property
    def final(self) -> float:
        """After the last round."""
        return self.accuracies[-1]

    @property
    def settled(self) -> float:
        """Mean over the last five rounds."""
        return float(np.mean(self.accuracies[-5:]))

    @property
    def up_bytes(self) -> float:
        """A device and round."""
        return float(np.mean([turn.up_bytes for turn in self.turns]))

    @property
    def down_bytes(self) -> float:
        """A device and round."""
        return float(np.mean([turn.down_bytes for turn in self.turns]))

    def rounds_to(self, accuracy: float) -> int | None:
        """The first round after which the test part is answered so well; None if there is none."""
        reached = [number for number, value in enumerate(self.accuracies) if number and value >= accuracy]
        return min(reached, default=None)

    def ended(self, how: str) -> int:
        """How many rounds ended so."""
        return sum(turn.ended == how for turn in self.turns)


@dataclass(slots=True, eq=False)
class _Device:
    """What the simulation keeps of one board. `holds`: which base, counted from 0."""

    name: str
    residual: Weights = field(default_factory=dict)
    standing: Standing = field(default_factory=Standing)
    last_round: int = NEVER
    holds: int = 0
    heads: Weights = field(default_factory=dict)
    first: Weights | None = None


class FleetRun:
    """A fleet in the middle of its rounds. `weights` is the training base of the next one."""

    def __init__(
        self,
        network: Network,
        start: Weights,
        devices: int,
        settings: SeriesSettings,
        *,
        seed: int,
        manner: Manner = Manner(),
        holdout: Labelled | None = None,
    ) -> None:
        self.weights: dict[str, FloatArray] = dict(start)
        self._learner = learner_of(network)
        self._settings = settings
        self._manner = manner
        self._holdout = holdout
        self._best: Losses | None = None
        self._seed = seed
        self._rng = np.random.default_rng((seed, 1))
        self._devices = [_Device(f"device-{index:05}") for index in range(devices)]
        self._liars = round(manner.attackers * devices) if manner.attack else 0
        self._state = ServerState()
        self._round = 0
        self._steps: list[int] = []
        self._whole_bytes = len(encode_delta(self.weights, "fp32"))

    def turn(self, examples: Sequence[Examples], uploaded: Examples | None = None) -> Turn:
        """One round, in which device i has `examples[i]` to learn from, and the hub `uploaded`."""
        digest = weights_digest(self.weights)
        terms = terms_of(
            self._settings,
            _MODEL,
            f"round-{self._round}",
            graph=_GRAPH,
            base=digest,
            base_bytes=size_bytes_of(shapes_of(self.weights)),
        )
        up, down, updates = [], [], []
        asked = self._cohort()
        for index in asked:
            device = self._devices[index]
            down.append(self._send_base(device, terms))
            made = self._learn(index, examples[index], terms)
            if made is not None:
                update, frame_bytes = made
                up.append(frame_bytes)
                updates.append(update)
        if uploaded is not None and self._settings.include_hub and len(uploaded):
            updates.append(self._own_vote(uploaded, digest))
        verdicts = self._screened(updates, digest)
        outcome = self._combined(verdicts)
        ended = self._conclude(outcome)
        rejected = Counter(each.reason.value for each in verdicts if not isinstance(each, Accepted))
        self._round += 1
        shares = max(len(asked), 1)
        return Turn(
            sum(up) / shares, sum(down) / shares, outcome.votes if outcome else 0, dict(rejected), ended
        )

    @property
    def _shared(self) -> dict[str, FloatArray]:
        """What travels: all weights, but for heads that stay on the devices."""
        kept = set(self._learner.head_parameters) if self._settings.private_heads else set()
        return {name: array for name, array in self.weights.items() if name not in kept}

    def heads(self, index: int) -> Weights:
        """The private heads of a device, none before its first round."""
        return self._devices[index].heads

    def _cohort(self) -> list[int]:
        eligible = [
            Eligible(device.name, online=True, graph_matches=True, standing=device.standing, last_round=device.last_round)
            for device in self._devices
        ]  # fmt: skip
        size = min(self._settings.cohort, len(eligible))
        if self._manner.uniform:
            return sorted(int(index) for index in self._rng.choice(len(eligible), size, replace=False))
        names = set(select_cohort(eligible, size, self._rng, round_number=self._round))
        chosen = [index for index, device in enumerate(self._devices) if device.name in names]
        for index in chosen:
            self._devices[index].last_round = self._round
        return chosen

    def _send_base(self, device: _Device, terms: RoundTerms) -> int:
        """Bytes of the offer and of the steps that the device has missed; the whole where that is shorter."""
        steps = self._steps[device.holds :]
        device.holds = len(self._steps)
        if sum(steps) >= self._whole_bytes:
            steps = [self._whole_bytes]
        size = _frame_bytes(RoundOffer(encode_terms(terms), _SIGNATURE, 3600))
        if steps:
            base = TrainingBase(_MODEL, terms.training_base, FROM_ZEROS, [bytes(1)])
            # The steps are deflated already: what is sent is their length and a little around it.
            size += len(encode(base)) + sum(steps)
        return size

    def _learn(self, index: int, examples: Examples, terms: RoundTerms) -> tuple[Update, int] | None:
        """A device's update as the hub decodes it, and the bytes it took; None when it learned nothing."""
        if len(examples) < self._settings.min_examples:
            return None
        device = self._devices[index]
        rng = np.random.default_rng((self._seed, 2, self._round, index))
        base = {**self.weights, **device.heads}
        try:
            trained = train(self._learner.step, base, examples, schedule_of(self._settings), rng=rng).weights
        except TrainingError:
            return None
        if index < self._liars:
            update = Update(device.name, len(examples), terms.training_base, self._lie(device, trained, rng))
            return update, 0
        made = make_update(
            base,
            trained,
            terms,
            residual=device.residual,
            head_parameters=self._learner.head_parameters,
            noise=np.random.default_rng((self._seed, 3, self._round, index)),
        )
        if made.residual is not None and not self._manner.forgets:
            device.residual = made.residual
        device.heads = made.heads
        message = ClientUpdate(
            device.name,
            _BOOT,
            self._round,
            _MODEL,
            terms.round_id,
            terms.training_base,
            len(examples),
            terms.encoding,
            made.delta,
        )
        delta = self._decoded(made.delta)
        return Update(device.name, len(examples), terms.training_base, delta), _frame_bytes(message)

    def _lie(self, device: _Device, trained: Weights, rng: np.random.Generator) -> Delta:
        now = difference(trained, self.weights)
        if device.first is None:
            device.first = now
        assert self._manner.attack is not None, "only then is there a liar"
        return ATTACKS[self._manner.attack](Honest(now, device.first, rng))

    def _own_vote(self, uploaded: Examples, digest: bytes) -> Update:
        """What the hub learns by the same loop from what was uploaded."""
        rng = np.random.default_rng((self._seed, 4, self._round))
        trained = train(self._learner.step, self.weights, uploaded, schedule_of(self._settings), rng=rng)
        return Update(HUB, len(uploaded), digest, difference(trained.weights, self.weights))

    def _screened(self, updates: Sequence[Update], digest: bytes) -> list[Verdict]:
        if not self._manner.screened:
            return [Accepted(update, 0.0, 0) for update in updates]
        spec = RoundSpec(
            digest,
            Layout.of(self._shared),
            self._settings.max_examples,
            norm_rule_of(self._settings),
        )
        verdicts = list(screen_cohort(lambda: updates, spec))
        known = {device.name: device for device in self._devices}
        for update, verdict in zip(updates, verdicts, strict=True):
            if device := known.get(update.device):
                device.standing = next_standing(device.standing, verdict, round_number=self._round)
        return verdicts

    def _combined(self, verdicts: Sequence[Verdict]) -> Outcome | None:
        """None where there is no result: no vote, or numbers that left the range."""
        round_ = strategy_of(self._settings).begin(self._shared)
        try:
            with np.errstate(invalid="ignore"):
                for verdict in verdicts:
                    if isinstance(verdict, Accepted):
                        round_.add(verdict)
                return round_.finish(self._state)
        except AggregationError:
            return None

    def _conclude(self, outcome: Outcome | None) -> str:
        """The next base, which is what boards reach by the step that they are sent."""
        if outcome is None:
            return "lost"
        step = encode_delta(difference(outcome.weights, self._shared), self._settings.base_encoding)
        following = {**self.weights, **moved(self._shared, self._decoded(step))}
        if self._manner.guarded and not self._is_kept(following):
            return "rolled back"
        self.weights, self._state = following, outcome.state
        self._steps.append(len(step))
        return "committed"

    def _is_kept(self, following: Weights) -> bool:
        """What cannot be judged is not kept, as in the hub."""
        assert self._holdout is not None, "a guard needs a holdout"
        before, after = (
            self._learner.labels(weights, self._holdout.x) for weights in (self.weights, following)
        )
        rules = guard_rules_of(self._settings)
        if self._best is None:
            self._best = self._losses(self.weights)
        losses = self._losses(following)
        is_kept = (
            isinstance(decide_guard(before, after, self._holdout.y, rules), Kept)
            and decide_drift(self._best, losses, max_drift=rules.max_drift) is None
        )
        if is_kept and losses.mean() <= self._best.mean():
            self._best = losses
        return is_kept

    def _losses(self, weights: Weights) -> Losses:
        assert self._holdout is not None
        network = self._learner.network
        examples = self._holdout.examples(network.classes)
        found = group_losses(self._learner.step, weights, examples)
        return bounded_losses(found, len(network.stages))

    def _decoded(self, delta: bytes) -> dict[str, FloatArray]:
        shapes = shapes_of(self._shared)
        return decode_delta(delta, shapes, max_bytes=size_bytes_of(shapes))


def run_fleet(
    fleet: Fleet,
    settings: SeriesSettings,
    *,
    seed: int,
    manner: Manner = Manner(),
) -> Run:
    """All rounds of a series, with the same examples in each."""
    learner = learner_of(fleet.network)
    run = FleetRun(
        fleet.network,
        fleet.start,
        len(fleet.devices),
        settings,
        seed=seed,
        manner=manner,
        holdout=fleet.holdout,
    )
    accuracies, turns = [learner.accuracy(run.weights, fleet.test)], []
    for _ in range(settings.rounds):
        turns.append(run.turn(fleet.devices, fleet.uploaded))
        accuracies.append(learner.accuracy(run.weights, fleet.test))
    if fleet.holdout is None:
        return Run(tuple(accuracies), tuple(turns))
    truth = fleet.holdout.y
    before, after = (learner.labels(weights, fleet.holdout.x) for weights in (fleet.start, run.weights))
    served = accuracies[-1 if is_better(before, after, truth, guard_rules_of(settings)) else 0]
    holdout = (float((before[-1] == truth).mean()), float((after[-1] == truth).mean()))
    return Run(tuple(accuracies), tuple(turns), holdout, served)


def _frame_bytes(message: Message) -> int:
    """Of the frame, or of the chunks that it travels in."""
    return sum(len(part) for part in split_frame(encode(message)))
