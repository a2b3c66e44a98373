"""Bundles that do harm in the runtime itself, tried in real children: the old one serves on, and the board lives."""

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import psutil
import pytest

pytest.importorskip("onnx", reason="hostile graphs are made with onnx (the dev extra)")

from edge_cascade.bundle import load_bundle
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError
from edge_daemon.releases.trial import Trial, TrialLimits, TriedAs, launch_trial
from edge_daemon.releases.trial_child import JOB_FILE, TrialJob
from edge_daemon.training.job import LOG_FILE
from tests.device.hostile_bundles import eats_memory, make_hostile, never_ends
from tests.device.spooling_cases import wait_until
from tests.device.test_swapper import WAIT_S, Board

ROOT = Path(__file__).parents[2]
BRIEF = TrialLimits(max_latency_factor=50.0, max_trial_s=6.0)


@pytest.fixture
def old(tiny_model_dir):
    return tiny_model_dir / "bundle"


def crashing(directory, on_end):
    """A launch of real children that read where nothing is as soon as their runtime opens a stage."""
    command = [sys.executable, "-m", "tests.device.crashing_child", str(directory), "0"]
    words = (directory / LOG_FILE).open("wb")
    process = subprocess.Popen(command, cwd=ROOT, stderr=words)
    words.close()
    threading.Thread(target=lambda: on_end(process.wait())).start()
    return process


def refusal_of(trial, bundle):
    with pytest.raises(RefusedError) as refused:
        trial.run(bundle, None, TriedAs(), threading.Event())
    return refused.value


@pytest.mark.parametrize(("harm", "failure"), [(eats_memory, Failure.MEMORY), (never_ends, Failure.LATENCY)])
def test_a_harmful_graph_fails_its_trial_and_the_old_bundle_serves_on(tmp_path, old, harm, failure):
    bad = make_hostile(old, tmp_path / "bad", harm)
    # The walk and the digests have nothing against it: only the trial can.
    bad_id = load_bundle(bad).bundle_id
    with Board(tmp_path, old, trial=BRIEF) as board:
        assert board.want("r1", bad) == bad_id
        wait_until(lambda: board.reports, WAIT_S, "the attempt to end")
        assert board.reports == [("r1", failure, board.installed.bundle_id)]
        board.put(3)
        wait_until(lambda: len(board.outcomes) == 3, WAIT_S, "answers")
    assert {outcome.answer.bundle for outcome in board.outcomes} == {board.installed.bundle_id}
    assert list((tmp_path / "trials").iterdir()) == []


def test_a_runtime_that_crashes_as_it_opens_a_graph_takes_its_child_with_it_alone(tmp_path, old):
    error = refusal_of(Trial(tmp_path / "trials", BRIEF, launch=crashing), old)
    assert error.failure is Failure.CRASH
    assert signal.Signals.SIGSEGV.name in error.detail


@pytest.fixture
def unwatched(tmp_path, old):
    """Starts children that stay where they are until they are ended; nobody kills them for being late."""
    bad = make_hostile(old, tmp_path / "bad", never_ends)
    running = []

    def start(*, max_seconds):
        job = TrialJob(str(bad), None, None, None, "onnxruntime", 2**30, max_seconds)
        (tmp_path / JOB_FILE).write_bytes(msgspec.json.encode(job))
        codes = queue.SimpleQueue()
        running.append(launch_trial(tmp_path, codes.put))
        wait_until(lambda: _is_bounded(running[-1].pid), WAIT_S, "the child's limits")
        return running[-1].pid, codes

    yield start
    for child in running:
        child.kill()


def test_a_child_that_computes_for_ever_ends_without_its_daemon(unwatched):
    _, codes = unwatched(max_seconds=2)
    assert codes.get(timeout=WAIT_S) in {-signal.SIGXCPU, -signal.SIGALRM}


def test_a_child_that_waits_for_ever_ends_without_its_daemon(unwatched):
    pid, codes = unwatched(max_seconds=2)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _is_pending(pid, signal.SIGALRM), WAIT_S, "the alarm")
    os.kill(pid, signal.SIGCONT)
    assert codes.get(timeout=WAIT_S) == -signal.SIGALRM


def test_a_child_has_no_network_goes_first_and_is_bounded(tmp_path, old, unwatched):
    pid, _ = unwatched(max_seconds=60)
    process, proc = psutil.Process(pid), Path(f"/proc/{pid}")
    kinds = (psutil.RLIMIT_DATA, psutil.RLIMIT_CPU, psutil.RLIMIT_CORE)
    assert [process.rlimit(kind)[0] for kind in kinds] == [2**30, 60, 0]
    assert (proc / "oom_score_adj").read_text().strip() == "1000"

    # What the system does not permit is told, and nothing else is.
    result = Trial(tmp_path / "trials", BRIEF).run(old, None, TriedAs(), threading.Event())
    assert set(result.refused) <= {"own network"}
    is_apart = (proc / "ns" / "net").readlink() != Path("/proc/self/ns/net").readlink()
    assert is_apart == ("own network" not in result.refused)
    if is_apart:
        routes = (proc / "net" / "route").read_text().splitlines()
        assert len(routes) <= 1


def _is_bounded(pid):
    """Everything is in place before the runtime is loaded."""
    return "onnxruntime" in Path(f"/proc/{pid}/maps").read_text()


def _is_pending(pid, number):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    shared = next(line for line in lines if line.startswith("ShdPnd:"))
    return bool(int(shared.split()[1], 16) >> (number - 1) & 1)
