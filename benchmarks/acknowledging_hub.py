"""A consumer that speaks the hub's side of the protocol as far as acknowledging goes.

It commits nothing and answers no verdicts: `mqtt` measures the device, and the hub would share the broker's
core with the load generator.
"""

from __future__ import annotations

import argparse
import signal
import threading

from edge_cascade.codec import decode, encode
from edge_cascade.messages import Acks, CaseBatch, Report, SwapReport
from edge_cascade.mqtt import Broker, Incoming, MqttSession
from edge_cascade.topics import DEFAULT_PREFIX, down_topic, fleet_filter


def main() -> None:
    """Acknowledge every case and report until killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acknowledging_hub")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()

    def received(incoming: Incoming) -> None:
        match decode(incoming.payload):
            case CaseBatch(device=device, boot=boot, cases=cases):
                acks = Acks(boot, committed=[case.seq for case in cases])
            case Report(device=device, boot=boot, seq=seq) | SwapReport(device=device, boot=boot, seq=seq):
                acks = Acks(boot, committed=[seq])
            case _:
                return
        session.publish(down_topic(DEFAULT_PREFIX, device, "acks"), encode(acks))

    session = MqttSession(
        Broker(port=options.port),
        "acknowledging-hub",
        subscriptions=[fleet_filter(DEFAULT_PREFIX, "cases"), fleet_filter(DEFAULT_PREFIX, "telemetry")],
        on_message=received,
    )
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    session.start()
    stopping.wait()
    session.stop()


if __name__ == "__main__":
    main()
