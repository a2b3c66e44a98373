"""Pairs are counted exactly, each input once, the same however often one looks; windows survive restarts."""

import itertools
import json
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import insert

from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.core.rollout.findings import Metric, Worse
from cloud_hub.core.rollout.judge import NO_REFERENCE, Pairs, Scene, decide_drift
from cloud_hub.core.rollout.rollout import begin
from cloud_hub.core.rollout.state import Outcome
from cloud_hub.core.rollout.waves import DEFAULT_WAVES, Device
from cloud_hub.core.rollout.windows import CounterRow, Stretch, course_of, vitals_of
from cloud_hub.errors import RolloutError
from cloud_hub.models import HubModel
from cloud_hub.registry import release_directory
from cloud_hub.rollouts import evidence as evidence_module
from cloud_hub.rollouts import shadows as shadows_module
from cloud_hub.rollouts.answers import BundleAnswers
from cloud_hub.rollouts.evidence import StoreEvidence, _count_audits
from cloud_hub.store import schema
from cloud_hub.store.releases import insert_release
from cloud_hub.store.store import Store
from cloud_hub.store.verdicts import Answered, insert_answers, label_case, pending_cases
from edge_cascade.ladder import Ladder
from edge_cascade.manifest import Wire
from edge_cascade.messages import DifferingPair, Reason, ShadowScene
from edge_cascade.packing import pack_probabilities
from edge_cascade.tensors import encode_tensor
from tests.bundles import LABELS, SHAPE_1D
from tests.hub.fleet import BOOT, FULL_MODEL, a_delivery, a_new_case
from tests.hub.rollouts_site import two_bundles

MODEL = "tiny"
SCENE_S = 300
LATE_S = 1_000_000.0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return two_bundles(tmp_path_factory)


class Bench:
    """A store with a release, its rollout, and cases put there by its commit path."""

    def __init__(self, path, bundles):
        self.path = path
        self.old, self.new, self.x, self.said, directory = bundles
        self.store = Store(path)
        self.store.open()
        self.model = HubModel(
            MODEL, LABELS, SHAPE_1D, self.old.graph.preprocess, FULL_MODEL, lambda x: x, self.old
        )
        target = release_directory(path, self.new.bundle_id)
        if not target.exists():
            target.parent.mkdir(parents=True)
            target.symlink_to(directory)
        self.store.database.run(
            lambda c: insert_release(
                c,
                {
                    "model": MODEL,
                    "bundle": bytes.fromhex(self.new.bundle_id),
                    "graph": bytes(32),
                    "weights": bytes(32),
                    "state": ReleaseState.DRAFT.value,
                    "series": None,
                    "lineage": "{}",
                    "figures": "{}",
                    "created_at_ms": 1,
                    "created_by": "ada",
                },
            )
        )
        self.rollout, _ = begin(
            "r1",
            model=MODEL,
            release="1",
            previous=None,
            waves=DEFAULT_WAVES,
            fleet=[Device(f"press-{n}") for n in range(1, 13)],
            now_s=0.0,
            by="ada",
        )

    def evidence(self, *, now_s=LATE_S, **options):
        return StoreEvidence(self.store, self.path, {MODEL: self.model}, clock_s=lambda: now_s, **options)

    def look(self, evidence=None, *, cases_after=0, scenes_after=0, **options):
        evidence = evidence or self.evidence(**options)
        shadowed, audited = evidence.pairs(self.rollout, cases_after=cases_after, scenes_after=scenes_after)
        return shadowed + audited

    def audit(self, *inputs, at_s=10.0, **changes):
        values = {"audit_ppm": 1000, "escalated": False, "reason": Reason.AUDIT} | changes
        self.put(*inputs, at_s=at_s, **values)

    def put(self, *inputs, at_s, **values):
        cases = [
            a_new_case(n, model=MODEL, tensor=encode_tensor(self.x[n], Wire("float32")), **values)
            for n in inputs
        ]
        self.store.commit([a_delivery(*cases)], now_ms=round(at_s * 1000))

    def answer(self, label_of):
        """The full model's word on all that is pending: `label_of` a case's id."""
        pending = self.store.database.run(lambda c: pending_cases(c, MODEL, 1000))
        answers = [Answered(each, label_of(each.case_id), b"", FULL_MODEL) for each in pending]
        self.store.database.run(lambda c: insert_answers(c, answers, now_ms=2))

    def label(self, case_id, to):
        certain = pack_probabilities([float(index == to) for index in range(len(LABELS))])
        self.store.database.run(
            lambda c: label_case(
                c, case_id, to, probabilities=certain, full_model=FULL_MODEL, labelled_by="ada", now_ms=3
            )
        )

    def shadow(self, *scenes, seq=1, served=None, device="press-1"):
        served = served or self.new
        other = self.old if served is self.new else self.new
        row = {
            "device": device,
            "boot": BOOT,
            "seq": seq,
            "model": MODEL,
            "bundle": bytes.fromhex(served.bundle_id),
            "other": bytes.fromhex(other.bundle_id),
            "scenes": msgspec.msgpack.encode(list(scenes)),
            "received_at_ms": 5,
        }
        self.store.database.run(lambda c: c.execute(insert(schema.shadow_reports).values(row)))

    def differing(self, count):
        found = [n for n in range(len(self.x)) if self.said[0][n] != self.said[1][n]]
        return found[:count]

    def alike(self, count):
        return [n for n in range(len(self.x)) if self.said[0][n] == self.said[1][n]][:count]


