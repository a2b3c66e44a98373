"""The session against a real mosquitto: what paho gets wrong when it is held wrong."""

from __future__ import annotations

import hashlib
import random
import socket
import threading

import pytest

from edge_cascade import mqtt
from edge_cascade.mqtt import Broker, BrokerConfigError, MqttSession, State
from tests.device.spooling_cases import wait_until
from tests.services import free_port, start_mosquitto


def test_packets_of_two_threads_do_not_mix_on_a_slow_line(tmp_path, monkeypatch):
    """Partial writes are the rule where the send buffer is small; two writers would tear the stream."""

    def with_small_buffer(_, __, sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)

    received = []
    with start_mosquitto(tmp_path, extra="max_queued_messages 0") as broker:
        listener = MqttSession(
            Broker(port=broker.port), "listener", subscriptions=["large"], on_message=received.append
        )
        listener.start()
        wait_until(lambda: listener.is_listening)
        monkeypatch.setattr(mqtt, "_set_nodelay", with_small_buffer)
        sender = MqttSession(Broker(port=broker.port), "sender", subscriptions=["small"])
        sender.start()
        wait_until(lambda: sender.is_listening)
        are_sent = threading.Event()

        def make_noise():
            while not are_sent.wait(0.0005):
                listener.publish("small", b"to be acknowledged meanwhile")

        def publish(seed):
            rng = random.Random(seed)
            for _ in range(30):
                payload = rng.randbytes(90_000)
                assert sender.publish("large", payload + hashlib.sha256(payload).digest()) is not None

        threads = [threading.Thread(target=publish, args=(seed,)) for seed in range(2)]
        noise = threading.Thread(target=make_noise)
        for thread in (*threads, noise):
            thread.start()
        try:
            for thread in threads:
                thread.join()
            wait_until(lambda: len(received) >= 60, timeout_s=20, what="60 payloads")
        finally:
            are_sent.set()
            noise.join()
        whole = [hashlib.sha256(one.payload[:-32]).digest() == one.payload[-32:] for one in received]
        assert (whole, sender.connects) == ([True] * 60, 1)
        sender.stop()
        listener.stop()


@pytest.mark.parametrize(("forgets", "expected"), [(False, 2), (True, 1)])
def test_what_was_not_acknowledged_is_sent_again_unless_forgotten(tmp_path, monkeypatch, forgets, expected):
    monkeypatch.setattr(mqtt, "LONGEST_RETRY_S", 0.1)
    port = free_port()
    received = []
    with start_mosquitto(tmp_path, port=port) as broker:
        sender = MqttSession(Broker(port=port), "sender", forget_on_down=forgets)
        sender.start()
        wait_until(lambda: sender.is_up)
        # The broker's hands are tied: the packet goes out and nothing comes back.
        broker.process.send_signal(19)
        assert sender.publish("x", b"before") is not None
        broker.kill()
        wait_until(lambda: not sender.is_up)
    with start_mosquitto(tmp_path, port=port):
        listener = MqttSession(Broker(port=port), "listener", subscriptions=["x"], on_message=received.append)
        listener.start()
        wait_until(lambda: listener.is_listening and sender.is_up)
        assert sender.publish("x", b"after") is not None
        wait_until(lambda: any(one.payload == b"after" for one in received))
        sender.stop()
        listener.stop()
    assert len(received) <= expected
    assert [one.payload for one in received][-1] == b"after"


def test_stopping_while_connecting_leaves_no_session(tmp_path):
    session = MqttSession(Broker(port=free_port()), "lonely")
    session.start()
    session.stop()
    assert session.state is State.STOPPED


def test_a_password_file_that_is_missing_is_named(tmp_path):
    broker = Broker(username="a", password_file=str(tmp_path / "none"))
    with pytest.raises(BrokerConfigError, match=r"password_file '/.*/none': No such file or directory"):
        MqttSession(broker, "a").start()
