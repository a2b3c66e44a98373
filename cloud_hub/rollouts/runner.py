"""Runs the rollouts, on one thread of its own; what takes long to measure has another.

What is to be done is in the store: rollouts that were started, orders, reports, which boards are there. The
signs from other threads only say where to look first. After any fault everything is loaded again from the
store, as after a restart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

from msgspec.structs import replace

from cloud_hub.core.rollout.events import (
    Approved,
    Event,
    Halted,
    Heard,
    Killed,
    Paused,
    Reported,
    Resumed,
    Unheard,
    Unpaused,
)
from cloud_hub.core.rollout.judge import JudgeRules
from cloud_hub.core.rollout.waves import Device
from cloud_hub.rollouts.desired import DesiredStates, Publish
from cloud_hub.rollouts.ports import Evidence
from cloud_hub.rollouts.run import Look, RolloutRun, Submit
from cloud_hub.store.rollouts import (
    Order,
    devices_of_fleet,
    get_rollout,
    last_heard_ms,
    new_orders,
    new_swaps,
    note_orders,
    note_swaps,
    open_rollout_ids,
)
from cloud_hub.store.store import Store
from cloud_hub.thread_loop import ThreadLoop

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
GATHER_S: Final = 0.1
LOOK_EVERY_S: Final = 60.0
ABSENT_S: Final = 60.0
"""Turns are a second apart. After so long without one the hub was away, or the clock was set."""
MAX_SWAPS_AT_ONCE: Final = 1024


class RolloutRunner(ThreadLoop):
    """Runs rollouts. `publish` returns None when a message was not taken.

    `evidence` is asked for with the first look; `size_of` says how many bytes a release takes on a board's
    disk. `submit` carries out a look somewhere; by default on a thread of its own. `hears`: whether boards
    could be heard; while they could not, they owe no answer, nor between two turns that are `absent_s` apart.
    """

    def __init__(
        self,
        store: Store,
        publish: Publish,
        evidence: Callable[[], Evidence],
        *,
        prefix: str,
        size_of: Callable[[int], int] = lambda _: 0,
        rules: JudgeRules | None = None,
        look_every_s: float = LOOK_EVERY_S,
        clock_s: Callable[[], float] = time.time,
        submit: Submit | None = None,
        hears: Callable[[], bool] = lambda: True,
        absent_s: float = ABSENT_S,
    ) -> None:
        super().__init__("rollouts", gather_s=GATHER_S)
        self._store = store
        self._evidence = evidence
        self._rules = rules or JudgeRules()
        self._look_every_s = look_every_s
        self._clock_s = clock_s
        self._submit: Submit = submit or self._on_a_thread
        self._hears = hears
        self._absent_s = absent_s
        self._heard_s: float | None = None
        self._looks: ThreadPoolExecutor | None = None
        self._desired = DesiredStates(store.database, publish, prefix=prefix, size_of=size_of)
        # The oldest first.
        self._runs: dict[str, RolloutRun] = {}
        self._is_loaded = False
        self._gate = threading.Lock()
        self._online: set[str] = set()
        self._is_connected_anew = False

    def start(self) -> None:
        """Start the thread.

        Raises:
            StoreError: when the store cannot say when a board was last heard.
        """
        # Now, for the first message that comes makes it look as if the hub had never been away.
        self._heard_s = self._last_heard_s()
        super().start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Finish the turn at hand and end the thread."""
        super().stop(timeout_s)
        if self._looks is not None:
            self._looks.shutdown(wait=False, cancel_futures=True)

    def came_online(self, devices: Iterable[str]) -> None:
        """Say that these devices are there."""
        with self._gate:
            self._online.update(devices)
        self.wake()

    def connected(self) -> None:
        """Say that the broker is there, and may have forgotten what boards should run."""
        with self._gate:
            self._is_connected_anew = True
        self.wake()

    def run_once(self) -> float:
        """See `ThreadLoop` and `take_turn`."""
        self.take_turn()
        return POLL_S

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
            self._runs.clear()
        self._excuse()
        # Before new rollouts are taken up: what was reported until now answers none of their offers.
        self._take_swaps()
        self._take_up()
        with self._gate:
            online, self._online = self._online, set()
            is_anew, self._is_connected_anew = self._is_connected_anew, False
        if not self._runs:
            self._is_loaded = True
            self._note_heard()
            return
        if is_anew or not self._is_loaded:
            self._desired.tell_all()
        self._is_loaded = True
        self._take_orders()
        self._watch_fleet()
        for run in self._runs.values():
            now_s = self._clock_s()
            self._desired.tell(run.tick(now_s=now_s))
            self._desired.tell(run.look(self._evidence, self._submit, now_s=now_s))
        self._desired.tell(online)
        self._desired.flush()
        self._note_heard()

    # --- what comes in -------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Take up rollouts that are new here; close those that end with them, before anything is offered."""
        names = self._store.database.run(open_rollout_ids)
        fresh = [name for name in names if name not in self._runs]
        for name in fresh:
            row = self._store.database.run(partial(get_rollout, rollout_id=name))
            self._runs[name] = RolloutRun(
                self._store.database, row, rules=self._rules, look_every_s=self._look_every_s
            )
        if not fresh:
            return
        # The database's order is the order in which they began.
        self._runs = {name: self._runs[name] for name in names if name in self._runs}
        self._excuse()
        self._watch_fleet()
        for name in fresh:
            if name in self._runs:
                self._desired.tell(self._runs[name].feed([Resumed()], now_s=self._clock_s()))

    def _excuse(self) -> None:
        """While they could not be heard, boards owed no answer."""
        if not self._runs:
            return
        now_s = self._clock_s()
        if self._heard_s is None:
            self._heard_s = self._last_heard_s()
        elif now_s - self._heard_s <= self._absent_s:
            return
        unheard = Unheard(min(self._heard_s, now_s))
        for run in self._runs.values():
            self._desired.tell(run.feed([unheard], now_s=now_s))
        self._heard_s = now_s

    def _note_heard(self) -> None:
        if self._hears():
            self._heard_s = self._clock_s()

    def _last_heard_s(self) -> float:
        return self._store.database.run(last_heard_ms) / 1000

    def _watch_fleet(self) -> None:
        """Tell every rollout who is there and who is not."""
        runs = list(self._runs.values())
        fleets = {model: self._fleet_of(model) for model in sorted({run.state.model for run in runs})}
        for index, run in enumerate(runs):
            events = run.events_of(fleets[run.state.model], [newer.state for newer in runs[index + 1 :]])
            if events:
                self._desired.tell(run.feed(events, now_s=self._clock_s()))
        self._runs = {name: run for name, run in self._runs.items() if not run.state.is_closed}

    def _fleet_of(self, model: str) -> list[Device]:
        fleet = self._store.database.run(partial(devices_of_fleet, model=model))
        if self._hears():
            return fleet
        # What is stored of who is there is old, and nobody can answer.
        return [replace(device, is_online=False) for device in fleet]

    def _take_orders(self) -> None:
        by_rollout: defaultdict[str, list[Order]] = defaultdict(list)
        for order in self._store.database.run(new_orders):
            by_rollout[order.rollout].append(order)
        for name, orders in by_rollout.items():
            note = partial(note_orders, ids=[order.id for order in orders])
            run = self._runs.get(name)
            if run is None:
                if not self._store.database.run(partial(get_rollout, rollout_id=name)).state.is_closed:
                    # Started since this turn began: the next one takes it up.
                    continue
                self._store.database.run(note)
                log.warning("orders come too late, the rollout is closed rollout=%s", name)
                continue
            events = [_event_of(order) for order in orders]
            self._desired.tell(run.feed(events, now_s=self._clock_s(), note=note))

    def _take_swaps(self) -> None:
        while swaps := self._store.database.run(partial(new_swaps, limit=MAX_SWAPS_AT_ONCE)):
            if not self._is_loaded:
                self._take_up()
            for run in self._runs.values():
                signs = tuple(
                    Reported(
                        swap.device,
                        swap.release,
                        not swap.failure,
                        ": ".join(text for text in (swap.failure, swap.detail) if text),
                    )
                    for swap in swaps
                    if swap.model == run.state.model and run.knows(swap.device)
                )
                if signs:
                    self._desired.tell(run.feed([Heard(signs)], now_s=self._clock_s()))
            # Noted last: whoever is killed before hears them twice, which harms nothing.
            self._store.database.run(partial(note_swaps, ids=[swap.id for swap in swaps]))

    # --- measuring -----------------------------------------------------------------------------------------

    def _on_a_thread(self, measure: Callable[[], Look]) -> Future[Look]:
        if self._looks is None:
            self._looks = ThreadPoolExecutor(1, thread_name_prefix="evidence")
        return self._looks.submit(measure)


def _event_of(order: Order) -> Event:
    match order.kind:
        case "approve":
            return Approved(order.ordered_by, order.wave or 0)
        case "pause":
            return Paused(order.ordered_by)
        case "resume":
            return Unpaused(order.ordered_by)
        case "halt":
            return Halted(order.ordered_by, order.reason)
        case _:
            return Killed(order.ordered_by, order.reason)
