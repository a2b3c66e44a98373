"""Whether boards got sick: compared with their own past and with boards left alone."""

from fractions import Fraction
from math import comb

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.core.rollout.findings import (
    Course,
    Fine,
    HealthRules,
    Metric,
    Unknown,
    Vitals,
    Worse,
    describe,
)
from cloud_hub.core.rollout.health import binomial_tail, decide_health

RULES = HealthRules()
HOUR_S = 3600.0
WELL = Vitals(
    24 * HOUR_S, 10_000, errors=5, restarts=0, latency_ms=10.0, memory_bytes=100_000_000, temp_celsius=50.0
)


def boards(n, seed=0, *, sick=None, of=None, **after):
    """Courses of `n` boards, each with a noise of its own; `after` changes the first `of` of them."""
    rng = np.random.default_rng(seed)
    courses = []
    for i in range(n):
        speed, heat = np.exp(rng.normal(0, 0.5)), rng.normal(0, 8)
        before, later = (
            msgspec.structs.replace(
                WELL,
                errors=int(rng.poisson(5)),
                latency_ms=10 * speed * np.exp(rng.normal(0, 0.05)),
                memory_bytes=int(1e8 * speed * np.exp(rng.normal(0, 0.02))),
                temp_celsius=50 + heat + rng.normal(0, 1),
            )
            for _ in range(2)
        )
        later = msgspec.structs.replace(later, running_s=HOUR_S)
        if sick and i < (n if of is None else of):
            later = sick(later)
        courses.append(Course(before, msgspec.structs.replace(later, **after)))
    return courses


def with_(**factors):
    def change(vitals):
        return msgspec.structs.replace(
            vitals, **{name: f(getattr(vitals, name)) for name, f in factors.items()}
        )

    return change


def found(treated, controls=None, rules=RULES):
    controls = boards(90, seed=1) if controls is None else controls
    return {each.metric: each for each in decide_health(treated, controls, rules).findings}


def test_boards_that_are_as_they_were_are_fine():
    for n in (1, 9, 50):
        health = decide_health(boards(n), boards(90, seed=1), RULES)
        assert [type(each) for each in health.findings] == [Fine] * len(Metric)
        assert (health.worse, health.unknown) == ((), ())


@pytest.mark.parametrize("n", [1, 9])
@pytest.mark.parametrize(
    ("metric", "sick"),
    [
        (Metric.LATENCY, with_(latency_ms=lambda ms: 2 * ms)),
        (Metric.MEMORY, with_(memory_bytes=lambda size: 2 * size)),
        (Metric.TEMPERATURE, with_(temp_celsius=lambda at: at + 15)),
        (Metric.ERRORS, with_(errors=lambda n: n + 1000)),
        (Metric.RESTARTS, with_(restarts=lambda n: n + 3)),
    ],
)
def test_a_sick_canary_is_seen_and_nothing_else_is_blamed(metric, sick, n):
    findings = found(boards(n, sick=sick))
    assert isinstance(findings.pop(metric), Worse)
    assert {type(each) for each in findings.values()} == {Fine}


def test_a_hot_afternoon_is_nobodys_fault():
    heat = with_(temp_celsius=lambda at: at + 15, latency_ms=lambda ms: 2 * ms)
    findings = found(boards(9, sick=heat), boards(90, seed=1, sick=heat))
    assert {type(each) for each in findings.values()} == {Fine}


def test_a_power_problem_that_restarts_everybody_is_nobodys_fault():
    restarts = with_(restarts=lambda n: 3)
    assert isinstance(
        found(boards(9, sick=restarts), boards(90, seed=1, sick=restarts))[Metric.RESTARTS], Fine
    )


def test_a_board_that_always_restarted_is_compared_with_itself():
    course = boards(1, restarts=2)[0]
    course = Course(msgspec.structs.replace(course.before, restarts=48, running_s=HOUR_S), course.after)
    assert isinstance(found([course])[Metric.RESTARTS], Fine)


def test_one_sick_board_among_many_is_not_the_releases_fault():
    sick = with_(
        latency_ms=lambda ms: 50 * ms, errors=lambda n: n + 10_000, restarts=lambda n: 1000, temp_celsius=lambda at: 95.0
    )  # fmt: skip
    assert {type(each) for each in found(boards(20, sick=sick, of=1)).values()} == {Fine}


