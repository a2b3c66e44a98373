"""The closed loop with boards that learn: started, taught, asked for series of rounds."""

import contextlib

import numpy as np
import psutil

from cloud_hub.store.store import Store
from edge_cascade.bundle import load_bundle
from edge_cascade.messages import Use
from tests.builder.models import images
from tests.faults.books import Books
from tests.faults.loop import Loop
from tests.faults.processes import wait_until
from tests.hub.candidates import MODEL, answer, send

BOARDS = ("pump-1", "pump-2", "pump-3")
SENSORS = {f"probe-{board[-1]}": board for board in BOARDS}
TAUGHT = 150
"""Labelled samples on each board."""
JUDGING = 600
"""Holdout samples that are there before the first series."""

EVERYBODY = {
    "cohort": len(BOARDS),
    "quorum": 1.0,
    "grace_s": 0,
    "deadline_s": 120,
    "sleeper_share": 0,
    "max_failures": 0,
}
"""A round of all boards, over as soon as the last one has voted. Boards take an offer up within 2 s."""
HARMLESS = {"rounds": 1, "learning_rate": 0.00001, "epochs": 1, "alpha": 0.000001}
"""Training that changes no answer: the guard keeps every round, and the series ends without a candidate.

Quantised anew the network may well answer a few samples better, so what is noise is taken generously.
"""


class TrainingLoop(Loop):
    """The loop with three boards, each with an account, a disk and a sensor of its own."""

    def __init__(self, folder, model_dir):
        super().__init__(folder, model_dir, sensors=SENSORS)
        training = {
            "enabled": True,
            "hub_key": self.command("round", "key").strip(),
            # What else runs on this machine is none of these tests' business.
            "max_load": 1.0,
            "max_temperature_celsius": 150.0,
            "min_free_mb": 0,
            "on_battery": True,
            "nice": 0,
        }
        self.boards = {board: self.new_device(board, device=board, training=training) for board in BOARDS}
        self.books = Books(self.hub.state_dir)
        self._sensors = {board: self.new_sensor(sensor, board) for sensor, board in SENSORS.items()}
        self._shapes = dict(load_bundle(model_dir / "bundle").train_step.shapes)
        self._holdouts = 0

    def teach(self):
        """Give the hub a holdout, and every board its examples; everything runs afterwards."""
        self.add_holdout(JUDGING)
        for board in self.boards.values():
            board.start()
        self.start()
        for number, (board, sensor) in enumerate(self._sensors.items()):
            sensor.start()
            self.boards[board].wait_ready()
            for index, x in enumerate(images(TAUGHT, seed=100 + number).x):
                sensor.send_as(f"s{index}", x.astype(np.float32))
        for board, sensor in self._sensors.items():
            wait_until(lambda of=sensor: len(of.verdicts) == TAUGHT, f"the verdicts for {board}")
        self._wait_settled()
        self.hub.stop()

    def stop(self):
        with contextlib.ExitStack() as last_first:
            last_first.callback(super().stop)
            for each in (*self._sensors.values(), *self.boards.values()):
                last_first.callback(each.stop)

    def add_holdout(self, count):
        """Audits with a verdict, into the store of a hub that is not running."""
        assert not self.hub.program.is_running
        self._holdouts += 1
        with Store(self.hub.state_dir) as store:
            send(store, count, 1000 + self._holdouts, use=Use.HOLDOUT)
            answer(store)

    def start_boards(self, crash_points):
        """Kill all boards and start them anew, those that are named with a crash point."""
        for name, board in self.boards.items():
            if board.program.is_running:
                board.program.kill()
            board.start(EDGE_CRASH_AT=crash_points.get(name, ""))
        for board in self.boards.values():
            board.wait_ready()

    def start_series(self, **settings):
        """`cloud-hub round start`, which needs no running hub; the number of the series."""
        flags = [
            (f"--{name.replace('_', '-')}", value)
            for name, value in (EVERYBODY | HARMLESS | settings).items()
        ]
        return int(self.command("round", "start", MODEL, *(word for flag in flags for word in flag)))

    def crash_hub(self, point):
        """Start the hub and wait until it has killed itself at a crash point."""
        self.hub.start(EDGE_CRASH_AT=point)
        self.hub.program.wait_killed()

    def wait_ended(self, number):
        """Wait until a series is over and all boards have settled, stop the hub, and check its books."""
        wait_until(
            lambda: f"series ended series={number} " in self.hub.program.log, f"series {number} to end"
        )
        self._wait_settled()
        self.hub.stop()
        self.books.check(self._shapes)
        return self.books.series(number)

    def _wait_settled(self):
        for name, board in self.boards.items():
            if board.program.is_running:
                wait_until(lambda of=board: of.is_drained() and not is_pending(of), f"{name} to settle")


def is_pending(board):
    """Whether a board remembers an update that may be in its spool."""
    return (board.state_dir / "training" / MODEL / "pending").exists()


def has_residual(board):
    """Whether a board remembers what its updates have left out."""
    return (board.state_dir / "training" / MODEL / "residual").exists()


def kill_child(board):
    """SIGKILL the process that trains, as soon as there is one."""

    daemon = psutil.Process(board.program.pid)
    (child,) = wait_until(daemon.children, "a training")
    child.kill()
