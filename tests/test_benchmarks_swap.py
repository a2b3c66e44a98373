"""What `benchmarks.swap` makes of its answers: windows around flips, beside all other time."""

import pytest

from benchmarks.swap_tables import ATTEMPT, FLIP, OUTSIDE, Answers, Swap, flips_of, rows_of

PERIOD_S = 10.0
FLIP_AFTER_S = 2.0
ENDED_AFTER_S = 4.0


def answers_of(swaps, took_us):
    """Ten answers a second; `took_us` says how long after seconds since the wish."""
    answers = Answers()
    for number in range(swaps):
        for step in range(int(PERIOD_S * 10)):
            since_s = step / 10
            answers.sent_s.append(number * PERIOD_S + since_s)
            answers.took_us.append(took_us(since_s))
            answers.bundle.append((number + (since_s >= FLIP_AFTER_S)) % 2)
    return answers


def swaps_of(count):
    return [
        Swap((number + 1) % 2, number * PERIOD_S, number * PERIOD_S + ENDED_AFTER_S, 100, "")
        for number in range(count)
    ]


def test_a_flip_is_where_the_new_bundle_answers_first():
    assert flips_of(answers_of(3, lambda _: 1.0), swaps_of(3)) == pytest.approx([2.0, 12.0, 22.0])


def test_windows_around_flips_are_held_against_the_time_outside_of_attempts():
    answers = answers_of(4, lambda s: 30.0 if abs(s - FLIP_AFTER_S) <= 0.45 else 20.0 if s <= 4 else 10.0)
    rows = {row.kind: row for row in rows_of(answers, swaps_of(4))}
    assert [round(rows[kind].p50_ratio, 2) for kind in (OUTSIDE, FLIP, ATTEMPT)] == [1.0, 3.0, 2.0]
    assert rows[FLIP].p99_ratio == rows[FLIP].p99_low == rows[FLIP].p99_high == pytest.approx(3.0)
    assert sum(rows[kind].us.count for kind in (OUTSIDE, ATTEMPT)) == len(answers.sent_s)


def test_a_swap_whose_bundle_never_answered_has_no_window():
    answers = answers_of(2, lambda s: 30.0 if abs(s - FLIP_AFTER_S) <= 0.45 else 10.0)
    for index in range(len(answers.bundle)):
        answers.bundle[index] = 1 if answers.sent_s[index] >= FLIP_AFTER_S else 0
    rows = {row.kind: row for row in rows_of(answers, swaps_of(2))}
    assert rows[FLIP].us.count == 11
