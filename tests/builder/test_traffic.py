import hashlib
import random
import socket
from itertools import count

import msgspec
import numpy as np
import paho.mqtt.client as paho
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="the builder needs onnx (the dev extra)")

from cloud_hub.builder.calibration.outcomes import walk
from cloud_hub.builder.reports.traffic import (
    FIRST_SAMPLE_AT_MS,
    Bytes,
    PlanRun,
    Sender,
    all_deflated_traffic,
    all_raw_traffic,
    cascade_traffic,
    natural_dtype,
    one_by_one_traffic,
    publish_bytes,
    tcp_bytes,
)
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.codec import MAX_PAYLOAD_BYTES, encode
from edge_cascade.ladder import Ladder
from edge_cascade.manifest import Wire
from edge_cascade.messages import Acks
from edge_daemon.audit import AuditCoin
from edge_daemon.core.spooling import BatchKey, ItemKind
from edge_daemon.frames import message_of
from edge_daemon.pipeline import Pipeline, Sample
from tests.builder.reports import digits

SENDER = Sender()


def walked(run, point):
    plan = run.plan
    return walk(run.outcomes, plan.rungs, plan.score, plan.points[point].max_score)


def some(run, samples):
    rows = np.arange(samples)
    return PlanRun(run.bundle, run.plan, run.x[rows], run.outcomes.rows(rows))


def test_the_frames_are_those_that_the_daemon_sends():
    run = digits().run("int8")
    now_ms = iter(map(SENDER.taken_at_ms, count()))
    boot = hashlib.sha256(b"board-1").digest()[:8]
    pipeline = Pipeline(
        run.bundle,
        Ladder(run.bundle, run.plan, OnnxStage, point=5),
        AuditCoin(0.0, 0.0, random.Random(0)),
        boot=boot,
        next_seq=count().__next__,
        now_s=lambda: 0.0,
    )
    cases = [
        outcome.case
        for outcome in (pipeline.process(Sample("sensor-1", x, 0.0, next(now_ms))) for x in run.x)
        if outcome.case is not None
    ]
    key = BatchKey(ItemKind.CASE, boot, "digits", bytes.fromhex(run.bundle.bundle_id), "int8")
    frames = [
        encode(message_of("board-1", key, cases[start : start + 64])) for start in range(0, len(cases), 64)
    ]
    traffic = cascade_traffic(run, walked(run, 5), SENDER, point=5)
    assert (traffic.samples, traffic.publishes) == (len(cases), len(frames))
    # One sample at a time or many, the last bit of a probability may differ, and deflate to other bytes.
    assert traffic.payload_bytes == pytest.approx(sum(map(len, frames)), abs=2 * len(frames))


@pytest.mark.parametrize(("protocol", "version"), [("5", paho.MQTTv5), ("3.1.1", paho.MQTTv311)])
@pytest.mark.parametrize("payload_bytes", [0, 1, 99, 100, 101, 16_350, 16_360, 100_000])
def test_a_publish_takes_the_bytes_that_paho_writes(protocol, version, payload_bytes, monkeypatch):
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=version)
    written = []
    monkeypatch.setattr(client, "_packet_queue", lambda command, packet, *rest: written.append(packet))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(client, "_sock", ours)
        client._send_publish(7, SENDER.topic.encode(), bytes(payload_bytes), qos=1)
        monkeypatch.undo()
    assert publish_bytes(SENDER.topic, payload_bytes, protocol) == len(written[0])


def test_tcp_counts_headers_of_every_segment_and_an_acknowledgement_for_every_second():
    assert tcp_bytes([1]) == Bytes(41, 40)
    assert tcp_bytes([1460]) == Bytes(1500, 40)
    assert tcp_bytes([1461]) == Bytes(1461 + 80, 40)
    assert tcp_bytes([3 * 1460, 10]) == Bytes(3 * 1500 + 50, 120)
    assert tcp_bytes([]) == Bytes(0, 0)


def test_nothing_escalated_sends_nothing():
    run = digits().run("int8")
    traffic = cascade_traffic(run, walked(run, len(run.plan.points) - 1), SENDER)
    assert (traffic.samples, traffic.publishes, traffic.payload_bytes) == (0, 0, 0)
    assert traffic.mqtt["5"] == traffic.tcp["3.1.1"] == Bytes(0, 0)


def test_batches_end_at_sixty_four_cases():
    traffic = all_deflated_traffic(some(digits().run("int8"), 129), SENDER)
    assert (traffic.samples, traffic.publishes) == (129, 3)


def test_batches_end_at_their_bytes():
    run = some(digits().run("int8"), 10)
    each = len(msgspec.msgpack.encode(bytes(64))) + 40
    traffic = all_deflated_traffic(run, Sender(max_batch_bytes=3 * each))
    assert traffic.publishes > 3


def test_a_slow_board_sends_every_case_alone_and_a_quick_one_does_not():
    run = some(digits().run("int8"), 12)
    slow = all_deflated_traffic(run, Sender(samples_per_s=1.0))
    quick = all_deflated_traffic(run, Sender(samples_per_s=20.0))
    assert slow.publishes == 12
    # A batch leaves 0.2 s after its first case, with the cases of five samples.
    assert quick.publishes == 3
    assert slow.up > quick.up


def test_every_frame_is_acknowledged_by_broker_and_hub():
    run = some(digits().run("int8"), 64)
    traffic = all_deflated_traffic(run, SENDER)
    acks = len(encode(Acks(bytes(8), committed=list(range(64)))))
    assert traffic.mqtt["3.1.1"].down == 4 + publish_bytes("edge/v1/board-1/down/acks", acks, "3.1.1")
    assert traffic.mqtt["5"].up == publish_bytes(SENDER.topic, traffic.payload_bytes, "5") + 4


def test_a_sample_above_the_payload_limit_travels_in_pieces():
    x = np.random.default_rng(0).random((2, 30_000), np.float32)
    raw = all_raw_traffic(x, SENDER)
    assert (raw.samples, raw.publishes, raw.payload_bytes) == (2, 4, 240_000)
    assert one_by_one_traffic(x, Wire("float32"), SENDER).publishes == 4
    assert raw.mqtt["5"].down == 4 * raw.publishes
    assert raw.up == 2 * (
        publish_bytes(SENDER.topic, MAX_PAYLOAD_BYTES, "5")
        + publish_bytes(SENDER.topic, 120_000 - MAX_PAYLOAD_BYTES, "5")
    )


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 255], "uint8"), ([-1, 5], "int16"), ([0, 256], "int16"), ([0.5], "float32"), ([1e6], "float32")],
)
def test_raw_samples_are_sent_in_the_narrowest_dtype_that_holds_them(values, dtype):
    x = np.array(values, np.float32)
    assert natural_dtype(x).dtype == dtype
    assert np.array_equal(natural_dtype(x), x)


@settings(max_examples=20)
@given(st.lists(st.booleans(), min_size=40, max_size=40))
def test_more_cases_are_never_fewer_messages_and_time_goes_on(flags):
    run = some(digits().run("int8"), 40)
    everything = walked(run, 0)
    accepted = np.where(flags, -1, 0)
    part = type(everything)(accepted, everything.label, everything.mult_adds)
    few, all_ = cascade_traffic(run, part, SENDER, point=0), cascade_traffic(run, everything, SENDER, point=0)
    assert few.samples == sum(flags)
    assert few.publishes <= all_.publishes
    assert few.up <= all_.up
    assert SENDER.taken_at_ms(3) == FIRST_SAMPLE_AT_MS + 60
