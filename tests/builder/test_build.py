import hashlib
import random
import shutil
import signal
import subprocess
import sys
from itertools import count

import msgspec
import numpy as np
import onnx
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from cloud_hub.builder import build as builder
from cloud_hub.builder.assemble import Policy
from cloud_hub.builder.build import measure_ladders, uninterrupted
from cloud_hub.builder.calibration.outcomes import losses, walk
from cloud_hub.builder.collect import collect
from cloud_hub.builder.edge_network import make_edge_network
from cloud_hub.builder.naive import naive_policy
from cloud_hub.builder.prepare import prepare
from cloud_hub.builder.reports.card import Card
from cloud_hub.builder.reports.card_files import CARD_HTML, CARD_MD, REPORT
from cloud_hub.builder.request import make_request
from cloud_hub.builder.samples.data import Dataset, data_sha256
from cloud_hub.builder.steps import Steps
from cloud_hub.models import load_model
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.bounds import bounds_problems
from edge_cascade.bundle import load_bundle
from edge_cascade.ladder import Ladder
from edge_cascade.manifest import Wire
from edge_cascade.policy import SAMPLE
from edge_cascade.tensors import through_wire
from edge_daemon.config import AuditConfig, ModelConfig
from edge_daemon.models import Numbering, open_pipelines
from edge_daemon.pipeline import Sample
from tests.builder.models import (
    LEARNED,
    MEAN,
    QUICK,
    STD,
    arrays_of,
    brought,
    built,
    full_model,
    images,
    snapshot,
)
from tests.builder.onnx_models import tensor

RESULTS = ("full.onnx", REPORT, CARD_MD, CARD_HTML)


