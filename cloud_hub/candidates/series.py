"""What a series of rounds asks for: a draft of its weights, and the hub's vote. See `federation.ports`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from cloud_hub.candidates.base import base_of
from cloud_hub.candidates.make import FRESH, Wish, fresh_after, make_candidate, most_cases
from cloud_hub.candidates.outcome import Base, Candidate, Refused
from cloud_hub.candidates.outcome import Lineage as Descent
from cloud_hub.candidates.outcome import Waiting as Wanting
from cloud_hub.candidates.training import train_on_cases
from cloud_hub.errors import ModelError
from cloud_hub.examples import count_cases, read_examples
from cloud_hub.federation.ports import (
    CandidateOutcome,
    Declined,
    HubVote,
    Lineage,
    Registered,
    Waiting,
)
from cloud_hub.federation.settings import SeriesSettings, guard_rules_of
from cloud_hub.models import HubModel
from cloud_hub.registry import recover_drafts, register_draft
from cloud_hub.store.releases import release_of_series
from cloud_hub.store.store import Store
from edge_cascade.messages import Use
from edge_cascade.training import Schedule
from edge_cascade.weights import Weights, difference

WHO = "rounds"
"""Who has created the drafts of series."""


@dataclass(frozen=True, slots=True)
class SeriesCandidates:
    """Implements `MakeCandidate` as `make` and `TrainHub` as `train`, for the hub's models.

    `waits` holds how many fresh cases each series that waits was told it needs: a series asks every minute,
    and until they are there everything but counting them would be done for nothing.
    """

    store: Store
    state_dir: Path
    models: Mapping[str, HubModel]
    clock_ms: Callable[[], int] = field(default=lambda: time.time_ns() // 1_000_000)
    waits: dict[int, int] = field(default_factory=dict)

    def make(
        self, series_id: int, model: str, base_digest: bytes, weights: Weights, lineage: Lineage
    ) -> CandidateOutcome:
        """See `MakeCandidate`."""
        recover_drafts(self.store.database, self.state_dir)
        there = self.store.database.run(lambda c: release_of_series(c, series_id))
        if there is not None:
            return Registered(str(there["id"]))
        base = self._base(model)
        if (needs := self.waits.get(series_id)) is not None:
            after = fresh_after(self.store, base, lineage.window_start)
            has = count_cases(self.store, base.model, Use.HOLDOUT, after_id=after)
            if has < needs:
                return Waiting(str(Wanting(has, needs, FRESH)))
        settings = msgspec.json.decode(lineage.settings, type=SeriesSettings)
        wish = Wish(lineage.window_start, guard_rules_of(settings))
        match make_candidate(self.store, base, weights, wish):
            case Wanting() as waiting:
                if waiting.what == FRESH:
                    self.waits[series_id] = waiting.needs
                return Waiting(str(waiting))
            case Refused(why):
                return Declined(why)
            case Candidate() as candidate:
                descent = Descent(
                    parent=base.bundle.bundle_id,
                    weights=base_digest.hex(),
                    trained="combined" if settings.include_hub else "federated",
                    series=series_id,
                    rounds=len(lineage.rounds),
                    strategy=settings.strategy,
                )
                release = register_draft(
                    self.store.database,
                    self.state_dir,
                    candidate,
                    descent,
                    created_by=WHO,
                    now_ms=self.clock_ms(),
                )
                return Registered(str(release.id))

    def train(
        self,
        model: str,
        base: Weights,
        schedule: Schedule,
        *,
        max_examples: int,
        soft_share: float,
        seed: int,
    ) -> HubVote | None:
        """See `TrainHub`."""
        of = self._base(model)
        cases = read_examples(self.store, of.model, Use.TRAIN, limit=min(max_examples, most_cases(of)))
        if len(cases) == 0:
            return None
        rng = np.random.default_rng(seed)
        trained = train_on_cases(of.bundle, base, cases, schedule, soft_share=soft_share, rng=rng)
        return HubVote(difference(trained.weights, base), len(cases))

    def _base(self, model: str) -> Base:
        try:
            return base_of(self.models[model])
        except KeyError:
            raise ModelError(f"this hub has no model {model!r}; add it to [[models]]") from None
