"""Work that answers would feel is done in pieces, each of them begun right after an answer."""

import threading
from itertools import pairwise

import pytest

from edge_cascade import bundle as bundles
from edge_cascade.bundle import GRAPH, TRAIN_STEP, load_bundle
from edge_cascade.inspected import Inspected
from edge_cascade.onnx_file import NODES_AT_ONCE, inspect_model
from edge_daemon import models
from edge_daemon.config import ModelConfig
from edge_daemon.lull import Lull
from edge_daemon.models import open_ladder
from edge_daemon.releases.trial import Trial, TrialLimits, TriedAs
from edge_daemon.releases.work import Worker
from tests.device.test_inference import Rig

WAIT_S = 10.0


class Steps:
    """What was done, in order; as a pause it is a step itself."""

    def __init__(self):
        self.done = []

    def pause(self):
        self.done.append("pause")

    def noted(self, what, function):
        def noting(*args, **kwargs):
            self.done.append(what)
            return function(*args, **kwargs)

        return noting


@pytest.fixture
def steps():
    return Steps()


def test_whoever_waits_goes_on_once_a_sample_is_answered_and_not_before():
    lull = Lull(rest_s=0.0, most_s=WAIT_S)
    rig = Rig(lull=lull)
    rig.pipeline.gate.clear()
    rig.thread.start()
    rig.put("a")
    assert rig.pipeline.entered.wait(WAIT_S)
    published = []
    waits = threading.Thread(target=lambda: published.append((lull.wait(), list(rig.published))))
    waits.start()
    while not lull.waiting:
        pass
    rig.pipeline.gate.set()
    waits.join(WAIT_S)
    assert rig.thread.stop(WAIT_S)
    assert published == [(True, ["a"])]


def test_without_samples_nobody_waits_for_ever_nor_is_still_awaited():
    lull = Lull(rest_s=0.0, most_s=0.001)
    assert not lull.wait()
    assert lull.waiting == 0


def test_one_answer_is_for_all_who_wait():
    lull = Lull(rest_s=0.0, most_s=WAIT_S)
    told = []
    waits = [threading.Thread(target=lambda: told.append(lull.wait())) for _ in range(3)]
    for each in waits:
        each.start()
    while lull.waiting < len(waits):
        pass
    lull.note_answer()
    for each in waits:
        each.join(WAIT_S)
    assert told == [True, True, True]


def test_reading_a_bundle_pauses_before_each_graph_that_is_checked(monkeypatch, tiny_model_dir, steps):
    monkeypatch.setattr(bundles, "_GRAPHS", Inspected())
    monkeypatch.setattr(bundles, "inspect_model", steps.noted("check", bundles.inspect_model))
    load_bundle(tiny_model_dir / "bundle", pause=steps.pause)
    assert steps.done.count("check") > 1
    assert ("check", "check") not in set(pairwise(steps.done))
    assert steps.done[0] == "pause"


def test_a_graph_of_many_nodes_is_checked_with_pauses_between_them(tiny_model_dir, steps):
    content = (tiny_model_dir / "bundle" / GRAPH / TRAIN_STEP).read_bytes()
    summary = inspect_model(content, pause=steps.pause)
    assert len(steps.done) == summary.node_count // NODES_AT_ONCE > 1


def test_opening_a_bundle_pauses_before_each_stage(monkeypatch, tiny_bundle, steps):
    opened = steps.noted("open", models.OPENERS["onnxruntime"])
    monkeypatch.setattr(models, "OPENERS", {"onnxruntime": opened})
    open_ladder(tiny_bundle, ModelConfig(bundle="tiny"), pause=steps.pause)
    assert steps.done.count("open") > 1
    assert steps.done == ["pause", "open"] * steps.done.count("open")


def test_each_step_of_a_swap_begins_with_a_pause(steps):
    worker = Worker(None, None, lambda model, event: None, pause=steps.pause)
    done = threading.Event()
    worker.add("tiny", 1, steps.noted("one", lambda stop: None))
    worker.add("tiny", 1, steps.noted("two", lambda stop: done.set()))
    assert done.wait(WAIT_S)
    worker.stop()
    assert steps.done == ["pause", "one", "pause", "two"]


def test_a_trials_process_begins_with_a_pause(tmp_path, steps):
    def launch(directory, on_end):
        steps.done.append("launch")
        raise OSError("no more processes")

    trial = Trial(tmp_path, TrialLimits(), launch=launch, pause=steps.pause)
    with pytest.raises(OSError, match="no more processes"):
        trial.run(tmp_path, None, TriedAs(), threading.Event())
    assert steps.done == ["pause", "launch"]
