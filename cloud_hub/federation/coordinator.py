"""Runs the series of rounds, on one thread of its own.

What is to be done is in the store: series that were asked for or are to end, updates that nobody has counted,
states. The signs from other threads only say where to look first. After any fault everything is loaded again
from the store, as after a restart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Final

from sqlalchemy import Connection

from cloud_hub.federation.bases import Bases
from cloud_hub.federation.offers import Offers, Publish
from cloud_hub.federation.ports import (
    CandidateOutcome,
    Declined,
    Lineage,
    MakeCandidate,
    TrainHub,
)
from cloud_hub.federation.requests import BaseRequests, OpenBase
from cloud_hub.federation.round_run import Parts
from cloud_hub.federation.series_run import SeriesRun, begin_series, load_series
from cloud_hub.federation.workshop import Workshop
from cloud_hub.models import HubModel
from cloud_hub.store import schema
from cloud_hub.store.bases import remove_old
from cloud_hub.store.members import (
    StoredUpdate,
    add_bytes_down,
    ever_asked,
    new_updates,
    note_late,
    note_updates,
)
from cloud_hub.store.release_reports import REMOVED_AT_ONCE, remove_old_shadows, remove_old_vitals
from cloud_hub.store.rounds import (
    ASKED,
    SeriesRow,
    end_open_round,
    open_series_rows,
    save_series,
    series_of_rounds,
)
from cloud_hub.store.store import Store
from cloud_hub.thread_loop import ThreadLoop
from edge_cascade.errors import CascadeError
from edge_cascade.messages import BaseRequest
from edge_cascade.weights import Weights

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
GATHER_S: Final = 0.02
MAX_UPDATES_PER_TURN: Final = 1024
CLEAN_EVERY_S: Final = 3600.0


def steady_wall_clock() -> Callable[[], float]:
    """Seconds since 1970 that no later setting of the system's clock moves."""
    start = time.time() - time.monotonic()
    return lambda: start + time.monotonic()


def no_candidates(
    series_id: int, model: str, base_digest: bytes, weights: Weights, lineage: Lineage
) -> CandidateOutcome:
    """Where nothing makes candidates."""
    del series_id, base_digest, weights, lineage
    return Declined(f"this hub makes no candidates of {model!r}")


