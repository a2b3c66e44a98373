"""Virtual boards for rollouts: rows where ingest would put them, a clock that is set, a broker that records."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import Future

from sqlalchemy import insert, update

from cloud_hub.core.rollout.findings import Fine, Health, Metric
from cloud_hub.core.rollout.judge import JudgeRules, Pairs
from cloud_hub.core.rollout.state import RolloutLimits
from cloud_hub.core.rollout.waves import Sampling, Wave
from cloud_hub.rollouts.orders import order
from cloud_hub.rollouts.runner import RolloutRunner
from cloud_hub.rollouts.start import start_rollout
from cloud_hub.store import schema
from cloud_hub.store.rollouts import get_rollout, set_labels
from edge_cascade.codec import decode
from edge_cascade.messages import SHIPPED

PREFIX = "edge"
FOUR = [f"press-{n}" for n in range(4)]
WELL = Health((Fine(Metric.LATENCY, 1.0, 9),))
GOOD = Pairs(count=4000, differing=40, lost=10, won=10)
WORSE = Pairs(count=1000, differing=80, lost=70, won=10)
WAVES = (
    Wave("canary", count=1, soak_s=100.0, max_drop=0.05, sampling=Sampling(0.1, 0.5)),
    Wave("half", share=0.5, soak_s=200.0),
    Wave("all", share=1.0, soak_s=300.0),
)
LIMITS = RolloutLimits(report_within_s=2000.0, vanished_after_s=86400.0, min_reached_share=0.5)

_seqs = itertools.count(1)


class FakeEvidence:
    """Says what it is told to say; counts how often it was asked."""

    def __init__(self):
        self.said, self.how_well = GOOD, WELL
        self.shadowed = Pairs()
        self.asked = 0
        self.error = None

    def pairs(self, rollout, *, cases_after, scenes_after):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.shadowed, self.said

    def health(self, rollout, now_s):
        return self.how_well


class Broker:
    """Keeps the retained message of every topic; takes nothing while `is_away`."""

    def __init__(self):
        self.retained = {}
        self.is_away = False
        self.count = 0

    def publish(self, topic, payload, *, retain=False):
        if self.is_away:
            return None
        assert retain
        self.count += 1
        self.retained[topic] = payload
        return 1

    def state_of(self, device):
        payload = self.retained.get(f"{PREFIX}/v1/{device}/down/desired")
        return None if payload is None else decode(payload)

    def wanted(self, device, model="pump"):
        state = self.state_of(device)
        models = [] if state is None else [each for each in state.models if each.model == model]
        return models[0] if models else None


class Fleet:
    """A hub's rollouts and the boards around them."""

    def __init__(self, store, names, *, labels=None, look_every_s=50.0):
        self.store = store
        self.broker = Broker()
        self.evidence = FakeEvidence()
        self.now_s = 1_000_000.0
        self.look_every_s = look_every_s
        self.serves = dict.fromkeys(names, SHIPPED)
        self.online = dict.fromkeys(names, True)
        self.reported = {}
        self.fails = set()
        self.hears = True
        # These boards' time goes in long steps.
        self.absent_s = math.inf
        self.size_error = None
        run = store.database.run
        row = {"first_seen_ms": 1, "last_seen_ms": 1, "online": True}
        run(lambda c: c.execute(insert(schema.devices), [{"name": name, **row} for name in names]))
        for name, its in (labels or {}).items():
            run(lambda c, name=name, its=its: set_labels(c, name, its))
        self.runner = self.new_runner()

    def new_runner(self):
        return RolloutRunner(
            self.store,
            self.broker.publish,
            lambda: self.evidence,
            prefix=PREFIX,
            size_of=self.size_of,
            rules=JudgeRules(),
            look_every_s=self.look_every_s,
            clock_s=lambda: self.now_s,
            submit=_at_once,
            hears=lambda: self.hears,
            absent_s=self.absent_s,
        )

    def size_of(self, number):
        if self.size_error is not None:
            raise self.size_error
        return 1000 + number

    def restart(self):
        self.runner = self.new_runner()
        self.turn()

    def release(self, number, *, model="pump", state="draft"):
        values = {
            "id": number, "model": model, "bundle": bytes([number]) * 32, "graph": bytes([7]) * 32,
            "weights": bytes([number, 1]) * 16, "state": state, "lineage": "{}", "figures": "{}",
            "created_at_ms": 1, "created_by": "ann",
        }  # fmt: skip
        self.store.database.run(lambda c: c.execute(insert(schema.releases).values(values)))
        return number

    def state_of_release(self, number):
        table = schema.releases
        query = table.select().where(table.c.id == number)
        return self.store.database.run(lambda c: c.execute(query).mappings().one()["state"])

    def start(self, release, **more):
        values = {"waves": WAVES, "limits": LIMITS, "is_signed": lambda *_: True, "by": "ann", **more}
        now_ms = round(self.now_s * 1000)
        return self.store.database.run(lambda c: start_rollout(c, release, now_ms=now_ms, **values))

    def order(self, rollout, kind, **more):
        now_ms = round(self.now_s * 1000)
        self.store.database.run(lambda c: order(c, rollout, kind, by="ann", now_ms=now_ms, **more))

    def state(self, rollout):
        return self.store.database.run(lambda c: get_rollout(c, rollout)).state

    def turn(self, seconds=0.0):
        self.now_s += seconds
        self.runner.take_turn()

    def set_online(self, name, is_online):
        if self.online[name] is is_online:
            return
        self.online[name] = is_online
        table = schema.devices
        self.store.database.run(
            lambda c: c.execute(update(table).where(table.c.name == name).values(online=is_online))
        )
        if is_online:
            self.runner.came_online([name])

    def boards_act(self, model="pump"):
        """Every board that is there becomes what is wanted, and says so once."""
        for name, is_online in self.online.items():
            wanted = self.broker.wanted(name, model)
            if not is_online or wanted is None or self.reported.get(name) == wanted.release:
                continue
            self.reported[name] = wanted.release
            failure = "golden" if (name, wanted.release) in self.fails else ""
            if not failure:
                self.serves[name] = wanted.release
            self.report(name, wanted.release, failure, model=model)

    def report(self, name, release, failure="", *, model="pump", serving=bytes(32)):
        values = {
            "device": name, "boot": bytes(8), "seq": next(_seqs), "model": model, "release": release,
            "bundle": bytes(32), "serving": serving, "failure": failure, "detail": "",
            "taken_at_ms": 1, "received_at_ms": 1,
        }  # fmt: skip
        self.store.database.run(lambda c: c.execute(insert(schema.swap_reports).values(values)))

    def go_on(self, seconds, *, step_s=25.0):
        for _ in range(round(seconds / step_s)):
            self.turn(step_s)
            self.boards_act()


def _at_once(measure):
    future = Future()
    try:
        future.set_result(measure())
    except Exception as error:
        future.set_exception(error)
    return future
