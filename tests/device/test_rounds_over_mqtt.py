"""A whole device, a real broker and a hub that says what it is told: from the offer to the update in chunks."""

from __future__ import annotations

import numpy as np
import pytest

from edge_cascade.deltas import decode_delta, encode_delta
from edge_cascade.messages import SelfLabels, TrainingBase
from edge_cascade.mqtt import Broker, MqttSession
from edge_cascade.weights import difference, shapes_of, weights_digest
from edge_daemon.config import (
    AuditConfig,
    Config,
    DeviceConfig,
    HubConfig,
    InletConfig,
    ModelConfig,
    SourceConfig,
    TrainingConfig,
)
from edge_daemon.daemon import Daemon
from tests.device.fake_hub import FakeHub
from tests.device.rounds_cases import HUB_KEY, offer, terms_for
from tests.device.spooling_cases import wait_until
from tests.services import start_mosquitto

CHUNK_BYTES = 5000


@pytest.fixture
def broker(tmp_path):
    with start_mosquitto(tmp_path, extra=f"max_packet_size {CHUNK_BYTES}") as broker:
        yield broker


@pytest.fixture
def hub(broker):
    with FakeHub(broker.port) as hub:
        yield hub


@pytest.fixture
def start(tmp_path, broker, tiny_model_dir):
    devices = []

    def start():
        device = Daemon(
            Config(
                device=DeviceConfig(id="dev-1", state_dir=str(tmp_path / "state"), drain_s=0.5),
                models=(ModelConfig(bundle=str(tiny_model_dir / "bundle")),),
                inlet=InletConfig(
                    sources=(SourceConfig(topic="sensors/{sensor}", format="float32le"),),
                    broker=Broker(port=broker.port),
                ),
                hub=HubConfig(broker=Broker(port=broker.port), batch_linger_s=0.02),
                audit=AuditConfig(rate=0.0),
                training=TrainingConfig(
                    enabled=True,
                    own_per_minute=6000,
                    own_min_probability=0,
                    hub_key=HUB_KEY.hex(),
                    # What else runs on this machine is none of this test's business.
                    max_load=1.0,
                    max_temperature_celsius=150,
                    min_free_mb=0,
                    on_battery=True,
                ),
            )
        )
        devices.append(device)
        device.start()
        return device

    yield start
    for device in devices:
        device.stop()


@pytest.fixture
def sensor(broker):
    session = MqttSession(Broker(port=broker.port), "sensor")
    session.start()
    wait_until(lambda: session.is_up)
    yield session
    session.stop()


def give_examples(device, sensor, count):
    """Samples until so many are kept."""
    rng = np.random.default_rng(3)

    def are_there():
        sensor.publish("sensors/a", (rng.standard_normal(128) * 3 + 1).astype("<f4").tobytes())
        return device.examples.counts().of("tiny") >= count

    wait_until(device.examples.counts, what="the store")
    wait_until(are_there, timeout_s=30.0, what=f"{count} examples, {device.examples.counts()}")


def test_a_board_learns_from_its_own_answers_and_sends_what_it_learned(hub, start, sensor, tiny_bundle):
    device = start()
    wait_until(lambda: device.uplink.is_up and device.health().ready, what="the device is connected")
    give_examples(device, sensor, 12)
    own = tiny_bundle.parameters()
    base = {name: array + np.float32(0.01) for name, array in own.items()}
    of = terms_for(
        tiny_bundle, base=base, self_labels=SelfLabels.HARD, min_examples=12, learning_rate_ppm=1000
    )
    hub.retain("round", offer(of))
    wait_until(lambda: hub.base_requests, what="a request for the base")
    request = hub.base_requests[0]
    assert (request.training_base, request.origin) == (weights_digest(base), weights_digest(own))
    # From zeros, as if the hub did not know the origin; the digest of a chain is that of its end.
    steps = [encode_delta(base, "fp32")]
    hub.send("round", TrainingBase("tiny", of.training_base, bytes(32), steps), CHUNK_BYTES - 200)
    wait_until(
        lambda: any(getattr(item, "round_id", "") == "round-1" for item in hub.stored.values()),
        timeout_s=60.0,
        what=f"the update, {device.metrics.snapshot()}",
    )
    (update,) = [item for item in hub.stored.values() if getattr(item, "round_id", "") == "round-1"]
    assert (update.device, update.boot, update.model) == ("dev-1", device.boot, "tiny")
    assert update.training_base == of.training_base
    assert 12 <= update.num_examples <= 100
    delta = decode_delta(update.delta, shapes_of(base), max_bytes=2**20)
    assert max(float(np.abs(array).max()) for array in delta.values()) > 1e-4
    assert len(update.delta) > 3 * CHUNK_BYTES
    assert max(hub.payload_sizes) < CHUNK_BYTES
    wait_until(lambda: device.metrics.rounds_completed.total == 1, what="the acknowledgement")
    # The retained offer comes again, with the next start: nothing follows.
    device.stop()
    again = start()
    wait_until(lambda: again.metrics.rounds_offered.total == 1, what="the offer")
    # Whoever has read what came after it has dealt with the offer.
    hub.send("round", offer(terms_for(tiny_bundle, "round-2", base=base, model="other")))
    wait_until(lambda: again.metrics.rounds_declined.total == 1, what="the next offer")
    assert again.metrics.rounds_joined.total == 0
    assert len(hub.deliveries) == len(set(hub.deliveries))
    assert difference(base, own).keys() == delta.keys()


def test_stopping_the_daemon_ends_the_child_at_once(hub, start, sensor, tiny_bundle):
    device = start()
    wait_until(lambda: device.uplink.is_up and device.health().ready, what="the device is connected")
    give_examples(device, sensor, 12)
    of = terms_for(
        tiny_bundle, self_labels=SelfLabels.HARD, min_examples=12, epochs=1000, learning_rate_ppm=1
    )
    hub.retain("round", offer(of))
    wait_until(lambda: device.follower._runner.training is not None, timeout_s=30.0, what="the training runs")
    process = device.follower._runner.training.running._process
    device.stop()
    assert process.wait(5.0) == -9
    assert device.metrics.trainings_failed.total == 0
