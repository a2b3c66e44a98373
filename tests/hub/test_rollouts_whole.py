"""Whole rollouts under the hub's own evidence: good and bad releases, boards that say nothing, a hub that dies."""

from __future__ import annotations

import pytest

from cloud_hub.core.rollout.state import Outcome, Phase
from cloud_hub.core.rollout.waves import Wave
from cloud_hub.store.store import Store
from edge_cascade.messages import SHIPPED
from tests.hub.rollouts_site import MODEL, NEW, SITE_WAVES, Behaviour, Site, two_bundles

NAMES = [f"press-{n}" for n in range(10)]
LONG_S = 20_000
LATE_S = 7 * 3600
"""A board that owes an answer counts as silent by then."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return two_bundles(tmp_path_factory)


@pytest.fixture
def site_of(tmp_path, bundles):
    """Makes a site under a behaviour, in a store that is closed at the end."""
    with Store(tmp_path) as store:

        def make(names=NAMES, *, has_past=True, **behaviour):
            site = Site(store, tmp_path, bundles, names, has_past=has_past, behaviour=Behaviour(**behaviour))
            return site, site.start()

        yield make


def is_over(site, rollout):
    return lambda: not site.state(rollout).is_widening


def served(site):
    return set(site.serves.values())


def said(site, rollout):
    return [entry.what for entry in site.state(rollout).history]


def test_a_good_release_reaches_every_board_by_what_was_measured(site_of):
    site, rollout = site_of()
    site.go_on(LONG_S, until=is_over(site, rollout))
    state = site.state(rollout)
    assert state.phase is Phase.DONE, state.history
    assert served(site) == {str(NEW)}
    assert "not worse by 10 points" in state.quality_said
    assert all("fine" in line for line in state.health_said)
    assert site.state_of_release(NEW) == "live"


def test_a_release_that_answers_worse_is_taken_back_from_the_canary(site_of):
    site, rollout = site_of(is_worse=True)
    site.go_on(LONG_S, until=is_over(site, rollout))
    site.go_on(300)
    state = site.state(rollout)
    assert (state.phase, state.wave) == (Phase.HALTED, 0)
    assert "worse: " in state.history[-1].what
    assert served(site) == {SHIPPED}
    assert {each.outcome for each in state.members.values() if each.is_offered} == {Outcome.BACK}


@pytest.mark.parametrize(
    ("sick", "metric"),
    [
        ({"latency": 3.0}, "latency"),
        ({"memory": 3.0}, "memory"),
        ({"celsius": 30.0}, "temperature"),
        ({"failed": 0.2}, "errors"),
        ({"crashes": 1.0}, "restarts"),
    ],
)
def test_a_release_that_makes_boards_sick_is_taken_back_from_the_canary(site_of, sick, metric):
    site, rollout = site_of(sick=sick)
    site.go_on(LONG_S, until=is_over(site, rollout))
    site.go_on(300)
    state = site.state(rollout)
    assert (state.phase, state.wave) == (Phase.HALTED, 0), state.history
    assert f"halted: {metric} worse" in state.history[-1].what
    assert served(site) == {SHIPPED}


def test_a_canary_that_never_says_how_it_ended_counts_as_failed(site_of):
    site, rollout = site_of(mute=set(NAMES))
    site.go_on(LATE_S, until=is_over(site, rollout))
    assert said(site, rollout)[-1] == "halted: 1 of 1 devices failed, 1 of them silent"


def test_a_canary_whose_numbers_cease_is_waited_for_and_nothing_widens(site_of):
    site, rollout = site_of(unheard=set(NAMES))
    site.go_on(LATE_S // 4)
    state = site.state(rollout)
    assert (state.phase, state.wave) == (Phase.RUNNING, 0)
    assert any("stopped reporting it" in line for line in state.health_said)


def test_one_new_board_alone_finishes_and_what_was_not_judged_is_said(site_of):
    site, rollout = site_of(["press-0"], has_past=False)
    site.go_on(10 * LONG_S, until=is_over(site, rollout))
    assert site.state(rollout).phase is Phase.DONE
    assert served(site) == {str(NEW)}
    assert any(
        line.startswith("not judged, there is nothing to compare with") for line in said(site, rollout)
    )


def test_one_board_with_a_past_is_judged_by_it(site_of):
    site, rollout = site_of(["press-0"], sick={"latency": 3.0})
    site.go_on(LONG_S, until=is_over(site, rollout))
    assert "halted: latency worse" in said(site, rollout)[-1]


def test_a_hub_that_is_killed_at_every_step_ends_where_one_that_lives_ends(site_of):
    site, rollout = site_of()
    for _ in range(200):
        if is_over(site, rollout)():
            break
        site.go_on(100)
        site.kill_hub()
    assert site.state(rollout).phase is Phase.DONE
    assert served(site) == {str(NEW)}


def test_what_people_order_is_carried_out_by_the_hub_that_starts_next(site_of):
    site, rollout = site_of()
    site.go_on(300)
    for kind, phase in (("pause", Phase.PAUSED), ("resume", Phase.RUNNING), ("halt", Phase.HALTED)):
        site.order(rollout, kind)
        site.kill_hub()
        site.go_on(100)
        assert site.state(rollout).phase is phase
    site.go_on(200)
    assert served(site) == {SHIPPED}
    site.order(rollout, "kill")
    site.kill_hub()
    site.go_on(100)
    assert site.state_of_release(NEW) == "retired"


def test_a_paused_rollout_widens_nothing_however_good_it_is(site_of):
    site, rollout = site_of()
    site.go_on(300)
    site.order(rollout, "pause")
    site.go_on(5000)
    assert site.state(rollout).wave == 0
    site.order(rollout, "resume")
    site.kill_hub()
    site.go_on(LONG_S, until=is_over(site, rollout))
    assert site.state(rollout).phase is Phase.DONE


def test_an_approval_that_was_given_to_a_hub_that_died_opens_the_wave(tmp_path, bundles):
    waves = (SITE_WAVES[0], Wave("all", share=1.0, soak_s=600.0, max_drop=0.1, needs_approval=True))
    with Store(tmp_path) as store:
        site = Site(store, tmp_path, bundles, NAMES)
        rollout = site.start(waves=waves)
        site.go_on(LONG_S // 4)
        state = site.state(rollout)
        assert (state.wave, state.asked) == (0, 1)
        site.order(rollout, "approve")
        site.kill_hub()
        site.go_on(LONG_S, until=is_over(site, rollout))
        assert site.state(rollout).phase is Phase.DONE


def test_a_kill_after_the_end_takes_every_board_back(site_of):
    site, rollout = site_of()
    site.go_on(LONG_S, until=is_over(site, rollout))
    site.order(rollout, "kill")
    site.kill_hub()
    site.go_on(300)
    assert served(site) == {SHIPPED}
    assert site.broker.wanted("press-0", MODEL).release == SHIPPED
