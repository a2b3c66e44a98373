"""From new weights to a candidate: better on what the guard has seen, certified on what nobody has.

The holdout is divided by case id. Cases up to `window_start` have been looked at: the guard judged the rounds
on them, and here they say whether the candidate is better than its base, and choose thresholds (D_opt). Fresh
cases, with ids above that and above everything that ever certified, are read once and only to test (D_cal).
Better or not is never asked of them: whoever asks has chosen by them, and a certificate that follows a choice
by its own samples promises less than it says. What was looked at is written down before it is looked at, so a
process that dies in between has spent its cases; they only make the next certificate wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cloud_hub.builder.assemble import Policy
from cloud_hub.builder.collect import stages_of_bundle
from cloud_hub.builder.write import GraphPart, graph_digest
from cloud_hub.candidates import certificate
from cloud_hub.candidates.judge import labels_as_shipped
from cloud_hub.candidates.outcome import Base, Candidate, Figures, Outcome, Refused, Waiting
from cloud_hub.candidates.requantise import (
    Network,
    check_new_weights,
    graph_part,
    new_weights_part,
    requantised,
)
from cloud_hub.core.federation.guard import (
    Better,
    CannotJudge,
    GuardFigures,
    GuardRules,
    Kept,
    Worse,
    decide_better,
    figures_of,
)
from cloud_hub.errors import BuildError, CertificateError
from cloud_hub.examples import CaseStore, LabelledCases, joined_cases, read_examples
from cloud_hub.store.releases import look_at_holdout, looked_at, take_fresh
from edge_cascade.deltas import decode_delta, encode_delta
from edge_cascade.durable import crash_point
from edge_cascade.errors import BackendError
from edge_cascade.messages import Use
from edge_cascade.weights import FloatArray, Weights, difference, moved, shapes_of, size_bytes_of

REPRESENTATIVE: Final = 1_024
"""Training cases, the newest, from which int8 takes its ranges."""

MIN_OPTIMISE: Final = 300
"""With fewer holdout cases that have been looked at, audits that may have trained help to choose thresholds.

The certificate does not suffer: it holds for whatever was chosen without its own cases.
"""

MAX_CASES: Final = 20_000
MAX_BYTES: Final = 512 * 2**20
"""Of cases that are held in memory for one purpose, the newest."""

Say = Callable[[str], None]

FRESH: Final = "fresh holdout cases for the certificate"
"""What a candidate may wait for; they lie above `fresh_after`."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a candidate beside its promise. `window_start`: the guard has seen ids up to it."""

    window_start: int
    rules: GuardRules
    must_be_better: bool = True


