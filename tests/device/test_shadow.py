"""A second bundle asked on live samples: which pairs are drawn, what is reported, what it may cost."""

import contextlib
import queue
import random
import threading
from concurrent.futures import Future
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.bundle import load_bundle
from edge_cascade.errors import BackendError
from edge_cascade.gate import Exit
from edge_cascade.ladder import Climb
from edge_cascade.messages import (
    SHIPPED,
    Case,
    DesiredModel,
    DifferingPair,
    Reason,
    ShadowReport,
    ShadowScene,
)
from edge_cascade.shipped import find_bundle
from edge_daemon.core.scenes import (
    MAX_DIFFERING_A_REPORT,
    MAX_OPEN,
    MAX_PAIRS,
    MAX_SCENES_A_REPORT,
    Allowance,
    Scenes,
    select_reports,
)
from edge_daemon.core.spooling import SHADOW_PLAN, ItemKind
from edge_daemon.pipeline import Answer, Outcome, Sample
from edge_daemon.shadow import AGAIN_S, Shadow, Shadowing, Surroundings
from edge_daemon.side_thread import MAX_WAITING

from .signed_fleet import FakeClock

BOOT = bytes(range(8))
LABEL_HERE, LABEL_THERE = 3, 5
pytestmark = pytest.mark.filterwarnings("error")


# --- scenes --------------------------------------------------------------------------------------------


def add(scenes, sensor, differing, now_s):
    """As whoever draws does it; whether there was room."""
    has_room = scenes.has_room(sensor, now_s=now_s)
    if has_room:
        scenes.add(sensor, differing, now_s=now_s)
    return has_room


def test_scene_ends_when_its_time_is_over_and_not_before():
    scenes = Scenes(300.0)
    add(scenes, "a", None, 0.0)
    add(scenes, "b", None, 100.0)
    pair = DifferingPair(7, 1, 2)
    add(scenes, "a", pair, 299.0)

    assert scenes.take_over(now_s=299.9) == []
    assert scenes.take_over(now_s=300.0) == [ShadowScene("a", 2, [pair])]
    assert scenes.take_over(now_s=300.0) == []
    assert scenes.take_all() == [ShadowScene("b", 1, [])]


def test_pair_after_the_end_of_a_scene_begins_another():
    scenes = Scenes(10.0)
    add(scenes, "a", None, 0.0)
    add(scenes, "a", None, 10.0)

    assert scenes.take_all() == [ShadowScene("a", 1, []), ShadowScene("a", 1, [])]


@pytest.mark.parametrize("differs", [True, False])
def test_a_fast_sensor_has_one_scene_a_stretch_and_no_more_pairs_than_a_report_holds(differs):
    scenes = Scenes(300.0)
    pairs = [DifferingPair(seq, 0, 1) if differs else None for seq in range(MAX_PAIRS + 10)]
    taken = [add(scenes, "a", pair, 1.0) for pair in pairs]

    assert taken == [True] * MAX_PAIRS + [False] * 10
    assert not scenes.has_room("a", now_s=300.9)
    assert scenes.has_room("b", now_s=300.9)
    assert scenes.has_room("a", now_s=301.0)
    (scene,) = scenes.take_over(now_s=301.0)
    assert (scene.pairs, len(scene.differing)) == (MAX_PAIRS, MAX_PAIRS if differs else 0)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.booleans(), st.floats(0.0, 50.0)),
        max_size=60,
    )
)
def test_no_pair_is_lost_or_counted_twice(pairs):
    scenes, now_s, told = Scenes(30.0), 0.0, []
    for seq, (sensor, differs, later_s) in enumerate(pairs):
        now_s += later_s
        assert add(scenes, str(sensor), DifferingPair(seq, 0, 1) if differs else None, now_s)
        if seq % 7 == 0:
            told += scenes.take_over(now_s=now_s)
    told += scenes.take_all()

    assert sum(scene.pairs for scene in told) == len(pairs)
    seqs = sorted(pair.seq for scene in told for pair in scene.differing)
    assert seqs == [seq for seq, (_, differs, _) in enumerate(pairs) if differs]


def test_open_scenes_are_bounded_and_a_sensor_beyond_waits_for_one_to_end():
    scenes = Scenes(100.0)
    taken = [add(scenes, str(sensor), None, 1.0) for sensor in range(MAX_OPEN + 2)]

    assert taken == [True] * MAX_OPEN + [False] * 2
    assert scenes.has_room("0", now_s=1.0)
    assert scenes.has_room(str(MAX_OPEN), now_s=101.0)
    assert len(scenes.take_over(now_s=101.0)) == MAX_OPEN