@pytest.fixture
def bench(tmp_path, bundles):
    bench = Bench(tmp_path, bundles)
    yield bench
    bench.store.close()


def slow_count(rows, labels, until_ms):
    """Reference: a dictionary of lists, counted one by one."""
    scenes = {}
    for (device, sensor, at_ms), said in zip(rows, labels, strict=True):
        stretch = at_ms // (SCENE_S * 1000)
        if (stretch + 2) * SCENE_S * 1000 <= until_ms:
            scenes.setdefault((device, sensor, stretch), []).append(said)
    total, of_many = Counter(), Counter()
    for said in scenes.values():
        counts = Counter()
        for old, new, right in said:
            counts["count"] += 1
            if old != new:
                counts["differing"] += 1
                kind = {old: "lost", new: "won", NO_REFERENCE: "pending"}.get(right)
                if kind:
                    counts[kind] += 1
        total += counts
        if len(said) > 1:
            of_many[len(said), counts["lost"], counts["won"], counts["pending"]] += 1
    return Pairs(**total, scenes=tuple(Scene(*each, n) for each, n in sorted(of_many.items())))


LABEL = st.integers(0, 2)


@given(
    st.lists(
        st.tuples(
            st.tuples(
                st.sampled_from(["a", "b"]), st.sampled_from(["s", "t"]), st.integers(0, 4 * SCENE_S * 1000)
            ),
            st.tuples(LABEL, LABEL, st.integers(-1, 2)),
        ),
        max_size=40,
    ),
    st.integers(0, 6 * SCENE_S * 1000),
)
def test_counting_agrees_with_a_slow_reference(cases, until_ms):
    rows, labels = [row for row, _ in cases], [said for _, said in cases]
    assert _count_audits(rows, labels, scene_s=SCENE_S, until_ms=until_ms) == slow_count(
        rows, labels, until_ms
    )


def test_audits_are_answered_by_both_bundles_and_counted_exactly(bench):
    lost, won, waits = bench.differing(3)
    same = bench.alike(2)
    bench.audit(lost, won, waits, *same)
    bench.answer(lambda case_id: bench.said[case_id - 1][(lost, won)[case_id - 1]] if case_id < 3 else 0)
    right = {3: bench.said[1][waits]}
    for case_id, label in right.items():
        bench.label(case_id, label)
    assert bench.look() == Pairs(5, 3, 1, 2, 0, (Scene(5, 1, 2, 0, 1),))


