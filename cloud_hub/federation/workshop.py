"""What a round makes: the next base of its votes, the guard's judgement of it, in the end a candidate.

Nothing here decides what follows from that; `series_run` tells the state machines.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from sqlalchemy import RowMapping

from cloud_hub.core.federation.aggregation import AggregationError
from cloud_hub.core.federation.guard import GuardFigures
from cloud_hub.core.federation.rounds import RoundState
from cloud_hub.core.federation.screening import RoundSpec
from cloud_hub.core.federation.server import ServerState
from cloud_hub.core.federation.update import Layout, Update
from cloud_hub.errors import HubError, StoreUnavailableError
from cloud_hub.federation.bases import Bases, NewBase
from cloud_hub.federation.closing import HUB, Closed, Finding, Votes, close_votes
from cloud_hub.federation.judging import HoldoutJudge, Judged
from cloud_hub.federation.ports import (
    CandidateOutcome,
    Declined,
    Lineage,
    LineageRound,
    MakeCandidate,
    TrainHub,
    Waiting,
)
from cloud_hub.federation.settings import (
    SeriesSettings,
    guard_rules_of,
    norm_rule_of,
    rule_vectors_of,
    schedule_of,
    strategy_of,
)
from cloud_hub.models import HubModel
from cloud_hub.store.bases import BaseRow
from cloud_hub.store.deliveries import Place
from cloud_hub.store.members import StoredUpdate, standings_of
from cloud_hub.store.rounds import committed_rounds
from cloud_hub.store.store import Store
from edge_cascade.bundle import Bundle
from edge_cascade.deltas import decode_delta, encode_delta
from edge_cascade.errors import CascadeError
from edge_cascade.weights import FloatArray, Weights

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class NoResultError(Exception):
    """A round's votes gave nothing that could be kept or judged; trying again would not help."""


@dataclass(frozen=True, slots=True)
class RoundOfSeries:
    """The round that is worked on."""

    series: int
    round_id: str
    number: int
    base: bytes
    result: bytes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """The next base, None where no board's vote stood, and what was found of each update."""

    new: NewBase | None
    closed: Closed

    @property
    def counted(self) -> int:
        """Votes of boards that stood."""
        return sum(finding.reason is None and finding.device != HUB for finding in self.closed.findings)

    @property
    def of_boards(self) -> list[Finding]:
        """What was found of the boards' updates."""
        return [finding for finding in self.closed.findings if finding.device != HUB]


