import numpy as np
import pytest

from cloud_hub.builder.calibration.outcomes import Outcomes
from cloud_hub.builder.calibration.p_values import GroupLosses, SampleLosses
from cloud_hub.builder.calibration.track import Chain, follow, losses_if_answered
from cloud_hub.builder.calibration.units import expected_to_pass, foresee, lossless, measure, units_of
from edge_cascade.policy import SAMPLE, Rung
from tests.builder.measured import heads_of

RUNG = (Rung(0, "int8", SAMPLE, 1.0, 1),)
# Escalate all; answer the first half, of which one in eight is wrong; answer all.
CHAIN = Chain(RUNG, "margin", np.array([[-1.0], [0.5], [1.0]]))


def outcomes_of(groups=None, n=16):
    labels = np.zeros(n, int)
    labels[0] = 1
    scores = np.where(np.arange(n) < n // 2, 0.25, 0.75)
    return Outcomes(heads_of(labels[None], scores[None]), np.zeros(n, int), np.zeros(n, int), groups)


def counted(outcomes, tested=None):
    track, marks = follow(CHAIN, outcomes), losses_if_answered(outcomes)
    own = units_of(outcomes)
    return measure(track, marks, own) if tested is None else foresee(track, marks, own, tested)


def test_samples_without_groups_and_groups_of_one_are_independent_samples():
    for groups in (None, np.arange(16)[::-1]):
        units = units_of(outcomes_of(groups))
        assert (len(units), units.method, units.full_size) == (16, "binomial", 16.0)
        losses = counted(outcomes_of(groups))
        assert isinstance(losses, SampleLosses)
        assert (losses.losses.tolist(), losses.samples) == ([0.0, 1.0, 1.0], 16)


def test_losses_are_counted_group_by_group_whatever_the_groups_are_called():
    groups = np.array([900] * 4 + [-5] * 2 + [7] * 10)
    units = units_of(outcomes_of(groups))
    assert (units.sizes.tolist(), units.method, units.full_size) == ([2.0, 10.0, 4.0], "betting", 1.6)
    losses = counted(outcomes_of(groups))
    assert isinstance(losses, GroupLosses)
    assert losses.losses.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert losses.repeats == 1.0


def test_what_is_expected_of_more_samples_is_the_share_seen_and_one_loss_more():
    losses = counted(outcomes_of(), units_of(outcomes_of(n=160)))
    assert isinstance(losses, SampleLosses)
    assert (losses.losses.tolist(), losses.samples) == ([0.0, 15.0, 20.0], 160)


def test_what_is_expected_of_more_groups_is_what_these_groups_lost_and_one_group_more():
    groups = np.arange(16) // 4
    losses = counted(outcomes_of(groups), units_of(outcomes_of(np.arange(80) // 4, n=80)))
    assert isinstance(losses, GroupLosses)
    assert losses.losses.sum(axis=1) == pytest.approx([0.0, 3.0, 5.0])
    assert losses.repeats == 5.0


def test_the_expected_point_is_the_last_that_passes_and_the_first_where_none_does():
    outcomes, tested = outcomes_of(n=160), units_of(outcomes_of(n=1_600))
    track = follow(CHAIN, outcomes)
    assert expected_to_pass(outcomes, tested, 0.05, 0.05)(track) == 2
    assert expected_to_pass(outcomes, tested, 0.016, 0.05)(track) == 1
    assert expected_to_pass(outcomes, tested, 0.009, 0.05)(track) == 0
    assert expected_to_pass(outcomes, units_of(outcomes_of()), 0.01, 0.05)(track) == 0


def test_units_without_a_loss_show_the_most_that_they_can():
    independent, grouped = units_of(outcomes_of()), units_of(outcomes_of(np.repeat(np.arange(4), 4)))
    assert lossless(independent).p_values(0.1)[0] == pytest.approx(0.9**16)
    assert (
        lossless(grouped).p_values(0.1)[0] == GroupLosses(np.zeros((1, 4)), np.full(4, 4.0)).p_values(0.1)[0]
    )
