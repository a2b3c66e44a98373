"""A trial takes only what answers leave of the processor, and is not refused for getting none of it."""

import os
import signal
import threading
from queue import SimpleQueue

import msgspec
import pytest

from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError
from edge_daemon.releases.trial import Trial, TrialLimits, TriedAs, launch_again, launch_trial
from edge_daemon.releases.trial_child import RESULT_FILE, TrialResult

BRIEF = TrialLimits(max_trial_s=0.6, max_idle_s=0.3)
MEASURED = TrialResult({"fp32": 0.0}, {"fp32": 0.01}, 2**20, 1e-3, None, ())


def starved(directory, on_end):
    """A child that never gets to compute."""
    running = launch_trial(directory, on_end)
    os.kill(running.pid, signal.SIGSTOP)
    return running


class Ended:
    pid = 0

    def kill(self):
        raise AssertionError("has ended already")


def prompt(directory, on_end):
    (directory / RESULT_FILE).write_bytes(msgspec.json.encode(MEASURED))
    on_end(0)
    return Ended()


@pytest.fixture
def bundle(tiny_model_dir):
    return tiny_model_dir / "bundle"


def test_a_trial_that_did_not_end_has_another_go(tmp_path, bundle):
    trial = Trial(tmp_path / "trials", BRIEF, launch=starved, again=prompt)
    assert trial.run(bundle, None, TriedAs(), threading.Event()) == MEASURED
    assert list((tmp_path / "trials").iterdir()) == []


def test_a_trial_that_does_not_end_in_its_second_go_either_is_refused(tmp_path, bundle):
    trial = Trial(tmp_path / "trials", BRIEF, launch=starved, again=starved)
    with pytest.raises(RefusedError) as refused:
        trial.run(bundle, None, TriedAs(), threading.Event())
    assert refused.value.failure is Failure.LATENCY


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="a scheduling class of Linux")
@pytest.mark.parametrize(("launch", "policy"), [(launch_trial, "SCHED_IDLE"), (launch_again, "SCHED_BATCH")])
def test_a_trial_gives_way_before_it_has_begun(tmp_path, launch, policy):
    ended = SimpleQueue()
    running = launch(tmp_path, ended.put)
    try:
        os.kill(running.pid, signal.SIGSTOP)
        assert os.sched_getscheduler(running.pid) == getattr(os, policy)
        assert os.getpriority(os.PRIO_PROCESS, running.pid) >= 10
    finally:
        running.kill()
        ended.get()