def test_without_a_verdict_a_differing_pair_waits(bench):
    bench.audit(*bench.differing(2), *bench.alike(1))
    assert bench.look() == Pairs(3, 2, 0, 0, 2, (Scene(3, 0, 0, 2, 1),))


def test_a_persons_label_overrides_the_full_models_between_two_looks(bench):
    (n,) = bench.differing(1)
    bench.audit(n)
    bench.answer(lambda _: bench.said[0][n])
    evidence = bench.evidence()
    assert bench.look(evidence) == Pairs(1, 1, 1, 0, 0)
    bench.label(1, bench.said[1][n])
    assert bench.look(evidence) == Pairs(1, 1, 0, 1, 0)


def test_what_another_full_model_said_is_no_reference(bench):
    bench.audit(*bench.differing(1))
    bench.answer(lambda _: 0)
    bench.model = HubModel(
        MODEL, LABELS, SHAPE_1D, bench.old.graph.preprocess, bytes(32), lambda x: x, bench.old
    )
    assert bench.look() == Pairs(1, 1, 0, 0, 1)


def test_escalations_shadow_cases_other_boards_and_earlier_ones_are_not_counted(bench):
    first, second, third, fourth, fifth = range(5)
    bench.audit(first)
    bench.put(second, at_s=10.0)
    bench.audit(third, reason=Reason.SHADOW)
    bench.audit(fourth, device="stranger")
    bench.audit(fifth, reason=Reason.UNSURE_AND_AUDIT, escalated=True)
    assert bench.look().count == 2
    assert bench.look(cases_after=1).count == 1


def test_scenes_that_are_not_over_are_left_out(bench):
    bench.audit(0, 1, at_s=10.0)
    bench.audit(2, at_s=310.0)
    assert bench.look(now_s=599.9).count == 0
    assert bench.look(now_s=600.0) == replace(bench.look(now_s=899.0))
    assert bench.look(now_s=600.0).count == 2
    assert bench.look(now_s=900.0).count == 3


def test_many_looks_a_budget_and_a_restart_give_what_one_look_gives(bench, bundles, monkeypatch):
    monkeypatch.setattr(evidence_module, "PAGE", 4)
    evidence = bench.evidence(max_replays=4)
    for start in range(0, 20, 5):
        bench.audit(*range(start, start + 5), at_s=start * 100.0, sensor=f"s{start % 2}")
        bench.look(evidence)
    bench.answer(lambda case_id: case_id % 4)
    counts = [bench.look(evidence).count for _ in range(8)]
    assert counts == sorted(counts)
    whole = bench.look()
    assert whole.count == 20
    assert bench.look(evidence) == whole
    bench.store.close()
    again = Bench(bench.path, bundles)
    try:
        assert again.look() == whole
    finally:
        again.store.close()


def test_a_case_is_answered_by_each_bundle_only_once(bench, monkeypatch):
    asked = []
    climb = Ladder.climb_batch
    monkeypatch.setattr(Ladder, "climb_batch", lambda self, x: asked.append(len(x)) or climb(self, x))
    evidence = bench.evidence()
    bench.audit(0, 1)
    bench.look(evidence)
    bench.audit(2)
    bench.look(evidence)
    bench.look(evidence)
    assert asked == [2, 2, 1, 1]


def test_labels_beyond_the_bound_are_answered_again_and_are_the_same(bench):
    bench.audit(0, 1, 2)
    rows = bench.store.database.run(
        lambda c: evidence_module.audited_page(c, MODEL, FULL_MODEL, after_id=0, limit=9)
    )
    answers = BundleAnswers(bench.old, max_kept=2)
    assert answers.labels_of(bench.store.blobs, rows) == bench.said[0][:3]
    assert answers.missing([1, 2, 3]) == [1]
    assert answers.labels_of(bench.store.blobs, rows) == bench.said[0][:3]


