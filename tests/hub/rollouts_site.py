"""Virtual boards whose cases, reports and crashes are judged by the hub's own evidence."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

import msgspec
import numpy as np
from sqlalchemy import insert

from cloud_hub.core.rollout.waves import Sampling, Wave
from cloud_hub.models import HubModel
from cloud_hub.registry import release_directory
from cloud_hub.rollouts.evidence import StoreEvidence
from cloud_hub.store import schema
from cloud_hub.store.verdicts import Answered, insert_answers, pending_cases
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.bundle import load_bundle
from edge_cascade.ladder import Ladder
from edge_cascade.manifest import Wire
from edge_cascade.messages import DifferingPair, Reason, ShadowScene
from edge_cascade.tensors import encode_tensor
from tests.bundles import LABELS, SHAPE_1D, build
from tests.hub.fleet import BOOT, FULL_MODEL, a_delivery, a_new_case
from tests.hub.rollouts_fleet import Fleet

MODEL = "tiny"
NEW = 5
STEP_S = 100
PAST_S = 20 * 3600
SCENE_S = 60
SITE_WAVES = (
    Wave("canary", count=1, soak_s=600.0, max_drop=0.1, sampling=Sampling(0.1, 0.5)),
    Wave("half", share=0.5, soak_s=600.0, max_drop=0.1, sampling=Sampling(0.1, 0.5)),
    Wave("all", share=1.0, soak_s=600.0, max_drop=0.1),
)
PAIRS_A_SCENE = 20
ONE_IN = 10
"""Inputs of which the bundles say something else, among all."""


def two_bundles(tmp_path_factory):
    """An old and a new bundle, inputs of which they answer some alike and some not, what both say, the new one's
    directory."""
    directories = [
        build(tmp_path_factory.mktemp(f"seed{seed}") / "b", seed=seed) / "bundle" for seed in (0, 1)
    ]
    old, new = map(load_bundle, directories)
    x = np.random.default_rng(5).standard_normal((60, *SHAPE_1D)).astype(np.float32) * 3 + 1
    said = [
        [climb.answer.label for climb in Ladder(each, each.plan(), OnnxStage).climb_batch(x)]
        for each in (old, new)
    ]
    assert 5 < sum(a != b for a, b in zip(*said, strict=True)) < 60
    return old, new, x, said, directories[1]


@dataclass
class Board:
    """What a daemon counts: `boot` is one start of it."""

    number: int
    boot: bytes
    latency_us: int
    running_s: int = 0
    samples: int = 0
    failed: int = 0
    rss_bytes: int = 100_000_000
    milli_celsius: int = 50_000
    has_crashed: bool = False
    starts: int = 0
    latency_sum_us: int = 0

    def run(self, *, seconds, is_new, sick):
        """Let time pass; on the new release with what it does to boards."""
        ills = sick if is_new else {}
        self.running_s += seconds
        self.samples += seconds
        self.latency_sum_us += round(seconds * self.latency_us * ills.get("latency", 1.0))
        self.failed += round(seconds * ills.get("failed", 0.0))
        self.rss_bytes = round((100_000_000 + self.number) * ills.get("memory", 1.0))
        self.milli_celsius = 50_000 + round(1000 * ills.get("celsius", 0.0))
        if ills.get("crashes"):
            self.starts += 1
            self.boot = self.number.to_bytes(4, "big") + self.starts.to_bytes(4, "big")
            self.running_s = self.samples = self.failed = self.latency_sum_us = 0
            self.has_crashed = True

    def counters(self):
        """As a report has them."""
        return {
            f"edge_samples{{model={MODEL},exit=0,precision=int8}}": self.samples,
            f"edge_failed{{model={MODEL}}}": self.failed,
            f"edge_latency_count{{model={MODEL}}}": self.samples,
            f"edge_latency_sum_us{{model={MODEL}}}": self.latency_sum_us,
            "edge_running_s": self.running_s,
            "edge_rss_bytes": self.rss_bytes,
            "edge_celsius_milli": self.milli_celsius,
            "edge_crashes": int(self.has_crashed),
        }


@dataclass
class Behaviour:
    """What the new release is like, and which boards say nothing."""

    is_worse: bool = False
    sick: dict[str, float] = field(default_factory=dict)
    mute: set[str] = field(default_factory=set)
    """Boards that never say how a swap ended."""
    unheard: set[str] = field(default_factory=set)
    """Boards that do not report their numbers once they run the new release."""


class Site(Fleet):
    """A fleet under the hub's own evidence; release `NEW` is the new bundle, the old one is what was shipped."""

    def __init__(self, store, state_dir, bundles, names, *, has_past=True, behaviour=None):
        self.old, self.new, self.x, self.said, directory = bundles
        self.state_dir = state_dir
        self.behaviour = behaviour or Behaviour()
        self.boards = {
            name: Board(number, number.to_bytes(4, "big") + bytes(4), 1000 + number)
            for number, name in enumerate(names)
        }
        self._seq = 0
        self._inputs = 0
        self._differed = Counter()
        model = HubModel(
            MODEL, LABELS, SHAPE_1D, self.old.graph.preprocess, FULL_MODEL, lambda x: x, self.old
        )
        self._models = {MODEL: model}
        super().__init__(store, names, look_every_s=50.0)
        self._renew_evidence()
        target = release_directory(state_dir, self.new.bundle_id)
        target.parent.mkdir(parents=True)
        target.symlink_to(directory)
        self.release(NEW, model=MODEL)
        self._set_bundle()
        if has_past:
            self._report_all()
            self._run_all(PAST_S)
            self.now_s += PAST_S
            self._report_all()

    def start(self, release=NEW, **more):
        return super().start(
            release, **{"waves": SITE_WAVES, "scene_s": SCENE_S, "same_canaries": True, **more}
        )

    def restart(self):
        self._renew_evidence()
        super().restart()

    def kill_hub(self):
        """A hub that has not had its next turn yet."""
        self._renew_evidence()
        self.runner = self.new_runner()

    def report(self, name, release, failure="", *, model=MODEL):
        if name in self.behaviour.mute:
            return
        self._seq += 1
        self._insert(
            schema.swap_reports, device=name, boot=bytes(8), seq=self._seq, model=model, release=release,
            bundle=bytes(32), serving=bytes(32), failure=failure, detail="", taken_at_ms=1,
            received_at_ms=self._now_ms,
        )  # fmt: skip

    def go_on(self, seconds, *, step_s=STEP_S, until=lambda: False):
        for _ in range(round(seconds / step_s)):
            if until():
                return
            self._run_all(step_s)
            self.now_s += step_s
            self._report_all()
            self._show_inputs()
            self.runner.take_turn()
            self.boards_act(model=MODEL)

    # --- what boards do ------------------------------------------------------------------------------------

    @property
    def _now_ms(self):
        return round(self.now_s * 1000)

    def _is_new(self, name):
        return self.serves[name] == str(NEW)

    def _run_all(self, seconds):
        for name, board in self.boards.items():
            board.run(seconds=seconds, is_new=self._is_new(name), sick=self.behaviour.sick)

    def _report_all(self):
        for name, board in self.boards.items():
            if not self.online[name] or (self._is_new(name) and name in self.behaviour.unheard):
                continue
            self._seq += 1
            self._insert(
                schema.vitals, device=name, boot=board.boot, seq=self._seq, received_at_ms=self._now_ms,
                counters=json.dumps(board.counters()),
            )  # fmt: skip

    def _show_inputs(self):
        """An audit of every board, and a scene of those that shadow; the full model answers them all."""
        deliveries, labels = [], []
        for name in self.boards:
            if not self.online[name]:
                continue
            wanted = self.broker.wanted(name, MODEL)
            shown = self._next_input()
            self._seq += 1
            audit = self._case(name, shown, audit_ppm=1000, reason=Reason.AUDIT)
            deliveries.append(a_delivery(audit, device=name))
            labels.append(self._right(shown, Reason.AUDIT))
            if wanted is not None and wanted.shadow_ppm and self._is_new(name):
                shown = self._differing()[0]
                self._seq += 1
                deliveries.append(a_delivery(self._case(name, shown, reason=Reason.SHADOW), device=name))
                labels.append(self._right(shown, Reason.SHADOW))
                self._shadow(name, shown)
        self.store.commit(deliveries, now_ms=self._now_ms)
        run = self.store.database.run
        pending = run(lambda c: pending_cases(c, MODEL, 1000))
        answers = [
            Answered(case, label, b"", FULL_MODEL) for case, label in zip(pending, labels, strict=True)
        ]
        run(lambda c: insert_answers(c, answers, now_ms=self._now_ms))

    def _case(self, name, shown, **changes):
        tensor = encode_tensor(self.x[shown], Wire("float32"))
        return a_new_case(self._seq, device=name, model=MODEL, tensor=tensor, escalated=False, **changes)

    def _shadow(self, name, shown):
        pair = DifferingPair(self._seq, self.said[1][shown], self.said[0][shown])
        self._insert(
            schema.shadow_reports, device=name, boot=BOOT, seq=self._seq, model=MODEL,
            bundle=bytes.fromhex(self.new.bundle_id), other=bytes.fromhex(self.old.bundle_id),
            scenes=msgspec.msgpack.encode([ShadowScene("s1", PAIRS_A_SCENE, [pair])]),
            received_at_ms=self._now_ms,
        )  # fmt: skip

    def _differing(self):
        return [n for n in range(len(self.x)) if self.said[0][n] != self.said[1][n]]

    def _next_input(self):
        self._inputs += 1
        differing = self._differing()
        if self._inputs % ONE_IN == 0:
            return differing[self._inputs % len(differing)]
        return next(n for n in range(len(self.x)) if n not in differing)

    def _right(self, shown, reason):
        """The full model's label: of a release that is as good, each bundle is right every other time."""
        old, new = self.said[0][shown], self.said[1][shown]
        self._differed[reason] += old != new
        return old if self.behaviour.is_worse or self._differed[reason] % 2 else new

    # --- the store -----------------------------------------------------------------------------------------

    def _renew_evidence(self):
        self.evidence = StoreEvidence(self.store, self.state_dir, self._models, clock_s=lambda: self.now_s)

    def _set_bundle(self):
        table = schema.releases
        change = table.update().where(table.c.id == NEW).values(bundle=bytes.fromhex(self.new.bundle_id))
        self.store.database.run(lambda c: c.execute(change))

    def _insert(self, table, **values):
        self.store.database.run(lambda c: c.execute(insert(table).values(values)))