def test_a_third_of_the_boards_falling_out_is_seen_although_the_middle_does_not_move():
    for metric, sick in {
        Metric.ERRORS: with_(errors=lambda n: n + 5000),
        Metric.LATENCY: with_(latency_ms=lambda ms: 5 * ms),
    }.items():
        finding = found(boards(10, sick=sick, of=3))[metric]
        assert isinstance(finding, Worse)
        assert finding.fallen == 3


def test_a_sick_control_group_excuses_nothing():
    sick = with_(latency_ms=lambda ms: 2 * ms)
    few_sick = boards(90, seed=1, sick=with_(latency_ms=lambda ms: 50 * ms), of=20)
    assert isinstance(found(boards(9, sick=sick), few_sick)[Metric.LATENCY], Worse)


def test_without_controls_the_own_past_counts():
    sick = with_(latency_ms=lambda ms: 2 * ms, restarts=lambda n: 3)
    findings = found(boards(20, sick=sick), [])
    assert isinstance(findings[Metric.LATENCY], Worse)
    assert isinstance(findings[Metric.RESTARTS], Worse)
    assert {type(each) for each in found(boards(20), []).values()} == {Fine}


def test_a_single_board_without_any_other_must_be_twice_as_far_out():
    def slower(factor):
        return found([Course(WELL, msgspec.structs.replace(WELL, latency_ms=10.0 * factor))], [])[
            Metric.LATENCY
        ]

    assert isinstance(slower(1.4), Fine)
    assert isinstance(slower(1.5), Worse)


def test_what_is_not_reported_is_unknown_and_holds_back():
    silent = [Course(WELL, None)] * 3
    findings = decide_health(silent + boards(2), boards(90, seed=1), RULES)
    assert Unknown(Metric.LATENCY, 2, 5, 3, holds_back=True) in findings.unknown
    assert len(findings.unknown) == len(Metric)
    nobody = decide_health([], boards(90), RULES)
    assert {each.metric for each in nobody.unknown} == RULES.required


def test_a_board_without_a_thermometer_holds_nothing_back_unless_it_had_one():
    cold = [
        Course(
            msgspec.structs.replace(WELL, temp_celsius=None), msgspec.structs.replace(WELL, temp_celsius=None)
        )
    ]
    finding = found(cold)[Metric.TEMPERATURE]
    assert finding == Unknown(Metric.TEMPERATURE, 0, 1, 0, holds_back=False)
    ceased = [Course(WELL, msgspec.structs.replace(WELL, temp_celsius=None))]
    assert found(ceased)[Metric.TEMPERATURE] == Unknown(Metric.TEMPERATURE, 0, 1, 1, holds_back=True)


def new_boards(n, **more):
    return [Course(None, course.after) for course in boards(n, seed=2, **more)]


def test_a_board_without_a_past_is_compared_with_boards_left_alone_in_errors_and_crashes():
    findings = found(new_boards(9))
    assert findings[Metric.ERRORS].without_past == 9
    assert isinstance(findings[Metric.RESTARTS], Fine)
    sick = with_(errors=lambda n: 5000, restarts=lambda n: 3)
    findings = found(new_boards(9, sick=sick))
    assert isinstance(findings[Metric.ERRORS], Worse)
    assert isinstance(findings[Metric.RESTARTS], Worse)


def test_new_boards_of_slower_hardware_are_no_reason_to_halt():
    slower = with_(latency_ms=lambda ms: 10 * ms, memory_bytes=lambda n: 10 * n)
    health = decide_health(new_boards(9, sick=slower), boards(90, seed=1), RULES)
    assert not health.worse
    assert {each.metric for each in health.lapsing} == {Metric.LATENCY, Metric.MEMORY}


def test_boards_with_a_past_and_new_ones_are_judged_together():
    findings = found(boards(9) + new_boards(1))
    assert (findings[Metric.ERRORS].boards, findings[Metric.ERRORS].without_past) == (10, 1)
    assert isinstance(findings[Metric.LATENCY], Fine)
    sick = with_(latency_ms=lambda ms: 2 * ms)
    assert isinstance(found(boards(9, sick=sick) + new_boards(5))[Metric.LATENCY], Worse)


