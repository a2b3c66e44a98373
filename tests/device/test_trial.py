"""A bundle's trial in a real child process: what passes, and every way in which a bundle can fail it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import msgspec
import pytest

from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError, StoppedError
from edge_daemon.releases.trial import Trial, TrialLimits, TriedAs, launch_trial
from edge_daemon.releases.trial_child import JOB_FILE, RESULT_FILE, TrialJob, TrialResult
from tests.bundles import build

HOW = TriedAs()
# On a busy machine one of two medians may be anything.
GENEROUS = TrialLimits(max_latency_factor=50.0, max_memory_factor=2.0, max_trial_s=60.0)


@pytest.fixture(scope="session")
def other_bundle_dir(tmp_path_factory):
    return build(tmp_path_factory.mktemp("other"), seed=1) / "bundle"


@pytest.fixture
def old(tiny_model_dir):
    return tiny_model_dir / "bundle"


def trial(tmp_path, limits=GENEROUS, launch=launch_trial):
    return Trial(tmp_path / "trials", limits, launch=launch)


def refusal_of(run, *arguments):
    with pytest.raises(RefusedError) as refused:
        run.run(*arguments, threading.Event())
    return refused.value


class Running:
    pid = 0

    def kill(self):
        raise AssertionError("has ended already")


def told(results):
    """A launch whose children say what they are told to have measured."""
    left = list(results)

    def launch(directory, on_end):
        assert msgspec.json.decode((directory / JOB_FILE).read_bytes(), type=TrialJob)
        (directory / RESULT_FILE).write_bytes(msgspec.json.encode(left.pop(0)))
        on_end(0)
        return Running()

    return launch


def measured(peak_mb=100, seconds=1e-3, against=1e-3, deviation=0.0):
    return TrialResult({"fp32": deviation}, {"fp32": 0.01}, peak_mb * 2**20, seconds, against, ())


def signalled(number, *, only_child=1):
    """A launch of real children, of which one is sent a signal."""
    started = 0

    def launch(directory, on_end):
        nonlocal started
        started += 1
        running = launch_trial(directory, on_end)
        if started == only_child:
            os.kill(running.pid, number)
        return running

    return launch


def test_a_good_bundle_passes_against_the_old_one(tmp_path, old, other_bundle_dir):
    result = trial(tmp_path).run(other_bundle_dir, old, HOW, threading.Event())
    assert set(result.deviation) == set(result.tolerance) != set()
    assert result.peak_bytes > 2**20
    assert 0 < result.seconds < 1
    assert 0 < result.against_seconds < 1
    assert list((tmp_path / "trials").iterdir()) == []


def test_a_child_has_nothing_of_the_daemons(tmp_path, old, monkeypatch):
    monkeypatch.setenv("EDGE_DAEMON__HUB__BROKER__USERNAME", "secret")
    seen = []

    def launch(directory, on_end):
        running = launch_trial(directory, on_end)
        os.kill(running.pid, signal.SIGSTOP)
        process = Path(f"/proc/{running.pid}")
        # Until exec the child is a copy of this process.
        while b"trial_child" not in (process / "cmdline").read_bytes():
            pass
        seen.append((process / "environ").read_bytes())
        os.kill(running.pid, signal.SIGCONT)
        return running

    trial(tmp_path, launch=launch).run(old, None, HOW, threading.Event())
    assert b"secret" not in seen[0]


def test_a_bundle_that_computes_something_else_here_is_refused(tmp_path, old):
    twisted = tmp_path / "twisted"
    shutil.copytree(old, twisted)
    manifest = twisted / "weights" / "manifest.json"
    weights = msgspec.json.decode(manifest.read_bytes())
    weights["tolerance"] = dict.fromkeys(weights["tolerance"], 0.0)
    # Valid in every digest, and as far off as one changed temperature.
    for plan in weights["plans"]:
        for rung in plan["rungs"]:
            rung["temperature"] *= 3
    manifest.write_bytes(msgspec.json.encode(weights))
    error = refusal_of(trial(tmp_path), twisted, old, HOW)
    assert error.failure is Failure.GOLDEN
    assert "deviates" in error.detail
    # Once it answers, another board's golden outputs are a warning: the way back stays open.
    assert trial(tmp_path).run(twisted, None, HOW, threading.Event()).deviation


@pytest.mark.parametrize(
    ("serving", "new", "is_refused"),
    [
        (0.009, 0.010, False),
        (0.009, 0.011, True),
        # A processor that rounds in another way does so for both.
        (0.030, 0.039, False),
        (0.030, 0.041, True),
        (None, 0.011, True),
        (0.030, None, True),
    ],
)
def test_golden_outputs_are_held_against_what_the_serving_bundle_makes_of_its_own(
    tmp_path, old, serving, new, is_refused
):
    results = [measured(deviation=serving), measured(deviation=new)]
    run = trial(tmp_path, launch=told(results))
    if is_refused:
        assert refusal_of(run, old, old, HOW).failure is Failure.GOLDEN
    else:
        run.run(old, old, HOW, threading.Event())


def test_a_nan_in_the_golden_outputs_is_refused(tmp_path, old):
    run = trial(tmp_path, launch=told([measured(), measured(deviation=None)]))
    assert refusal_of(run, old, old, HOW).failure is Failure.GOLDEN


def test_a_bundle_that_is_slower_than_allowed_is_refused(tmp_path, old):
    limits = TrialLimits(max_latency_factor=1.5)
    slow = [measured(), measured(seconds=1.6e-3)]
    error = refusal_of(trial(tmp_path, limits, told(slow)), old, old, HOW)
    assert (error.failure, error.detail) == (Failure.LATENCY, "1600 us a sample, 1000 us before")
    trial(tmp_path, limits, told([measured(), measured(seconds=1.4e-3)])).run(
        old, old, HOW, threading.Event()
    )


def test_a_difference_that_no_median_can_tell_from_noise_is_no_latency(tmp_path, old):
    limits = TrialLimits(max_latency_factor=1.5, least_slower_s=0.0005)
    noisy = [measured(), measured(seconds=5e-5, against=2e-5)]
    trial(tmp_path, limits, told(noisy)).run(old, old, HOW, threading.Event())
    slow = [measured(), measured(seconds=5.3e-4, against=2e-5)]
    assert refusal_of(trial(tmp_path, limits, told(slow)), old, old, HOW).failure is Failure.LATENCY


def test_a_bundle_that_takes_more_memory_than_allowed_is_refused(tmp_path, old):
    limits = TrialLimits(max_memory_factor=1.5)
    error = refusal_of(trial(tmp_path, limits, told([measured(), measured(peak_mb=151)])), old, old, HOW)
    assert (error.failure, error.detail) == (Failure.MEMORY, "151 MiB at most, 100 MiB before")


def test_a_bundle_that_does_not_fit_into_the_memory_it_may_use_is_refused(tmp_path, old):
    error = refusal_of(trial(tmp_path, TrialLimits(max_memory_bytes=24 * 2**20)), old, None, HOW)
    assert error.failure is Failure.MEMORY


def test_a_graph_that_hangs_is_killed_after_a_while(tmp_path, old):
    run = trial(tmp_path, TrialLimits(max_trial_s=0.5), signalled(signal.SIGSTOP))
    error = refusal_of(run, old, None, HOW)
    assert (error.failure, error.detail) == (Failure.LATENCY, "its trial did not end within 0 s")
    assert list((tmp_path / "trials").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "failure"),
    [(signal.SIGSEGV, Failure.CRASH), (signal.SIGKILL, Failure.MEMORY), (signal.SIGXCPU, Failure.LATENCY)],
)
def test_a_child_that_is_ended_by_a_signal_fails_its_bundle(tmp_path, old, number, failure):
    error = refusal_of(trial(tmp_path, launch=signalled(number)), old, None, HOW)
    assert error.failure is failure
    assert signal.Signals(number).name in error.detail


def test_a_crash_while_the_old_bundle_is_weighed_says_nothing_against_the_new(
    tmp_path, old, other_bundle_dir
):
    run = trial(tmp_path, launch=signalled(signal.SIGSEGV, only_child=1))
    assert run.run(other_bundle_dir, old, HOW, threading.Event()).against_seconds is None


def test_a_bundle_that_cannot_be_loaded_is_refused_in_its_own_words(tmp_path, old):
    error = refusal_of(trial(tmp_path), tmp_path / "nowhere", None, HOW)
    assert error.failure is Failure.LOAD
    assert "nowhere" in error.detail


def test_a_trial_that_is_stopped_leaves_no_child(tmp_path, old):
    stop, pids = threading.Event(), []

    def launch(directory, on_end):
        running = launch_trial(directory, on_end)
        os.kill(running.pid, signal.SIGSTOP)
        pids.append(running.pid)
        stop.set()
        return running

    with pytest.raises(StoppedError):
        trial(tmp_path, launch=launch).run(old, None, HOW, stop)
    assert not Path(f"/proc/{pids[0]}").exists()
