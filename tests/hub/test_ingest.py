"""Ingest through a real mosquitto, in one process with the hub; kill -9 is in test_program."""

import asyncio
import threading

import numpy as np
import pytest

from cloud_hub.config import Config, HttpSection, HubSection
from cloud_hub.core.delivery import Committed
from cloud_hub.errors import StoreRefusedError, StoreUnavailableError
from cloud_hub.hub import Hub
from cloud_hub.ingest import NO_BOOT, Ingest, acks_of
from cloud_hub.intake import Intake
from cloud_hub.reading import Reader
from cloud_hub.store.queries import CaseFilter, find_cases, list_devices, totals
from cloud_hub.store.store import Store
from edge_cascade.codec import decode, encode, frame_digest
from edge_cascade.manifest import Wire
from edge_cascade.messages import (
    Acks,
    ClientUpdate,
    Receipt,
    Receipts,
    Refusal,
    Report,
    Source,
    VerdictBatch,
)
from edge_cascade.mqtt import Broker, Incoming
from edge_cascade.tensors import encode_tensor
from tests.hub.fleet import (
    BOOT,
    FULL_MODEL,
    Device,
    a_batch,
    a_case,
    a_delivery,
    a_model,
    a_new_case,
    sample,
    wait_until,
)
from tests.services import start_mosquitto


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with start_mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


class Running:
    """A hub on an event loop of its own."""

    def __init__(self, state_dir, port, prefix, models):
        config = Config(
            hub=HubSection(state_dir=str(state_dir), prefix=prefix),
            broker=Broker(port=port),
            http=HttpSection(port=0),
        )
        self.hub = Hub(config, models)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self):
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.hub.start(), self._loop).result(20)
        wait_until(lambda: not self.hub.problems(), what="the hub to be ready")
        return self.hub

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self.hub.stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def prefix(request):
    return "t/" + str(abs(hash(request.node.name)))


@pytest.fixture
def hub(tmp_path, broker, prefix):
    with Running(tmp_path / "state", broker.port, prefix, {"pump": a_model()}) as hub:
        yield hub


@pytest.fixture
def device(hub, broker, prefix):
    with Device(broker.port, prefix=prefix) as device:
        yield device


def counters(hub):
    return hub.store.database.run(totals).counters


def cases_in(hub):
    return hub.store.database.run(lambda c: find_cases(c, CaseFilter(), before=None, limit=500))


def test_a_case_is_acknowledged_answered_and_its_verdict_sent_until_confirmed(hub, device):
    device.say_online()
    device.send(a_batch(a_case(7, x=sample(2))))
    assert device.next_of(Acks) == Acks(BOOT, committed=[7])
    batch = device.next_of(VerdictBatch)
    (verdict,) = batch.verdicts
    assert (batch.model, batch.full_model) == ("pump", FULL_MODEL)
    assert (verdict.seq, verdict.sensor, verdict.label, verdict.source) == (7, "s1", 2, Source.MODEL)
    again = device.next_of(VerdictBatch)
    assert again == batch
    device.send(Receipts([Receipt(BOOT, 7, verdict.revision)]), channel="telemetry")
    wait_until(lambda: hub.store.database.run(totals).unconfirmed == 0, what="the receipt")


def test_the_same_batch_again_is_acknowledged_as_duplicate_and_kept_once(hub, device):
    for expected in (Acks(BOOT, committed=[1, 2]), Acks(BOOT, duplicate=[1, 2])):
        device.send(a_batch(a_case(1), a_case(2)))
        assert device.next_of(Acks) == expected
    assert len(cases_in(hub)) == 2


def test_bad_cases_are_rejected_beside_good_ones(hub, device):
    device.send(a_batch(a_case(1), a_case(2, tensor=b"\xff\xff"), a_case(3, x=sample()[:1])))
    assert device.next_of(Acks) == Acks(BOOT, committed=[1])
    rejected = device.next_of(Acks).rejected
    assert [(one.seq, one.reason) for one in rejected] == [
        (2, "unknown tensor encoding 127"),
        (3, "tensor (1, 4), the model takes (2, 4)"),
    ]


def test_a_large_batch_comes_in_chunks_and_int8_deflated_tensors_are_taken(hub, device):
    rng = np.random.default_rng(1)
    cases = [a_case(n, x=rng.normal(size=(64, 256)).astype(np.float32)) for n in range(5)]
    packed = encode_tensor(rng.normal(size=(2, 4)).astype(np.float32), Wire("int8"), deflate=True)
    device.send(a_batch(*cases, a_case(9, tensor=packed), model="unknown-model"), max_payload_bytes=50_000)
    assert device.next_of(Acks) == Acks(BOOT, committed=[0, 1, 2, 3, 4, 9])
    assert {(row["model"], row["state"]) for row in cases_in(hub)} == {("unknown-model", 0)}