class Workshop:
    """Makes what the rounds of one model ask for."""

    def __init__(
        self,
        store: Store,
        bases: Bases,
        model: HubModel,
        *,
        make_candidate: MakeCandidate,
        train_hub: TrainHub | None,
    ) -> None:
        assert model.bundle is not None
        self._store = store
        self._bases = bases
        self._model = model
        self._bundle: Bundle = model.bundle
        self._judge = HoldoutJudge(store, model, model.bundle)
        self._make_candidate = make_candidate
        self._train_hub = train_hub
        self._loaded: OrderedDict[bytes, tuple[BaseRow, dict[str, FloatArray]]] = OrderedDict()

    def weights(self, digest: bytes) -> tuple[BaseRow, dict[str, FloatArray]]:
        """A base and its row; the last three asked for are kept in memory.

        Raises:
            HubError, CascadeError: when it is not there, or is damaged.
        """
        if digest not in self._loaded:
            row = self._bases.row(digest)
            assert self._bundle.train_step is not None
            self._remember(row, self._bases.load(row, dict(self._bundle.train_step.shapes)))
        self._loaded.move_to_end(digest)
        return self._loaded[digest]

    def aggregate(
        self,
        of: RoundOfSeries,
        settings: SeriesSettings,
        votes: Sequence[StoredUpdate],
        older_bases: Mapping[bytes, int],
    ) -> Aggregate:
        """Screen and combine the votes, in their order.

        Raises:
            NoResultError: when they have no result.
            StoreUnavailableError: when they cannot be read now.
        """
        return _or_no_result(lambda: self._aggregate(of, settings, votes, older_bases))

    def judge(self, of: RoundOfSeries, settings: SeriesSettings, window: int) -> Judged:
        """Hold the round's result against its base, and against the best of its series, on the holdout.

        Raises:
            NoResultError: when it cannot be judged.
            StoreUnavailableError: when the samples cannot be read now.
        """
        return _or_no_result(lambda: self._judged(of, settings, window))

    def candidate(
        self, series_id: int, base: bytes, first_base: bytes, settings: str, window: int
    ) -> CandidateOutcome:
        """Make a release of a base, with its lineage."""
        try:
            _, weights = self.weights(base)
            rounds = self._store.database.run(lambda c: committed_rounds(c, series_id))
            lineage = Lineage(
                series_id,
                first_base,
                tuple(
                    LineageRound(row["id"], row["number"], row["base"], row["result"], _votes_of(row))
                    for row in rounds
                ),
                settings,
                window,
            )
            return self._make_candidate(series_id, self._model.name, base, weights, lineage)
        except StoreUnavailableError as error:
            return Waiting(str(error))
        except (HubError, CascadeError) as error:
            return Declined(str(error))
        except Exception as error:
            # A fault of ours in one candidate must not be met again every minute for ever.
            log.exception("candidate failed series=%d", series_id)
            return Declined(f"{type(error).__name__}: {error}")

    def _aggregate(
        self,
        of: RoundOfSeries,
        settings: SeriesSettings,
        votes: Sequence[StoredUpdate],
        older_bases: Mapping[bytes, int],
    ) -> Aggregate:
        row, base = self.weights(of.base)
        heads = set(self._bundle.graph.head_parameters) if settings.private_heads else set()
        shared = {name: array for name, array in base.items() if name not in heads}
        spec = RoundSpec(
            of.base,
            Layout.of(shared),
            settings.max_examples,
            norm_rule_of(settings),
            older_bases,
            settings.max_staleness if settings.is_asynchronous else 0,
        )
        names = [vote.device for vote in votes]
        standings = self._store.database.run(lambda c: standings_of(c, self._model.name, names))
        closed = close_votes(
            Votes(votes, self._read, standings, self._own_vote(of, settings, base, set(shared))),
            shared,
            spec,
            strategy_of(settings),
            self._rule_state(of.series, settings, spec.layout),
            round_number=of.number,
        )
        if closed.outcome is None:
            return Aggregate(None, closed)
        wanted = {**base, **closed.outcome.weights}
        self._check_bounds(wanted)
        rule = closed.outcome.state.vectors
        extra = encode_delta(rule, "fp32") if rule else b""
        new = self._bases.next(row, base, wanted, settings.base_encoding, extra=extra)
        self._remember(new.row, new.weights)
        return Aggregate(new, closed)

    def _remember(self, row: BaseRow, weights: dict[str, FloatArray]) -> None:
        self._loaded[row.digest] = (row, weights)
        while len(self._loaded) > 3:
            self._loaded.popitem(last=False)

    def _judged(self, of: RoundOfSeries, settings: SeriesSettings, window: int) -> Judged:
        assert of.result is not None
        _, after = self.weights(of.result)
        _, before = self.weights(of.base)
        best = self._best_of(of)
        _, best_weights = self.weights(best)
        return self._judge.judge(
            (of.base, before), (of.result, after), (best, best_weights), guard_rules_of(settings), window
        )

    def _best_of(self, of: RoundOfSeries) -> bytes:
        """The base of the least loss that the series has had: its start, or what a committed round gave."""
        rounds = self._store.database.run(lambda c: committed_rounds(c, of.series))
        best = rounds[0]["base"] if rounds else of.base
        for row in rounds:
            if row["guard"] is not None and row["result"] is not None:
                figures = msgspec.json.decode(row["guard"], type=GuardFigures)
                if figures.loss is None or figures.best_loss is None:
                    continue
                if figures.loss <= figures.best_loss:
                    best = row["result"]
        return bytes(best)

    def _own_vote(
        self, of: RoundOfSeries, settings: SeriesSettings, base: Weights, shared: set[str]
    ) -> Update | None:
        if not settings.include_hub or self._train_hub is None:
            return None
        try:
            vote = self._train_hub(
                self._model.name,
                base,
                schedule_of(settings),
                max_examples=settings.max_examples,
                soft_share=settings.soft_share,
                seed=(settings.seed or 0) + of.number,
            )
        except StoreUnavailableError:
            raise
        except (HubError, CascadeError) as error:
            log.warning("the hub has no vote model=%s reason=%s", self._model.name, error)
            return None
        if vote is None:
            return None
        delta = {name: array for name, array in vote.delta.items() if name in shared}
        return Update(HUB, min(vote.num_examples, settings.max_examples), of.base, delta)

    def _rule_state(self, series_id: int, settings: SeriesSettings, layout: Layout) -> ServerState:
        """What the server's rule kept at the last round that was committed."""
        names = rule_vectors_of(settings)
        rounds = self._store.database.run(lambda c: committed_rounds(c, series_id))
        if not names or not rounds or rounds[-1]["rule_blob"] is None:
            return ServerState()
        row = rounds[-1]
        content = self._read(Place(row["rule_blob"], row["rule_offset"], row["rule_length"]))
        shapes = dict.fromkeys(names, (layout.size,))
        return ServerState(decode_delta(content, shapes, max_bytes=4 * len(names) * layout.size))

    def _check_bounds(self, weights: Weights) -> None:
        """Refuse weights that no board would take: the graph part's signature covers the limit."""
        limit = self._bundle.graph.bounds.max_abs_weight
        for name, array in weights.items():
            if float(abs(array).max()) > limit:
                raise NoResultError(f"parameter {name!r} left the bound of the graph, {limit:g}")

    def _read(self, place: Place) -> bytes:
        return self._store.blobs.get(place.blob, place.offset, place.length)


def _votes_of(row: RowMapping) -> int:
    return msgspec.json.decode(row["state"], type=RoundState).counted


def _or_no_result(work: Callable[[], ResultT]) -> ResultT:
    try:
        return work()
    except (StoreUnavailableError, NoResultError):
        raise
    except (AggregationError, HubError, CascadeError) as error:
        raise NoResultError(str(error)) from error
    except Exception as error:
        # A fault of ours in one round must not be met again every second for ever.
        log.exception("round failed")
        raise NoResultError(f"{type(error).__name__}: {error}") from error