def test_a_new_board_beside_nobody_has_nothing_to_be_compared_with_and_that_lapses():
    health = decide_health(new_boards(1), [], RULES)
    assert {each.metric for each in health.lapsing} == RULES.required
    assert health.lapsing == health.unknown
    assert not health.after_waiting().unknown
    assert describe(health.after_waiting().findings[0]) == "errors not judged: comparable on 0 of 1 boards"


def test_a_new_board_that_crashed_or_is_not_heard_of_never_lapses():
    crashed = decide_health(new_boards(1, restarts=1), [], RULES)
    assert {each.metric for each in crashed.after_waiting().unknown} == {Metric.RESTARTS}
    nothing = decide_health([Course(None, None)], [], RULES)
    assert not nothing.lapsing
    assert {each.metric for each in nothing.unknown} == RULES.required


def test_a_board_whose_sensor_has_always_been_silent_lapses_and_one_that_fell_silent_does_not():
    idle = msgspec.structs.replace(WELL, samples=0, errors=0, latency_ms=None)
    health = decide_health([Course(idle, idle)], [], RULES)
    assert {each.metric for each in health.lapsing} == {Metric.ERRORS, Metric.LATENCY}
    assert not decide_health([Course(WELL, idle)], [], RULES).lapsing


def test_a_board_that_crashes_before_it_has_run_for_a_second_is_seen():
    loop = msgspec.structs.replace(WELL, running_s=0.0, restarts=40)
    assert isinstance(found([Course(WELL, loop)], [])[Metric.RESTARTS], Worse)


def test_no_crash_at_all_reads_as_none():
    assert describe(found(boards(9))[Metric.RESTARTS]) == "restarts fine: x0.00 on 9 boards"


def test_no_samples_are_no_error_share():
    idle = [Course(WELL, msgspec.structs.replace(WELL, samples=0, errors=0))]
    assert isinstance(found(idle)[Metric.ERRORS], Unknown)


def test_boards_that_report_too_few_may_still_be_worse():
    sick = boards(9, sick=with_(latency_ms=lambda ms: 4 * ms))
    silent = [Course(WELL, msgspec.structs.replace(WELL, latency_ms=None))] * 9
    assert isinstance(found(sick + silent)[Metric.LATENCY], Worse)


@given(st.integers(0, 60), st.integers(0, 60), st.fractions(Fraction(1, 100), Fraction(99, 100)))
def test_thebinomial_tail_is_the_exact_one(least, trials, chance):
    exact = sum(
        comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(max(least, 0), trials + 1)
    )
    assert binomial_tail(least, trials, float(chance)) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


values = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))


@given(st.lists(st.tuples(values, values), max_size=8), st.lists(st.tuples(values, values), max_size=8))
def test_whatever_boards_say_there_is_a_finding_for_every_metric(treated, controls):
    def courses(drawn):
        return [
            Course(*(Vitals(HOUR_S, 10, latency_ms=value, temp_celsius=value) for value in pair))
            for pair in drawn
        ]

    findings = decide_health(courses(treated), courses(controls), RULES).findings
    assert {each.metric for each in findings} == set(Metric)
    assert all("\n" not in describe(each) for each in findings)


def test_a_finding_reads_as_one_line():
    assert describe(Fine(Metric.LATENCY, 1.02, 9)) == "latency fine: x1.02 on 9 boards"
    assert describe(Worse(Metric.ERRORS, 0.1, 0.01, 9)) == "errors worse: +10.00% on 9 boards, limit +1.00%"
    assert (
        describe(Worse(Metric.TEMPERATURE, 15.0, 6.0, 10, 3))
        == "temperature worse: +15.0 C on 3 of 10 boards, limit +6.0 C"
    )
    assert (
        describe(Unknown(Metric.MEMORY, 2, 5, 3, holds_back=True))
        == "memory unknown: comparable on 2 of 5 boards, 3 stopped reporting it"
    )


@pytest.mark.parametrize(
    "rules",
    [
        {"max_latency_factor": 0.9},
        {"max_restart_factor": 0.0},
        {"sigmas": 0.0},
        {"level": 0.0},
        {"min_reported": 1.5},
    ],
)
def test_rules_out_of_range_are_refused(rules):
    with pytest.raises(ValueError, match="health"):
        HealthRules(**rules)
