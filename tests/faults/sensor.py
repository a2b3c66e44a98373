"""A virtual sensor, which is the reader of the results as well, and the balance of what became of its samples."""

import json
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_cascade.backends.onnx import open_whole_model
from edge_cascade.bundle import load_bundle
from edge_cascade.preprocess import normalise
from edge_cascade.tensors import through_wire
from tests.faults.processes import DEVICE, TIMEOUT_S, wait_until


class Sensor:
    """A sensor and a reader of results in one: sends samples under names of their own, keeps what comes back.

    Its session outlives the broker's orderly restart, so nothing that was published for it is missed.
    """

    def __init__(self, connect, account, model_dir, *, device=DEVICE):
        self.answers = defaultdict(list)
        self.verdicts = defaultdict(list)
        self.samples = {}
        self.messages_per_sample = 1
        self._device = device
        self._numbers = count()
        self._bundle = load_bundle(model_dir / "bundle")
        self._full = open_whole_model((model_dir / "full.onnx").read_bytes())
        self._subscribed = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, account, protocol=paho.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe(f"results/{device}/#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._receive
        self._client.max_inflight_messages_set(1000)
        self._client.reconnect_delay_set(min_delay=0.1, max_delay=0.2)
        self._properties = Properties(PacketTypes.CONNECT)
        self._properties.SessionExpiryInterval = 3600
        self._connect = connect

    def start(self):
        self._connect(self._client, properties=self._properties)
        self._client.loop_start()
        assert self._subscribed.wait(TIMEOUT_S)

    def stop(self):
        self._client.disconnect()
        self._client.loop_stop()

    def send(self, number_of_samples=1):
        """Send samples at QoS 1, each known by its name; returns when the broker has them."""
        names, handed = [], []
        for _ in range(number_of_samples):
            number = next(self._numbers)
            rng = np.random.default_rng(number)
            x = rng.standard_normal(self._bundle.graph.input_shape) * 3 + 1
            names.append(f"s{number}")
            handed += self.send_as(names[-1], x.astype(np.float32))
        for each in handed:
            each.wait_for_publish(TIMEOUT_S)
        return names

    def send_as(self, name, x):
        """Send one sample under a name of the caller's; what to wait on for the broker to have it."""
        self.samples[name] = x
        pieces = np.split(x.astype("<f4").ravel(), self.messages_per_sample)
        return [self.publish(name, piece.tobytes()) for piece in pieces]

    def publish(self, topic, payload):
        """Any payload, to a topic below the device's sensors."""
        wait_until(self._client.is_connected, "the sensor's broker")
        return self._client.publish(f"sensors/{self._device}/{topic}", payload, qos=1)

    def wait_answered(self, names):
        wait_until(lambda: all(self.answers[name] for name in names), f"answers to {names}")

    def is_verdict_promised(self, name):
        return is_case_promised(self.answers[name][-1])

    def full_label(self, name):
        """What the full model says of a sample, as it comes off the wire."""
        graph = self._bundle.graph
        x = normalise(through_wire(self.samples[name], graph.wire)[None], graph.preprocess)
        return graph.labels[int(self._full(x).argmax())]

    def _receive(self, _, __, message):
        levels = message.topic.split("/")
        kept = self.verdicts if levels[-1] == "verdict" else self.answers
        kept[levels[2]].append(json.loads(message.payload))


@dataclass(frozen=True)
class Balance:
    """What became of some samples.

    `superseded`: the device died before the case was on its disk, so the broker gave the sample again, and the
    sensor has a later answer that counts. How many there are depends on the moment of the kill.
    """

    samples: int
    unanswered: int = 0
    missing: int = 0
    twice_in_hub: int = 0
    without_verdict: int = 0
    wrong_verdicts: int = 0
    superseded: int = field(default=0, compare=False)


def is_case_promised(answer):
    return answer["escalated"] or answer["audited"]


def balance(names, sensor, cases):
    """Compare what the sensor saw with the hub's cases."""
    ids = Counter(f"{case['boot']}-{case['seq']}" for case in cases)
    found = Counter()
    for name in names:
        promised = [answer["id"] for answer in sensor.answers[name] if is_case_promised(answer)]
        in_hub = ids.keys() & promised
        last = [answer["id"] for answer in sensor.answers[name]][-1:]
        verdicts = {verdict["id"] for verdict in sensor.verdicts[name]}
        right = sensor.full_label(name)
        found["unanswered"] += not sensor.answers[name]
        for lost in set(promised) - in_hub:
            found["missing" if lost in last else "superseded"] += 1
        found["without_verdict"] += len(in_hub - verdicts)
        found["wrong_verdicts"] += sum(verdict["label"] != right for verdict in sensor.verdicts[name])
    found["twice_in_hub"] = sum(times - 1 for times in ids.values())
    return Balance(len(names), **found)