@given(st.lists(st.integers(0, 1024), max_size=700))
def test_reports_hold_every_scene_in_order_and_no_more_than_the_message_does(differing):
    scenes = [
        ShadowScene(str(n), 1024, [DifferingPair(0, 0, 1)] * count) for n, count in enumerate(differing)
    ]

    reports = select_reports(scenes)

    assert [scene for report in reports for scene in report] == scenes
    assert all(1 <= len(report) <= MAX_SCENES_A_REPORT for report in reports)
    assert all(sum(len(scene.differing) for scene in report) <= MAX_DIFFERING_A_REPORT for report in reports)


def test_allowance_is_spent_and_comes_back_with_time():
    allowance = Allowance(2.0)
    assert allowance.allows(now_s=0.0)
    allowance.charge()
    allowance.charge()
    assert not allowance.allows(now_s=0.0)
    assert not allowance.allows(now_s=1799.0)
    assert allowance.allows(now_s=1800.0)


def test_allowance_of_less_than_one_an_hour_is_one_in_more_hours_and_none_is_none():
    allowance = Allowance(0.5)
    assert [allowance.allows(now_s=3600.0 * hour) for hour in range(3)] == [False, True, True]
    allowance.charge()
    assert [allowance.allows(now_s=3600.0 * hour) for hour in (2, 3, 4, 5)] == [False, False, True, True]
    assert not any(Allowance(0.0).allows(now_s=3600.0 * hour) for hour in range(9))


def test_overdrawn_allowance_is_paid_back_first():
    allowance = Allowance(60.0)
    assert allowance.allows(now_s=0.0)
    for _ in range(90):
        allowance.charge()
    assert not allowance.allows(now_s=1800.0)
    assert allowance.allows(now_s=1860.0)


# --- the shadow ----------------------------------------------------------------------------------------


class FakeSpool:
    """Holds what it is given, and says when."""

    def __init__(self):
        self.items = queue.Queue()

    def append(self, item):
        self.items.put(item)
        done = Future()
        done.set_result(None)
        return done

    def next(self):
        return self.items.get(timeout=20)

    def all(self):
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self.items.get_nowait())
        return found


class FakeLadder:
    """Says what it is told to; `gate` holds it up."""

    def __init__(self):
        self.label = LABEL_THERE
        self.failed = False
        self.error = None
        self.asked = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def climb(self, x):
        self.asked.release()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        exit_ = Exit(0, self.label, 0.9, 0.1)
        return Climb((exit_,), exit_, accepted=True, failed=self.failed)


@pytest.fixture(scope="module")
def bundles():
    return load_bundle(find_bundle("digits")), load_bundle(find_bundle("vibration"))


class Board:
    """A shadow with the digits bundle serving and another directory beside it."""

    def __init__(self, bundle, *, per_hour=1e6):
        self.bundle = bundle
        self.spool, self.ladder, self.clock = FakeSpool(), FakeLadder(), FakeClock()
        self.opened = threading.Event()
        self.seqs = iter(range(10_000, 20_000))
        self.shadow = Shadow(
            Surroundings(
                "board", BOOT, lambda: next(self.seqs), self.spool, self.clock, open_ladder=self._open
            ),
            lambda _: self.bundle,
            max_cases_per_hour=per_hour,
            rng=random.Random(1),
        )
        self.shadow.start()

    def _open(self, _):
        self.opened.set()
        return self.ladder

    def compare(self, **terms):
        self.hear(**terms)
        self.wait(self.is_comparing)

    def hear(self, *, model="digits", ppm=1_000_000, bundle=None, serving=None, other=True, scene_s=300):
        asked = DesiredModel(
            model, "4", bytes.fromhex(bundle or self.bundle.bundle_id), shadow_ppm=ppm, scene_s=scene_s
        )
        directory = find_bundle("vibration") if other else None
        self.shadow.hear(Shadowing(asked, serving or self.bundle.bundle_id, directory))

    def wait(self, is_done):
        # The thread's own look, bounded: nothing else tells that terms were taken up.
        deadline = threading.Event()
        for _ in range(2000):
            if is_done():
                return
            deadline.wait(0.01)
        raise AssertionError("not within 20 s")

    def is_comparing(self):
        return "digits" in self.shadow._shares

    def observe(self, seq, **changed):
        self.shadow.observe("digits", a_sample(), an_outcome(self.bundle, seq, **changed))

    def stopped(self):
        self.shadow.stop()
        return self.spool.all()


@pytest.fixture
def board(bundles):
    made = Board(bundles[0])
    yield made
    made.ladder.gate.set()
    made.shadow.stop()


def a_sample(received_s=1000.0):
    return Sample("s1", np.zeros((64,), np.float32), received_s, 5)


