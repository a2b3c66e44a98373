"""What somebody would write instead: paho, one session, one callback. It is what `mqtt` compares with.

No cascade, no queue, no spool, no metrics, nothing that survives; but TCP_NODELAY, one thread for the
runtime, no limit in flight and a fast JSON library, because a comparison with a slow loop says nothing.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import msgspec
import numpy as np
import onnxruntime
import paho.mqtt.client as paho

LABELS = ("a", "b", "c", "d")
MEAN, STD = np.float32(1.0), np.float32(3.0)
SHAPE = (1, 1, 128)


def main() -> None:
    """Serve `<root>/raw/+` and `<root>/json/+`, answer on `<root>/results/<sensor>`, until killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minimal_loop")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--qos", type=int, choices=(0, 1), default=1)
    options = parser.parse_args()

    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(options.model, session_options, providers=["CPUExecutionProvider"])
    decode_json = msgspec.json.Decoder(list[float]).decode

    def connected(client: paho.Client, *_: Any) -> None:
        client.subscribe([(f"{options.root}/raw/+", options.qos), (f"{options.root}/json/+", options.qos)])

    def received(client: paho.Client, _: Any, message: paho.MQTTMessage) -> None:
        _, kind, sensor = message.topic.split("/")
        if kind == "raw":
            x = np.frombuffer(message.payload, dtype="<f4")
        else:
            x = np.array(decode_json(message.payload), dtype=np.float32)
        logits = session.run(None, {"x": (x.reshape(SHAPE) - MEAN) / STD})[0][0]
        exponents = np.exp(logits - logits.max())
        label = int(exponents.argmax())
        answer = {
            "sensor": sensor,
            "label": LABELS[label],
            "probability": round(float(exponents[label] / exponents.sum()), 6),
        }
        client.publish(f"{options.root}/results/{sensor}", msgspec.json.encode(answer), qos=options.qos)

    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=f"minimal-{options.root}")
    client.max_inflight_messages_set(0)
    client.on_socket_open = lambda _, __, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.on_connect = connected
    client.on_message = received
    client.connect("127.0.0.1", options.port)
    client.loop_forever()


if __name__ == "__main__":
    main()
