"""The child process that trains: a real one, what it is allowed, and every way in which it can end."""

from __future__ import annotations

import os
import queue
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest

from edge_cascade.backends.onnx import OnnxTrainStep
from edge_cascade.deltas import decode_delta
from edge_cascade.training import Schedule, train
from edge_cascade.weights import difference, shapes_of
from edge_daemon.core.examples import Origin
from edge_daemon.training.arrays import dump_arrays, load_arrays
from edge_daemon.training.child import EXIT_DIVERGED, EXIT_DONE, EXIT_FAILED
from edge_daemon.training.job import (
    BASE_FILE,
    EXAMPLES_FILE,
    INPUTS_FILE,
    JOB_FILE,
    LOG_FILE,
    RESULT_FILE,
    STEP_FILE,
    Result,
    job_of,
    read_result,
    write_job,
)
from edge_daemon.training.supervisor import ChildProcess, make_job_directory, outcome_of, remove_jobs
from edge_daemon.training.targets import make_examples
from tests.device.rounds_cases import drawn, terms_for
from tests.device.spooling_cases import wait_until

WAIT_S = 60.0


@pytest.fixture
def children():
    """Children that are gone when the test is."""
    started = []
    yield started
    for child in started:
        child.kill()


@pytest.fixture
def write(tmp_path, tiny_bundle):
    """Write a job; `end` runs it to its end."""

    def write(of=None, *, base=None, examples=None, residual=None, max_memory_bytes=2**30, seconds=60):
        directory = make_job_directory(tmp_path / "jobs")
        job = job_of(
            tiny_bundle,
            of or terms_for(tiny_bundle),
            seed=7,
            noise_seed=bytes(32),
            max_memory_bytes=max_memory_bytes,
            max_seconds=seconds,
        )
        write_job(
            directory,
            job,
            step=tiny_bundle.train_step.model,
            base=base or tiny_bundle.parameters(),
            examples=examples or drawn(),
            residual=residual,
        )
        return directory

    return write


@pytest.fixture
def start(children):
    def start(directory):
        codes = queue.SimpleQueue()
        child = ChildProcess(directory, codes.put, nice=19)
        children.append(child)
        return child, codes

    return start


@pytest.fixture
def end(start):
    def end(directory):
        return start(directory)[1].get(timeout=WAIT_S)

    return end


LONG = {"epochs": 1000, "learning_rate_ppm": 1}


def test_a_child_learns_what_the_same_process_would(write, end, tiny_bundle):
    of = terms_for(tiny_bundle, soft_ppm=300_000, prox_mu_ppm=10_000)
    directory = write(of)
    assert end(directory) == EXIT_DONE
    result = outcome_of(directory, EXIT_DONE, of)
    base = tiny_bundle.parameters()
    here = train(
        OnnxTrainStep(tiny_bundle.train_step),
        base,
        make_examples(drawn(), of, tiny_bundle.graph.preprocess, classes=4),
        Schedule(2, 8, 0.05, momentum=0.9, prox_mu=0.01),
        rng=np.random.default_rng(7),
    )
    delta = decode_delta(result.delta, shapes_of(base), max_bytes=2**20)
    expected = difference(here.weights, base)
    assert delta.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(delta[name], expected[name])
    assert result.num_examples == 40
    assert (result.first_loss, result.last_loss) == (here.first_loss, here.last_loss)
    assert result.last_loss < result.first_loss
    assert (result.residual, result.heads) == (None, None)
    assert 0 < result.seconds < WAIT_S


def test_a_child_adds_what_was_left_out_and_leaves_heads_and_residual(write, end, tiny_bundle):
    of = terms_for(tiny_bundle, encoding="sign", private_heads=True)
    heads = set(tiny_bundle.graph.head_parameters)
    trunk = {name: array for name, array in tiny_bundle.parameters().items() if name not in heads}
    before = {name: np.full_like(array, 0.01) for name, array in trunk.items()}
    directory = write(of, residual=dump_arrays(before))
    assert end(directory) == EXIT_DONE
    result = outcome_of(directory, EXIT_DONE, of)
    fp32 = terms_for(tiny_bundle, private_heads=True)
    plain = write(fp32)
    assert end(plain) == EXIT_DONE
    delta = decode_delta(outcome_of(plain, EXIT_DONE, fp32).delta, shapes_of(trunk), max_bytes=2**20)
    sent = decode_delta(result.delta, shapes_of(trunk), max_bytes=2**20)
    left_out = load_arrays(result.residual)
    for name in trunk:
        assert sent[name] + left_out[name] == pytest.approx(delta[name] + 0.01, abs=1e-6)
    assert load_arrays(result.heads).keys() == heads