def test_whatever_cannot_be_read_is_refused_by_its_digest_and_the_hub_goes_on(hub, device):
    good = encode(a_batch(a_case(1)))
    for payload in (b"", b"\xed", bytes(5000), good[:-3], good[:4] + b"\xc1" * 50, encode(Acks(BOOT))):
        for channel in ("cases", "update", "telemetry"):
            device.send_bytes(payload, channel=channel)
            refused = device.next_of(Acks)
            assert refused.boot == NO_BOOT
            assert [one.frame_digest for one in refused.refused] == [frame_digest(payload)]
    device.send_bytes(good)
    assert device.next_of(Acks) == Acks(BOOT, committed=[1])
    assert counters(hub)["malformed/frame"] == 12
    assert counters(hub)["malformed/oversize"] == 3
    assert counters(hub)["malformed/kind"] == 3


def test_a_payload_of_another_device_is_refused_on_this_ones_topic(hub, device):
    payload = encode(a_batch(a_case(1), device="press-2"))
    device.send_bytes(payload)
    reason = "the payload names the device 'press-2', not the topic's"
    assert device.next_of(Acks) == Acks(NO_BOOT, refused=[Refusal(frame_digest(payload), reason)])
    assert cases_in(hub) == []
    assert counters(hub)["malformed/device"] == 1


def test_reports_updates_and_status_are_kept_and_acknowledged(hub, device):
    device.say_online()
    device.send(Report("press-1", BOOT, 3, 55, {"shed": 4}), channel="telemetry")
    assert device.next_of(Acks) == Acks(BOOT, committed=[3])
    update = ClientUpdate("press-1", BOOT, 4, "pump", "r1", bytes(32), 12, "int8", bytes(200_000))
    device.send(update, channel="update")
    assert device.next_of(Acks) == Acks(BOOT, committed=[4])
    device.send(update, channel="update")
    assert device.next_of(Acks) == Acks(BOOT, duplicate=[4])
    (row,) = hub.store.database.run(lambda c: list_devices(c, after="", limit=5))
    assert (row["name"], row["online"], row["daemon_version"], row["counters"]) == (
        "press-1",
        True,
        "1.2.3",
        '{"shed":4}',
    )


def test_a_retained_status_is_found_by_a_hub_that_starts_later(tmp_path, broker, prefix):
    with Device(broker.port, prefix=prefix) as device:
        device.say_online()
        with Running(tmp_path, broker.port, prefix, {}) as hub:
            wait_until(lambda: hub.store.database.run(totals).devices_online == 1, what="the status")


def test_a_hub_that_stops_acknowledges_what_it_took(tmp_path, broker, prefix):
    with Device(broker.port, prefix=prefix) as device:
        with Running(tmp_path, broker.port, prefix, {}) as hub:
            for seq in range(50):
                device.send(a_batch(a_case(seq)))
            wait_until(
                lambda: hub.ingest.latencies.quantiles() or hub.ingest.waiting, what="the first message"
            )
        acknowledged = []
        with Store(tmp_path) as store:
            kept = {
                r["seq"]
                for r in store.database.run(lambda c: find_cases(c, CaseFilter(), before=None, limit=99))
            }
        while len(acknowledged) < len(kept):
            acknowledged += device.next_of(Acks).committed
        assert set(acknowledged) == kept


# --- with a store that fails: no broker needed


class FailingStore:
    """Commits into a set, unless told to fail."""

    def __init__(self):
        self.trouble = None
        self.attempts = 0
        self.items = set()

    def commit(self, deliveries, *, now_ms):
        self.attempts += 1
        if self.trouble is not None:
            self.trouble(deliveries)
        items = {case.item for delivery in deliveries for case in delivery.cases} - self.items
        self.items |= items
        return Committed(frozenset(items), frozenset())


class Published(list):
    def __call__(self, topic, payload):
        self.append((topic, decode(payload)))

    @property
    def committed(self):
        return [seq for _, acks in list(self) for seq in acks.committed]


@pytest.fixture
def failing():
    store, published = FailingStore(), Published()
    reader = Reader("edge", holdout_share=0.3, max_payload_bytes=10**6, shapes=dict)
    ingest = Ingest(store, reader, published, prefix="edge", intake=Intake(max_messages=8))
    yield store, published, ingest
    ingest.stop(0.1)