class Coordinator(ThreadLoop):
    """Runs series. `publish` returns None when a message was not taken."""

    def __init__(
        self,
        store: Store,
        publish: Publish,
        models: Mapping[str, HubModel],
        *,
        prefix: str,
        private_key: Callable[[], bytes],
        make_candidate: MakeCandidate = no_candidates,
        train_hub: TrainHub | None = None,
        clock_s: Callable[[], float] | None = None,
    ) -> None:
        super().__init__("coordinator", gather_s=GATHER_S)
        self._store = store
        self._publish = publish
        self._models = models
        self._prefix = prefix
        self._private_key = private_key
        self._make_candidate = make_candidate
        self._train_hub = train_hub
        self._clock_s = clock_s or steady_wall_clock()
        self._bases = Bases(store)
        self._requests = BaseRequests(store, self._bases, publish, prefix=prefix)
        self._offers: Offers | None = None
        self._runs: dict[int, SeriesRun] = {}
        self._parts: dict[str, Parts] = {}
        self._gate = threading.Lock()
        self._online: set[str] = set()
        self._is_connected_anew = False
        self._is_loaded = False
        self._next_poll_s = self._next_clean_s = 0.0

    def wake(self) -> None:
        """Say that there may be something new in the store."""
        self._next_poll_s = 0.0
        super().wake()

    def came_online(self, devices: Iterable[str]) -> None:
        """Say that these devices are there."""
        with self._gate:
            self._online.update(devices)
        super().wake()

    def connected(self) -> None:
        """Say that the broker is there, and may have forgotten every offer."""
        with self._gate:
            self._is_connected_anew = True
        super().wake()

    def ask_for_base(self, request: BaseRequest) -> None:
        """Pass on that a board asks for a training base."""
        self._requests.ask(request)
        super().wake()

    def run_once(self) -> float:
        """See `ThreadLoop` and `take_turn`."""
        self.take_turn()
        # A cohort asks for its base at once: who is left waits for no other sign.
        return GATHER_S if len(self._requests) else POLL_S

    def take_turn(self) -> None:
        """Do what there is to do.

        Raises:
            HubError: everything is loaded again before the next turn.
        """
        try:
            self._turn()
        except BaseException:
            self._is_loaded = False
            raise

    def _turn(self) -> None:
        if not self._is_loaded:
            self._load()
        if time.monotonic() >= self._next_poll_s:
            self._next_poll_s = time.monotonic() + POLL_S
            self._take_orders()
        with self._gate:
            online, self._online = self._online, set()
            is_anew, self._is_connected_anew = self._is_connected_anew, False
        if is_anew:
            self._offer_everything()
        self._take_updates()
        for run in self._open_runs():
            if online:
                run.came_online(online)
            run.tick()
        self._requests.serve(self._find_base)
        self._flush()
        self._forget_ended()
        if time.monotonic() >= self._next_clean_s:
            self._next_clean_s = time.monotonic() + CLEAN_EVERY_S
            self._clean()

    def _clean(self) -> None:
        now_ms = round(self._clock_s() * 1000)
        bases = {digest for run in self._open_runs() for digest in run.open_bases}
        removed = self._store.database.run(lambda c: remove_old(c, now_ms=now_ms, open_bases=bases))
        self._store.blobs.remove(removed.packs)
        for remove in (remove_old_vitals, remove_old_shadows):
            while self._store.database.run(partial(remove, now_ms=now_ms)) == REMOVED_AT_ONCE:
                log.debug("old reports removed count=%d", REMOVED_AT_ONCE)
        if removed.rows:
            log.info("old updates and training bases removed count=%d", removed.rows)

    # --- series --------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """As after a restart: everything from the store, every offer published again, stale ones cleared."""
        self._runs.clear()
        self._parts.clear()
        self._offers = Offers(self._publish, prefix=self._prefix, private_key=self._private_key)
        for row in self._store.database.run(open_series_rows):
            if row.phase != ASKED:
                self._take_up(row)
        self._offer_everything()
        self._is_loaded = True

    def _take_orders(self) -> None:
        for row in self._store.database.run(open_series_rows):
            if row.id not in self._runs:
                self._take_up(row)
            if row.abort_reason is not None and row.id in self._runs:
                self._runs[row.id].abort(row.abort_reason)
                self._forget_ended()

    def _take_up(self, row: SeriesRow) -> None:
        model = self._models.get(row.model)
        problem = _problem_of(row, model)
        if model is None or problem is not None:
            self._give_up(row, problem or "")
            return
        parts = self._parts_of(model)
        if row.phase == ASKED:
            if row.abort_reason is not None:
                self._give_up(row, row.abort_reason, phase="aborted")
                return
            try:
                self._runs[row.id] = begin_series(parts, self._bases, row, model)
            except CascadeError as error:
                self._give_up(row, str(error))
            return
        run = self._runs[row.id] = load_series(parts, row, model)
        run.resume()

    def _give_up(self, row: SeriesRow, why: str, *, phase: str = "failed") -> None:
        now_ms = round(self._clock_s() * 1000)

        def write(connection: Connection) -> None:
            save_series(connection, row.id, phase=phase, why=why, ended_at_ms=now_ms)
            end_open_round(connection, row.id, why, now_ms=now_ms)

        self._store.database.run(write)
        log.warning("series given up series=%d reason=%s", row.id, why)

    def _parts_of(self, model: HubModel) -> Parts:
        if model.name not in self._parts:
            assert self._offers is not None
            workshop = Workshop(
                self._store,
                self._bases,
                model,
                make_candidate=self._make_candidate,
                train_hub=self._train_hub,
            )
            self._parts[model.name] = Parts(self._store, workshop, self._offers, self._flush, self._clock_s)
        return self._parts[model.name]

    def _open_runs(self) -> list[SeriesRun]:
        return [run for run in self._runs.values() if not run.is_over]

    def _forget_ended(self) -> None:
        self._runs = {number: run for number, run in self._runs.items() if not run.is_over}

    # --- what comes in -------------------------------------------------------------------------------------

    def _take_updates(self) -> None:
        """Give every update that nobody has counted to its round, or note that it has none."""
        while True:
            updates = self._store.database.run(lambda c: new_updates(c, MAX_UPDATES_PER_TURN))
            if not updates:
                return
            for_run, strays = self._sorted(updates)
            for number, its in for_run.items():
                round_ = self._runs[number].round
                if round_ is not None:
                    round_.hear_updates(its)
            if strays:
                self._store.database.run(partial(_note_strays, strays=strays))

    def _sorted(
        self, updates: Iterable[StoredUpdate]
    ) -> tuple[dict[int, list[StoredUpdate]], list[tuple[StoredUpdate, str]]]:
        """The updates of each series with an open round for them; the others, each with what it is."""
        updates = list(updates)
        names = {update.round_id for update in updates}
        known = self._store.database.run(lambda c: series_of_rounds(c, names))
        for_run: defaultdict[int, list[StoredUpdate]] = defaultdict(list)
        strays: list[tuple[StoredUpdate, str]] = []
        for update in updates:
            series, model = known.get(update.round_id, (0, ""))
            run = self._runs.get(series)
            if model != update.model:
                strays.append((update, "unknown_round"))
            elif run is None or run.round is None or not run.round.may_take(update.round_id):
                strays.append((update, "late"))
            else:
                for_run[series].append(update)
        return for_run, strays

    def _find_base(self, model: str, digest: bytes) -> OpenBase | None:
        for run in self._open_runs():
            round_ = run.round
            if run.model == model and round_ is not None and round_.base.digest == digest and round_.waiting:
                return OpenBase(round_.id, model, digest, round_.base.size_bytes)
        return None

    # --- offers --------------------------------------------------------------------------------------------

    def _offer_everything(self) -> None:
        """Publish every open offer, and take away what may be left of others."""
        assert self._offers is not None
        waiting: set[str] = set()
        for run in self._open_runs():
            if run.round is not None:
                waiting |= run.round.waiting
                run.round.offer_again(run.round.waiting)
        stale = [name for name in self._store.database.run(ever_asked) if name not in waiting]
        self._offers.clear(stale, "")
        self._flush()

    def _flush(self) -> None:
        assert self._offers is not None
        flushed = self._offers.flush()
        # A board has one retained offer: taking one model's away must not take another's.
        for run in self._open_runs():
            if run.round is not None and flushed.cleared:
                run.round.offer_again(flushed.cleared)
        again = self._offers.flush().sent if flushed.cleared else {}
        for sent in (flushed.sent, again):
            for round_id, amounts in sent.items():
                self._store.database.run(partial(_count_down, round_id=round_id, amounts=amounts))


def _problem_of(row: SeriesRow, model: HubModel | None) -> str | None:
    """Why this hub cannot run a series, None when it can."""
    if model is None or model.bundle is None:
        return f"this hub has no model {row.model!r}; add it to [[models]] and start the series again"
    if model.bundle.train_step is None:
        return f"the bundle of {row.model!r} has no train step"
    if bytes.fromhex(model.bundle.graph_sha256) != row.graph:
        return f"the bundle of {row.model!r} has another graph than when the series was started"
    return None


def _note_strays(connection: Connection, strays: Collection[tuple[StoredUpdate, str]]) -> None:
    note_updates(connection, [(update.id, None) for update, _ in strays])
    note_late(connection, [update for update, what in strays if what == "late"])
    counts = Counter(f"votes/{what}" for _, what in strays)
    counts["round_bytes/up"] += sum(update.place.length for update, _ in strays)
    schema.add_to_counters(connection, counts)


def _count_down(connection: Connection, round_id: str, amounts: Mapping[str, int]) -> None:
    add_bytes_down(connection, round_id, amounts)
    schema.add_to_counters(connection, {"round_bytes/down": sum(amounts.values())})