def an_outcome(bundle, seq, *, escalated=False, audited=False, failed=False, answered=True, served=None):
    exit_ = Exit(0, LABEL_HERE, 0.8, 0.2)
    case = None
    if escalated or audited:
        ppm, reason = (1000, Reason.AUDIT) if audited else (0, Reason.UNSURE)
        case = Case(seq, "s1", 5, 0, b"", escalated, ppm, reason, escalated, False, b"")
    if not answered:
        return Outcome(None, None, case)
    answer = Answer(
        f"{BOOT.hex()}-{seq}", "s1", "digits", "3", 0.8, 0.2, 0, 0, "int8",
        served or bundle.bundle_id, "all", 2, 100, escalated, audited, escalated, False, 5,
    )  # fmt: skip
    return Outcome(answer, Climb((exit_,), exit_, accepted=not escalated, failed=failed), case)


def reports_of(items):
    return [msgspec.msgpack.decode(item.body, type=ShadowReport) for item in items if is_report(item)]


def is_report(item):
    return item.key.kind is ItemKind.REPORT


def test_differing_sample_is_sent_as_a_shadowed_case_and_reported_with_its_scene(board, bundles):
    board.compare()
    board.observe(17)

    case_row = board.spool.next()
    case = msgspec.msgpack.decode(case_row.body, type=Case)
    assert (case.seq, case.reason, case.escalated, case.audit_ppm, case.point) == (
        17,
        Reason.SHADOW,
        False,
        0,
        2,
    )
    assert case_row.key.bundle.hex() == bundles[0].bundle_id

    (row,) = board.stopped()
    (report,) = reports_of([row])
    assert row.key.plan == SHADOW_PLAN
    assert (report.device, report.boot, report.seq, report.model) == ("board", BOOT, 10_000, "digits")
    assert (report.bundle.hex(), report.other.hex()) == (bundles[0].bundle_id, bundles[1].bundle_id)
    assert report.scenes == [ShadowScene("s1", 1, [DifferingPair(17, LABEL_HERE, LABEL_THERE)])]


def test_same_label_is_a_pair_and_no_case(board):
    board.compare()
    board.ladder.label = LABEL_HERE
    board.observe(1)
    board.observe(2)

    items = board.stopped()
    assert [report.scenes for report in reports_of(items)] == [[ShadowScene("s1", 2, [])]]
    assert len(items) == 1


def test_escalated_sample_that_differs_is_not_sent_twice(board):
    board.compare()
    board.observe(9, escalated=True)

    (row,) = board.stopped()
    assert reports_of([row])[0].scenes[0].differing == [DifferingPair(9, LABEL_HERE, LABEL_THERE)]


@pytest.mark.parametrize(
    "left_out",
    [
        {"audited": True},
        {"audited": True, "escalated": True},
        {"failed": True, "escalated": True},
        {"answered": False, "escalated": True},
        {"served": "ab" * 32},
    ],
)
def test_sample_that_is_audited_or_failed_or_of_another_bundle_is_no_pair(board, left_out):
    board.compare()
    board.observe(1, **left_out)

    assert board.stopped() == []
    assert board.shadow.pairs == 0


@pytest.mark.parametrize("broken", ["error", "failed"])
def test_sample_that_the_other_bundle_cannot_answer_is_no_pair(board, broken):
    board.compare()
    setattr(board.ladder, broken, BackendError("no") if broken == "error" else True)
    board.observe(1)

    assert board.stopped() == []


@pytest.mark.parametrize(
    "asked",
    [
        {"ppm": 0},
        {"other": False},
        {"bundle": "cd" * 32},
    ],
)
def test_nothing_is_compared_where_nothing_is_asked_or_neither_bundle_is_the_one_judged(board, asked):
    board.hear(**asked)
    board.observe(1)

    assert board.stopped() == []
    assert not board.opened.is_set()


def test_unreadable_other_bundle_is_said_and_nothing_is_compared(board, tmp_path, caplog):
    asked = DesiredModel("digits", "4", bytes.fromhex(board.bundle.bundle_id), shadow_ppm=1_000_000)
    board.shadow.hear(Shadowing(asked, board.bundle.bundle_id, tmp_path / "gone"))
    board.wait(lambda: "not shadowed" in caplog.text)
    board.observe(1)

    assert board.stopped() == []