def test_a_damaged_tensor_is_no_pair(bench):
    bench.audit(0)
    bench.store.commit(
        [a_delivery(a_new_case(9, model=MODEL, audit_ppm=9, escalated=False, reason=Reason.AUDIT))],
        now_ms=10_000,
    )
    assert bench.look().count == 1


def test_shadowed_scenes_are_joined_with_the_verdicts_of_their_cases(bench):
    bench.put(0, 1, 2, at_s=1.0, reason=Reason.SHADOW, escalated=False)
    bench.answer(lambda case_id: {1: 0, 2: 1, 3: 2}[case_id])
    bench.shadow(
        ShadowScene("s1", 50, [DifferingPair(0, 1, 0), DifferingPair(1, 1, 0), DifferingPair(77, 1, 0)]),
        ShadowScene("s1", 1, [DifferingPair(2, 0, 1)]),
    )
    assert bench.look() == Pairs(51, 4, 1, 1, 1, (Scene(50, 1, 1, 1, 1),))
    assert bench.look(scenes_after=1) == Pairs()


def test_where_the_old_bundle_answered_the_sides_are_changed(bench):
    bench.put(0, at_s=1.0, reason=Reason.SHADOW, escalated=False)
    bench.answer(lambda _: 1)
    bench.shadow(ShadowScene("s1", 2, [DifferingPair(0, 1, 0)]), served=bench.old)
    assert bench.look() == Pairs(2, 1, 1, 0, 0, (Scene(2, 1, 0, 0, 1),))


def test_scenes_that_contradict_themselves_count_nothing(bench):
    bench.shadow(
        ShadowScene("s1", 1, [DifferingPair(0, 1, 0), DifferingPair(1, 1, 0)]),
        ShadowScene("s1", 9, [DifferingPair(0, 1, 0), DifferingPair(0, 1, 0)]),
        ShadowScene("s1", 9, [DifferingPair(0, 1, 1)]),
    )
    assert bench.look() == Pairs()


def test_every_look_reads_what_is_new_alone(bench, monkeypatch):
    read = []
    page = shadows_module.shadow_page
    monkeypatch.setattr(
        shadows_module, "shadow_page", lambda *args, **more: read.append(page(*args, **more)) or read[-1]
    )
    evidence = bench.evidence()
    counts = []
    for seq in range(1, 6):
        bench.shadow(ShadowScene("s1", 10, [DifferingPair(seq, 1, 0)]), seq=seq)
        counts.append(bench.look(evidence).count)
    assert counts == [10, 20, 30, 40, 50]
    assert [each.id for page in read for each in page] == [1, 2, 3, 4, 5]


def test_whatever_comes_in_which_order_looks_count_what_one_look_counts(bench, monkeypatch):
    monkeypatch.setattr(shadows_module, "PAGE", 3)
    draw = np.random.default_rng(11)
    evidence, cases = bench.evidence(), 0
    members = bench.rollout.members
    found = set()
    for seq in range(90):
        match draw.integers(5):
            case 0:
                device = f"press-{draw.integers(1, 4)}"
                bench.put(cases, at_s=1.0, reason=Reason.SHADOW, escalated=False, device=device)
                cases += 1
            case 1:
                bench.answer(lambda case_id: case_id % 3)
            case 2 if cases:
                bench.label(int(draw.integers(1, cases + 1)), int(draw.integers(3)))
            case 3:
                gone = [f"press-{n}" for n in range(1, 4) if draw.integers(2)]
                kept = {name: each for name, each in members.items() if name not in gone}
                bench.rollout = replace(bench.rollout, members=kept)
            case _:
                named = draw.choice(max(cases, 1) + 2, size=2, replace=False)
                scene = ShadowScene(
                    "s1", int(draw.integers(2, 9)), [DifferingPair(int(n), 1, 0) for n in named]
                )
                served = bench.new if draw.integers(2) else bench.old
                bench.shadow(scene, seq=seq, device=f"press-{draw.integers(1, 4)}", served=served)
        counted = bench.look(evidence)
        assert counted == bench.look()
        found.add(counted)
    assert len(found) > 20


