import numpy as np
import pytest

from cloud_hub.builder import costs as costing
from cloud_hub.builder.collect import stages_of_bundle
from cloud_hub.builder.costs import board_costs, board_ratio, int8_pays, measure_here, measure_stages
from cloud_hub.errors import BuildError
from edge_cascade.bundle import load_bundle
from edge_cascade.profile import StageCost, write_profile
from edge_cascade.shipped import shipped_model_dir
from tests.builder.models import QUICK, brought
from tests.cascade.test_profile import profile

STAGES = [(stage, precision) for stage in range(3) for precision in ("fp32", "int8")]


@pytest.fixture(scope="module")
def shipped_id():
    return load_bundle(shipped_model_dir("digits") / "bundle").bundle_id


@pytest.fixture
def quick_clock(monkeypatch):
    monkeypatch.setattr(costing, "SECONDS", 0.05)


def costs_at(bundle_id, **us):
    return [
        StageCost(
            "digits",
            bundle_id,
            stage,
            precision,
            "onnxruntime",
            "tight",
            1000,
            us[precision],
            us[precision],
            50,
        )
        for stage, precision in STAGES
    ]


@pytest.fixture
def board(tmp_path, monkeypatch, shipped_id):
    """A board's profile file; this machine is told to need 10 us a stage of the models that ship."""

    def write(*, fp32, int8):
        monkeypatch.setattr(
            costing, "measure_here", lambda there: tuple(costs_at(shipped_id, fp32=10.0, int8=10.0))
        )
        path = tmp_path / "board.json"
        write_profile(path, profile(*costs_at(shipped_id, fp32=10.0 * fp32, int8=10.0 * int8)))
        return path

    return write


@pytest.fixture
def new_network(monkeypatch):
    """This machine is told to need 20 us a stage in fp32 and 10 in int8 of any network that is built."""
    took = {(stage, precision): 20.0 if precision == "fp32" else 10.0 for stage, precision in STAGES}
    monkeypatch.setattr(costing, "measure_stages", lambda stages, x: took)


@pytest.mark.parametrize(
    ("costs", "pays"),
    [
        ({(0, "fp32"): 10.0, (0, "int8"): 5.0}, True),
        ({(0, "fp32"): 10.0, (0, "int8"): 9.6}, False),
        ({(0, "fp32"): 10.0, (0, "int8"): 20.0, (1, "fp32"): 10.0, (1, "int8"): 5.0}, True),
        ({(0, "int8"): 5.0}, False),
        ({}, False),
    ],
)
def test_int8_pays_where_some_stage_gains_more_than_a_few_percent(costs, pays):
    assert int8_pays(costs) is pays


def test_every_stage_of_a_bundle_is_timed_in_every_precision(tiny_bundle, quick_clock):
    x = np.zeros((1, 1, 128), np.float32)
    costs = measure_stages(stages_of_bundle(tiny_bundle), x)
    assert set(costs) == set(tiny_bundle.stage_models)
    assert all(cost > 0 for cost in costs.values())


def test_only_shipped_models_that_the_board_knows_are_timed_here(quick_clock, shipped_id):
    here = measure_here(profile(*costs_at(shipped_id, fp32=1.0, int8=1.0)))
    assert {(cost.model, cost.bundle_id, cost.pace) for cost in here} == {("digits", shipped_id, "tight")}
    assert {(cost.stage, cost.precision) for cost in here} == set(STAGES)
    assert measure_here(profile(*costs_at("ab" * 32, fp32=1.0, int8=1.0))) == ()


def test_a_board_costs_what_this_machine_does_times_what_it_is_slower(board, new_network):
    path = board(fp32=3.0, int8=7.0)
    assert board_ratio(path) == pytest.approx({"fp32": 3.0, "int8": 7.0})
    assert board_costs(None, None, path) == {
        (stage, precision): 60.0 if precision == "fp32" else 70.0 for stage, precision in STAGES
    }


def test_a_precision_that_the_board_did_not_measure_goes_by_the_other(
    tmp_path, monkeypatch, shipped_id, new_network
):
    only = [cost for cost in costs_at(shipped_id, fp32=40.0, int8=1.0) if cost.precision == "fp32"]
    monkeypatch.setattr(
        costing, "measure_here", lambda there: tuple(costs_at(shipped_id, fp32=10.0, int8=10.0))
    )
    write_profile(tmp_path / "board.json", profile(*only))
    assert board_costs(None, None, tmp_path / "board.json")[0, "int8"] == 40.0


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file or directory; write one with `edge-daemon profile`"),
        (b"{}", "no profile of `edge-daemon profile`"),
        (b'{"version": 99}', "profile version 99"),
    ],
)
def test_a_profile_that_is_none_ends_the_build_in_one_line(tmp_path, capsys, content, complaint):
    if content is not None:
        (tmp_path / "board.json").write_bytes(content)
    assert brought().build(tmp_path / "out", *QUICK, "--profile", tmp_path / "board.json") == 10
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_profile_of_models_that_do_not_ship_ends_the_build_in_one_line(tmp_path):
    write_profile(tmp_path / "board.json", profile(*costs_at("ab" * 32, fp32=1.0, int8=1.0)))
    with pytest.raises(BuildError, match="holds no stage of the models that ship with this version"):
        board_ratio(tmp_path / "board.json")


def build_with(path, out, *options):
    options = [*QUICK, "--plans", "int8,fp32", *options]
    assert brought().build(out, *options, *(["--profile", path] if path else [])) == 0
    return load_bundle(out / "bundle")


def test_a_profile_prices_the_rungs_and_decides_the_default_plan(tmp_path, board, new_network):
    quick_int8 = build_with(board(fp32=3.0, int8=3.0), tmp_path / "a")
    assert [plan.name for plan in quick_int8.weights.plans] == ["int8", "fp32"]
    assert quick_int8.weights.default_plan == "int8"
    assert [rung.cost_us for rung in quick_int8.plan("int8").rungs] == [30.0] * 3
    assert [rung.cost_us for rung in quick_int8.plan("fp32").rungs] == [60.0] * 3

    slow_int8 = build_with(board(fp32=3.0, int8=30.0), tmp_path / "b")
    assert [plan.name for plan in slow_int8.weights.plans] == ["fp32"]
    assert slow_int8.weights.default_plan == "fp32"


def test_without_a_profile_no_clock_decides_what_is_in_a_bundle(tmp_path, monkeypatch):
    def fail(*arguments):
        raise AssertionError("a clock was read")

    for name in ("measure_tight", "measure_stages", "measure_here"):
        monkeypatch.setattr(costing, name, fail)
    bundle = build_with(None, tmp_path / "out")
    assert {rung.cost_us for plan in bundle.weights.plans for rung in plan.rungs} == {None}


def test_a_build_with_a_profile_times_the_new_stages_by_the_clock(tmp_path, quick_clock, shipped_id):
    write_profile(tmp_path / "board.json", profile(*costs_at(shipped_id, fp32=500.0, int8=400.0)))
    bundle = build_with(tmp_path / "board.json", tmp_path / "out", "--plans", "fp32")
    assert all(rung.cost_us > 0 for plan in bundle.weights.plans for rung in plan.rungs)
