import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from edge_cascade.bounds import bounds_problems, weight_norm
from edge_cascade.bundle import load_bundle
from edge_cascade.manifest import Bounds
from edge_cascade.shipped import find_bundle

BUNDLE = load_bundle(find_bundle("digits"))
WEIGHTS = {
    f"{precision}/{name}": array
    for (_, precision), stage in BUNDLE.stage_models.items()
    for name, array in stage.weights.items()
}


def problems(weights=BUNDLE.weights, *, tensors=WEIGHTS, **bounds):
    graph = replace(BUNDLE.graph, bounds=replace(BUNDLE.graph.bounds, **bounds))
    return bounds_problems(graph, weights, tensors)


def with_plan(**changes):
    first, *others = BUNDLE.weights.plans
    return replace(BUNDLE.weights, plans=(replace(first, **changes), *others))


def test_what_ships_keeps_to_its_bounds():
    assert problems() == []


def test_a_point_that_accepts_everything_is_out_of_bounds():
    plan = BUNDLE.weights.plans[0]
    (said,) = problems(with_plan(chosen=len(plan.points) - 1))
    assert "accepts scores up to 1" in said


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 100.0, float("nan")])
def test_a_temperature_that_makes_every_answer_sure_is_out_of_bounds(temperature):
    rungs = BUNDLE.weights.plans[0].rungs
    (said,) = problems(with_plan(rungs=(replace(rungs[0], temperature=temperature), *rungs[1:])))
    assert "temperature" in said


@pytest.mark.parametrize("epsilon", [0.5, float("nan"), 0.0])
def test_a_weaker_promise_is_out_of_bounds(epsilon):
    first, *others = BUNDLE.weights.certificates
    weights = replace(BUNDLE.weights, certificates=(replace(first, epsilon=epsilon), *others))
    (said,) = problems(weights)
    assert "certificate" in said


def test_weights_that_grew_are_out_of_bounds():
    norm = weight_norm(WEIGHTS)
    assert problems(max_weight_norm=norm) == []
    larger = {name: array * 2 if name.startswith("fp32/") else array for name, array in WEIGHTS.items()}
    assert "norm" in problems(tensors=larger, max_weight_norm=1.5 * norm)[0]
    nothing = {"fp32/w": np.array([np.nan], np.float32)}
    assert "norm" in problems(tensors=nothing, max_weight_norm=norm)[0]


def test_bounds_at_their_defaults_are_written_as_before_there_were_any():
    assert msgspec.json.encode(Bounds(1.0, 0.9)) == b'{"max_abs_weight":1.0,"max_accept_score":0.9}'
