"""The frame of the hub's threads: signs, turns, faults, the end."""

import logging
import threading
from queue import SimpleQueue

import pytest

from cloud_hub import thread_loop
from cloud_hub.errors import StoreUnavailableError
from cloud_hub.thread_loop import ThreadLoop

WAIT_S = 30.0


class Turns(ThreadLoop):
    """Tells each turn; what it does and how long it may rest is told in advance."""

    def __init__(self):
        super().__init__("turns")
        self.taken = SimpleQueue()
        self.script = []
        self.rest_s = WAIT_S * 10

    def run_once(self):
        self.taken.put(threading.current_thread().name)
        act = self.script.pop(0) if self.script else None
        if act is not None:
            act()
        return self.rest_s

    def next_turn(self):
        return self.taken.get(timeout=WAIT_S)


def raising(error):
    def act():
        raise error

    return act


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.setattr(thread_loop, "RETRY_S", 0.0)
    turns = Turns()
    yield turns
    turns.stop(WAIT_S)
    assert not turns.is_alive


def test_a_turn_is_taken_at_the_start_and_at_every_sign(turns):
    assert not turns.is_alive
    turns.start()
    assert turns.is_alive
    assert turns.next_turn() == "turns"
    turns.wake()
    turns.next_turn()
    assert turns.taken.empty()


def test_a_sign_that_comes_during_a_turn_is_worth_another(turns):
    turns.script = [turns.wake]
    turns.start()
    turns.next_turn()
    turns.next_turn()


def test_whoever_may_not_rest_goes_on_without_a_sign(turns):
    turns.rest_s = 0.0
    turns.start()
    for _ in range(5):
        turns.next_turn()


def test_a_fault_of_the_store_is_said_in_one_line_and_the_next_turn_comes(turns, caplog):
    turns.script = [raising(StoreUnavailableError("disk full"))]
    turns.start()
    turns.next_turn()
    turns.next_turn()
    assert caplog.messages == ["turns waits reason=disk full"]


def test_a_defect_is_said_with_its_trace_and_ends_no_thread(turns, caplog):
    turns.script = [raising(ZeroDivisionError("defect")), raising(ZeroDivisionError("again"))]
    turns.start()
    for _ in range(3):
        turns.next_turn()
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.ERROR, "turn failed thread=turns")
    ] * 2
    assert all(record.exc_info for record in caplog.records)


def test_a_stop_ends_the_rest_and_one_that_never_started_can_be_stopped(turns):
    turns.start()
    turns.next_turn()
    turns.stop(WAIT_S)
    assert not turns.is_alive
    Turns().stop()