def test_what_could_not_be_opened_is_tried_again_unless_something_else_is_asked_for(board, caplog):
    ladder, short = board.ladder, threading.Event()

    def open_ladder(_):
        if not short.is_set():
            raise MemoryError("short")
        return ladder

    board.shadow._around = replace(board.shadow._around, open_ladder=open_ladder)
    board.hear()
    board.wait(lambda: "not shadowed" in caplog.text)
    short.set()
    assert not board.is_comparing()
    board.clock.now_s += AGAIN_S
    board.wait(board.is_comparing)

    short.clear()
    board.hear(ppm=900_000)
    board.wait(lambda: caplog.text.count("not shadowed") == 2)
    board.hear(ppm=0)
    board.wait(lambda: not board.shadow._again)
    short.set()
    board.clock.now_s += AGAIN_S
    assert board.stopped() == []


def test_share_is_drawn_before_the_outcome_is_looked_at(board):
    """The same draws whether every third sample is audited or none is."""
    board.compare(ppm=300_000)
    board.ladder.label = LABEL_HERE
    chance = random.Random(5)
    draws = [chance.random() < 0.3 for _ in range(60)]
    for audits, expected in ((False, sum(draws)), (True, sum(d for n, d in enumerate(draws) if n % 3))):
        board.shadow._rng = random.Random(5)
        before = board.shadow.pairs
        for seq in range(60):
            board.observe(seq, audited=audits and seq % 3 == 0)
            board.wait(board.shadow._items.empty)
        board.wait(lambda before=before, expected=expected: board.shadow.pairs == before + expected)


def test_what_is_not_got_to_is_dropped_and_counted_and_answers_do_not_wait(board):
    board.compare()
    board.ladder.gate.clear()
    board.observe(0)
    assert board.ladder.asked.acquire(timeout=20)
    for seq in range(1, MAX_WAITING + 6):
        board.observe(seq)

    assert board.shadow.dropped == 5
    board.ladder.gate.set()
    (report,) = reports_of(board.stopped())
    assert report.scenes[0].pairs == MAX_WAITING + 1


def test_cases_stop_at_the_allowance_and_so_do_pairs(bundles):
    board = Board(bundles[0], per_hour=3.0)
    board.compare()
    for seq in range(20):
        board.observe(seq)
        # The case leaves once it has been charged.
        board.wait(lambda seq=seq: board.spool.items.qsize() >= min(seq + 1, 3))

    items = board.stopped()
    assert sum(not is_report(item) for item in items) == 3
    assert reports_of(items)[0].scenes[0].pairs == 3


def test_what_the_other_bundles_take_is_theirs_as_long_as_they_are_compared_and_no_longer(board, monkeypatch):
    resident = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr("edge_daemon.shadow.read_rss_bytes", lambda: next(resident))
    board.hear(model="vibration")
    board.compare()
    board.wait(lambda: board.shadow.held_bytes == 2 * 10**6)
    for ppm in (900_000, 800_000, 700_000):
        board.opened.clear()
        board.compare(ppm=ppm)
        assert board.opened.is_set()
    assert board.shadow.held_bytes == 2 * 10**6

    board.hear(ppm=0)
    board.wait(lambda: board.shadow.held_bytes == 10**6)
    board.hear(model="vibration", ppm=0)
    board.wait(lambda: board.shadow.held_bytes == 0)


def test_defect_that_comes_with_every_sample_is_said_once(board, caplog):
    board.compare()
    board.ladder.error = ValueError("odd shape")
    for seq in range(20):
        board.observe(seq)
    board.ladder.asked.acquire(timeout=20)

    assert board.stopped() == []
    assert caplog.text.count("turn failed thread=shadow") == 1


def test_scene_that_is_over_is_reported_while_others_go_on(board):
    board.compare(scene_s=10)
    board.ladder.label = LABEL_HERE
    board.observe(1)
    board.wait(lambda: board.shadow.pairs == 1)
    board.clock.now_s += 10.0

    (report,) = reports_of([board.spool.next()])
    assert report.scenes == [ShadowScene("s1", 1, [])]


def test_new_terms_end_the_scenes_of_the_old_ones(board):
    board.compare()
    board.ladder.label = LABEL_HERE
    board.observe(1)
    board.wait(lambda: board.shadow.pairs == 1)

    board.hear(ppm=0)

    assert reports_of([board.spool.next()])[0].scenes == [ShadowScene("s1", 1, [])]
    board.observe(2)
    assert board.stopped() == []


def test_after_a_swap_nothing_is_compared_until_the_new_terms_are_there(board):
    board.compare()
    board.hear(serving="ef" * 32)
    board.observe(1)

    assert not board.is_comparing()
    assert board.stopped() == []


def test_release_that_is_the_installed_bundle_is_compared_with_nothing(board):
    asked = DesiredModel("digits", SHIPPED, bytes(32), shadow_ppm=1_000_000)
    board.shadow.hear(Shadowing(asked, board.bundle.bundle_id, find_bundle("vibration")))
    board.observe(1)

    assert board.stopped() == []
    assert not board.opened.is_set()
