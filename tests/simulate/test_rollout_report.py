"""What is told of a rollout through a virtual fleet, from what a run leaves behind."""

import io

import pytest
from rich.console import Console

from edge_daemon.simulate.ledger import AnswerView, Ledger
from edge_daemon.simulate.rollout_kinds import KINDS
from edge_daemon.simulate.rollout_report import EXPECTED, BoardView, Facts, make_report
from edge_daemon.simulate.rollout_view import print_rollout

SHIPPED, RELEASE = "aa" * 32, "bb" * 32
QUALITY = "halted: worse: 8 lost and 0 won, 6.8 points; 8 of 118 pairs tell, e-value 41.2"
HEALTH = "halted: memory worse: x1.90 on 3 boards, limit x1.40"
FAILED = "halted: 1 of 1 devices failed"


def facts(kind="good", *, history=("done",), cases=(), shed=0, dropped=0):
    phase = "halted" if history[-1].startswith("halted") else "done"
    shown = {
        "rollout": {"phase": phase, "wave_name": "canary"},
        "quality": "not judged yet",
        "health": [],
        "history": [{"what": line} for line in history],
    }
    boards = [BoardView("b0", 0, "committed", "", 1, 17), BoardView("b1", 1, "not offered", "", 1, 0)]
    return Facts(
        kind, "digits", "mosquitto", 12.3, SHIPPED, RELEASE, 0.06, shown, boards, cases, shed, dropped
    )


def answered(*entries):
    """A ledger of samples: sensor, bundle, whether the answer was right, whether the hub was asked."""
    ledger = Ledger()
    for sensor, bundle, is_right, asked in entries:
        ledger.sent("b0", sensor, "3")
        if bundle is not None:
            answer = AnswerView(
                f"boot-{sensor}", "3" if is_right else "4", 0, "int8", 90, asked, False, bundle
            )
            ledger.note_answer("b0", sensor, answer, now_s=1.0)
    return ledger


@pytest.mark.parametrize(
    ("history", "caught_by"),
    [
        (("wave 'all' opened", "done"), ""),
        (("wave 'canary' opened", QUALITY), "quality"),
        (("wave 'canary' opened", HEALTH), "health"),
        (("b0 reverted: latency: 900 us a sample, 20 us before", FAILED), "trial"),
        (("b0 reverted: golden: deviation 0.4", FAILED), "trial"),
        (("b0 reverted: crash: 3 crashes without a boot in between", FAILED), "probation"),
        (("b0 reverted: probation: 9 of 100 samples failed", FAILED), "probation"),
        ((FAILED + ", 1 of them silent",), "health"),
    ],
)
def test_who_caught_a_release_is_told_from_what_happened(history, caught_by):
    report = make_report(Ledger(), facts(history=history))
    assert report.caught_by == caught_by
    assert bool(report.why) == bool(caught_by)


def test_what_a_board_said_of_its_failure_is_part_of_why():
    said = "b0 reverted: latency: 900 us a sample, 20 us before"
    assert make_report(Ledger(), facts(history=(said, FAILED))).why == f"1 of 1 devices failed; {said}"


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_catch_that_such_a_release_deserves_is_as_expected(kind):
    ends = {
        "": ("done",),
        "quality": (QUALITY,),
        "trial": ("b0 reverted: latency: slow", FAILED),
        "probation": ("b0 reverted: crash: 3", FAILED),
        "health": (HEALTH,),
    }
    fine = {
        name for name, end in ends.items() if make_report(Ledger(), facts(kind, history=end)).is_as_expected
    }
    assert fine == {EXPECTED[kind]}


def test_quality_of_a_release_that_went_through_is_what_the_last_wave_that_asked_was_told():
    passed = ("not worse by 4 points: 1 of 108 pairs tell, e-value 20.8", "not worse by 4 points: 2 of 170")
    assert make_report(Ledger(), facts(history=(*passed, "wave 'all' opened", "done"))).quality == passed[-1]
    assert make_report(Ledger(), facts(history=(*passed, QUALITY))).quality == "not judged yet"


def test_answers_count_for_the_bundle_that_gave_them():
    ledger = answered(
        ("s0", SHIPPED, True, False),
        ("s1", SHIPPED, False, False),
        ("s2", RELEASE, True, False),
        ("s3", None, False, False),
    )
    report = make_report(ledger, facts())
    assert (report.by_shipped.samples, report.by_shipped.accuracy) == (2, 0.5)
    assert (report.by_release.samples, report.by_release.accuracy) == (1, 1.0)
    assert (report.samples, report.answered, report.lost) == (4, 3, 1)


def test_case_that_the_hub_has_not_got_is_lost_unless_a_counter_has_it():
    ledger = answered(("s0", SHIPPED, True, True), ("s1", SHIPPED, True, True))
    cases = [{"device": "b0", "sensor": "s0"}]
    assert make_report(ledger, facts(cases=cases)).lost == 1
    assert make_report(ledger, facts(cases=cases, dropped=1)).lost == 0


def test_sample_that_is_answered_again_after_a_kill_is_one_sample():
    ledger = answered(("s0", SHIPPED, True, True))
    again = AnswerView("boot2-0", "3", 0, "int8", 90, True, False, RELEASE)
    ledger.note_answer("b0", "s0", again, now_s=2.0)
    report = make_report(ledger, facts(cases=[{"device": "b0", "sensor": "s0"}]))
    assert (report.answered, report.lost) == (1, 0)


@pytest.mark.parametrize(("first", "second", "lost"), [(True, False, 0), (False, True, 1), (True, True, 1)])
def test_of_a_sample_that_is_answered_again_the_last_answer_says_whether_a_case_must_be_there(
    first, second, lost
):
    ledger = answered(("s0", SHIPPED, True, first))
    ledger.note_answer("b0", "s0", AnswerView("b", "3", 0, "int8", 90, False, second, SHIPPED), now_s=2.0)
    assert make_report(ledger, facts()).lost == lost


@pytest.mark.parametrize("width", [60, 100])
def test_table_fits_and_says_who_caught_it(width):
    report = make_report(answered(("s0", RELEASE, True, False)), facts("bad", history=(QUALITY,)))
    written = io.StringIO()
    print_rollout(Console(file=written, width=width), report)
    text = written.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "worse by 6.0 points" in " ".join(text.split())
    assert "judge of quality" in " ".join(text.split())
    assert "which it should not have" not in text
