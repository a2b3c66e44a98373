"""When a board's own heads are preferred, which scenes tell, and which heads a bundle takes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_cascade.bundle import load_bundle
from edge_cascade.errors import BundleError
from edge_cascade.ladder import Ladder
from edge_cascade.manifest import Norms
from edge_cascade.shipped import find_bundle
from edge_daemon.core.heads import with_heads
from edge_daemon.core.personal import MAX_OPEN, NEEDED, OpenScenes, Standing, evidence, next_standing
from edge_daemon.models import open_stage

counts = st.integers(0, 200)


def after(scenes, standing=None):
    standing = standing or Standing()
    for is_won in scenes:
        standing = next_standing(standing, is_won=is_won)
    return standing


# --- who is preferred ----------------------------------------------------------------------------------


@given(counts, counts)
def test_evidence_is_expected_to_stay_where_it_is_if_gains_and_losses_are_as_likely(gains, losses):
    after_one = (evidence(gains + 1, losses) + evidence(gains, losses + 1)) / 2
    assert after_one == pytest.approx(evidence(gains, losses))


@given(counts, counts)
def test_evidence_grows_with_gains_and_shrinks_with_losses(gains, losses):
    assert evidence(gains + 1, losses) > evidence(gains, losses) > evidence(gains, losses + 1)


@given(counts)
def test_as_many_gains_as_losses_are_no_evidence(each):
    assert evidence(each, each) <= 1.0


@given(st.lists(st.booleans(), max_size=12))
def test_only_counts_matter_until_a_mind_is_changed(scenes):
    standing = after(scenes)
    if not standing.is_preferred and not after(sorted(scenes, reverse=True)).is_preferred:
        assert standing == after(sorted(scenes)) == Standing(False, sum(scenes), len(scenes) - sum(scenes))


def test_seven_scenes_won_and_none_lost_are_enough_and_six_are_not():
    assert after([True] * 6) == Standing(False, 6, 0)
    assert after([True] * 7) == Standing(is_preferred=True)


def test_seven_scenes_lost_in_a_row_end_it_however_many_were_won_before():
    standing = after([True] * 500)
    assert standing.is_preferred
    assert after([False] * 6, standing).is_preferred
    assert after([False] * 7, standing) == Standing()


def test_heads_that_are_no_better_are_rarely_ever_preferred():
    rng = np.random.default_rng(0)
    ever = [any_preferred(rng.random(600) < 0.5) for _ in range(400)]
    assert np.mean(ever) <= 1 / NEEDED + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_heads_that_win_three_scenes_in_four_are_preferred_soon_and_kept():
    rng = np.random.default_rng(1)
    ends = [after(rng.random(100) < 0.75) for _ in range(200)]
    assert np.mean([end.is_preferred for end in ends]) > 0.95


def test_heads_that_are_as_good_stay_for_as_many_scenes_as_the_evidence_that_is_needed_or_more():
    rng = np.random.default_rng(2)
    stays = []
    for _ in range(200):
        standing, scenes = Standing(is_preferred=True), 0
        while standing.is_preferred:
            standing, scenes = next_standing(standing, is_won=bool(rng.random() < 0.5)), scenes + 1
        stays.append(scenes)
    assert np.mean(stays) >= NEEDED


def any_preferred(scenes):
    standing = Standing()
    for is_won in scenes:
        standing = next_standing(standing, is_won=bool(is_won))
        if standing.is_preferred:
            return True
    return False


# --- scenes --------------------------------------------------------------------------------------------


def test_scene_is_won_by_whom_it_favours_more_often_and_even_ones_tell_nothing():
    scenes = OpenScenes(300.0)
    for sensor, pairs in {
        "won": [(True, False), (True, False), (False, True)],
        "lost": [(False, True), (True, True)],
        "even": [(True, False), (False, True)],
        "same": [(True, True), (False, False)],
    }.items():
        for own_right, shared_right in pairs:
            scenes.add(sensor, own_right=own_right, shared_right=shared_right, now_s=1.0)

    assert scenes.take_over(now_s=300.9) == []
    assert scenes.take_over(now_s=301.0) == [True, False]
    assert scenes.take_over(now_s=1e9) == []


def test_scene_begins_anew_after_its_end():
    scenes = OpenScenes(10.0)
    scenes.add("a", own_right=True, shared_right=False, now_s=0.0)
    scenes.add("b", own_right=False, shared_right=True, now_s=5.0)
    assert scenes.take_over(now_s=10.0) == [True]
    scenes.add("a", own_right=False, shared_right=True, now_s=10.0)
    assert scenes.take_over(now_s=15.0) == [False]
    assert scenes.take_over(now_s=20.0) == [False]


def test_open_scenes_are_bounded():
    scenes = OpenScenes(10.0)
    for number in range(MAX_OPEN + 5):
        scenes.add(str(number), own_right=True, shared_right=False, now_s=0.0)
    assert len(scenes.take_over(now_s=10.0)) == MAX_OPEN


# --- heads ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_bundle(find_bundle("digits"))


@pytest.fixture
def heads(digits):
    parameters = digits.parameters()
    return {name: parameters[name].copy() for name in digits.graph.head_parameters}


def test_heads_are_put_into_every_precision_and_no_certificate_is_left(digits, heads):
    heads["exit0.dense0.bias"] += 3.0
    personal = with_heads(digits, heads)

    assert (personal.bundle_id, personal.graph, personal.weights.certificates) == (
        digits.bundle_id,
        digits.graph,
        (),
    )
    assert personal.certified_point(personal.plan()) == -1
    changed = [
        (key, name)
        for key, stage in personal.stage_models.items()
        for name, array in stage.weights.items()
        if not np.array_equal(array, digits.stage_models[key].weights[name])
    ]
    assert changed == [((0, "fp32"), "exit0.dense0.bias"), ((0, "int8"), "exit0.dense0.bias")]


def test_a_bundle_with_other_heads_answers_by_them(digits, heads):
    for stage in range(3):
        heads[f"exit{stage}.dense0.weight"][:] = 0.0
        heads[f"exit{stage}.dense0.bias"][:] = np.eye(10, dtype=np.float32)[4] * 20
    personal = with_heads(digits, heads)

    climb = Ladder(personal, personal.plan(), open_stage).climb(digits.golden_inputs[0])
    assert (climb.answer.label, climb.accepted) == (4, True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda heads: heads.pop("exit1.dense0.bias"), "'exit1.dense0.bias' is missing"),
        (lambda heads: heads.update(other=np.zeros(3, np.float32)), "'other' is none"),
        (lambda heads: heads["exit0.dense0.bias"].fill(np.nan), "'exit0.dense0.bias' is not finite"),
        (lambda heads: heads["exit0.dense0.bias"].fill(33.0), "fp32/exit0.dense0.bias reaches 33, the bound"),
        (
            lambda heads: heads.update({"exit0.dense0.bias": np.zeros(9, np.float32)}),
            "holds 'exit0.dense0.bias' as float32 (10,), these are float32 (9,)",
        ),
    ],
)
def test_heads_that_do_not_belong_are_refused(digits, heads, change, problem):
    change(heads)
    with pytest.raises(BundleError, match="private heads") as refused:
        with_heads(digits, heads)
    assert problem in str(refused.value)


def test_heads_beyond_a_signed_norm_are_refused(digits, heads):
    each = {
        name: 1e6
        for stage in digits.stage_models.values()
        for full in stage.weights
        for name in (full, full.removesuffix("_quantized"))
    }
    bounds = replace(digits.graph.bounds, norms=Norms(1e6, each | {"exit0.dense0.bias": 20.0}))
    bounded = dataclasses.replace(digits, graph=replace(digits.graph, bounds=bounds))
    assert with_heads(bounded, heads).bundle_id == digits.bundle_id
    heads["exit0.dense0.bias"].fill(10.0)
    with pytest.raises(BundleError, match=r"norm of fp32/exit0.dense0.bias is 31.6"):
        with_heads(bounded, heads)


def test_a_head_that_a_stage_holds_quantised_is_refused(digits, heads):
    stage = digits.stage_models[0, "int8"]
    renamed = {name: array for name, array in stage.weights.items() if name != "exit0.dense0.bias"}
    summary = dataclasses.replace(
        stage.summary, external=tuple(spec for spec in stage.summary.external if spec.name in renamed)
    )
    quantised = dataclasses.replace(stage, weights=renamed, summary=summary)
    bundle = dataclasses.replace(digits, stage_models={**digits.stage_models, (0, "int8"): quantised})
    with pytest.raises(
        BundleError, match=r"stage 0 in int8 holds 'exit0.dense0.bias' quantised or not at all"
    ):
        with_heads(bundle, heads)
