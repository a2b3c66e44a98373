"""What pairs of answers say of a release, looked at as often as one likes."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.core.rollout.judge import (
    NO_REFERENCE,
    DriftHint,
    Halt,
    JudgeRules,
    Pairs,
    Pass,
    Scene,
    Undecided,
    count_pairs,
    decide_drift,
    decide_quality,
    describe,
)

RULES = JudgeRules(alpha=0.05, beta=0.05, max_drop=0.02)


def pairs(lost, won, count=1000, pending=0, both_wrong=0):
    return Pairs(count, lost + won + pending + both_wrong, lost, won, pending)


def counts():
    return st.builds(
        lambda lost, won, pending, rest, same: Pairs(
            lost + won + pending + rest + same, lost + won + pending + rest, lost, won, pending
        ),
        *[st.integers(0, 300)] * 4,
        st.integers(0, 20_000),
    )


def test_pairs_are_lost_won_or_neither():
    old = np.array([1, 1, 1, 2, 2, 3, 3])
    new = np.array([1, 2, 2, 1, 1, 1, 3])
    reference = np.array([1, 1, 2, 3, 1, NO_REFERENCE, NO_REFERENCE])
    assert count_pairs(old, new, reference) == Pairs(count=7, differing=5, lost=1, won=2, pending=1)


def test_pairs_of_one_scene_are_counted_together():
    old = np.array([1, 1, 1, 2, 2, 3, 3, 1, 1])
    new = np.array([1, 2, 2, 1, 1, 1, 3, 1, 2])
    reference = np.array([1, 1, 2, 3, 1, NO_REFERENCE, NO_REFERENCE, 1, 1])
    scenes = np.array([7, 7, 2, 2, 5, 5, 5, 9, 9])
    assert count_pairs(old, new, reference, scenes) == Pairs(
        9, 6, 2, 2, 1, (Scene(2, 0, 1, 0), Scene(2, 1, 0, 0, times=2), Scene(3, 0, 1, 1))
    )
    alone = count_pairs(old, new, reference, np.arange(9))
    assert alone == count_pairs(old, new, reference)
    assert alone.alone == Scene(9, 2, 2, 1)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="labels of shapes"):
        count_pairs(np.zeros(3, int), np.zeros(4, int), np.zeros(3, int))


def test_pairs_of_both_sources_are_added():
    assert Pairs(10, 3, 1, 1, 1) + Pairs(5, 2, 0, 1, 0) == Pairs(15, 5, 1, 2, 1)
    assert Pairs(10, 3, 1, 1, 1).discordant == 2
    scenes = (Scene(2, 1, 0, 0), Scene(3, 0, 0, 0, times=2))
    both = Pairs(8, 1, 1, 0, 0, scenes) + Pairs(9, 1, 1, 0, 0, scenes)
    assert both == Pairs(17, 2, 2, 0, 0, (Scene(2, 1, 0, 0, 2), Scene(3, 0, 0, 0, 4)))
    assert both.alone == Scene(1, 0, 0, 0)


@pytest.mark.parametrize(
    "counts",
    [
        (1, 2, 0, 0, 0),
        (5, 2, 1, 1, 1),
        (5, 2, -1, 1, 1),
        (5, 2, 1, 0, 0, (Scene(2, 2, 0, 0),)),
        (5, 2, 0, 0, 0, (Scene(3, 0, 0, 0, 2),)),
    ],
)
def test_counts_that_contradict_themselves_are_refused(counts):
    with pytest.raises(ValueError, match="pairs: lost"):
        Pairs(*counts)


def test_no_pairs_say_nothing():
    judgement = decide_quality(Pairs(), RULES)
    assert judgement == Undecided(judgement.needs, 0.02, 0, 0)
    assert judgement.needs > 100


def test_a_handful_of_lost_pairs_halts_and_the_same_number_won_does_not():
    judgement = decide_quality(pairs(9, 0), RULES)
    assert judgement == Halt("worse: 9 lost and 0 won, 0.9 points", judgement.e_value, 1000, 9)
    assert judgement.e_value >= 20
    assert isinstance(decide_quality(pairs(0, 9), RULES), Pass)
    assert isinstance(decide_quality(pairs(5, 0, count=100), RULES), Undecided)


def test_pairs_on_which_neither_is_better_say_nothing_about_worse():
    few, many = (decide_quality(pairs(30, 5, count=count), RULES) for count in (100, 10_000))
    assert isinstance(few, Halt)
    assert isinstance(many, Halt)
    assert few.e_value == pytest.approx(many.e_value)


def test_what_waits_for_a_verdict_is_no_reason_to_halt_and_no_reason_to_pass():
    assert isinstance(decide_quality(pairs(10, 10, count=2000), RULES), Pass)
    waiting = decide_quality(pairs(10, 10, count=2000, pending=25), RULES)
    assert isinstance(waiting, Undecided)
    assert waiting.pending == 25
    assert isinstance(decide_quality(pairs(0, 0, count=2000, pending=1500), RULES), Undecided)


def test_a_tolerated_loss_does_not_halt():
    worse = pairs(60, 30, count=3000)
    assert isinstance(decide_quality(worse, RULES), Halt)
    assert not isinstance(decide_quality(worse, JudgeRules(alpha=0.05, max_drop=0.02, tolerated=0.01)), Halt)


@given(counts())
def test_a_lost_pair_more_speaks_for_worse_and_a_won_one_against(before):
    order = {Halt: 0, Undecided: 1, Pass: 2}
    here = order[type(decide_quality(before, RULES))]
    lost = order[type(decide_quality(before + Pairs(1, 1, 1, 0, 0), RULES))]
    won = order[type(decide_quality(before + Pairs(1, 1, 0, 1, 0), RULES))]
    assert lost <= here
    assert won >= here or here == 0


@given(counts())
def test_every_verdict_is_finite_and_reads_as_one_line(counted):
    judgement = decide_quality(counted, RULES)
    assert "\n" not in describe(judgement)
    if isinstance(judgement, Undecided):
        assert judgement.needs >= 1
    else:
        assert math.isfinite(judgement.e_value)


def looks(discordant, drop, *, rollouts, steps, size, seed, rules):
    """How often so many rollouts, looked at after every `size` pairs, were ever halted and ever passed."""
    rng = np.random.default_rng(seed)
    halted = passed = 0
    for _ in range(rollouts):
        drawn = rng.multinomial(
            size, [(discordant + drop) / 2, (discordant - drop) / 2, 1 - discordant], steps
        )
        seen = {
            type(decide_quality(Pairs(size * (i + 1), int(lost + won), int(lost), int(won)), rules))
            for i, (lost, won, _) in enumerate(drawn.cumsum(axis=0))
        }
        halted += Halt in seen
        passed += Pass in seen
    return halted, passed


def bound(share, of):
    return share * of + 2.33 * math.sqrt(share * (1 - share) * of)


@pytest.mark.parametrize("discordant", [0.02, 0.1])
def test_an_equally_good_release_is_ever_halted_in_at_most_alpha(discordant):
    halted, _ = looks(discordant, 0.0, rollouts=400, steps=100, size=40, seed=1, rules=RULES)
    assert halted <= bound(RULES.alpha, 400)


@pytest.mark.parametrize("discordant", [0.03, 0.1])
def test_a_release_that_is_worse_by_max_drop_ever_passes_in_at_most_beta(discordant):
    _, passed = looks(discordant, 0.02, rollouts=400, steps=100, size=40, seed=2, rules=RULES)
    assert passed <= bound(RULES.beta, 400)


def scenes_seen(drop, *, size, stands_still, rng):
    """What the judge says of one release, looking after every 10 of 400 scenes."""
    shares = [0.03 + drop / 2, 0.03 - drop / 2, 0.94]
    drawn = size * rng.multinomial(1, shares, 400) if stands_still else rng.multinomial(size, shares, 400)
    seen, kinds = set(), Counter()
    for start in range(0, 400, 10):
        kinds.update((lost, won) for lost, won, _ in drawn[start : start + 10].tolist())
        scenes = tuple(Scene(size, *kind, 0, times) for kind, times in kinds.items())
        lost, won = (int(n) for n in drawn[: start + 10, :2].sum(axis=0))
        seen.add(type(decide_quality(Pairs(size * (start + 10), lost + won, lost, won, 0, scenes), RULES)))
    return seen


@pytest.mark.parametrize("size", [2, 30])
@pytest.mark.parametrize("stands_still", [True, False])
def test_scenes_keep_the_promise_whether_their_pairs_repeat_each_other_or_not(size, stands_still):
    rng = np.random.default_rng(size)
    how = {"size": size, "stands_still": stands_still, "rng": rng}
    halted = sum(Halt in scenes_seen(0.0, **how) for _ in range(200))
    passed = sum(Pass in scenes_seen(0.02, **how) for _ in range(200))
    assert halted <= bound(RULES.alpha, 200)
    assert passed <= bound(RULES.beta, 200)


def test_one_scene_that_repeats_a_hundred_times_is_not_a_hundred_pairs():
    assert isinstance(decide_quality(pairs(100, 0), RULES), Halt)
    scene = Pairs(100, 100, 100, 0, 0, (Scene(100, 100, 0, 0),))
    assert isinstance(decide_quality(scene, RULES), Undecided)


def test_scenes_whose_pairs_are_strangers_tell_more_than_as_many_single_pairs():
    drawn = np.random.default_rng(4).multinomial(5, [0.035, 0.015, 0.95], 400)
    of_scenes = Pairs()
    for lost, won, _ in drawn.tolist():
        of_scenes += Pairs(5, lost + won, lost, won, scenes=(Scene(5, lost, won, 0),))
    first = Pairs(400, 20, 14, 6)
    assert isinstance(decide_quality(first, RULES), Undecided)
    assert isinstance(decide_quality(of_scenes, RULES), Halt)


def test_a_scene_that_waits_for_its_verdicts_counts_against_passing_only():
    quiet = Pairs(400, 4, 2, 2)
    waiting = Pairs(90, 30, 0, 0, 30, (Scene(3, 0, 0, 1, times=28), Scene(3, 0, 0, 2), Scene(3, 0, 0, 0)))
    assert isinstance(decide_quality(quiet, RULES), Pass)
    assert isinstance(decide_quality(quiet + waiting, RULES), Undecided)
    assert isinstance(decide_quality(Pairs(4, 4, 0, 0, 4, (Scene(4, 0, 0, 4),)), RULES), Undecided)


def test_what_is_needed_is_about_what_it_takes():
    rng = np.random.default_rng(3)
    needed = decide_quality(pairs(10, 10, count=400), RULES).needs
    took = []
    for _ in range(60):
        now = pairs(10, 10, count=400)
        while not isinstance(decide_quality(now, RULES), Pass) and now.count < 10_000:
            lost, won, _ = rng.multinomial(20, [0.025, 0.025, 0.95])
            now = now + Pairs(20, int(lost + won), int(lost), int(won))
        took.append(now.count - 400)
    assert needed / 2 < np.median(took) < 2 * needed


def test_boards_that_differ_far_more_often_than_the_hub_are_a_hint_and_no_verdict():
    hub = Pairs(1000, 50, 10, 10, 0)
    assert decide_drift(Pairs(1000, 55, 0, 0, 55), hub) == DriftHint(0.055, 0.05, is_suspicious=False)
    assert decide_drift(Pairs(1000, 200, 0, 0, 200), hub) == DriftHint(0.2, 0.05, is_suspicious=True)
    assert decide_drift(Pairs(), hub) == DriftHint(0.0, 0.05, is_suspicious=False)


def test_a_judgement_reads_as_one_line():
    assert (
        describe(Halt("worse: 9 lost and 0 won, 0.9 points", 31.4, 1000, 9))
        == "worse: 9 lost and 0 won, 0.9 points; 9 of 1000 pairs tell, e-value 31.4"
    )
    assert (
        describe(Pass(0.01, 20.5, 3000, 150)) == "not worse by 1 points: 150 of 3000 pairs tell, e-value 20.5"
    )
    assert (
        describe(Undecided(700, 0.01, 300, 12, 2))
        == "cannot be judged to 1 points yet: 12 of 300 pairs tell, 2 wait for a verdict; about 700 more are needed"
    )


@pytest.mark.parametrize(
    "rules",
    [
        {"alpha": 0.0},
        {"beta": 1.0},
        {"max_drop": 0.0},
        {"max_drop": 0.6},
        {"tolerated": -0.1},
        {"tolerated": 0.01},
    ],
)
def test_rules_out_of_range_are_refused(rules):
    with pytest.raises(ValueError, match="judge"):
        JudgeRules(**rules)
