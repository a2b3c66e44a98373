"""Labels from the site: read, refused, and on their way through a real broker into a real store."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.mqtt import Broker, Incoming
from edge_daemon.config import (
    Config,
    DeviceConfig,
    HttpConfig,
    HubConfig,
    InletConfig,
    ModelConfig,
    ResultsConfig,
    SourceConfig,
    TrainingConfig,
)
from edge_daemon.core.examples import LabelOutcome, Origin
from edge_daemon.daemon import Daemon
from edge_daemon.inlet.decode import make_decoder
from edge_daemon.inlet.labels import MAX_LABEL_LENGTH, LabelError, LabelInlet, SiteLabel, decode_label
from edge_daemon.inlet.mqtt import MqttInlet, Source
from edge_daemon.inlet.queue import SampleQueue
from edge_daemon.models import open_pipelines
from edge_daemon.training.wiring import EXAMPLES_FILE
from tests.device.spooling_cases import wait_until
from tests.identity.party import Party
from tests.services import start_mosquitto

ID = "8f3a52c6019be47d-42"


class TestDecode:
    @pytest.mark.parametrize(
        ("payload", "label"),
        [
            (b'{"label": "outer_race"}', SiteLabel("outer_race")),
            (b' {"label": 1, "id": "%s", "who": "me"}\n' % ID.encode(), SiteLabel(1, ID)),
            (b'{"label": "x", "id": null}', SiteLabel("x")),
            (b'"outer race"', SiteLabel("outer race")),
            (b"outer race\n", SiteLabel("outer race")),
            (b"3", SiteLabel("3")),
            ("größer".encode(), SiteLabel("größer")),
        ],
    )
    def test_an_object_a_string_and_bare_text_are_labels(self, payload, label):
        assert decode_label(payload) == label

    @pytest.mark.parametrize(
        "payload",
        [
            *(b"", b"  ", b"{", b"{}", b'{"label": ""}', b'{"label": -1}', b'{"label": 65536}', b'{"label": 1.5}'),
            *(b'{"label": null}', b'{"label": true}', b'{"label": ["a"]}', b'{"label": "a", "id": 3}', b'"a'),
            *(b"\xff", b"a\0b", b"a\nb", b"a" * (MAX_LABEL_LENGTH + 1), b'{"label": "%s"}' % (b"a" * 2000)),
            *(b'{"label": "a", "id": ""}', b'{"a":' * 200),
        ],
    )  # fmt: skip
    def test_anything_else_is_none(self, payload):
        with pytest.raises(LabelError):
            decode_label(payload)

    @given(st.binary(max_size=1100) | st.text(max_size=40).map(str.encode))
    def test_random_bytes_are_refused_or_a_short_label(self, payload):
        try:
            label = decode_label(payload)
        except LabelError:
            return
        assert isinstance(label.label, int) or 1 <= len(label.label) <= MAX_LABEL_LENGTH

    @given(st.text(min_size=1, max_size=MAX_LABEL_LENGTH))
    def test_json_carries_any_label(self, label):
        payload = json.dumps({"label": label}).encode()
        if len(payload) <= 1024:
            assert decode_label(payload) == SiteLabel(label)


class TestInlet:
    def make(self, prefix="labels"):
        self.heard, self.malformed, self.acknowledged = [], [], []
        labels = LabelInlet(prefix, lambda *label: self.heard.append(label), self.malformed.append)
        self.queue = SampleQueue(10, pytest.fail)
        return MqttInlet(
            Broker(), "test", [Source("sensors/{sensor}", "m", (1,), make_decoder("json"), None)], self.queue,
            max_payload_bytes=1000, on_malformed=self.malformed.append, labels=labels, now_s=lambda: 5.0,
        )  # fmt: skip

    def receive(self, inlet, topic, payload, *, retained=False):
        inlet.receive(Incoming(topic, payload, 1, retained, 1))

    def test_what_comes_below_the_prefix_is_a_label_of_that_sensor(self):
        inlet = self.make("truth/here")
        self.receive(inlet, "truth/here/bearing-1", b'{"label": 2, "id": "a-1"}')
        self.receive(inlet, "truth/here/plant/line", b"fault")
        self.receive(inlet, "sensors/bearing-1", b"[1]")
        assert self.heard == [("bearing-1", "2", "a-1"), ("plant/line", "fault", None)]
        assert (len(self.queue), self.malformed, inlet.unacknowledged) == (1, [], 1)

    def test_a_malformed_label_is_counted_told_once_and_acknowledged(self, caplog):
        inlet = self.make()
        for _ in range(3):
            self.receive(inlet, "labels/pump", b"\xff")
        self.receive(inlet, f"labels/{'x' * 200}", b"fault")
        assert (self.heard, self.malformed, inlet.unacknowledged) == ([], ["labels/+/#"] * 4, 0)
        assert caplog.text.count("malformed label") == 1

    def test_a_retained_label_needs_an_id(self):
        inlet = self.make()
        self.receive(inlet, "labels/pump", b"fault", retained=True)
        self.receive(inlet, "labels/pump", b'{"label": "fault", "id": "a-1"}', retained=True)
        assert self.heard == [("pump", "fault", "a-1")]
        assert self.malformed == ["labels/+/#"]

    def test_after_the_inlet_was_paused_a_label_stays_with_the_broker(self):
        inlet = self.make()
        inlet.pause()
        self.receive(inlet, "labels/pump", b"fault")
        assert self.heard == []


def device(tmp_path, bundle_dir, port, **training):
    broker = Broker(port=port)
    return Daemon(
        Config(
            device=DeviceConfig(id="press-3", state_dir=str(tmp_path / "state")),
            models=(ModelConfig(bundle=str(bundle_dir)),),
            inlet=InletConfig(
                broker=broker, sources=(SourceConfig(topic="sensors/{sensor}", format="float32le"),)
            ),
            results=ResultsConfig(),
            hub=HubConfig(enabled=False),
            training=TrainingConfig(**training),
            http=HttpConfig(enabled=False),
        )
    )


def test_a_label_through_a_real_broker_turns_an_answered_sample_into_a_humans_example(
    tmp_path, tiny_model_dir, tiny_bundle
):
    x = np.linspace(-2, 2, 128, dtype="<f4")
    with start_mosquitto(tmp_path) as broker, Party(broker.port) as site:
        daemon = device(tmp_path, tiny_model_dir / "bundle", broker.port, enabled=True, own_per_minute=0.0)
        daemon.start()
        try:
            site.subscribe("results/#")
            wait_until(lambda: daemon._inlet.session.is_listening)
            answers = []
            for sensor in ("pump", "fan"):
                site.publish(f"sensors/{sensor}", x.tobytes())
                answers.append(json.loads(site.received.get(timeout=10)[1]))
            # The label leaves as soon as the answer is there, and finds its sample.
            site.publish("labels/pump", json.dumps({"label": "c", "id": answers[0]["id"]}).encode())
            site.publish("labels/fan", b"3")
            site.publish("labels/nobody", b"a")
            site.publish("labels/fan", b"\xff")
            wait_until(lambda: daemon.metrics.malformed.values() == {("labels/+/#",): 1})
            drawn = daemon.examples.draw("tiny", 10)
        finally:
            daemon.stop()
    assert (drawn.labels.tolist(), set(drawn.origins)) == ([3, 2], {Origin.HUMAN})
    assert drawn.x.shape == (2, *tiny_bundle.graph.input_shape)
    assert daemon.examples.counts().labels == {LabelOutcome.USED: 2, LabelOutcome.UNMATCHED: 1}
    numbers = daemon.metrics.snapshot()
    assert numbers["edge_examples{model=tiny,origin=human}"] == 2
    assert numbers["edge_labels{outcome=unmatched}"] == 1
    assert (tmp_path / "state" / EXAMPLES_FILE).exists()


def test_without_training_nothing_is_kept_and_no_label_is_read(tmp_path, tiny_model_dir):
    daemon = device(tmp_path, tiny_model_dir / "bundle", 1)
    assert daemon.examples is None
    assert daemon._inlet.session._subscriptions == ("sensors/+",)
    assert daemon._inference._observe is None


def test_training_with_a_bundle_that_cannot_is_one_warning(tmp_path, tiny_model_dir, caplog, monkeypatch):
    def without_train_steps(*arguments, **options):
        pipelines = open_pipelines(*arguments, **options)
        for pipeline in pipelines.values():
            pipeline.bundle = dataclasses.replace(pipeline.bundle, train_step=None)
        return pipelines

    monkeypatch.setattr("edge_daemon.daemon.open_pipelines", without_train_steps)
    daemon = device(tmp_path, tiny_model_dir / "bundle", 1, enabled=True)
    assert daemon.examples is None
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning == (
        "training.enabled = true, but no bundle has a train step: nothing is kept or learned; build one that "
        "has, or set training.enabled = false"
    )
