"""A device as the hub sees it, a model that needs no file, and waiting without sleeping blindly."""

import queue
import time
from collections import Counter

import numpy as np

from cloud_hub.core.delivery import Delivery, NewCase
from cloud_hub.models import HubModel
from edge_cascade.codec import decode, encode, split_frame
from edge_cascade.gate import Exit
from edge_cascade.manifest import Preprocess, Wire
from edge_cascade.messages import Acks, Case, CaseBatch, Reason, Status, Use
from edge_cascade.mqtt import Broker, MqttSession
from edge_cascade.packing import pack_exits
from edge_cascade.tensors import encode_tensor
from edge_cascade.topics import down_topic, up_topic

BOOT = bytes(range(8))
BUNDLE = bytes(range(32))
FULL_MODEL = bytes(32)[:-1] + b"\x07"
SHAPE = (2, 4)
LABELS = ("calm", "worn", "broken")
TIMEOUT_S = 20.0


def wait_until(is_so, *, what="it"):
    """Poll with a deadline; the value that was true."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        value = is_so()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"waited {TIMEOUT_S} s for {what}")


def sample(value=0.0):
    """A sample whose mean is `value`; `a_model` answers with the label of that number."""
    return np.full(SHAPE, value, dtype=np.float32)


def run_by_mean(x):
    """Logits that prefer the label whose index is the sample's mean."""
    distance = np.abs(x.mean(axis=(1, 2))[:, None] - np.arange(len(LABELS), dtype=np.float32))
    return (-4.0 * distance).astype(np.float32)


def a_model(run=run_by_mean, name="pump"):
    return HubModel(name, LABELS, SHAPE, Preprocess((0.0,), (1.0,)), FULL_MODEL, run)


def a_case(seq, *, x=None, tensor=None, exits=None, escalated=True, audit_ppm=0, reason=None, sensor="s1"):
    if reason is None:
        reason = Reason.UNSURE if escalated else Reason.AUDIT
    return Case(
        seq=seq,
        sensor=sensor,
        taken_at_ms=1_000 + seq,
        point=3,
        exits=pack_exits([Exit(0, 1, 0.5, 0.75)] if exits is None else exits),
        escalated=escalated,
        audit_ppm=audit_ppm,
        reason=reason,
        deferred=False,
        uncertified=False,
        tensor=encode_tensor(sample() if x is None else x, Wire("float32")) if tensor is None else tensor,
    )


def a_batch(*cases, device="press-1", model="pump", boot=BOOT):
    return CaseBatch(device, boot, model, BUNDLE, "default", list(cases))


def a_new_case(seq, *, device="press-1", model="pump", x=None, **changes):
    values = {
        "device": device,
        "boot": BOOT,
        "seq": seq,
        "model": model,
        "bundle": BUNDLE,
        "plan": "default",
        "point": 0,
        "sensor": "s1",
        "taken_at_ms": 5,
        "exits": pack_exits([Exit(0, 1, 0.5, 0.75)]),
        "device_label": 1,
        "escalated": True,
        "audit_ppm": 0,
        "reason": Reason.UNSURE,
        "deferred": False,
        "uncertified": False,
        "use": Use.TRAIN,
        "tensor": encode_tensor(sample() if x is None else x, Wire("float32")),
    }
    return NewCase(**(values | changes))


def a_delivery(*cases, device="press-1", **fields):
    return Delivery(device, b"\0" * 8, boot=BOOT, cases=list(cases), counts=Counter(), **fields)


GREETING = Acks(bytes(8))


class Device:
    """A board's side of the hub's topics over a real broker; what comes down is queued by kind."""

    def __init__(self, port, name="press-1", prefix="edge"):
        self.name = name
        self._prefix = prefix
        self._inbox = queue.Queue()
        self._session = MqttSession(
            Broker(port=port),
            name,
            subscriptions=[down_topic(prefix, name, "acks"), down_topic(prefix, name, "verdicts")],
            on_message=self._receive,
        )
        self._kept = []

    def __enter__(self):
        self._session.start()
        wait_until(lambda: self._session.is_listening, what="the device's session")
        return self

    def __exit__(self, *_):
        self._session.stop()

    def send(self, message, *, channel="cases", max_payload_bytes=100 * 1024):
        for payload in split_frame(encode(message), max_payload_bytes):
            self.send_bytes(payload, channel=channel)

    def send_bytes(self, payload, *, channel="cases", retain=False, device=None):
        topic = up_topic(self._prefix, device or self.name, channel)
        assert self._session.publish(topic, payload, retain=retain) is not None

    def say_online(self, *, online=True):
        status = Status(self.name, online, BOOT, "1.2.3")
        self.send_bytes(encode(status), channel="status", retain=True)

    def _receive(self, incoming):
        message = decode(incoming.payload)
        # A hub that connects greets everybody; when, is of no interest to these tests.
        if message != GREETING:
            self._inbox.put(message)

    def next_of(self, kind):
        """The next message of a kind; others stay for later."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            for message in self._kept:
                if isinstance(message, kind):
                    self._kept.remove(message)
                    return message
            try:
                self._kept.append(self._inbox.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"no {kind.__name__} within {TIMEOUT_S} s") from None

    def next_now(self, kind):
        """As `next_of` for what is here already; LookupError when there is nothing."""
        while not self._inbox.empty():
            self._kept.append(self._inbox.get())
        for message in self._kept:
            if isinstance(message, kind):
                self._kept.remove(message)
                return message
        raise LookupError(kind)
