"""Verdicts go out until they are confirmed, a bounded amount at a time, and to everybody."""

import pytest

from cloud_hub.core.delivery import NewStatus
from cloud_hub.core.outbox import FIRST_RETRY_MS
from cloud_hub.full_model import FullModelWorker
from cloud_hub.outbox import MAX_DEVICES_PER_TURN, MAX_VERDICTS_PER_DEVICE, Outbox
from cloud_hub.store.store import Store
from cloud_hub.store.verdicts import confirm, label_case
from edge_cascade.codec import decode
from edge_cascade.messages import Acks, Receipt, Source
from tests.hub.fleet import BOOT, FULL_MODEL, a_delivery, a_model, a_new_case, wait_until


class Sent:
    """A publisher that writes down what it is given, while it is up."""

    def __init__(self):
        self.frames = []
        self.is_up = True

    def __call__(self, topic, payload):
        if not self.is_up:
            return None
        self.frames.append((topic, decode(payload)))
        return 1

    def take(self):
        taken = [(topic.split("/")[2], v.seq) for topic, frame in self.frames for v in frame.verdicts]
        self.frames.clear()
        return taken


class Clock:
    now_ms = 1_000_000

    def __call__(self):
        return self.now_ms


@pytest.fixture
def parts(tmp_path):
    with Store(tmp_path) as store:
        sent, clock = Sent(), Clock()
        yield store, Outbox(store.database, sent, prefix="edge", clock_ms=clock, sweep_s=0.05), sent, clock


def fill(store, **cases_of):
    """Answered cases, so many of each device, all of them online."""
    for device, count in cases_of.items():
        status = NewStatus(device, True, BOOT, "1", ())
        cases = [a_new_case(seq, device=device) for seq in range(count)]
        store.commit([a_delivery(*cases, device=device, status=status)], now_ms=1)
    worker = FullModelWorker(store, {"pump": a_model()})
    while worker.answer_some(a_model()):
        pass


def test_an_unconfirmed_verdict_is_sent_again_later_and_a_confirmed_one_is_not(parts):
    store, outbox, sent, clock = parts
    fill(store, a=2)
    outbox.hint(["a"])
    outbox.take_turn()
    assert sent.take() == [("a", 0), ("a", 1)]
    outbox.hint(["a"])
    outbox.take_turn()
    assert sent.take() == []
    store.database.run(lambda c: confirm(c, [("a", Receipt(BOOT, 0, 1))]))
    clock.now_ms += FIRST_RETRY_MS
    outbox.sweep()
    outbox.take_turn()
    assert sent.take() == [("a", 1)]


def test_nothing_is_noted_as_sent_while_the_broker_is_away(parts):
    store, outbox, sent, _ = parts
    fill(store, a=1)
    sent.is_up = False
    outbox.hint(["a"])
    outbox.take_turn()
    sent.is_up = True
    outbox.hint(["a"])
    outbox.take_turn()
    assert sent.take() == [("a", 0)]


def test_a_turn_is_bounded_and_a_large_backlog_keeps_nobody_waiting(parts):
    store, outbox, sent, _ = parts
    fill(store, a=2 * MAX_VERDICTS_PER_DEVICE + 5, b=3)
    outbox.hint(["a", "b"])
    assert outbox.take_turn()
    first = sent.take()
    assert len(first) == MAX_VERDICTS_PER_DEVICE + 3
    assert [seq for device, seq in first if device == "b"] == [0, 1, 2]
    assert outbox.take_turn()
    assert not outbox.take_turn()
    rest = sent.take()
    assert len({*first, *rest}) == len(first) + len(rest) == 2 * MAX_VERDICTS_PER_DEVICE + 8


def test_sweeps_come_round_to_every_device(parts):
    store, outbox, sent, _ = parts
    names = [f"d{number:03}" for number in range(MAX_DEVICES_PER_TURN + 10)]
    fill(store, **dict.fromkeys(names, 1))
    for _ in range(2):
        outbox.sweep()
        outbox.take_turn()
    assert sorted(device for device, _ in sent.take()) == names


def test_a_correction_goes_out_at_once_as_a_new_revision(parts):
    store, outbox, sent, _ = parts
    fill(store, a=1)
    outbox.hint(["a"])
    outbox.take_turn()
    label = {
        "probabilities": b"\0\0\0\0\xff\xff",
        "full_model": FULL_MODEL,
        "labelled_by": "ann",
        "now_ms": 3,
    }
    store.database.run(lambda c: label_case(c, 1, 2, **label))
    sent.take()
    outbox.hint(["a"])
    outbox.take_turn()
    ((_, frame),) = sent.frames
    (verdict,) = frame.verdicts
    assert (verdict.label, verdict.source, verdict.revision) == (2, Source.HUMAN, 2)


def test_the_thread_finds_without_a_hint_what_was_due_before_it_started(parts):
    store, outbox, sent, _ = parts
    fill(store, a=1)
    outbox.start()
    wait_until(lambda: sent.frames, what="the verdict")
    outbox.stop()
    assert not outbox.is_alive
    assert sent.take() == [("a", 0)]


def test_a_hub_that_is_back_greets_every_board_it_knows_online_or_not(parts):
    store, outbox, sent, _ = parts
    fill(store, a=1, b=1)
    store.commit([a_delivery(device="b", status=NewStatus("b", False, BOOT, "1", ()))], now_ms=2)
    outbox.greet()
    outbox.start()
    greetings = [("edge/v1/a/down/acks", Acks(bytes(8))), ("edge/v1/b/down/acks", Acks(bytes(8)))]
    wait_until(lambda: [frame for frame in sent.frames if isinstance(frame[1], Acks)] == greetings)
    outbox.stop()
