"""The frame of what works beside the answers: items, signs, defects, the end."""

import threading
from queue import SimpleQueue

import pytest

from edge_daemon.side_thread import MAX_WAITING, SideThread

from .signed_fleet import FakeClock

WAIT_S = 30.0


class Turns(SideThread[str]):
    """Tells each turn; `gate` holds it up, `error` spoils it."""

    def __init__(self):
        self.clock = FakeClock()
        super().__init__("turns", self.clock)
        self.taken = SimpleQueue()
        self.gate = threading.Event()
        self.gate.set()
        self.error = None
        self.ended = []

    def turn(self, item):
        self.taken.put((threading.current_thread().name, item))
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error

    def end(self):
        self.ended += self.left()

    def next_turn(self):
        return self.taken.get(timeout=WAIT_S)


@pytest.fixture
def turns():
    turns = Turns()
    turns.start()
    yield turns
    turns.gate.set()
    turns.stop()
    assert not turns._thread.is_alive()


def test_what_is_put_in_is_dealt_with_in_order_on_a_thread_of_that_name(turns):
    assert turns.offer("a")
    assert turns.offer("b")
    assert [turns.next_turn(), turns.next_turn()] == [("turns", "a"), ("turns", "b")]


def test_a_sign_is_a_turn_and_so_is_a_while_without_one(turns):
    turns.wake()
    assert [turns.next_turn(), turns.next_turn()] == [("turns", None)] * 2


def test_what_does_not_fit_is_not_taken_and_nobody_waits(turns):
    turns.gate.clear()
    assert turns.offer("in hand")
    turns.next_turn()
    assert not turns.is_full
    assert all(turns.offer(str(n)) for n in range(MAX_WAITING))
    assert turns.is_full
    assert not turns.offer("too much")
    turns.wake()


def test_a_stop_finishes_the_turn_and_what_is_left_is_for_the_end(turns):
    turns.gate.clear()
    turns.offer("in hand")
    turns.next_turn()
    turns.wake()
    turns.offer("left")
    stopping = threading.Thread(target=turns.stop)
    stopping.start()
    assert turns._stopping.wait(WAIT_S)
    turns.gate.set()
    stopping.join(WAIT_S)
    assert turns.taken.empty()
    assert turns.ended == ["left"]


def test_a_defect_that_stays_is_said_with_its_trace_once_a_burst_and_ends_nothing(turns, caplog):
    turns.error = ZeroDivisionError("defect")
    for item in "abc":
        turns.offer(item)
        assert turns.next_turn() == ("turns", item)
    turns.error = None
    turns.offer("d")
    assert turns.next_turn() == ("turns", "d")
    assert [(record.message, bool(record.exc_info)) for record in caplog.records] == [
        ("turn failed thread=turns", True)
    ]


def test_one_that_never_started_can_be_stopped():
    Turns().stop()
