"""Who belongs to which step of a rollout."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.core.rollout.waves import (
    DEFAULT_WAVES,
    Device,
    Sampling,
    Wave,
    check_waves,
    has,
    may_overlap,
    place_of,
    select_cuts,
    wave_of,
)

FLEET = [Device(f"board-{n}") for n in range(100)]


def sizes(waves, fleet, salt="r1"):
    cuts = select_cuts(waves, fleet, salt)
    waves_of = [wave_of(cuts, device, salt) for device in fleet]
    return [waves_of.count(index) for index in range(len(waves))]


def test_a_hundred_boards_go_in_steps_of_one_nine_forty_and_the_rest():
    assert sizes(DEFAULT_WAVES, FLEET) == [1, 9, 40, 50]


@pytest.mark.parametrize(
    ("devices", "steps"), [(1, [1, 0, 0, 0]), (2, [1, 0, 0, 1]), (5, [1, 0, 2, 2]), (12, [1, 1, 4, 6])]
)
def test_small_fleets_round_up(devices, steps):
    assert sizes(DEFAULT_WAVES, FLEET[:devices]) == steps


def test_a_canary_is_a_device_that_is_there():
    salt = "r1"
    by_place = sorted(FLEET, key=lambda device: place_of(salt, device.name))
    fleet = [Device(each.name, is_online=each not in by_place[:3]) for each in FLEET]
    cuts = select_cuts(DEFAULT_WAVES, fleet, salt)
    assert cuts[0].up_to == place_of(salt, by_place[3].name)


def test_when_nobody_is_there_whoever_comes_is_a_canary():
    cuts = select_cuts(DEFAULT_WAVES, [], "r1")
    assert wave_of(cuts, FLEET[0], "r1") == 0


@given(st.sets(st.integers(0, 10_000), max_size=60), st.text(max_size=8))
def test_a_device_that_comes_or_goes_moves_nobody_else(new, salt):
    cuts = select_cuts(DEFAULT_WAVES, FLEET, salt)
    before = {device.name: wave_of(cuts, device, salt) for device in FLEET}
    late = [Device(f"late-{n}") for n in new]
    for device in [*late, *FLEET[:50]]:
        assert wave_of(cuts, device, salt) == before.get(device.name, wave_of(cuts, device, salt))
    assert all(0 <= wave_of(cuts, device, salt) <= 3 for device in late)


def test_who_joins_later_falls_into_waves_by_their_size():
    cuts = select_cuts(DEFAULT_WAVES, FLEET, "r1")
    late = [wave_of(cuts, Device(f"late-{n}"), "r1") for n in range(4000)]
    assert 0.02 < (late.count(0) + late.count(1)) / 4000 < 0.2
    assert 0.4 < late.count(3) / 4000 < 0.6


def test_places_are_even_and_another_salt_is_another_order():
    places = [place_of("r1", f"d{n}") for n in range(4000)]
    assert abs(sum(places) / 4000 - 0.5) < 0.02
    assert max(places) < 1.0
    assert sorted(FLEET, key=lambda d: place_of("r1", d.name)) != sorted(
        FLEET, key=lambda d: place_of("r2", d.name)
    )


def test_a_site_may_go_first_and_the_shares_count_the_others_too():
    fleet = [Device(f"board-{n}", {"site": "lab" if n < 5 else "plant"}) for n in range(100)]
    waves = (
        Wave("one in the lab", count=1, labels={"site": "lab"}),
        Wave("lab", share=1.0, labels={"site": "lab"}),
        Wave("all", share=1.0),
    )
    assert sizes(waves, fleet) == [1, 4, 95]
    cuts = select_cuts(waves, fleet, "r1")
    assert wave_of(cuts, Device("new", {"site": "lab"}), "r1") in {0, 1}
    assert wave_of(cuts, Device("new", {"site": "plant"}), "r1") == 2


@pytest.mark.parametrize(
    ("group", "other", "overlap"),
    [
        ({}, {}, True),
        ({}, {"site": "a"}, True),
        ({"site": "a"}, {"site": "b"}, False),
        ({"site": "a"}, {"board": "b"}, True),
        ({"site": "a", "board": "x"}, {"site": "a", "board": "y"}, False),
    ],
)
def test_groups_overlap_unless_a_label_tells_them_apart(group, other, overlap):
    assert may_overlap(group, other) is overlap
    assert may_overlap(other, group) is overlap


def test_a_device_has_all_the_labels_or_not():
    device = Device("d", {"site": "a", "board": "x"})
    assert has(device, {})
    assert has(device, {"site": "a"})
    assert not has(device, {"site": "a", "board": "y"})
    assert not has(device, {"line": "1"})


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        ((), "at least one"),
        ((Wave("a"),), "either share or count"),
        ((Wave("a", share=0.5, count=1),), "either share or count"),
        ((Wave("a", count=0),), "count 0"),
        ((Wave("a", share=0.0),), "share 0.0"),
        ((Wave("a", share=1.1),), "share 1.1"),
        ((Wave("a", share=float("nan")),), "share nan"),
        ((Wave("a", share=1.0, soak_s=-1),), "soak_s"),
        ((Wave("a", share=1.0, soak_s=float("inf")),), "soak_s"),
        ((Wave("a", share=1.0, max_drop=0.0),), "max_drop"),
        ((Wave("a", share=1.0, sampling=Sampling(audit_rate=2.0)),), "audit_rate"),
        ((Wave("a", share=1.0, sampling=Sampling(shadow_share=-1.0)),), "shadow_share"),
        ((Wave("a", share=0.5), Wave("b", share=0.5), Wave("c", share=1.0)), "takes nobody"),
        ((Wave("a", share=0.5),), "must have share 1.0"),
        ((Wave("a", share=1.0, labels={"site": "x"}),), "no labels"),
    ],
)
def test_waves_that_contradict_themselves_are_refused(waves, message):
    with pytest.raises(ValueError, match=message):
        check_waves(waves)
    with pytest.raises(ValueError, match=message):
        select_cuts(waves, FLEET, "r1")
