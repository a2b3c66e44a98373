import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_cascade.bounds import bounds_problems, norms_around
from edge_cascade.bundle import load_bundle
from edge_cascade.manifest import Bounds, Norms
from edge_cascade.shipped import find_bundle
from tests.bundles import build

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


def test_weights_may_grow_by_the_headroom_and_no_further():
    norms = norms_around(WEIGHTS)
    assert problems(tensors=WEIGHTS, norms=norms) == []
    weight = "fp32/stage1.conv0.weight"
    assert problems(tensors=WEIGHTS | {weight: WEIGHTS[weight] * 2}, norms=norms) == []
    for name in ("fp32", "int8"):
        larger = {
            key: array * 4 if key.startswith(name) and array.dtype.kind == "f" else array
            for key, array in WEIGHTS.items()
        }
        assert any(
            f"the norm of all {name} weights" in each for each in problems(tensors=larger, norms=norms)
        )


@pytest.mark.parametrize("name", [name for name, array in WEIGHTS.items() if array.dtype.kind == "f"])
def test_no_tensor_or_scale_grows_a_hundredfold_unseen(name):
    larger = WEIGHTS | {name: np.asarray(WEIGHTS[name] * 100, np.float32)}
    norms = norms_around(WEIGHTS)
    assert problems(tensors=larger, norms=norms)
    graph = replace(BUNDLE.graph, bounds=replace(BUNDLE.graph.bounds, norms=norms))
    assert bounds_problems(graph, BUNDLE.weights, larger)
    # The word of a graph's manifest holds before that of whoever signed it.
    wide = Norms(1e9, dict.fromkeys(norms.each, 1e9))
    assert bounds_problems(graph, BUNDLE.weights, larger, wide)


def test_integers_are_held_to_what_they_stand_for():
    norms = norms_around(WEIGHTS)
    bias = "int8/stage0.conv0.bias_quantized"
    assert "norm" in problems(tensors=WEIGHTS | {bias: WEIGHTS[bias] * 50}, norms=norms)[0]
    offset = "int8/stage0.conv0.weight_zero_point"
    moved = WEIGHTS | {offset: np.full_like(WEIGHTS[offset], -128)}
    assert problems(tensors=moved, norms=replace(norms, together=10.0))
    scale = "int8/stage2.conv0.weight_scale"
    # Without any norms the largest value is bounded all the same.
    assert "reaches" in problems(tensors=WEIGHTS | {scale: WEIGHTS[scale] * 100})[0]


def test_a_decoy_hides_no_scale():
    norms = norms_around(WEIGHTS)
    weight = "int8/stage0.conv0.weight"
    decoy = {f"{weight}_scale": WEIGHTS[f"{weight}_scale"] * 100, f"{weight}_quantized_scale": np.ones(1)}
    assert problems(tensors=WEIGHTS | decoy, norms=norms)
    beside = {"int8/x_quantized": np.zeros(1, np.int8), "int8/x_scale": WEIGHTS["int8/x_scale"] * 100}
    assert problems(tensors=WEIGHTS | beside, norms=norms)


@pytest.mark.parametrize("value", [0.0, -0.01, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_named(value):
    for name in ("int8/x_scale", "int8/stage0.conv0.weight_scale"):
        (said,) = problems(tensors=WEIGHTS | {name: np.full_like(WEIGHTS[name], value)})
        assert f"{name} is no scale" in said


def test_tensors_without_a_bound_and_values_that_are_none_are_out_of_bounds():
    norms = norms_around(WEIGHTS)
    (said,) = problems(tensors=WEIGHTS | {"fp32/more": np.zeros(3, np.float32)}, norms=norms)
    assert said == "fp32/more: no bound is signed for such a tensor"
    nothing = WEIGHTS | {"fp32/exit0.dense0.bias": np.full(10, np.nan, np.float32)}
    assert "nan" in problems(tensors=nothing, norms=norms)[0]
    odd = WEIGHTS | {"int8/stage0.conv0.weight_scale": np.ones(5, np.float32)}
    assert "5 scales" in problems(tensors=odd)[0]


@given(
    shape=st.lists(st.integers(1, 4), max_size=4).map(tuple),
    scales=st.integers(0, 5),
    kind=st.sampled_from(["int8", "uint8", "int32", "float32"]),
    suffix=st.sampled_from(["", "_quantized", "_zero_point", "_scale"]),
)
def test_whatever_the_shapes_are_it_answers_and_bounds_around_it_hold(shape, scales, kind, suffix):
    tensors = {
        f"int8/w{suffix}": np.ones(shape, kind),
        "int8/w_scale": np.full(scales, 0.5, np.float32),
        "int8/w_zero_point": np.zeros(scales, "int8"),
    }
    said = problems(tensors=tensors)
    assert said or not problems(tensors=tensors, norms=norms_around(tensors))


def test_a_bundle_is_built_with_norms_around_its_weights(tmp_path):
    bundle = load_bundle(build(tmp_path) / "bundle")
    tensors = {
        f"{precision}/{name}": array
        for (_, precision), stage in bundle.stage_models.items()
        for name, array in stage.weights.items()
    }
    assert bundle.graph.bounds.norms == norms_around(tensors)
    assert bounds_problems(bundle.graph, bundle.weights, tensors) == []
    # Of numbers that another machine adds up in another order they are the same.
    assert all(math.log2(norm).is_integer() for norm in bundle.graph.bounds.norms.each.values())


def test_bounds_at_their_defaults_are_written_as_before_there_were_any():
    assert msgspec.json.encode(Bounds(1.0, 0.9)) == b'{"max_abs_weight":1.0,"max_accept_score":0.9}'
