import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_hub.builder.graphs.stages import cut_stages
from cloud_hub.builder.networks.export import export_staged
from cloud_hub.builder.networks.family import Candidate, default_family
from cloud_hub.builder.networks.network import initial_parameters
from cloud_hub.builder.networks.selection import measure_candidate, select_candidate
from cloud_hub.errors import BuildError

SHAPES = st.one_of(
    st.tuples(st.integers(1, 3_000)),
    st.tuples(st.integers(1, 64), st.integers(1, 20_000)),
    st.tuples(st.integers(1, 8), st.integers(1, 300), st.integers(1, 300)),
)


@given(shape=SHAPES, classes=st.integers(2, 1_000))
def test_every_shape_has_three_sizes_of_three_exits(shape, classes):
    family = default_family(shape, classes)
    assert [candidate.name for candidate in family] == ["small", "medium", "large"]
    for candidate in family:
        network = candidate.network
        assert (network.input_shape, network.classes, len(network.stages)) == (shape, classes, 3)
        assert all(cost > 0 for cost in network.mult_adds)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (3, 96, 96), (1, 1024), (9, 128), (1, 16), (64,)])
def test_sizes_grow_and_the_largest_stays_small(shape):
    counts = [candidate.network.parameter_count for candidate in default_family(shape, 10)]
    assert counts[0] * 2 < counts[1]
    assert counts[1] * 1.5 < counts[2] <= 150_000


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (1, 8, 8), (3, 32, 32), (3, 96, 96), (1, 1024), (9, 128), (1, 16)]
)
def test_exits_stand_near_a_fifth_and_a_half_of_the_work(shape):
    for candidate in default_family(shape, 10):
        done = np.cumsum(candidate.network.mult_adds) / sum(candidate.network.mult_adds)
        assert 0.1 < done[0] < 0.3
        assert 0.35 < done[1] < 0.65


@settings(max_examples=12)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 40)),
        st.tuples(st.integers(1, 3), st.integers(1, 300)),
        st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 60)),
    )
)
def test_every_candidate_can_be_exported_and_cut(shape):
    network = default_family(shape, 3)[0].network
    staged = export_staged(network, initial_parameters(network, np.random.default_rng(0)))
    assert len(cut_stages(staged)) == 3


@pytest.mark.parametrize(("shape", "classes"), [((), 2), ((1, 2, 3, 4), 2), ((0, 5), 2), ((8,), 1)])
def test_a_shape_that_no_network_is_made_for_is_told(shape, classes):
    with pytest.raises(BuildError, match="--edge"):
        default_family(shape, classes)


FAMILY = default_family((1, 8, 8), 3)
TIMES = {"small": 10.0, "medium": 20.0, "large": 40.0}


def time_of(candidate: Candidate) -> float:
    return TIMES[candidate.name]


@pytest.mark.parametrize(
    ("budget_us", "budget_bytes", "chosen"),
    [
        (None, None, "large"),
        (39.0, None, "medium"),
        (20.0, None, "medium"),
        (None, FAMILY[0].weight_bytes, "small"),
        (39.0, FAMILY[1].weight_bytes - 1, "small"),
    ],
)
def test_the_largest_that_fits_both_budgets_is_chosen(budget_us, budget_bytes, chosen):
    for order in (FAMILY, FAMILY[::-1]):
        found = select_candidate(order, budget_us=budget_us, budget_bytes=budget_bytes, measure=time_of)
        assert found.name == chosen


def test_where_none_fits_the_costs_of_all_are_told_in_one_line():
    with pytest.raises(BuildError) as caught:
        select_candidate(FAMILY, budget_us=9.0, budget_bytes=200_000, measure=time_of)
    costs = "; ".join(f"{one.name} {one.weight_bytes:,} bytes and {time_of(one):.0f} us" for one in FAMILY)
    assert str(caught.value) == (
        f"no network fits into 200,000 bytes and 9 us: {costs}; "
        "raise the budget, or bring a smaller network with --edge"
    )


def test_nothing_is_measured_where_time_does_not_matter():
    def refuse(candidate):
        raise AssertionError(candidate)

    assert select_candidate(FAMILY, budget_us=None, budget_bytes=None, measure=refuse).name == "large"


def test_a_climb_takes_time_and_a_slower_board_more_of_it():
    took_us = measure_candidate(FAMILY[0])
    assert 1.0 < took_us < 100_000.0
    # Twenty times is far beyond what another process on this machine can make of a median.
    assert measure_candidate(FAMILY[0], scale=1_000.0) > 20 * took_us