def test_counts_of_another_full_model_are_not_kept(bench):
    bench.put(0, at_s=1.0, reason=Reason.SHADOW, escalated=False)
    bench.answer(lambda _: 1)
    bench.shadow(ShadowScene("s1", 2, [DifferingPair(0, 1, 0)]))
    models = {MODEL: bench.model}
    evidence = StoreEvidence(bench.store, bench.path, models, clock_s=lambda: LATE_S)
    assert bench.look(evidence).won == 1
    models[MODEL] = HubModel(
        MODEL, LABELS, SHAPE_1D, bench.old.graph.preprocess, bytes(32), lambda x: x, bench.old
    )
    assert bench.look(evidence) == Pairs(2, 1, 0, 0, 1, (Scene(2, 0, 0, 1, 1),))


def test_drift_compares_the_boards_with_the_audits(bench):
    bench.audit(*bench.alike(6))
    bench.shadow(ShadowScene("s1", 200, [DifferingPair(n, 1, 0) for n in range(200)]))
    hint = decide_drift(*bench.evidence().pairs(bench.rollout, cases_after=0, scenes_after=0))
    assert (hint.on_board, hint.in_hub, hint.is_suspicious) == (1.0, 0.0, True)


def test_a_bundle_that_is_gone_is_named(bench):
    release_directory(bench.path, bench.new.bundle_id).unlink()
    with pytest.raises(RolloutError, match=rf"bundle {bench.new.bundle_id[:12]} of 'tiny' cannot be read"):
        bench.look()


# --- health ------------------------------------------------------------------------------------------------

_seqs = itertools.count(1)


def counters(samples, *, running_s=0, latency_us=1000, failed=0, rss=10**8, crashes=0):
    return {
        f"edge_samples{{model={MODEL},exit=0,precision=int8}}": samples,
        f"edge_failed{{model={MODEL}}}": failed,
        f"edge_latency_count{{model={MODEL}}}": samples,
        f"edge_latency_sum_us{{model={MODEL}}}": samples * latency_us,
        "edge_running_s": running_s,
        "edge_rss_bytes": rss,
        "edge_crashes": crashes,
    }


def report(bench, device, boot, at_s, numbers):
    row = {
        "device": device,
        "boot": boot,
        "seq": next(_seqs),
        "received_at_ms": round(at_s * 1000),
        "counters": json.dumps(numbers),
    }
    bench.store.database.run(lambda c: c.execute(insert(schema.vitals).values(row)))


def committed(bench, device, at_s):
    row = {
        "device": device,
        "boot": BOOT,
        "seq": next(_seqs),
        "model": MODEL,
        "release": "1",
        "bundle": bytes(32),
        "serving": bytes(32),
        "failure": "",
        "detail": "",
        "taken_at_ms": 1,
        "received_at_ms": round(at_s * 1000),
        "noted": True,
    }
    bench.store.database.run(lambda c: c.execute(insert(schema.swap_reports).values(row)))


def swapped_fleet(bench, *, latency_after, of_controls):
    """Six boards that swapped at 10 000 s and six left alone, with an hour of reports on either side."""
    members = dict(bench.rollout.members)
    for n, name in enumerate(sorted(members)):
        is_treated = n < 6
        latency = latency_after if is_treated else of_controls
        for boot, since_s, each in ((b"before!!", 5000, 1000 + n), (b"after!!!", 11_000, latency + n)):
            for step in range(4):
                numbers = counters(100 * step, running_s=1000 * step, latency_us=each)
                report(bench, name, boot, since_s + 1000 * step, numbers)
        if is_treated:
            members[name] = replace(
                members[name], is_offered=True, reached_s=9500.0, outcome=Outcome.COMMITTED
            )
            committed(bench, name, 10_000.0)
    return replace(bench.rollout, members=members, wave=0)


