"""The inference thread with a scripted pipeline: it answers, hands on, and survives whatever a sample does."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass

import pytest

from edge_cascade.mqtt import Incoming
from edge_daemon.errors import SpoolError, StoppedError
from edge_daemon.inference import BATCH_FROM, InferenceThread
from edge_daemon.inlet.acks import OrderedAcks
from edge_daemon.inlet.queue import Queued, SampleQueue
from edge_daemon.pipeline import Outcome, Sample

WAIT_S = 10.0


@dataclass
class Case:
    sensor: str


class Pipeline:
    """Sensors named `bad` raise, `unsure` make a case; the others are answered."""

    def __init__(self):
        self.sizes = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def process(self, sample):
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        self.sizes.append(1)
        return self.answer(sample)

    def process_batch(self, samples):
        self.sizes.append(len(samples))
        return [self.answer(sample) for sample in samples]

    def answer(self, sample):
        if sample.sensor.startswith("bad"):
            raise RuntimeError("no")
        return Outcome(
            sample.sensor, None, Case(sample.sensor) if sample.sensor.startswith("unsure") else None
        )


class Rig:
    def __init__(self, observe=None, lull=None):
        self.pipeline = Pipeline()
        self.published, self.counted, self.acknowledged, self.shed = [], [], [], []
        self.failed = 0
        self.futures = []
        self.acks = OrderedAcks(lambda message: self.acknowledged.append(message.packet_id))
        self.queue = SampleQueue(100, self.shed.append)
        self.thread = InferenceThread(
            {"m": self.pipeline},
            self.queue,
            publish=lambda outcome: self.published.append(outcome.answer),
            submit=self.submit,
            tally=self,
            on_failed=self.note_failed,
            observe=observe,
            lull=lull,
        )

    def submit(self, _, case):
        self.futures.append(Future())
        return self.futures[-1]

    def count_outcome(self, _, outcome):
        self.counted.append(outcome.answer)

    def note_failed(self, _):
        self.failed += 1

    def put(self, *sensors):
        for sensor in sensors:
            ticket = self.acks.open(Incoming(sensor, b"", 1, False, len(self.acks) + 1), 1)
            self.queue.put(Queued("m", Sample(sensor, None, 0.0, 0), ticket))

    def run(self):
        self.thread.start()
        assert self.thread.stop(WAIT_S)


@pytest.fixture
def rig():
    return Rig()


def test_every_sample_is_published_counted_and_acknowledged_in_order(rig):
    rig.put("a", "b", "c")
    rig.run()
    assert rig.published == rig.counted == ["a", "b", "c"]
    assert rig.acknowledged == [1, 2, 3]


def test_a_case_is_acknowledged_only_after_its_commit_and_holds_back_what_came_later(rig):
    rig.put("unsure", "b")
    rig.run()
    assert rig.published == ["unsure", "b"]
    assert rig.acknowledged == []
    rig.futures[0].set_result(None)
    assert rig.acknowledged == [1, 2]


def test_a_case_that_the_disk_refused_is_acknowledged_too_because_it_is_counted(rig):
    rig.put("unsure")
    rig.run()
    rig.futures[0].set_exception(SpoolError("full"))
    assert rig.acknowledged == [1]


def test_a_sample_that_raises_is_counted_and_the_next_one_served(rig, caplog):
    rig.put("a", "bad", "c")
    rig.run()
    assert (rig.published, rig.failed, rig.acknowledged) == (["a", "c"], 1, [1, 2, 3])
    assert caplog.text.count("sample failed") == 1
    assert "Traceback" not in caplog.text


def test_what_has_queued_up_is_answered_in_batches(rig):
    rig.put(*(f"s{n}" for n in range(BATCH_FROM + 1)))
    rig.run()
    assert rig.pipeline.sizes == [BATCH_FROM + 1]
    assert rig.published == [f"s{n}" for n in range(BATCH_FROM + 1)]


def test_stopping_answers_what_is_queued(rig):
    rig.put(*(f"s{n}" for n in range(80)))
    rig.run()
    assert len(rig.published) == 80


def test_a_stuck_sample_is_seen_and_stopping_does_not_wait_for_ever(rig):
    rig.pipeline.gate.clear()
    rig.put("a")
    rig.thread.start()
    assert rig.pipeline.entered.wait(WAIT_S)
    assert rig.thread.stuck_s() > 0
    assert not rig.thread.stop(0.05)
    rig.pipeline.gate.set()
    assert rig.thread.stop(WAIT_S)
    assert rig.thread.stuck_s() == 0


def test_a_learner_that_cannot_look_at_a_sample_keeps_no_answer_back(caplog):
    def observe(model, sample, outcome):
        raise MemoryError

    rig = Rig(observe)
    rig.put("a", "b")
    rig.run()
    assert (rig.published, rig.failed, rig.acknowledged) == (["a", "b"], 0, [1, 2])
    assert caplog.text.count("not learned from") == 1


def test_another_pipeline_answers_between_two_batches_and_the_one_before_is_handed_back(rig):
    before, after = rig.pipeline, Pipeline()
    rig.pipeline.gate.clear()
    rig.put("a")
    rig.thread.start()
    assert before.entered.wait(WAIT_S)
    flipped = rig.thread.install("m", after)
    rig.put("b")
    assert not flipped.done()
    before.gate.set()
    assert flipped.result(WAIT_S) is before
    assert rig.thread.stop(WAIT_S)
    assert (before.sizes, after.sizes) == ([1], [1])
    assert rig.published == ["a", "b"]


def test_a_flip_that_was_taken_back_is_not_made(rig):
    after = Pipeline()
    assert rig.thread.install("m", after).cancel()
    rig.put("a")
    rig.run()
    assert (rig.pipeline.sizes, after.sizes) == ([1], [])


def test_a_flip_after_the_end_is_refused(rig):
    rig.run()
    with pytest.raises(StoppedError):
        rig.thread.install("m", Pipeline()).result(WAIT_S)
