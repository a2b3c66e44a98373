import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cloud_hub.builder.calibration.outcomes import Outcomes, disagreements, losses, walk
from cloud_hub.builder.calibration.track import (
    Chain,
    disagreements_if_answered,
    follow,
    losses_if_answered,
    mean_costs,
    operating_points,
    risk_if_answered,
    upload_shares,
)
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE, SAMPLE, OperatingPoint, Rung
from tests.builder.measured import heads_of

# Halves, quarters and so on are the same number as float32 and as float64.
SCORES = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0, float("nan")])
LIMITS = st.sampled_from([ACCEPT_NONE, 0.0, 0.125, 0.25, 0.5, 0.75, ACCEPT_ALL])


@st.composite
def chains_and_outcomes(draw):
    rungs, n, points = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    small = st.integers(0, 2)
    heads = heads_of(
        draw(hnp.arrays(np.int64, (rungs, n), elements=small)),
        draw(hnp.arrays(np.float64, (rungs, n), elements=SCORES)),
    )
    outcomes = Outcomes(
        heads,
        draw(hnp.arrays(np.int64, n, elements=small)),
        draw(st.none() | hnp.arrays(np.int64, n, elements=small)),
    )
    ladder = tuple(Rung(i, "int8", i - 1, 1.0, 10 * i + 1, draw(st.booleans())) for i in range(rungs))
    limits = np.sort(draw(hnp.arrays(np.float64, (points, rungs), elements=LIMITS)), axis=0)
    return Chain(ladder, draw(st.sampled_from(["entropy", "margin", "max_prob"])), limits), outcomes


@given(chains_and_outcomes())
def test_every_point_counts_what_a_walk_at_its_thresholds_counts(case):
    chain, outcomes = case
    track = follow(chain, outcomes)
    walks = [walk(outcomes, chain.rungs, chain.score, limits) for limits in chain.max_scores.tolist()]
    lost = [losses(outcomes, walked).sum() for walked in walks]
    differ = [disagreements(outcomes, walked).sum() for walked in walks]
    assert track.totals(losses_if_answered(outcomes), 0.0).tolist() == lost
    assert track.totals(disagreements_if_answered(outcomes), 0.0).tolist() == differ
    assert track.totals(risk_if_answered(outcomes), 0.0).tolist() == (
        differ if outcomes.labels is None else lost
    )
    assert upload_shares(track) == pytest.approx([walked.escalated.mean() for walked in walks])
    costs = [rung.mult_adds for rung in chain.rungs]
    assert mean_costs(track, costs) == pytest.approx([walked.mult_adds.mean() for walked in walks])
    assert operating_points(chain, outcomes) == tuple(
        OperatingPoint(
            max_score=tuple(limits),
            upload_share=round(float(walked.escalated.mean()), 6),
            accuracy=round(float((walked.label == outcomes.reference).mean()), 6),
            mult_adds=round(float(walked.mult_adds.mean()), 1),
        )
        for limits, walked in zip(chain.max_scores.tolist(), walks, strict=True)
    )


@given(chains_and_outcomes())
def test_uploads_never_rise_along_a_nested_chain(case):
    assert (np.diff(upload_shares(follow(*case))) <= 0).all()


@given(chains_and_outcomes(), st.integers(1, 4))
def test_counts_by_unit_add_up_to_the_counts_of_all(case, units):
    chain, outcomes = case
    track, marks = follow(chain, outcomes), losses_if_answered(outcomes)
    unit = np.arange(len(outcomes)) % units
    by_unit = track.totals_by_unit(marks, 0.0, unit, units)
    assert by_unit.shape == (len(chain), units)
    assert by_unit.sum(axis=1).tolist() == track.totals(marks, 0.0).tolist()


def test_a_threshold_is_compared_in_doubles_as_on_the_device():
    # float32(0.1) is a little above 0.1: the device, which compares doubles, does not accept it there.
    outcomes = Outcomes(heads_of([[0]], [[0.1]]), np.array([0]))
    chain = Chain((Rung(0, "int8", SAMPLE, 1.0, 1),), "margin", np.array([[0.1], [0.100001]]))
    assert upload_shares(follow(chain, outcomes)).tolist() == [1.0, 0.0]