def most_cases(base: Base) -> int:
    """How many cases of a model are read for one purpose."""
    elements = 1
    for size in base.bundle.graph.input_shape:
        elements *= size
    return max(min(MAX_CASES, MAX_BYTES // (4 * elements)), 1)


def fresh_after(store: CaseStore, base: Base, window_start: int) -> int:
    """The id above which no guard and no certificate has looked at the holdout."""
    return max(window_start, store.database.run(lambda c: looked_at(c, base.model.name)))


def make_candidate(
    store: CaseStore, base: Base, weights: Weights, wish: Wish, *, say: Say = lambda _: None
) -> Outcome:
    """Judge, quantise and certify new weights; `say` is told each step. Registers nothing.

    Raises:
        StoreError: when the store cannot be read or written now; asking again may succeed.
    """
    try:
        check_new_weights(base.bundle, weights)
        return _Making(store, base, wish, say).run(_as_they_travel(base, weights))
    except (BuildError, BackendError) as error:
        return Refused(str(error))


def _as_they_travel(base: Base, weights: Weights) -> dict[str, FloatArray]:
    """The base and a step of eight bits a value: what is judged and certified is what boards will have.

    So a board that has the base is sent a quarter of the bytes; see `edge_cascade.weights_delta`.
    """
    before = base.bundle.parameters()
    step = encode_delta(difference(weights, before), "int8")
    shapes = shapes_of(before)
    return moved(before, decode_delta(step, shapes, max_bytes=size_bytes_of(shapes)))


@dataclass(frozen=True, slots=True)
class _Decided:
    policy: Policy
    unseen: int


@dataclass(frozen=True, slots=True)
class _Making:
    """One candidate on its way."""

    store: CaseStore
    base: Base
    wish: Wish
    say: Say

    def run(self, weights: Weights) -> Outcome:
        """Everything, in its order."""
        base, wish = self.base, self.wish
        self.store.database.run(lambda c: look_at_holdout(c, base.model.name, upto_id=wish.window_start))
        seen = read_examples(
            self.store, base.model, Use.HOLDOUT, upto_id=wish.window_start, limit=most_cases(base)
        )
        if len(seen) < wish.rules.min_samples:
            return Waiting(len(seen), wish.rules.min_samples, "holdout cases for the guard")
        self.say("quantising anew")
        training = read_examples(self.store, base.model, Use.TRAIN, limit=REPRESENTATIVE)
        network = requantised(base.bundle, weights, training.x)
        guard = self._judge(network, seen)
        if isinstance(guard, Refused):
            return guard
        optimise, thresholds_from = self._optimise(seen)
        decided = self._decide(network, optimise)
        if not isinstance(decided, _Decided):
            return decided
        graph = graph_part(base.bundle, network)
        part = new_weights_part(base.bundle, network, decided.policy)
        plan = next(plan for plan in part.plans if plan.name == part.default_plan)
        before = base.bundle.plan()
        figures = Figures(
            guard=guard,
            certificates=part.certificates,
            default_plan=plan.name,
            upload_share=plan.points[plan.chosen].upload_share,
            base_upload_share=before.points[before.chosen].upload_share,
            thresholds_from=thresholds_from,
            unseen=decided.unseen,
            graph_bytes=sum(map(len, graph.stage_files.values())) + len(graph.train_step or b""),
            weights_bytes=sum(array.nbytes for array in part.tensors.values()),
            whole_release=network.whole_release or self._why_whole(graph),
        )
        return Candidate(graph, part, figures)

    def _why_whole(self, graph: GraphPart) -> str:
        """Empty where the graph part is the base's, byte for byte: then only weights need to travel."""
        is_same = graph_digest(graph) == self.base.bundle.graph_sha256
        return "" if is_same else "its manifest is written otherwise than when the base was built"

    def _judge(self, network: Network, seen: LabelledCases) -> GuardFigures | Refused:
        """Candidate against base, both as they ship."""
        bundle = self.base.bundle
        rungs = bundle.plan().rungs
        before = labels_as_shipped(bundle, stages_of_bundle(bundle), rungs, seen.x)
        after = labels_as_shipped(bundle, network.stages, rungs, seen.x)
        judgement = decide_better(before, after, seen.labels, self.wish.rules)
        figures = figures_of(judgement, len(seen))
        match judgement:
            case Worse() | CannotJudge():
                return Refused(figures.says)
            case Kept() if self.wish.must_be_better:
                return Refused(f"not better beyond noise: {figures.says}")
            case Better() | Kept():
                return figures

    def _optimise(self, seen: LabelledCases) -> tuple[LabelledCases, str]:
        """The cases that choose thresholds, and which they are."""
        said = f"{len(seen)} holdout cases"
        if len(seen) >= MIN_OPTIMISE:
            return seen, said
        model, wanted = self.base.model, MIN_OPTIMISE - len(seen)
        audits = read_examples(self.store, model, Use.TRAIN, limit=wanted, audits_only=True)
        if len(audits) == 0:
            return seen, said
        both = joined_cases(model, [seen, audits])
        return both, f"{said} and {len(audits)} audits that may have trained"

    def _decide(self, network: Network, optimise: LabelledCases) -> _Decided | Waiting | Refused:
        """Thresholds, and the certificate where the base has one."""
        promise = certificate.promise_of(self.base.bundle)
        nothing = joined_cases(self.base.model, [])
        if promise is None:
            self.say("choosing thresholds; the base promises nothing, so nothing is certified")
            ladders = certificate.measured(
                self.base, network.stages, optimise, nothing, truth_is_known=bool(optimise.is_human.all())
            )
            return _Decided(certificate.uncertified(ladders), 0)
        name = self.base.model.name
        after = fresh_after(self.store, self.base, self.wish.window_start)
        fresh = read_examples(
            self.store, self.base.model, Use.HOLDOUT, after_id=after, limit=most_cases(self.base)
        )
        known = bool(fresh.is_human.all() and optimise.is_human.all())
        targets = certificate.targets_of(promise, truth_is_known=known)
        needs = certificate.samples_needed(targets, len(self.base.bundle.weights.plans))
        if len(fresh) >= needs:
            self.say("choosing thresholds")
            foreseen = certificate.measured(
                self.base, network.stages, optimise, nothing, truth_is_known=known
            )
            needs = certificate.samples_worth_spending(foreseen, targets, len(fresh))
        if len(fresh) < needs:
            return Waiting(len(fresh), needs, FRESH)
        self.say(f"certifying on {len(fresh)} cases that nothing has looked at")
        upto = int(fresh.ids[-1])
        if not self.store.database.run(lambda c: take_fresh(c, name, after_id=after, upto_id=upto)):
            return Waiting(0, needs, f"{FRESH}, another candidate has taken the others")
        crash_point("hub.candidate-looked")
        ladders = certificate.measured(self.base, network.stages, optimise, fresh, truth_is_known=known)
        try:
            made = certificate.certified(ladders, targets, fresh)
        except CertificateError as error:
            return Refused(str(error))
        return _Decided(Policy(made.plans, made.default_plan, made.certificates), len(fresh))