def incoming(*seqs):
    frame = encode(a_batch(*[a_case(seq) for seq in seqs]))
    return Incoming("edge/v1/press-1/up/cases", frame, 1, False, 1)


def disk_full(_):
    raise StoreUnavailableError("store: database or disk is full")


def test_a_failing_store_means_no_acknowledgement_until_it_works_again(failing, caplog):
    store, published, ingest = failing
    store.trouble = disk_full
    ingest.start()
    ingest.offer(incoming(1))
    wait_until(lambda: store.attempts >= 3, what="retries")
    assert published == []
    assert "disk is full" in ingest.problem
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        "store fails, nothing is acknowledged, trying again reason=store: database or disk is full"
    ]
    store.trouble = None
    wait_until(lambda: published.committed == [1], what="the acknowledgement")
    assert ingest.problem is None


def test_while_the_store_fails_a_bounded_number_waits_and_the_rest_is_counted(failing):
    store, published, ingest = failing
    store.trouble = disk_full
    ingest.start()
    ingest.offer(incoming(0))
    wait_until(lambda: store.attempts, what="the first attempt")
    for seq in range(1, 21):
        ingest.offer(incoming(seq))
    assert ingest.not_taken == 12
    store.trouble = None
    wait_until(lambda: sorted(published.committed) == list(range(9)), what="what was taken")


def test_a_message_that_the_store_will_never_take_is_refused_alone(failing):
    store, published, ingest = failing

    def refuse_seven(deliveries):
        if any(case.seq == 7 for delivery in deliveries for case in delivery.cases):
            raise StoreRefusedError("store: no sevens")

    store.trouble = refuse_seven
    for seq in (6, 7, 8):
        ingest.offer(incoming(seq))
    ingest.start()
    wait_until(lambda: sorted(published.committed) == [6, 8], what="the neighbours")
    reasons = [one.reason for _, acks in published for one in acks.refused]
    assert reasons == ["store: no sevens"]


def test_a_fault_of_our_own_drops_the_group_unacknowledged_and_goes_on(failing, caplog):
    store, published, ingest = failing

    def fault(_):
        store.trouble = None
        raise ZeroDivisionError

    store.trouble = fault
    ingest.start()
    ingest.offer(incoming(1))
    wait_until(lambda: store.attempts == 1, what="the fault")
    ingest.offer(incoming(2))
    wait_until(lambda: published.committed == [2], what="the next message")
    assert "dropped, unacknowledged" in caplog.text


def test_a_message_that_we_fail_at_is_dropped_alone_whether_read_or_kept(failing, caplog, monkeypatch):
    store, published, ingest = failing

    def fault_at_seven(deliveries):
        if any(case.seq == 7 for delivery in deliveries for case in delivery.cases):
            raise ZeroDivisionError

    store.trouble = fault_at_seven
    unreadable = incoming(5)
    read = ingest._reader.read

    def read_or_fail(taken):
        if taken.payload == unreadable.payload:
            raise RecursionError
        return read(taken)

    monkeypatch.setattr(ingest._reader, "read", read_or_fail)
    for each in (incoming(4), unreadable, incoming(6), incoming(7), incoming(8)):
        ingest.offer(each)
    ingest.start()
    wait_until(lambda: sorted(published.committed) == [4, 6, 8], what="the neighbours")
    assert [seq for _, acks in published for seq in acks.duplicate] == []
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        "message dropped, unacknowledged from=edge/v1/press-1/up/cases more=0"
    ]


def test_a_hub_that_stops_while_the_store_fails_ends_in_time(failing):
    store, published, ingest = failing
    store.trouble = disk_full
    ingest.start()
    ingest.offer(incoming(1))
    wait_until(lambda: store.attempts, what="an attempt")
    ingest.stop(0.2)
    assert not ingest.is_alive
    assert published == []


def test_acknowledgements_fit_into_a_payload_whatever_they_say():
    cases = [a_new_case(seq + 2**40) for seq in range(1500)]
    delivery = a_delivery(*cases, rejected=[(n + 2**50, f"reason {n} " + "é" * 140) for n in range(1000)])
    committed = Committed(frozenset(case.item for case in cases[:1000]), frozenset())
    frames = [acks for _, acks in acks_of([delivery], committed, "edge")]
    assert sum(len(acks.committed) for acks in frames) == 1000
    assert sum(len(acks.duplicate) for acks in frames) == 500
    assert sum(len(acks.rejected) for acks in frames) == 1000
    assert max(len(encode(acks)) for acks in frames) < 100 * 1024
