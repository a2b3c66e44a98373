"""The uplink against a real mosquitto and a hub that does as it is told."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack

import msgspec
import pytest

from edge_cascade.burst import QUIET_S
from edge_cascade.codec import encode
from edge_cascade.messages import (
    Acks,
    BaseRequest,
    ClientUpdate,
    DesiredModel,
    DesiredState,
    Report,
    RoundOffer,
    RunningModel,
    Source,
    Status,
    TrainingBase,
    Use,
    Verdict,
    VerdictBatch,
)
from edge_cascade.mqtt import Broker, Incoming
from edge_daemon.clock import SystemClock
from edge_daemon.config import HubConfig
from edge_daemon.core import sending
from edge_daemon.core.sending_events import Tick
from edge_daemon.core.spooling import DropReason, Priority, SpoolLimits
from edge_daemon.downlink import Downlink
from edge_daemon.spool import SqliteSpool
from edge_daemon.uplink import MqttUplink
from tests.device.fake_hub import FakeHub
from tests.device.spooling_cases import BOOT, BUNDLE, OTHER_BOOT, case, item, raw, report, update, wait_until
from tests.services import free_port, start_mosquitto

MODEL = RunningModel("vibration", BUNDLE, "p", 3)
FULL_MODEL = bytes(32)
ONLINE = Status("dev-1", True, BOOT, "0.1.0", [MODEL])
OFFLINE = Status("dev-1", False, BOOT, "0.1.0", [])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Failures are retried within a test's patience."""
    monkeypatch.setattr(sending, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(sending, "LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr("edge_cascade.mqtt.LONGEST_RETRY_S", 0.2)


class Device:
    """Spool and uplink, with the verdicts that were passed on."""

    def __init__(self, directory, port, boot=BOOT, **hub):
        settings = {"batch_linger_s": 0.02, "ack_timeout_s": 0.4} | hub
        self.config = HubConfig(broker=Broker(port=port), **settings)
        self.spool = SqliteSpool(directory / "spool.db", SpoolLimits(commit_window_ms=1), SystemClock())
        self.verdicts = []
        self.desired = []
        self.rounds = []
        self.uplink = MqttUplink(
            self.config,
            "dev-1",
            boot,
            self.spool,
            self.pass_on,
            lambda: [MODEL],
            client_id="dev-1-secret-uplink",
            clock=SystemClock(),
            daemon_version="0.1.0",
            on_desired=self.desired.append,
            on_round=self.rounds.append,
        )

    def pass_on(self, model, full_model, verdict):
        self.verdicts.append((model, full_model, verdict))

    def start(self):
        self.spool.open()
        self.uplink.start()
        return self

    def close(self):
        self.uplink.stop(0)
        self.spool.close()

    def append(self, *items):
        for future in [self.spool.append(one) for one in items]:
            future.result(45)

    def rows(self):
        self.spool.flush()
        return self.spool.counts().rows

    def wait_empty(self):
        wait_until(
            lambda: self.rows() == 0,
            what=f"the spool is empty, {self.spool.counts()}, {self.uplink.counters()}",
        )


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def broker(stack, tmp_path):
    return stack.enter_context(start_mosquitto(tmp_path))


@pytest.fixture
def hub(stack, broker):
    return stack.enter_context(FakeHub(broker.port))


@pytest.fixture
def start_device(stack, tmp_path, broker):
    def start(**settings):
        device = Device(tmp_path, settings.pop("port", broker.port), **settings).start()
        stack.callback(device.close)
        return device

    return start


@pytest.fixture
def device(start_device):
    device = start_device()
    wait_until(lambda: device.uplink._session.is_listening, what="the uplink is subscribed")
    return device


def verdict(seq, revision=0, label=2):
    return Verdict(BOOT, seq, "pump-1", label, b"", Source.MODEL, Use.TRAIN, revision)


def verdicts(*those):
    return VerdictBatch("vibration", FULL_MODEL, list(those))


def test_cases_updates_and_reports_arrive_as_they_were_and_leave_the_spool(hub, device):
    device.append(item(1), item(2, values=300), update(3), report(4), item(5, boot=OTHER_BOOT))
    device.wait_empty()
    assert hub.stored == {
        (BOOT, 1): case(1),
        (BOOT, 2): case(2, values=300),
        (BOOT, 3): ClientUpdate("dev-1", BOOT, 3, "vibration", "round-7", BUNDLE, 20, "fp32", b"delta"),
        (BOOT, 4): Report("dev-1", BOOT, 4, 5, {"edge_samples": 7}),
        (OTHER_BOOT, 5): case(5),
    }
    assert device.uplink.counters() | {"bytes_up": 0, "bytes_down": 0, "frames": 0} == {
        "bytes_up": 0,
        "bytes_down": 0,
        "connects": 1,
        "frames": 0,
        "items": 5,
        "retries": 0,
        "acknowledged": 5,
        "duplicates": 0,
        "rejected": 0,
        "refused": 0,
        "malformed": 0,
        "verdicts": 0,
        "verdicts_repeated": 0,
        "verdicts_not_passed_on": 0,
    }


def test_cases_travel_in_batches(hub, stack, tmp_path, broker):
    device = Device(tmp_path, broker.port, batch_linger_s=3600, max_batch_items=10, ack_timeout_s=60.0)
    stack.callback(device.close)
    device.spool.open()
    # Before the uplink starts: one that claims while rows are still being committed takes what is there.
    device.append(*(item(seq) for seq in range(40)))
    device.uplink.start()
    device.wait_empty()
    assert (len(hub.batches), sorted(seq for batch in hub.batches for seq in batch)) == (4, list(range(40)))


def test_the_status_is_retained_and_says_what_runs(device, broker):
    with FakeHub(broker.port) as late_hub:
        wait_until(lambda: late_hub.statuses == [ONLINE], what="the retained status")


def test_a_goodbye_leaves_an_offline_status(hub, device):
    wait_until(lambda: hub.statuses == [ONLINE])
    device.uplink.stop(0)
    wait_until(lambda: hub.statuses == [ONLINE, OFFLINE], what="the offline status")


def test_a_swap_is_announced(hub, device):
    wait_until(lambda: hub.statuses == [ONLINE])
    device.uplink.announce()
    wait_until(lambda: hub.statuses == [ONLINE, ONLINE], what="the second status")


def test_the_will_says_offline_when_the_device_dies(hub, start_device):
    device = start_device()
    wait_until(lambda: hub.statuses == [ONLINE])
    # A second session with the same name: the broker cuts the first, as it would a dead one.
    other = Device(device.spool._ledger._path.parent / "other", device.config.broker.port)
    other.start()
    wait_until(lambda: OFFLINE in hub.statuses, what="the last will")
    other.close()


def test_stopping_drains_what_waits(hub, start_device):
    device = start_device(batch_linger_s=3600)
    wait_until(lambda: device.uplink.is_up)
    device.append(item(1), item(2))
    device.uplink.stop(10)
    device.spool.flush()
    assert (set(hub.stored), device.spool.counts().rows) == ({(BOOT, 1), (BOOT, 2)}, 0)


def test_stopping_without_a_broker_does_not_wait(start_device):
    device = start_device(port=free_port())
    device.append(item(1))
    thread = threading.Thread(target=device.uplink.stop, args=(3600,))
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert device.spool.counts().rows == 1


def test_lost_acknowledgements_are_made_good_by_sending_again(hub, device):
    hub.answer = hub.stay_silent
    device.append(*(item(seq) for seq in range(10)))
    wait_until(lambda: len(hub.deliveries) > 10, what="a second delivery")
    hub.answer = hub.acknowledge
    device.wait_empty()
    assert set(hub.stored) == {(BOOT, seq) for seq in range(10)}
    counters = device.uplink.counters()
    assert counters["duplicates"] > 0
    assert counters["retries"] > 0


def test_a_defect_while_nothing_is_heard_ends_no_delivery_and_is_said_once(
    hub, start_device, monkeypatch, caplog
):
    monkeypatch.setattr("edge_daemon.uplink.DEFECT_PAUSE_S", 0.01)
    defects = []

    def next_state(state, event, **given):
        if isinstance(event, Tick) and len(defects) < 5:
            defects.append(event)
            raise ValueError("a defect")
        return sending.next_state(state, event, **given)

    monkeypatch.setattr("edge_daemon.uplink.next_state", next_state)
    hub.answer = hub.stay_silent
    device = start_device()
    device.append(*(item(seq) for seq in range(10)))
    wait_until(lambda: len(defects) == 5, what="five defects")
    hub.answer = hub.acknowledge
    device.wait_empty()
    assert caplog.text.count("defect in the uplink") == 1


def test_while_the_hub_is_silent_single_rows_probe_it(hub, device):
    hub.answer = hub.forget
    device.append(*(item(seq) for seq in range(20)))
    wait_until(lambda: len(hub.batches) >= 4, what="three more attempts")
    assert {len(batch) for batch in hub.batches[1:4]} == {1}


def test_acknowledgements_may_come_twice_and_for_strangers(hub, device):
    device.append(item(1))
    device.wait_empty()
    for seqs in ([1], [1, 77], list(range(100, 200))):
        hub.send("acks", Acks(BOOT, seqs))
    device.append(item(2))
    device.wait_empty()
    assert set(hub.stored) == {(BOOT, 1), (BOOT, 2)}


def test_rejected_items_become_counted_drops(hub, device):
    hub.answer = hub.reject
    device.append(item(1), item(2), report(3))
    device.wait_empty()
    counts = {key: dropped.count for key, dropped in device.spool.counts().drops.items()}
    assert counts == {
        (DropReason.REJECTED, Priority.ESCALATION): 2,
        (DropReason.REJECTED, Priority.REPORT): 1,
    }


def test_one_row_that_the_hub_cannot_read_holds_up_no_other(hub, device):
    def refuse_the_poison(frame, names):
        return hub.refuse(frame, names) if (BOOT, 3) in names else hub.acknowledge(frame, names)

    hub.answer = refuse_the_poison
    device.append(*(item(seq) for seq in range(8)))
    wait_until(lambda: len(hub.stored) == 7, what="all others")
    wait_until(lambda: device.spool.counts().deferred_rows == 1, what="the poison is put back")
    wait_until(lambda: device.rows() == 1, what="the others are acknowledged")
    assert device.spool.counts().drops == {}
    device.append(item(9))
    wait_until(lambda: (BOOT, 9) in hub.stored)


def test_a_hub_that_cannot_read_anything_loses_nothing(hub, device):
    hub.answer = hub.refuse
    device.append(*(item(seq) for seq in range(5)))
    wait_until(lambda: device.uplink.counters()["refused"] >= 6)
    device.spool.flush()
    assert (device.spool.counts().rows, device.spool.counts().drops) == (5, {})


def test_a_row_whose_body_is_no_message_is_dropped_and_counted(hub, device):
    device.append(raw(1), raw(2))
    device.append(item(3))
    device.wait_empty()
    assert set(hub.stored) == {(BOOT, 3)}
    assert {key: dropped.count for key, dropped in device.spool.counts().drops.items()} == {
        (DropReason.DAMAGED, Priority.ESCALATION): 2
    }


def test_a_large_case_and_a_large_update_travel_in_chunks(hub, device):
    delta = random.Random(1).randbytes(350_000)
    device.append(item(1, values=60_000), update(2, delta=delta))
    device.wait_empty()
    assert hub.stored[BOOT, 1] == case(1, values=60_000)
    assert hub.stored[BOOT, 2].delta == delta
    assert len(hub.payload_sizes) >= 7
    assert max(hub.payload_sizes) <= 100 * 1024


def test_chunks_obey_the_brokers_maximum_packet_size(stack, tmp_path):
    broker = stack.enter_context(start_mosquitto(tmp_path, extra="max_packet_size 5000"))
    hub = stack.enter_context(FakeHub(broker.port))
    device = Device(tmp_path, broker.port).start()
    stack.callback(device.close)
    device.append(*(item(seq, values=2000) for seq in range(5)))
    device.wait_empty()
    assert set(hub.stored) == {(BOOT, seq) for seq in range(5)}
    assert 4000 < max(hub.payload_sizes) < 5000


def test_rows_wait_for_a_broker_that_comes_late_and_a_hub_that_comes_later(stack, tmp_path):
    port = free_port()
    device = Device(tmp_path, port).start()
    stack.callback(device.close)
    device.append(*(item(seq) for seq in range(5)))
    assert device.uplink.is_up is False
    stack.enter_context(start_mosquitto(tmp_path, port=port))
    wait_until(lambda: device.uplink.is_up, what="the broker is found")
    hub = stack.enter_context(FakeHub(port))
    device.wait_empty()
    assert set(hub.stored) == {(BOOT, seq) for seq in range(5)}


def test_a_broker_killed_and_started_without_its_memory_loses_nothing(stack, tmp_path):
    port = free_port()
    device = Device(tmp_path, port).start()
    stack.callback(device.close)
    expected = set()
    for life in range(3):
        with start_mosquitto(tmp_path, port=port) as broker, FakeHub(port, is_silent=life < 2) as hub:
            device.append(*(item(100 * life + seq) for seq in range(30)))
            expected |= {(BOOT, 100 * life + seq) for seq in range(30)}
            wait_until(lambda hub=hub: hub.deliveries, what="something arrives")
            if life < 2:
                broker.kill()
            else:
                device.wait_empty()
        wait_until(lambda: not device.uplink.is_up, what="the loss is noticed")
    assert set(hub.stored) == expected


def test_a_new_life_sends_what_the_last_one_left(hub, start_device):
    hub.answer = hub.stay_silent
    first = start_device()
    first.append(item(1), item(2))
    wait_until(lambda: hub.deliveries)
    first.close()
    hub.answer = hub.acknowledge
    start_device(boot=OTHER_BOOT).wait_empty()
    assert set(hub.stored) == {(BOOT, 1), (BOOT, 2)}


# --- verdicts ----------------------------------------------------------------------------------------------


def test_a_verdict_is_passed_on_and_then_receipted(hub, device):
    hub.send("verdicts", verdicts(verdict(1), verdict(2)))
    wait_until(lambda: hub.receipts == [(1, 0), (2, 0)], what="two receipts")
    assert device.verdicts == [("vibration", FULL_MODEL, verdict(1)), ("vibration", FULL_MODEL, verdict(2))]


def test_a_repeated_verdict_is_receipted_again_but_not_passed_on_twice(hub, device):
    for _ in range(3):
        hub.send("verdicts", verdicts(verdict(1)))
    wait_until(lambda: hub.receipts == [(1, 0)] * 3, what="three receipts")
    assert [passed for _, _, passed in device.verdicts] == [verdict(1)]


def test_a_correction_is_passed_on_and_what_it_overtook_is_not(hub, device):
    for revision in (0, 2, 1):
        hub.send("verdicts", verdicts(verdict(1, revision, label=revision)))
    wait_until(lambda: hub.receipts == [(1, 0), (1, 2), (1, 1)], what="a receipt for each")
    assert [(passed.revision, passed.label) for _, _, passed in device.verdicts] == [(0, 0), (2, 2)]


def test_a_verdict_that_could_not_be_passed_on_is_not_receipted(hub, device, monkeypatch):
    monkeypatch.setattr(device, "verdicts", None)
    hub.send("verdicts", verdicts(verdict(1)))
    wait_until(lambda: device.uplink.counters()["verdicts_not_passed_on"] == 1)
    device.verdicts = []
    hub.send("verdicts", verdicts(verdict(1), verdict(2)))
    wait_until(lambda: hub.receipts == [(1, 0), (2, 0)], what="receipts once it works")


def test_a_chunked_batch_of_verdicts_is_put_together(hub, device):
    many = [verdict(seq) for seq in range(500)]
    hub.send("verdicts", verdicts(*many), max_payload_bytes=500)
    wait_until(lambda: len(hub.receipts) == 500, what="500 receipts")
    assert [passed for _, _, passed in device.verdicts] == many


# --- the other topics, and garbage -------------------------------------------------------------------------


def test_desired_state_and_round_offers_are_handed_over(hub, device):
    desired = DesiredState("dev-1", 3, [DesiredModel("vibration", "r7", BUNDLE)])
    offer = RoundOffer(b"terms", bytes(64), 60)
    hub.send("desired", desired)
    hub.send("round", offer)
    wait_until(lambda: (device.desired, device.rounds) == ([desired], [offer]), what="both")


def test_training_bases_in_chunks_and_a_cleared_offer_are_handed_over(hub, device):
    base = TrainingBase("vibration", BUNDLE, bytes(32), [random.Random(5).randbytes(5000)])
    hub.send("round", base, max_payload_bytes=1000)
    hub.send_raw("round", b"")
    wait_until(lambda: device.rounds == [base, None], what="both")


def test_a_request_for_a_base_goes_to_the_hub_and_not_through_the_spool(hub, device):
    wait_until(lambda: device.uplink.is_up)
    request = BaseRequest("dev-1", "vibration", BUNDLE, bytes(32))
    device.uplink.ask_for_base(request)
    wait_until(lambda: hub.base_requests == [request])
    assert device.spool.counts().appended == 0


def test_garbage_on_every_down_topic_is_counted_and_changes_nothing(hub, device):
    rng = random.Random(7)
    good = encode(Acks(BOOT, [1, 2, 3]))
    garbage = [
        rng.randbytes(rng.randrange(1, 300)) for _ in range(20)
    ] + [
        good[: rng.randrange(len(good))] for _ in range(5)
    ] + [
        bytes((0xED, 1, kind, flags)) + rng.randbytes(40) for kind in range(12) for flags in (0, 1, 2)
    ] + [
        bytes((0xED, 9)) + good[2:],
        # A bomb: announces 4 GiB.
        bytes((0xED, 1, 2, 1)) + b"\xff\xff\xff\xff" + rng.randbytes(100),
        encode(Status("dev-1", True, BOOT, "1", [])),
    ]  # fmt: skip
    sent = 0
    for channel in ("acks", "verdicts", "desired", "round"):
        for payload in filter(None, garbage):
            hub.send_raw(channel, payload)
            sent += 1
    wait_until(lambda: device.uplink.counters()["malformed"] == sent, what=f"{sent} malformed payloads")
    device.append(item(1))
    device.wait_empty()
    hub.send("verdicts", verdicts(verdict(1)))
    wait_until(lambda: hub.receipts == [(1, 0)])


def test_a_burst_of_garbage_is_one_line_in_the_log(caplog):
    downlink = Downlink(lambda *_: None, None, None)
    for now_s in (0.0, 1.0, QUIET_S - 1.0, QUIET_S):
        assert downlink.read("acks", b"garbage", now_s=now_s) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"malformed message from the hub channel=acks kept_back={kept_back}: "
        "7 bytes that are no frame of this protocol"
        for kept_back in (0, 2)
    ]
    assert downlink.counts.malformed == 4


def test_remembered_verdicts_are_bounded(monkeypatch):
    monkeypatch.setattr("edge_daemon.downlink.REMEMBERED_VERDICTS", 2)
    passed = []
    downlink = Downlink(lambda *verdict: passed.append(verdict[2].seq), None, None)
    for seq in (1, 2, 1, 3, 1, 2):
        downlink.read("verdicts", encode(verdicts(verdict(seq))), now_s=0.0)
    assert passed == [1, 2, 3, 2]


def test_a_message_of_a_newer_hub_with_more_fields_is_understood():
    frame = encode(Acks(BOOT, [1]))
    longer = frame[:4] + msgspec.msgpack.encode([*msgspec.msgpack.decode(frame[4:]), "new", 5])
    assert Downlink(lambda *_: None, None, None).read("acks", longer, now_s=0.0) == Acks(BOOT, [1])


def test_while_nobody_listens_rows_are_tried_again_without_waiting_for_the_acknowledgement(
    stack, broker, start_device
):
    device = start_device(ack_timeout_s=600.0)
    wait_until(lambda: device.uplink.is_up, what="the uplink is connected")
    device.append(item(1))
    wait_until(lambda: device.uplink.counters()["retries"] >= 2, what="the row was tried again")
    stack.enter_context(FakeHub(broker.port))
    device.wait_empty()


def test_the_hubs_greeting_shortens_the_pause(monkeypatch, stack, broker, start_device):
    monkeypatch.setattr(sending, "GREETING_SPREAD_S", 0.1)
    monkeypatch.setattr(sending, "FIRST_PAUSE_S", 600.0)
    monkeypatch.setattr(sending, "LONGEST_PAUSE_S", 600.0)
    device = start_device(ack_timeout_s=600.0)
    wait_until(lambda: device.uplink.is_up, what="the uplink is connected")
    device.append(item(1))
    wait_until(lambda: device.uplink._state.failures > 0, what="the uplink pauses")
    hub = stack.enter_context(FakeHub(broker.port))
    hub.send("acks", Acks(bytes(8)))
    device.wait_empty()


@pytest.mark.parametrize(
    "topic", ["edge/v1/dev-1/up/cases", "edge/v1/dev-2/down/acks", "edge/v1/dev-1/x/y", ""]
)
def test_a_message_of_somebody_else_changes_nothing(device, hub, topic):
    device.uplink._inbox.put(Incoming(topic, encode(Acks(BOOT, [1])), 1, True, 7))
    device.append(item(1))
    device.wait_empty()
    assert device.uplink.counters()["acknowledged"] == 1


def test_a_retained_wish_that_is_cleared_is_not_malformed(device, hub):
    hub.send_raw("desired", b"")
    device.append(item(1))
    device.wait_empty()
    assert device.uplink.counters()["malformed"] == 0
