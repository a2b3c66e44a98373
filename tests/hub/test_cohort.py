"""Who is asked in a round."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.core.federation.cohort import NEVER, Eligible, select_cohort, select_eligible
from cloud_hub.core.federation.standing import Standing


def a_device(name, *, online=True, graph_matches=True, standing=Standing(), last_round=NEVER):  # noqa: B008
    return Eligible(name, online, graph_matches, standing, last_round)


def fleet(awake, asleep):
    return [a_device(f"a{i:03}") for i in range(awake)] + [
        a_device(f"s{i:03}", online=False) for i in range(asleep)
    ]


def cohort(devices, size, seed=0, **how):
    return select_cohort(devices, size, np.random.default_rng(seed), **{"round_number": 1, **how})


def run_rounds(devices, size, rounds, seed=0, **how):
    """The cohorts of so many rounds, each device remembering when it was asked last."""
    rng = np.random.default_rng(seed)
    known = {device.device: device for device in devices}
    cohorts = []
    for number in range(1, rounds + 1):
        chosen = select_cohort(known.values(), size, rng, round_number=number, **how)
        cohorts.append(chosen)
        for name in chosen:
            known[name] = a_device(name, online=known[name].online, last_round=number)
    return cohorts


devices_of = st.lists(
    st.builds(
        a_device,
        st.text("abc", min_size=1),
        online=st.booleans(),
        graph_matches=st.booleans(),
        standing=st.builds(Standing, barred_until=st.integers(0, 10)),
        last_round=st.integers(-1, 4),
    ),
    max_size=30,
    unique_by=lambda device: device.device,
)


@given(devices_of, st.integers(1, 40), st.integers(0, 2**32), st.floats(0, 1), st.randoms())
def test_a_cohort_is_as_large_as_can_be_of_devices_that_may_be_asked_and_depends_on_the_seed_alone(
    devices, size, seed, share, random
):
    allowed = {d.device for d in devices if d.graph_matches and d.standing.barred_until <= 5}
    chosen = cohort(devices, size, seed, round_number=5, sleeper_share=share)
    assert set(chosen) <= allowed
    assert len(chosen) == len(set(chosen)) == min(size, len(allowed))
    assert list(chosen) == sorted(chosen)
    random.shuffle(devices)
    assert cohort(devices, size, seed, round_number=5, sleeper_share=share) == chosen


def test_a_device_of_another_graph_or_in_quarantine_is_not_asked():
    devices = [
        a_device("good"),
        a_device("other", graph_matches=False),
        a_device("barred", standing=Standing(9, 1, 8)),
    ]
    assert cohort(devices, 3, round_number=7) == ("good",)
    assert cohort(devices, 3, round_number=8) == ("barred", "good")
    assert [d.device for d in select_eligible(devices, round_number=7)] == ["good"]


def test_most_places_go_to_devices_that_are_online():
    cohorts = [cohort(fleet(50, 50), 10, seed) for seed in range(100)]
    assert all(sum(name[0] == "s" for name in chosen) == 2 for chosen in cohorts)


def test_places_that_one_side_cannot_fill_go_to_the_other():
    assert Counter(name[0] for name in cohort(fleet(3, 50), 10)) == {"a": 3, "s": 7}
    assert Counter(name[0] for name in cohort(fleet(50, 1), 10)) == {"a": 9, "s": 1}


def test_a_part_of_a_place_is_decided_by_chance():
    asleep = sum(cohort(fleet(5, 5), 1, seed)[0][0] == "s" for seed in range(1000))
    assert 160 <= asleep <= 240


def test_nobody_waits_long_awake_or_asleep():
    cohorts = run_rounds(fleet(80, 20), 10, 100)
    asked = Counter(name for chosen in cohorts for name in chosen)
    # Ten of a hundred at a time: ten rounds each, if it were in turn.
    assert (min(asked.values()), len(asked)) >= (8, 100)
    for device in fleet(80, 20):
        rounds = [0, *(i for i, chosen in enumerate(cohorts, 1) if device.device in chosen), 101]
        assert max(np.diff(rounds)) <= 25


def test_who_was_asked_longest_ago_comes_first_among_the_drawn():
    devices = [a_device(f"old{i}", last_round=1) for i in range(10)] + [
        a_device(f"new{i}", last_round=9) for i in range(10)
    ]
    # Twenty are drawn for ten places: all.
    assert all(name.startswith("old") for name in cohort(devices, 10, sleeper_share=0.0, round_number=10))


def test_a_retry_asks_others():
    devices = fleet(40, 0)
    first, second = run_rounds(devices, 10, 2)
    assert len(set(first) & set(second)) <= 2


def test_the_same_devices_do_not_always_meet():
    cohorts = run_rounds(fleet(40, 0), 10, 40)
    assert len(set(cohorts)) == 40


@pytest.mark.parametrize("how", [{"size": 0}, {"size": 3, "sleeper_share": 1.5}])
def test_a_size_or_share_out_of_range_is_refused(how):
    with pytest.raises(ValueError, match="a cohort of"):
        cohort(fleet(3, 3), **how)


def test_a_device_given_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        cohort([a_device("a"), a_device("a")], 1)
