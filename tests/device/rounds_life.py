"""One life of a board that takes part in a round: run as a process, so that it can be killed in the middle.

`python -m tests.device.rounds_life STATE_DIR BUNDLE_DIR`: a real spool, real files, a real child; the hub is
in this process. Ends once the round's update was acknowledged. Prints a line `boot seq round` per delivery.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from edge_cascade.bundle import load_bundle
from edge_cascade.deltas import encode_delta
from edge_cascade.messages import TrainingBase
from edge_cascade.weights import FROM_ZEROS
from edge_daemon.clock import SystemClock
from edge_daemon.core import rounds
from edge_daemon.core.spooling import SpoolLimits
from edge_daemon.frames import decode_batch
from edge_daemon.metrics import Metrics
from edge_daemon.spool import SqliteSpool
from edge_daemon.training.follower import Follower
from edge_daemon.training.inbox import Surroundings
from edge_daemon.training.learner import CostLimits
from edge_daemon.training.supervisor import ChildProcess
from tests.device.rounds_cases import HUB_KEY, drawn, offer, terms_for
from tests.device.spooling_cases import wait_until
from tests.device.test_follower import COOL, LIMITS, FakeExamples


def live(state_dir: Path, bundle_dir: Path) -> None:
    rounds.OFFER_SPREAD_S = 0.0
    bundle = load_bundle(bundle_dir)
    base = {name: array + np.float32(0.01) for name, array in bundle.parameters().items()}
    of = terms_for(bundle, base=base, encoding="sign")
    spool = SqliteSpool(state_dir / "spool.sqlite", SpoolLimits(commit_window_ms=1), SystemClock())
    spool.open()
    follower: Follower

    def give_base(request):
        follower.hear(TrainingBase("tiny", of.training_base, FROM_ZEROS, [encode_delta(base, "fp32")]))

    boot = os.urandom(8)
    follower = Follower(
        "dev-1",
        {"tiny": bundle},
        state_dir / "training",
        Surroundings(
            examples=FakeExamples(drawn()),
            spool=spool,
            ask_for_base=give_base,
            read_vitals=lambda pid: COOL,
            launch=lambda directory, on_end: ChildProcess(directory, on_end, nice=0),
            metrics=Metrics(),
            clock=SystemClock(),
            boot=boot,
            next_seq=iter(range(1000)).__next__,
        ),
        hub_key=HUB_KEY,
        vitals=LIMITS,
        rounds=rounds.RoundLimits(max_passes=10_000),
        costs=CostLimits(max_memory_bytes=2**30),
    )
    follower.start()
    follower.hear(offer(of))

    def is_acknowledged():
        batch = spool.claim(10, 10**9)
        if batch is not None:
            for seq, update in decode_batch(batch)[0].items():
                print(batch.key.boot.hex(), seq, update.round_id, flush=True)
            spool.acknowledge(batch.key.boot, list(batch.bodies))
        # The files alone: an earlier life may have ended the round.
        files = state_dir / "training" / "tiny"
        is_voted, is_pending = (files / "voted").exists(), (files / "pending").exists()
        return is_voted and not is_pending and spool.counts().rows == 0

    wait_until(is_acknowledged, timeout_s=60.0, what="the round is over")
    follower.stop()
    spool.close()


if __name__ == "__main__":
    live(Path(sys.argv[1]), Path(sys.argv[2]))
