"""The threads that work for swaps: one a model, trials in turns."""

import threading
from pathlib import Path
from queue import SimpleQueue

import pytest

from edge_daemon.core.swap_events import Downloaded, TrialPassed, Verified
from edge_daemon.errors import StoppedError
from edge_daemon.ports import Wanted
from edge_daemon.releases.trial import TriedAs
from edge_daemon.releases.trial_child import TrialResult
from edge_daemon.releases.turns import turn
from edge_daemon.releases.work import Worker

WAIT_S = 30.0
HOW = TriedAs()


def a_wish(model):
    return Wanted(model, "1", "b" * 64, "c" * 64, "d" * 64, 1000)


class Source:
    """Fetches of `slow` last until they are stopped."""

    def fetch(self, wanted, held, stop):
        if wanted.model == "slow":
            stop.wait(WAIT_S)
            raise StoppedError("stopped")

    def verify(self, wanted):
        pass


class SlowTrial:
    """Every trial lasts until `go` has a token for it, or it is stopped."""

    def __init__(self):
        self.begun = SimpleQueue()
        self.go = threading.Semaphore(0)
        self.running = self.most = 0

    def run(self, bundle, against, how, stop):
        self.running += 1
        self.most = max(self.most, self.running)
        self.begun.put(bundle.name)
        self.go.acquire(timeout=WAIT_S)
        self.running -= 1
        return TrialResult({}, {}, peak_bytes=1, seconds=1e-3, against_seconds=None, refused=())


class Bench:
    def __init__(self):
        self.trial = SlowTrial()
        self.told = SimpleQueue()
        self.worker = Worker(Source(), self.trial, lambda model, event: self.told.put((model, event)))

    def next_told(self):
        return self.told.get(timeout=WAIT_S)


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    for _ in range(10):
        bench.trial.go.release()
    bench.worker.stop()


def test_a_fetch_that_waits_holds_up_what_its_own_model_asks_for_and_no_other(bench):
    bench.worker.download("slow", 1, a_wish("slow"), [])
    bench.worker.verify("slow", 1, a_wish("slow"))
    bench.worker.download("quick", 1, a_wish("quick"), [])
    bench.worker.verify("quick", 1, a_wish("quick"))
    assert [bench.next_told(), bench.next_told()] == [("quick", Downloaded(1)), ("quick", Verified(1))]
    assert bench.told.empty()


def test_an_abandoned_attempt_says_nothing_and_the_next_goes_on(bench):
    bench.worker.download("slow", 1, a_wish("slow"), [])
    bench.worker.verify("slow", 1, a_wish("slow"))
    bench.worker.abandon("slow", 1)
    bench.worker.download("slow", 2, None, [])
    assert bench.next_told() == ("slow", Downloaded(2))


def test_trials_of_two_models_take_turns(bench):
    for model in ("a", "b"):
        bench.worker.try_out(model, 1, Path(model), None, HOW)
    first = bench.trial.begun.get(timeout=WAIT_S)
    bench.trial.go.release()
    assert bench.next_told() == (first, TrialPassed(1))
    bench.trial.go.release()
    assert bench.next_told() == ({"a": "b", "b": "a"}[first], TrialPassed(1))
    assert bench.trial.most == 1


def test_a_trial_that_is_abandoned_before_its_turn_is_never_begun(bench):
    bench.worker.try_out("a", 1, Path("a"), None, HOW)
    assert bench.trial.begun.get(timeout=WAIT_S) == "a"
    bench.worker.try_out("b", 1, Path("b"), None, HOW)
    bench.worker.abandon("b", 1)
    bench.worker.download("b", 2, None, [])
    assert bench.next_told() == ("b", Downloaded(2))
    assert bench.trial.begun.empty()


def test_what_is_added_after_the_stop_is_forgotten(bench):
    bench.worker.stop()
    bench.worker.download("quick", 1, None, [])
    assert bench.told.empty()


def test_whoever_waits_for_a_turn_can_be_stopped():
    gate, stop = threading.Lock(), threading.Event()
    stop.set()
    with turn(gate), pytest.raises(StoppedError), turn(gate, stop):
        pass
    with turn(gate, threading.Event()):
        assert gate.locked()
    assert not gate.locked()
