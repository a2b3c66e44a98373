"""TLS with client certificates from sensor to hub and back, chunks and deflate: processes and a real broker."""

import io

import numpy as np
import pytest

from edge_cascade.codec import MAX_PAYLOAD_BYTES, decode
from edge_cascade.manifest import Preprocess, Window, Wire
from edge_cascade.messages import CaseBatch, Chunk
from tests.faults.loop import Loop
from tests.faults.processes import DEVICE, http, wait_until
from tests.faults.sensor import Balance
from tests.identity.party import alert_from, tls_context

LENGTH = 40_000
LABELS = ("a", "b")


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory):
    """A small model of a large input, sent as float32: 160 kB a sample."""
    pytest.importorskip("onnx", reason="building a bundle needs onnx (the dev extra)")
    from cloud_hub.builder.assemble import Declaration
    from cloud_hub.builder.naive import Calibration, build_naive_bundle
    from cloud_hub.builder.networks.export import export_full, export_staged
    from cloud_hub.builder.networks.network import (
        Conv,
        Dense,
        GlobalAveragePool,
        Network,
        Relu,
        Stage,
        initial_parameters,
    )

    out = tmp_path_factory.mktemp("wide")
    head = (GlobalAveragePool(), Dense(len(LABELS)))
    network = Network((1, LENGTH), len(LABELS), (Stage((Conv(4, 9, 16), Relu()), head),))
    full = Network((1, LENGTH), len(LABELS), (Stage((Conv(8, 9, 8), Relu()), head),))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((48, 1, LENGTH)).astype(np.float32)
    build_naive_bundle(
        export_staged(network, initial_parameters(network, rng)),
        Declaration(
            model="wide",
            labels=LABELS,
            input_shape=network.input_shape,
            preprocess=Preprocess(mean=(0.0,), std=(1.0,)),
            wire=Wire("float32"),
            window=Window(length=LENGTH, hop=LENGTH),
        ),
        full=export_full(full, initial_parameters(full, rng)),
        representative=x[:16],
        calibration=Calibration(x[16:], rng.integers(0, len(LABELS), 32)),
        out=out,
    )
    return out


@pytest.fixture(scope="module")
def loop(tmp_path_factory, wide_model_dir):
    loop = Loop(tmp_path_factory.mktemp("tls"), wide_model_dir, mutual_tls=True)
    # A sample is larger than a packet that the broker takes: it comes as a stream, in two halves.
    source = {"topic": f"sensors/{DEVICE}/{{sensor}}", "format": "float32le", "window": "bundle"}
    loop.device = loop.new_device("wide", inlet__sources=[source])
    loop.sensor.messages_per_sample = 2
    try:
        loop.start()
        loop.sensor.start()
        loop.device.start()
        loop.device.wait_ready()
        yield loop
    finally:
        loop.stop()
    assert loop.tracebacks() == []


def test_a_case_above_the_payload_limit_travels_in_chunks_over_mutual_tls_and_arrives_whole(loop):
    with loop.party("hub") as eavesdropper:
        eavesdropper.subscribe(f"edge/v1/{DEVICE}/up/cases")
        (name,) = loop.sensor.send()
        assert loop.settle([name]) == Balance(samples=1)
        payloads = [eavesdropper.received.get(timeout=10)[1]]
        first = decode(payloads[0])
        assert isinstance(first, Chunk)
        payloads += [eavesdropper.received.get(timeout=10)[1] for _ in range(first.count - 1)]
    assert first.count == 2
    assert max(map(len, payloads)) <= MAX_PAYLOAD_BYTES
    np.testing.assert_array_equal(stored_tensor(loop, name), loop.sensor.samples[name])


def test_a_case_that_deflates_well_travels_whole_and_deflated(loop):
    flat = np.full((1, LENGTH), 0.25, np.float32)
    with loop.party("hub") as eavesdropper:
        eavesdropper.subscribe(f"edge/v1/{DEVICE}/up/cases")
        loop.sensor.send_as("flat", flat)
        assert loop.settle(["flat"]) == Balance(samples=1)
        payload = eavesdropper.received.get(timeout=10)[1]
    # Byte 3 of a frame: bit 0 says that the body is deflated.
    assert payload[3] == 1
    assert len(payload) < 1000
    batch = decode(payload)
    assert isinstance(batch, CaseBatch)
    assert len(batch.cases[0].tensor) > 4 * LENGTH
    np.testing.assert_array_equal(stored_tensor(loop, "flat"), flat)


def test_who_has_no_certificate_is_not_heard(loop):
    context = tls_context(loop.hub_broker.folder / "ca.pem")
    assert "CERTIFICATE" in alert_from(loop.hub_broker.port, context).upper()


def stored_tensor(loop, name):
    (case,) = [case for case in loop.hub.cases() if case["sensor"] == name]
    wait_until(lambda: loop.hub.get(f"/v1/cases/{case['id']}")["case"]["state"] == "answered", "the answer")
    status, body = http(f"{loop.hub.url}/v1/cases/{case['id']}/tensor", token=loop.hub.token)
    assert status == 200
    return np.load(io.BytesIO(body), allow_pickle=False)
