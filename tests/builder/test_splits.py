import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from cloud_hub.builder.samples.data import Dataset, Parts
from cloud_hub.builder.samples.splits import (
    DROPPED,
    MIN_SAMPLES,
    Shares,
    divide_groups,
    divide_samples,
    divide_stream,
    overlap_groups,
    split_parts,
)
from cloud_hub.errors import BuildError
from edge_cascade.manifest import Window

SHARES = (0.5, 0.15, 0.35)


def samples(count, classes=3, start=0, groups=None, names=None):
    """Samples that are all different, numbered from `start`, so that they can be followed."""
    x = np.arange(start, start + count, dtype=np.float32)[:, np.newaxis].repeat(2, axis=1)
    return Dataset(x, np.arange(count) % classes, groups, names)


def numbers(data):
    return {int(number) for number in data.x[:, 0]}


def known_parts(splits):
    return (splits.train, splits.optimise, splits.calibrate)


def refusal_of(parts, **keywords):
    with pytest.raises(BuildError) as caught:
        split_parts(parts, **keywords)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=120),
    train=st.floats(0.05, 0.8),
    seed=st.integers(0, 9),
)
def test_every_sample_is_in_one_part_and_every_class_is_shared_out_alike(labels, train, seed):
    y = np.array(labels, np.int64)
    shares = (train, (1 - train) * 0.3, (1 - train) * 0.7)
    part = divide_samples(y, len(y), shares, np.random.default_rng(seed))
    assert set(part) <= {0, 1, 2}
    for label in np.unique(y):
        counts = np.bincount(part[y == label], minlength=3)
        assert np.abs(counts - np.array(shares) * counts.sum()).max() < 2
        assert counts[2] > 0  # what certifies sees every class


@given(
    groups=st.lists(st.integers(0, 12), min_size=3, max_size=150),
    classes=st.integers(1, 4),
    parts=st.integers(2, 3),
    seed=st.integers(0, 9),
)
def test_no_group_is_in_two_parts_and_no_part_is_empty(groups, classes, parts, seed):
    groups = np.array(groups, np.int64)
    y = np.arange(len(groups)) % classes
    shares = SHARES if parts == 3 else (0.3, 0.7)
    rng = np.random.default_rng(seed)
    if len(np.unique(groups)) < parts:
        with pytest.raises(BuildError, match="without breaking one"):
            divide_groups(groups, y, shares, rng)
        return
    part = divide_groups(groups, y, shares, rng)
    assert set(part) == set(range(parts))
    assert all(len(np.unique(part[groups == group])) == 1 for group in np.unique(groups))


def test_many_groups_are_shared_out_closely_and_by_class():
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 200, 6_000)
    y = (groups % 5 == 0).astype(np.int64)  # a fifth of the groups holds all of class 1
    part = divide_groups(groups, y, SHARES, rng)
    for label in (0, 1):
        np.testing.assert_allclose(np.bincount(part[y == label]) / (y == label).sum(), SHARES, atol=0.02)


@given(
    count=st.integers(1, 400),
    hop=st.integers(1, 20),
    extra=st.integers(0, 60),
    dense=st.sampled_from([None, 0]),
    seed=st.integers(0, 9),
)
def test_kept_windows_of_a_stream_share_no_reading_but_inside_training(count, hop, extra, dense, seed):
    window = Window(length=hop + extra, hop=hop)
    shares = SHARES if dense == 0 else (0.3, 0.7)
    rng = np.random.default_rng(seed)
    if overlap_groups(count, window)[-1] + 1 < len(shares):
        with pytest.raises(BuildError, match="too short"):
            divide_stream(count, window, None, shares, rng, dense=dense)
        return
    part = divide_stream(count, window, None, shares, rng, dense=dense)
    kept = np.flatnonzero(part != DROPPED)
    for first in kept:
        for second in kept[(kept > first) & ((kept - first) * hop < window.length)]:
            assert part[first] == part[second] == dense


def test_a_stream_that_does_not_overlap_loses_nothing_and_a_half_overlap_little_of_training():
    rng = np.random.default_rng(0)
    whole = divide_stream(4_000, Window(8, 8), None, SHARES, rng, dense=0)
    assert (whole != DROPPED).all()
    half = divide_stream(4_000, Window(8, 4), None, SHARES, rng, dense=0)
    kept = np.bincount(half[half != DROPPED], minlength=3) / 4_000
    assert kept[0] > 0.43
    np.testing.assert_allclose(kept[1:], [0.075, 0.175], atol=0.01)


def test_blocks_of_a_stream_are_consecutive_and_many():
    blocks = overlap_groups(1_000, Window(8, 4))
    assert blocks[0] == 0
    assert set(np.diff(blocks)) == {0, 1}
    assert blocks[-1] >= 29
    assert overlap_groups(7, Window(8, 4)).tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_undivided_data_is_divided_half_for_training_and_keeps_labels_at_their_samples():
    splits = split_parts(Parts(train=samples(1_000, classes=4)))
    assert [len(data) for data in known_parts(splits)] == [500, 148, 352]  # 125, 37, 88 of each class
    assert set().union(*map(numbers, known_parts(splits))) == set(range(1_000))
    assert all((data.y == data.x[:, 0] % 4).all() for data in known_parts(splits))
    assert splits.test is None