def test_a_child_has_nothing_of_the_daemons_and_takes_little(write, start, monkeypatch, tiny_bundle):
    monkeypatch.setenv("EDGE_DAEMON__HUB__BROKER__USERNAME", "secret")
    with Path("/dev/null").open("rb") as inherited:
        os.set_inheritable(inherited.fileno(), True)
        child, codes = start(write(terms_for(tiny_bundle, **LONG)))
        process = psutil.Process(child.pid)
        wait_until(lambda: "onnxruntime" in Path(f"/proc/{child.pid}/maps").read_text(), WAIT_S)
        assert set(process.environ()) <= {
            "PATH",
            "LD_LIBRARY_PATH",
            "LANG",
            "OMP_NUM_THREADS",
            "OPENBLAS_NUM_THREADS",
            "ORT_DISABLE_TELEMETRY",
        }
        files = {str(Path(f"/proc/{child.pid}/fd/{number}").readlink()) for number in range(3)}
        assert len(files) == 3
        assert "/dev/null" in files
        assert any(name.startswith("pipe:") for name in files)
        extra = [path for path in Path(f"/proc/{child.pid}/fd").iterdir() if int(path.name) > 2]
        assert not [path for path in extra if str(path.readlink()) == "/dev/null"]
        assert process.net_connections() == []
    assert process.nice() == 19
    assert os.sched_getscheduler(child.pid) in {os.SCHED_IDLE, os.SCHED_BATCH}
    assert process.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "1000"
    assert process.rlimit(psutil.RLIMIT_DATA)[0] == 2**30
    assert process.rlimit(psutil.RLIMIT_CPU)[0] == 60
    child.kill()
    assert codes.get(timeout=WAIT_S) == -signal.SIGKILL


def test_a_killed_child_is_a_failure_in_words(write, start, tiny_bundle):
    of = terms_for(tiny_bundle, **LONG)
    directory = write(of)
    child, codes = start(directory)
    os.kill(child.pid, signal.SIGKILL)
    code = codes.get(timeout=WAIT_S)
    assert outcome_of(directory, code, of) == "the child was ended by SIGKILL"
    child.kill()


def test_a_child_whose_daemon_is_gone_ends_with_the_next_batch(write, start, tiny_bundle):
    of = terms_for(tiny_bundle, **LONG)
    directory = write(of)
    child, codes = start(directory)
    child._process.stdin.close()
    code = codes.get(timeout=WAIT_S)
    assert outcome_of(directory, code, of) == "the daemon is gone"
    assert not (directory / RESULT_FILE).exists()


def test_a_learning_rate_that_is_too_high_is_said(write, end, tiny_bundle):
    of = terms_for(tiny_bundle, learning_rate_ppm=10**9, epochs=20)
    directory = write(of)
    code = end(directory)
    assert code == EXIT_DIVERGED
    assert "learning rate" in outcome_of(directory, code, of)


def test_weights_that_training_made_worse_are_no_result(write, end, tiny_bundle):
    of = terms_for(tiny_bundle, learning_rate_ppm=2_000_000, momentum_ppm=0, epochs=1)
    directory = write(of)
    code = end(directory)
    assert code == EXIT_DIVERGED
    assert "the loss on its own examples went from" in outcome_of(directory, code, of)
    assert not (directory / RESULT_FILE).exists()


def test_a_round_without_a_usable_example_is_said(write, end, tiny_bundle):
    directory = write(examples=drawn(origin=Origin.SELF))
    code = end(directory)
    assert outcome_of(directory, code, terms_for(tiny_bundle)) == "there is no example to learn from"


def test_a_child_that_needs_more_memory_than_it_may_have_fails(write, end, tiny_bundle):
    directory = write(max_memory_bytes=2**20)
    code = end(directory)
    assert code != EXIT_DONE
    assert isinstance(outcome_of(directory, code, terms_for(tiny_bundle)), str)


def test_inputs_are_written_without_a_copy_of_them(write):
    examples = drawn(8, shape=(2**19,))
    tracemalloc.start()
    write(examples=examples)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < examples.x.nbytes / 8


@pytest.mark.parametrize("name", [JOB_FILE, STEP_FILE, BASE_FILE, EXAMPLES_FILE, INPUTS_FILE])
@pytest.mark.parametrize("damage", ["cut", "noise", "missing"])
def test_a_damaged_job_is_refused_in_one_line(write, end, name, damage):
    directory = write()
    path = directory / name
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "noise":
            path.write_bytes(np.random.default_rng(1).bytes(len(content)))
        case "missing":
            path.unlink()
    assert end(directory) == EXIT_FAILED
    assert len((directory / LOG_FILE).read_text().splitlines()) == 1
    assert not (directory / RESULT_FILE).exists()


def test_a_base_of_another_network_is_refused(write, end, tiny_bundle):
    base = tiny_bundle.parameters()
    name = min(base)
    base[name] = np.zeros((3, 3), np.float32)
    directory = write(base=base)
    code = end(directory)
    assert outcome_of(directory, code, terms_for(tiny_bundle)).startswith(
        "the base does not fit the train step"
    )


def test_a_result_of_another_round_is_refused(write, end, tiny_bundle):
    directory = write()
    assert end(directory) == EXIT_DONE
    assert isinstance(read_result(directory, terms_for(tiny_bundle)), Result)
    assert "not a result of round" in outcome_of(
        directory, EXIT_DONE, terms_for(tiny_bundle, encoding="int8")
    )
    (directory / RESULT_FILE).write_bytes(b"\xc1")
    assert "cannot be read" in outcome_of(directory, EXIT_DONE, terms_for(tiny_bundle))


def test_jobs_of_an_earlier_start_are_removed(write, tmp_path):
    directory = write()
    (tmp_path / "jobs" / "else").mkdir()
    remove_jobs(tmp_path / "jobs")
    assert not directory.exists()
    assert (tmp_path / "jobs" / "else").exists()