@pytest.fixture(autouse=True)
def _interruptible():
    """Whoever starts the tests in the background may have them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def request_of(**changes):
    ours = brought()
    values = {"full": str(ours.full), "data": str(ours.data), "rebase": str(ours.base), "out": "unused"}
    return make_request(
        values | {"mean": (MEAN,), "std": (STD,), "epsilon": 0.02, "plans": ("int8",)} | changes
    )


def report_of(out):
    return msgspec.json.decode((out / REPORT).read_bytes(), type=Card)


# --- what a build leaves behind


def test_a_build_leaves_the_bundle_the_full_model_and_what_is_to_be_read():
    assert {path.name for path in built().iterdir()} == {"bundle", *RESULTS}
    bundle = load_bundle(built() / "bundle")
    assert hashlib.sha256((built() / "full.onnx").read_bytes()).hexdigest() == bundle.graph.full_model_sha256
    assert report_of(built()).evaluation.bundle_id == bundle.bundle_id
    assert bundle.graph.model == "digit-like"


def test_the_certificates_are_in_the_weights_part_and_say_what_they_were_measured_on():
    weights = load_bundle(built() / "bundle").weights
    calibrate = prepare(request_of()).splits.calibrate
    for plan in weights.plans:
        own = {each.kind: each for each in weights.certificates if each.plan == plan.name}
        assert set(own) == {"loss", "disagreement"}
        loss = own["loss"]
        assert (loss.epsilon, loss.delta, loss.method) == (0.02, 0.05, "binomial")
        assert (loss.samples, loss.groups, loss.data_sha256) == (
            len(calibrate),
            len(calibrate),
            data_sha256(calibrate),
        )
        assert (plan.chosen, plan.method) == (loss.last_point, "certified")
        assert plan.points[plan.chosen].upload_share == loss.upload_share < 0.5


def test_the_promise_holds_on_samples_that_nobody_has_seen():
    bundle = load_bundle(built() / "bundle")
    fresh = images(2000, 99)
    data = Dataset(fresh.x.astype(np.float32), fresh.y)
    plan = bundle.plan()
    outcomes = collect(bundle, plan, data, (built() / "full.onnx").read_bytes())
    walked = walk(outcomes, plan.rungs, plan.score, plan.points[plan.chosen].max_score)
    assert losses(outcomes, walked).mean() <= 0.02
    assert outcomes.full_accuracy > outcomes.rung_accuracy[-1] + 0.03


def test_the_card_is_measured_on_the_test_part_and_names_the_data_of_every_part():
    card, splits = report_of(built()), prepare(request_of()).splits
    assert (card.measured_on, card.evaluation.samples) == ("test data", 300)
    assert [(part.name, part.samples, part.sha256) for part in card.data] == [
        ("training", 100, data_sha256(splits.train)),
        ("thresholds (D_opt)", len(splits.optimise), data_sha256(splits.optimise)),
        ("certificate (D_cal)", len(splits.calibrate), data_sha256(splits.calibrate)),
        ("test", 300, data_sha256(splits.test)),
    ]
    assert "not trained again" in card.made_by["network"]


def test_without_a_test_part_the_card_says_that_it_was_measured_on_calibration_data(tmp_path):
    arrays = arrays_of()
    np.savez(tmp_path / "data.npz", **{name: arrays[name] for name in arrays if "test" not in name})
    assert brought().build(tmp_path / "out", *QUICK, "--data", tmp_path / "data.npz") == 0
    card = report_of(tmp_path / "out")
    assert card.measured_on == "calibration data"
    assert card.evaluation.checks == ()


def test_the_hub_answers_with_the_full_model_as_the_users_file_does():
    model = load_model(str(built()), None)
    test = images(200, 5)
    labels = model.run((test.x.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)).argmax(axis=1)
    assert np.mean(labels == test.y) > 0.95
    assert model.name == "digit-like"


# --- what a device makes of it


def pipeline_at(point):
    numbering = Numbering(bytes(8), count().__next__)
    model = ModelConfig(str(built()), point=point)
    (pipeline,) = open_pipelines(
        [model], AuditConfig(rate=0.0), numbering, rng=random.Random(0), now_s=lambda: 1.0
    ).values()
    return pipeline


@pytest.mark.parametrize(("beyond", "uncertified"), [(0, False), (1, True)])
def test_a_device_flags_what_it_answers_beyond_the_certified_point(beyond, uncertified):
    bundle = load_bundle(built() / "bundle")
    pipeline = pipeline_at(bundle.certified_point(bundle.plan()) + beyond)
    x = images(20, 6).x.astype(np.float32)
    outcomes = [pipeline.process(Sample("s", sample, 1.0, 0)) for sample in x]
    assert {outcome.answer.uncertified for outcome in outcomes} == {uncertified}
    assert {outcome.case.uncertified for outcome in outcomes if outcome.case} <= {uncertified}
    assert {outcome.answer.bundle for outcome in outcomes} == {bundle.bundle_id}


def test_later_weights_may_promise_as_little_as_those_that_were_built(tmp_path):
    options = ("--disagreement-epsilon", "0.08")
    assert brought().build(tmp_path / "out", *QUICK, *options) == 0
    bundle = load_bundle(tmp_path / "out" / "bundle")
    assert {each.epsilon for each in bundle.weights.certificates} == {0.02, 0.08}
    assert bundle.graph.bounds.max_epsilon == 0.08
    tensors = load_file(tmp_path / "out" / "bundle" / "weights" / "weights.safetensors")
    assert bounds_problems(bundle.graph, bundle.weights, tensors) == []


def test_every_point_of_an_uncertified_bundle_is_flagged(tmp_path):
    assert brought().build(tmp_path / "out", *QUICK, "--uncertified") == 0
    bundle = load_bundle(tmp_path / "out" / "bundle")
    assert bundle.weights.certificates == ()
    assert bundle.certified_point(bundle.plan()) == -1
    assert bundle.plan().method == "naive"
    assert report_of(tmp_path / "out").trade == ()


@pytest.mark.parametrize(("channels", "channels_last"), [(1, False), (3, True)])
def test_a_device_does_with_raw_samples_what_the_builder_measured(tmp_path, channels, channels_last):
    ours = brought(channels=channels, channels_last=channels_last)
    layout = ["--layout", "channels_last"] if channels_last else []
    assert ours.build(tmp_path / "out", *QUICK, *layout) == 0
    bundle = load_bundle(tmp_path / "out" / "bundle")
    raw = arrays_of(channels=channels, channels_last=channels_last)["x_test"]
    assert bundle.graph.input_shape == raw.shape[1:] == ((8, 8, 3) if channels_last else (1, 8, 8))
    assert bundle.graph.wire == Wire("uint8", 1.0)
    sent = raw.astype(np.float32)
    assert np.array_equal(through_wire(sent[0], bundle.graph.wire), sent[0])

    plan = bundle.plan()
    outcomes = collect(bundle, plan, Dataset(sent), (tmp_path / "out" / "full.onnx").read_bytes())
    walked = walk(outcomes, plan.rungs, plan.score, plan.points[plan.chosen].max_score)
    ladder = Ladder(bundle, plan, OnnxStage)
    climbs = [ladder.climb(sample) for sample in sent]
    assert [climb.answer.rung if climb.accepted else SAMPLE for climb in climbs] == walked.rung.tolist()
    assert [climb.answer.label for climb in climbs if climb.accepted] == walked.label[
        ~walked.escalated
    ].tolist()
    assert report_of(tmp_path / "out").evaluation.upload_share == walked.escalated.mean() < 0.5


# --- the same again


def test_the_same_request_twice_gives_the_same_bytes(tmp_path):
    for place in ("a", "b"):
        assert brought().build(tmp_path / place / "out", *QUICK) == 0
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_a_build_may_be_rebased_onto_itself_and_stays_as_it_is(tmp_path):
    out = tmp_path / "elsewhere"
    shutil.copytree(built(), out)
    # What the network learned with, and what it is called, is the bundle's own.
    assert brought().build(out, "--epsilon", "0.02", "--rebase", out, "--full", out / "full.onnx") == 0
    assert snapshot(out / "bundle") == snapshot(built() / "bundle")


# --- groups


def test_groups_are_bet_on_and_none_is_in_two_parts(tmp_path):
    arrays = {name: array for name, array in arrays_of().items() if "calibration" not in name}
    calibration = images(2400, 8)
    groups = np.random.default_rng(0).permutation(np.arange(2400) // 4)
    arrays |= {"x_cal": calibration.x, "y_cal": calibration.y, "groups_cal": groups}
    arrays["groups_train"] = 600 + np.arange(len(arrays["x_train"]))
    np.savez(tmp_path / "data.npz", **arrays)
    assert (
        brought().build(tmp_path / "out", *QUICK, "--data", tmp_path / "data.npz", "--epsilon", "0.05") == 0
    )
    (loss,) = (
        each for each in load_bundle(tmp_path / "out" / "bundle").weights.certificates if each.kind == "loss"
    )
    parts = {part.name: part for part in report_of(tmp_path / "out").data}
    certified, chosen = parts["certificate (D_cal)"], parts["thresholds (D_opt)"]
    assert (loss.method, loss.groups, loss.samples) == ("betting", certified.groups, certified.samples)
    assert certified.groups + chosen.groups == 600
    assert certified.samples + chosen.samples == 2400
    assert "groups" in (tmp_path / "out" / CARD_MD).read_text()


# --- Ctrl-C


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """A folder with the same answers by other logits, in `full.onnx`, and what is built with it in `out`."""
    folder = tmp_path_factory.mktemp("another")
    model = full_model()
    for weights in model.graph.initializer:
        weights.CopyFrom(tensor(weights.name, 1.5 * onnx.numpy_helper.to_array(weights)))
    onnx.save(model, folder / "full.onnx")
    assert brought().build(folder / "out", *QUICK, "--full", folder / "full.onnx") == 0
    return folder


def press(*args, **keywords):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("place", "is_new"),
    [
        ("cloud_hub.builder.build.certify", False),
        ("cloud_hub.builder.assemble.write_bundle", True),
        ("cloud_hub.builder.assemble.write_durably", True),
        ("cloud_hub.builder.build.collect", True),
        ("cloud_hub.builder.build.write_card", True),
    ],
)
def test_ctrl_c_leaves_the_old_bundle_or_the_new_one_and_never_a_mixture(
    tmp_path, capsys, monkeypatch, another, place, is_new
):
    out = tmp_path / "out"
    shutil.copytree(built(), out)
    old, new = (load_bundle(each / "bundle").bundle_id for each in (out, another / "out"))
    again = [*QUICK, "--full", another / "full.onnx"]
    module, _, function = place.rpartition(".")
    original = getattr(sys.modules[module], function)

    def pressed(*args, **keywords):
        press()
        return original(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(place, pressed)
        capsys.readouterr()
        assert brought().build(out, *again) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "cloud-hub: interrupted; the same command goes on where this one stopped"
    )
    bundle = load_bundle(out / "bundle")
    assert bundle.bundle_id == (new if is_new else old)
    assert hashlib.sha256((out / "full.onnx").read_bytes()).hexdigest() == bundle.graph.full_model_sha256
    if (out / REPORT).exists():
        assert report_of(out).evaluation.bundle_id == bundle.bundle_id
    assert {path.name for path in out.iterdir()} <= {"bundle", *RESULTS}

    assert brought().build(out, *again) == 0
    assert snapshot(out) == snapshot(another / "out")


def test_a_real_ctrl_c_ends_the_program_with_one_line(tmp_path):
    ours = brought()
    command = [sys.executable, "-m", "cloud_hub", "build", "--full", ours.full, "--data", ours.data]
    command += ["--rebase", ours.base, "--out", tmp_path / "out", *LEARNED, "--epsilon", "0.02"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:
            if line.startswith("calibrating"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "cloud-hub: interrupted; the same command goes on where this one stopped"
    assert "Traceback" not in rest
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_put_off_until_the_block_is_done_and_then_counts():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        press()
        done.append("all of it")
    assert done == ["all of it"]
    with pytest.raises(KeyboardInterrupt):
        press()


def test_an_error_in_the_block_outranks_ctrl_c():
    with pytest.raises(ZeroDivisionError), uninterrupted():
        press()
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- the parts of a build


def measured(**changes):
    request = request_of(**changes)
    prepared = prepare(request)
    console = Console(quiet=True)
    network = make_edge_network(request, prepared, Steps(built() / "unused"), console)
    return request, prepared, network, console


def test_ladders_are_measured_on_both_parts_in_the_order_of_their_samples():
    request, prepared, network, console = measured(plans=("fp32", "int8"))
    ladders = measure_ladders(request, prepared, network.stages, {}, console)
    assert [ladder.name for ladder in ladders] == ["int8", "fp32"]
    for ladder in ladders:
        assert np.array_equal(ladder.optimise.labels, prepared.splits.optimise.y)
        assert np.array_equal(ladder.test.labels, prepared.splits.calibrate.y)
        assert {rung.precision for rung in ladder.rungs} == {ladder.name}
        assert {rung.cost_us for rung in ladder.rungs} == {None}


def costs_of(int8_us, fp32_us=100.0):
    return {
        (stage, precision): cost
        for stage in range(3)
        for precision, cost in (("int8", int8_us), ("fp32", fp32_us))
    }


@pytest.mark.parametrize(
    ("plans", "int8_us", "measured_plans"),
    [
        (("int8", "int8-fp32", "fp32"), 40.0, ["int8", "int8-fp32", "fp32"]),
        (("int8", "int8-fp32", "fp32"), 140.0, ["fp32"]),
        (("int8", "int8-fp32"), 140.0, ["int8", "int8-fp32"]),
    ],
)
def test_int8_that_pays_nowhere_is_left_out_unless_nothing_else_was_asked_for(plans, int8_us, measured_plans):
    request, prepared, network, console = measured(plans=plans)
    ladders = measure_ladders(request, prepared, network.stages, costs_of(int8_us), console)
    assert [ladder.name for ladder in ladders] == measured_plans
    for ladder in ladders:
        assert {rung.cost_us for rung in ladder.rungs} <= {int8_us, 100.0}


def test_a_request_without_a_promise_takes_the_naive_policy():
    request, prepared, network, console = measured(uncertified=True)
    ladders = measure_ladders(request, prepared, network.stages, {}, console)
    policy, certified = builder.decide(request, prepared, ladders)
    assert certified is None
    assert policy == naive_policy(ladders, 0.02)
    assert isinstance(policy, Policy)