def test_boards_that_became_slow_are_found_and_a_slow_day_is_not(bench):
    rollout = swapped_fleet(bench, latency_after=2000, of_controls=1000)
    (worse,) = bench.evidence().health(rollout, 15_000.0).worse
    assert isinstance(worse, Worse)
    assert (worse.metric, worse.boards) == (Metric.LATENCY, 6)


def test_what_the_boards_left_alone_have_too_is_nobodys_fault(bench):
    rollout = swapped_fleet(bench, latency_after=2000, of_controls=2000)
    health = bench.evidence().health(rollout, 15_000.0)
    assert not health.worse
    assert not health.unknown


def test_before_any_board_swapped_health_is_unknown(bench):
    assert {each.metric for each in bench.evidence().health(bench.rollout, 10.0).unknown} >= {Metric.LATENCY}


def row(boot, at_s, samples, **more):
    return CounterRow(boot, at_s, counters(samples, **more))


def test_a_window_sums_over_starts_from_where_it_began():
    rows = [
        row(b"a", 1, 50, running_s=60),
        row(b"a", 2, 80, running_s=90),
        row(b"b", 3, 7, running_s=5, crashes=1),
    ]
    vitals = vitals_of(rows, MODEL)
    assert (vitals.samples, vitals.running_s, vitals.restarts) == (37, 35.0, 1)
    assert vitals.latency_ms == 1.0


def test_a_crash_before_the_first_report_of_a_window_counts():
    crashed = [row(b"b", 130, 5, running_s=10, crashes=1), row(b"b", 430, 50, running_s=310, crashes=1)]
    course = course_of([row(b"a", 50, 9, running_s=900), *crashed], MODEL, Stretch(0, 90), Stretch(100, 500))
    assert course.before.restarts == 0
    assert (course.after.restarts, course.after.samples, course.after.running_s) == (1, 50, 310.0)
    running = [row(b"a", 130, 5, running_s=99, crashes=1), row(b"a", 430, 50, running_s=399, crashes=1)]
    after = course_of(running, MODEL, Stretch(0, 90), Stretch(100, 500)).after
    assert (after.restarts, after.samples, after.running_s) == (0, 45, 300.0)


def test_what_is_not_reported_is_none_and_no_report_is_no_window():
    vitals = vitals_of([CounterRow(b"a", 1.0, {}), CounterRow(b"a", 2.0, {})], MODEL)
    assert (vitals.samples, vitals.errors, vitals.restarts) == (0, None, None)
    assert (vitals.latency_ms, vitals.memory_bytes, vitals.temp_celsius) == (None, None, None)
    course = course_of([row(b"a", 5.0, 1)], MODEL, Stretch(0, 1), Stretch(4, 6))
    assert course.before is None
    assert course.after is not None


def test_another_models_counters_are_not_this_ones():
    assert vitals_of([row(b"a", 1, 3), row(b"a", 2, 9)], "tin").samples == 0


@settings(max_examples=50)
@given(st.data())
def test_windows_count_what_happened_whatever_the_order_and_wherever_starts_lie(data):
    starts = data.draw(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=4))
    rows, happened, at_s = [], 0, 0.0
    for index, steps in enumerate(starts):
        totals = list(itertools.accumulate(steps))
        happened += totals[-1] - (totals[0] if index == 0 else 0)
        for total in totals:
            at_s += 1.0
            rows.append(row(bytes([index]), at_s, total))
    shuffled = data.draw(st.permutations(rows))
    vitals = vitals_of(shuffled, MODEL)
    assert vitals == vitals_of(rows, MODEL)
    assert vitals.samples == happened
