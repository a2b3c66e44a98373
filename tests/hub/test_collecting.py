"""Which releases nobody needs: nothing that anything points at is ever among them."""

from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.core.collecting import CollectRules, Held, Uses, select_collectable
from cloud_hub.core.rollout.events import ReleaseState

NOW_S = 1e6
RULES = CollectRules(keep_live=2, keep_drafts=1, min_age_s=100.0)


def held(number, state, *, model="pump", age_s=1000.0, parent=""):
    return Held(number, model, f"{number:02d}", ReleaseState(state), NOW_S - age_s, parent)


def collectable(*releases, uses=None, rules=RULES):
    return [each.id for each in select_collectable(releases, uses or Uses(), rules, now_s=NOW_S)]


def test_old_drafts_and_what_was_halted_or_retired_go_the_oldest_first():
    releases = [held(1, "draft"), held(2, "halted"), held(3, "retired"), held(4, "draft")]
    assert collectable(*reversed(releases)) == [1, 2, 3]


def test_the_newest_that_were_live_stay_so_that_a_person_can_go_back():
    releases = [held(1, "superseded"), held(2, "superseded"), held(3, "superseded"), held(4, "live")]
    assert collectable(*releases) == [1, 2]


def test_models_do_not_take_each_others_places():
    releases = [held(1, "draft"), held(2, "draft", model="other")]
    assert collectable(*releases) == []


def test_what_is_young_stays():
    assert collectable(held(1, "halted", age_s=99.0)) == []
    assert collectable(held(1, "halted", age_s=100.0)) == [1]


def test_what_a_board_is_to_run_or_says_that_it_runs_stays():
    releases = [
        held(1, "halted"),
        held(2, "retired"),
        held(3, "superseded"),
        held(4, "draft"),
        held(5, "draft"),
    ]
    uses = Uses(releases=frozenset({1}), bundles=frozenset({"02"}))
    assert collectable(*releases, uses=uses) == [4]


def test_what_a_draft_that_stays_was_made_of_stays_for_the_difference():
    chain = [held(1, "draft"), held(2, "draft", parent="01"), held(3, "draft", parent="02")]
    assert collectable(*chain) == []
    assert collectable(*chain, held(4, "draft")) == [1, 2, 3]
    assert collectable(held(1, "retired"), held(2, "canary", parent="01")) == []


states = st.sampled_from([state.value for state in ReleaseState])
fleets = st.lists(
    st.tuples(states, st.sampled_from(["pump", "press"]), st.floats(0, 2000), st.integers(0, 24)), max_size=25
)


@given(fleets, st.data())
def test_nothing_that_is_pointed_at_live_or_a_canary_is_ever_selected(drawn, data):
    releases = [
        held(n, state, model=model, age_s=age_s, parent=f"{min(parent, n - 1):02d}")
        for n, (state, model, age_s, parent) in enumerate(drawn, 1)
    ]
    numbers = st.sets(st.sampled_from([each.id for each in releases])) if releases else st.just(set())
    uses = Uses(frozenset(data.draw(numbers)), frozenset(f"{n:02d}" for n in data.draw(numbers)))
    rules = CollectRules(data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3)), 100.0)

    found = select_collectable(releases, uses, rules, now_s=NOW_S)

    assert [each.id for each in found] == sorted({each.id for each in found})
    for release in found:
        assert release.id not in uses.releases
        assert release.bundle not in uses.bundles
        assert release.state not in {ReleaseState.LIVE, ReleaseState.CANARY}
        assert NOW_S - release.created_s >= 100.0
    gone = {each.id for each in found}
    for release in releases:
        if release.id not in gone and release.state in {ReleaseState.DRAFT, ReleaseState.CANARY}:
            assert release.parent not in {each.bundle for each in found if each.model == release.model}
    for model in ("pump", "press"):
        of_model = [each for each in releases if each.model == model]
        was_live = [each.id for each in of_model if each.state.value in {"live", "superseded"}]
        assert not {each.id for each in found} & set(was_live[-rules.keep_live :])