def test_the_same_seed_divides_alike_and_another_differently():
    parts = Parts(train=samples(200))
    first, again, other = (split_parts(parts, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.calibrate.x, again.calibrate.x)
    assert numbers(first.calibrate) != numbers(other.calibrate)


def test_samples_sorted_by_class_come_out_mixed():
    data = samples(300)
    data = data.rows(np.argsort(data.y, kind="stable"))
    splits = split_parts(Parts(train=data, calibration=samples(100, start=1_000)))
    assert all(len(set(part.y[:20])) == 3 for part in known_parts(splits))


def test_given_calibration_data_is_divided_and_training_data_left_whole():
    splits = split_parts(Parts(train=samples(300), calibration=samples(300, start=1_000)))
    assert numbers(splits.train) == set(range(300))
    assert (len(splits.optimise), len(splits.calibrate)) == (90, 210)
    assert splits.notes == ()


def test_test_data_is_for_the_report_alone_and_the_full_model_is_warned_of():
    splits = split_parts(Parts(train=samples(300), test=samples(50, start=1_000)))
    assert numbers(splits.test) == set(range(1_000, 1_050))
    assert sum(map(len, known_parts(splits))) == 300
    assert "a full model that learned from them" in splits.notes[0]


def test_copies_of_training_samples_never_calibrate_and_are_counted():
    calibration = samples(300, start=270)  # the first 30 are the last 30 of training
    splits = split_parts(Parts(train=samples(300), calibration=calibration, test=samples(20, start=295)))
    assert not numbers(splits.train) & (numbers(splits.optimise) | numbers(splits.calibrate))
    assert len(splits.optimise) + len(splits.calibrate) == 270
    assert splits.notes == (
        "30 calibration samples are exact copies of training samples and were dropped",
        "5 of 20 test samples are exact copies of training samples",
    )


def test_copies_within_undivided_data_are_found_too():
    twice = samples(200).rows(np.tile(np.arange(200), 2))
    splits = split_parts(Parts(train=twice))
    assert not numbers(splits.train) & (numbers(splits.optimise) | numbers(splits.calibrate))


def copied(count, times, **keywords):
    """`count` different samples, all of them `times` times over."""
    return samples(count, **keywords).rows(np.tile(np.arange(count), times))


def test_copies_in_calibration_data_count_once_and_never_choose_and_certify():
    calibration = copied(340, 8, start=1_000)
    splits = split_parts(Parts(train=samples(300), calibration=calibration))
    assert len(splits.optimise) + len(splits.calibrate) == 340
    assert not numbers(splits.optimise) & numbers(splits.calibrate)
    assert len(splits.optimise) == pytest.approx(0.3 * 340, abs=40)  # the shares are those of the rest
    assert splits.notes == (
        "2380 calibration samples are exact copies of others and were dropped: they are not independent",
    )


def test_the_first_of_copies_is_kept_with_its_own_label():
    data = samples(300, start=1_000)
    again = Dataset(data.x[:50], (data.y[:50] + 1) % 3)
    both = Dataset(np.concatenate([data.x, again.x]), np.concatenate([data.y, again.y]))
    splits = split_parts(Parts(train=samples(300), calibration=both))
    kept = np.concatenate([splits.optimise.x[:, 0], splits.calibrate.x[:, 0]])
    labels = np.concatenate([splits.optimise.y, splits.calibrate.y])
    assert sorted(kept) == sorted(data.x[:, 0])
    assert np.array_equal(labels, data.y[kept.astype(int) - 1_000])


def test_copies_within_a_group_stay_and_across_groups_the_later_ones_go():
    groups = np.arange(300) // 10
    inside = samples(300, start=1_000, groups=groups).rows(np.arange(300).repeat(2))
    train = samples(300, groups=np.arange(300) // 10 + 100)
    splits = split_parts(Parts(train=train, calibration=inside))
    assert len(splits.optimise) + len(splits.calibrate) == 600
    assert splits.notes == ()

    first = samples(300, start=1_000, groups=groups)
    across = Dataset(
        np.concatenate([first.x, first.x[:40]]),
        np.concatenate([first.y, first.y[:40]]),
        np.concatenate([groups, np.arange(40) // 10 + 50]),
    )
    splits = split_parts(Parts(train=train, calibration=across))
    assert not numbers(splits.optimise) & numbers(splits.calibrate)
    assert set(splits.optimise.groups) | set(splits.calibrate.groups) == set(range(30))
    assert splits.notes[0].startswith("40 calibration samples are exact copies of others and were dropped")


@given(
    numbered=st.lists(st.integers(0, 60), min_size=150, max_size=300),
    grouped=st.booleans(),
    given_apart=st.booleans(),
)
def test_no_sample_is_both_in_what_chooses_and_in_what_certifies(numbered, grouped, given_apart):
    x = np.array(numbered, np.float32)[:, np.newaxis]
    data = Dataset(x, groups=np.arange(len(x)) // 5 if grouped else None)
    train = samples(40, start=1_000, groups=np.arange(40) + 900 if grouped else None)
    parts = Parts(train=Dataset(train.x[:, :1], groups=train.groups), calibration=data)
    try:
        splits = split_parts(parts if given_apart else Parts(train=data))
    except BuildError:
        reject()  # too few that differ
    assert not numbers(splits.optimise) & numbers(splits.calibrate)
    assert not numbers(splits.train) & (numbers(splits.optimise) | numbers(splits.calibrate))
    if not grouped:
        judged = len(splits.optimise) + len(splits.calibrate)
        assert judged == len(numbers(splits.optimise) | numbers(splits.calibrate))


def test_too_few_that_differ_are_told_with_how_many_are_copies():
    message = refusal_of(Parts(train=samples(300), calibration=copied(12, 30, classes=1, start=1_000)))
    assert "when 348 exact copies are dropped, where each part needs 10 at least" in message


def test_groups_stay_whole_and_go_with_their_samples():
    groups = np.arange(600) // 20
    splits = split_parts(Parts(train=samples(600, groups=groups)))
    seen = [set(data.groups) for data in known_parts(splits)]
    assert set().union(*seen) == set(range(30))
    assert sum(map(len, seen)) == 30
    assert all((data.groups == data.x[:, 0] // 20).all() for data in known_parts(splits))


def test_a_group_in_training_and_calibration_is_refused():
    train, calibration = (
        samples(60, groups=np.arange(60) % 6),
        samples(60, start=100, groups=np.arange(60) % 6),
    )
    assert "6 groups are in both" in refusal_of(Parts(train=train, calibration=calibration))


def test_groups_of_one_part_alone_are_refused_since_the_other_may_hold_them_too():
    grouped = samples(60, groups=np.arange(60) % 6)
    assert refusal_of(Parts(train=grouped, calibration=samples(60, start=100))) == (
        "training data has groups, calibration data has none: give groups_calibration"
    )
    assert refusal_of(Parts(train=samples(60, start=100), calibration=grouped)) == (
        "calibration data has groups, training data has none: give groups_train, so that none is in both"
    )


def test_overlapping_windows_are_thinned_wherever_they_judge():
    splits = split_parts(
        Parts(train=samples(2_000, classes=2), test=samples(100, classes=2, start=5_000)),
        overlap=Window(9, 3),
    )
    judged = sorted(numbers(splits.optimise) | numbers(splits.calibrate))
    assert min(np.diff(judged)) >= 3
    assert min(abs(one - other) for one in judged for other in numbers(splits.train)) >= 3
    assert len(splits.test) == 34


def test_too_little_data_is_told_by_part():
    assert f"3 to optimise, 7 to calibrate, where each part needs {MIN_SAMPLES}" in refusal_of(
        Parts(train=samples(20, classes=1))
    )
    assert "x_train" in refusal_of(Parts(calibration=samples(20)))
    assert "too short" in refusal_of(Parts(train=samples(20)), overlap=Window(200, 10))


def test_a_class_that_calibration_misses_is_refused_by_name():
    names = ("off", "on", "worn")
    train, calibration = samples(90, names=names), samples(90, classes=2, start=500, names=names)
    message = refusal_of(Parts(train=train, calibration=calibration))
    assert "no sample of class 'worn' is left to calibrate on" in message


def test_a_class_in_one_group_alone_is_refused_with_what_can_be_done():
    groups = np.arange(300) // 75
    data = Dataset(samples(300).x, np.where(groups == 2, np.arange(300) % 3, np.arange(300) % 2), groups)
    message = refusal_of(Parts(train=data))
    assert "class 2 is left to calibrate on: all are in groups of other parts" in message


@given(seed=st.integers(0, 30))
def test_a_class_in_three_groups_reaches_all_three_parts(seed):
    groups = np.arange(400) // 20
    y = np.where(np.isin(groups, [3, 8, 15]), 1, 0)
    part = divide_groups(groups, y, SHARES, np.random.default_rng(seed))
    assert set(part[y == 1]) == {0, 1, 2}


def test_a_class_that_training_or_test_misses_is_noted():
    splits = split_parts(
        Parts(train=samples(90, classes=2), calibration=samples(90, start=500), test=samples(30, start=900))
    )
    assert splits.notes == ("no training sample of class 2",)


def test_unlabelled_data_is_divided_too():
    splits = split_parts(Parts(train=Dataset(samples(200).x)))
    assert [len(data) for data in known_parts(splits)] == [100, 30, 70]
    assert splits.calibrate.y is None


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.0), (0.5, 0.3, 0.3), (1.5, -0.25, -0.25)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(BuildError, match="together 1"):
        Shares(*shares)
