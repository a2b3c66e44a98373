"""The baseline from end to end: train on uploaded cases, guard, candidate, draft. See `training`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

import msgspec
import numpy as np

from cloud_hub.candidates.base import load_base
from cloud_hub.candidates.make import Wish, make_candidate, most_cases
from cloud_hub.candidates.outcome import Base, Candidate, Lineage, Refused, Waiting
from cloud_hub.candidates.training import guard_training, train_on_cases, window_of
from cloud_hub.config import Config
from cloud_hub.core.federation.guard import GuardFigures, GuardRules
from cloud_hub.errors import NotFoundError
from cloud_hub.examples import CaseStore, read_examples
from cloud_hub.registry import Release, recover_drafts, register_draft
from cloud_hub.store.examples import ExampleFilter, example_ids
from cloud_hub.store.releases import look_at_holdout, looked_at
from edge_cascade.errors import BackendError, TrainingError
from edge_cascade.messages import Use
from edge_cascade.training import Schedule
from edge_cascade.weights import weights_digest

Say = Callable[[str], None]

WHO = "cloud-hub train"


@dataclass(frozen=True, slots=True)
class HubTraining:
    """How the hub trains. `max_examples`: the newest; None: as many as memory is set aside for."""

    schedule: Schedule
    soft_share: float = 0.0
    max_examples: int | None = None
    seed: int = 0
    must_be_better: bool = True
    threads: int = 1
    rules: GuardRules = GuardRules()  # noqa: RUF009 - frozen


class TrainingFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What was trained, and what the guard said of it in fp32; None where it was not asked."""

    examples: int
    damaged: int
    first_loss: float
    last_loss: float
    guard: GuardFigures | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """A draft, or why there is none."""

    outcome: DraftOutcome
    figures: TrainingFigures | None = None


DraftOutcome: TypeAlias = Release | Waiting | Refused


def train_in_hub(
    config: Config,
    store: CaseStore,
    name: str,
    training: HubTraining,
    *,
    say: Say = lambda _: None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    now_ms: int,
) -> Trained:
    """Train the model called `name` and register a draft; `on_batch` is told steps done and to do.

    Raises:
        ConfigError, ModelError: no such model, one that cannot be used, or one without a train step.
        NotFoundError: no case to train on.
        StoreError: when the store cannot be read or written now.
    """
    base = load_base(config, name)
    for left in recover_drafts(store.database, config.state_dir):
        say(f"release {left.id} of {left.model} was written and not registered, and is now")
    window = _window(store, base, training.rules)
    if isinstance(window, Waiting):
        return Trained(window)
    most = min(training.max_examples or most_cases(base), most_cases(base))
    cases = read_examples(store, base.model, Use.TRAIN, limit=most)
    if len(cases) == 0:
        raise NotFoundError(
            f"no case of {name!r} to train on: none that boards have sent has a verdict and is not held out"
        )
    schedule = training.schedule
    say(f"training on {len(cases)} cases{f', {cases.damaged} damaged ones left out' * (cases.damaged > 0)}")
    total = schedule.epochs * ceil(len(cases) / schedule.batch_size)
    done = iter(range(total))
    before = base.bundle.parameters()
    try:
        trained = train_on_cases(
            base.bundle,
            before,
            cases,
            schedule,
            soft_share=training.soft_share,
            rng=np.random.default_rng(training.seed),
            on_batch=lambda: on_batch(next(done), total),
            threads=training.threads,
        )
        say("judging on the holdout")
        store.database.run(lambda c: look_at_holdout(c, name, upto_id=window))
        seen = read_examples(store, base.model, Use.HOLDOUT, upto_id=window, limit=most_cases(base))
        guarded = guard_training(base, before, trained.weights, seen, training.rules)
    except (TrainingError, BackendError) as error:
        return Trained(Refused(str(error)))
    figures = TrainingFigures(
        examples=len(cases),
        damaged=cases.damaged,
        first_loss=trained.first_loss,
        last_loss=trained.last_loss,
    )
    if isinstance(guarded, Waiting | Refused):
        return Trained(guarded, figures)
    figures = msgspec.structs.replace(figures, guard=guarded.figures)
    wish = Wish(window, training.rules, must_be_better=training.must_be_better)
    candidate = make_candidate(store, base, trained.weights, wish, say=say)
    if not isinstance(candidate, Candidate):
        return Trained(candidate, figures)
    lineage = Lineage(
        parent=base.bundle.bundle_id,
        weights=weights_digest(trained.weights).hex(),
        trained="hub",
        examples=len(cases),
        schedule=_said(training),
    )
    release = register_draft(
        store.database, config.state_dir, candidate, lineage, created_by=WHO, now_ms=now_ms
    )
    return Trained(release, figures)


def _window(store: CaseStore, base: Base, rules: GuardRules) -> int | Waiting:
    """Up to which id the guard may look; asked before the minutes that training takes."""
    name = base.model.name
    wanted = ExampleFilter(name, Use.HOLDOUT, base.model.full_model)
    ids = np.array(store.database.run(lambda c: example_ids(c, wanted)), np.int64)
    if len(ids) < rules.min_samples:
        return Waiting(len(ids), rules.min_samples, "holdout cases for the guard")
    mark = store.database.run(lambda c: looked_at(c, name))
    return window_of(ids, mark, min_samples=rules.min_samples)


def _said(training: HubTraining) -> str:
    schedule = training.schedule
    return (
        f"{schedule.epochs} epochs, batches of {schedule.batch_size}, learning rate "
        f"{schedule.learning_rate:g}, momentum {schedule.momentum:g}, proximal {schedule.prox_mu:g}, "
        f"soft share {training.soft_share:g}, seed {training.seed}"
    )
