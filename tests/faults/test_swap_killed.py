"""kill -9 of a board at every named point of a swap: a signed bundle serves afterwards, the next attempt succeeds."""

import json
import threading
from contextlib import closing, contextmanager

import pytest

pytest.importorskip("tuf", reason="needs python-tuf")

from edge_cascade.bundle import load_bundle
from edge_cascade.codec import encode
from edge_cascade.messages import DesiredModel, DesiredState
from edge_cascade.topics import DEFAULT_PREFIX, down_topic
from tests.bundles import build
from tests.device.file_server import FileServer
from tests.device.signed_fleet import SignedFleet, sha256
from tests.faults.loop import Loop
from tests.faults.processes import DEVICE, wait_until

PARTS = ("graph", "weights")
SEEDS = (21, 22, 23)
PROBATION = 3

# Each a swap that is cut short so often. The third crash of a fetched bundle would bar it.
COURSES = (
    ("download.part", "download.file", "download.whole", "verify.done"),
    ("swap.state-written:3", "swap.trial", "swap.flipped"),
    ("swap.state-written:5", "swap.state-written:6"),
    ("swap.state-written:7", "swap.committed"),
    ("swap.state-written:8", "swap.before-state:4"),
)


class Releases:
    """Bundles signed and served by a hub's files, and a board that is told which to run."""

    def __init__(self, folder, model_dir):
        self.server, self.fleet = FileServer(), SignedFleet()
        self.server.__enter__()
        self.directories = [build(folder / f"release-{seed}", seed=seed) / "bundle" for seed in SEEDS]
        self.bundles = [load_bundle(directory) for directory in self.directories]
        for directory, bundle in zip(self.directories, self.bundles, strict=True):
            self._offer(directory, bundle)
        (folder / "root.json").write_bytes(self.fleet.first_root)
        self.loop = Loop(folder, model_dir)
        self.board = self.loop.new_device(
            "board",
            releases={
                "enabled": True,
                "url": self.server.url,
                "root": str(folder / "root.json"),
                "jitter_s": 0.0,
                "probation_samples": PROBATION,
                "min_probation_s": 0.0,
                # A trial beside other tests is a noisy one.
                "max_latency_factor": 100.0,
            },
        )
        self.loop.device = self.board
        self.revision = 0
        self.names = []
        self.serving = load_bundle(model_dir / "bundle").bundle_id

    def _offer(self, directory, bundle):
        for part in PARTS:
            for path in (directory / part).iterdir():
                content = path.read_bytes()
                self.server.files[f"blobs/{sha256(content)}"] = content
        graph, weights = ((directory / part / "manifest.json").read_bytes() for part in PARTS)
        self.fleet.sign_graph("tiny", graph)
        self.fleet.sign_weights("tiny", weights, bundle.graph_sha256, role=self.fleet.targets)
        self.fleet.renew()
        for name, content in self.fleet.files.items():
            self.server.files[f"metadata/{name}.json"] = content

    def next(self):
        """The bundle that a board with the one before on its disk has to fetch."""
        self.revision += 1
        return self.bundles[self.revision % len(self.bundles)]

    def want(self, bundle):
        """Say what the board should run, as a hub does: retained."""
        asked = DesiredModel(
            "tiny",
            f"r{self.revision}",
            bytes.fromhex(bundle.bundle_id),
            bytes.fromhex(bundle.graph_sha256),
            bytes.fromhex(bundle.weights_sha256),
            10**6,
        )
        with closing(self.loop.party("hub")) as hub:
            topic = down_topic(DEFAULT_PREFIX, DEVICE, "desired")
            hub.publish(topic, encode(DesiredState(DEVICE, self.revision, [asked])), retain=True)

    def send(self):
        """A sample, whether or not there is anybody to answer it."""
        self.names += self.loop.sensor.send()

    @contextmanager
    def samples(self):
        """Live samples all the while: probation needs them, and a crash may come in the middle of one."""
        stopping = threading.Event()

        def feed():
            while not stopping.wait(0.05):
                self.send()

        feeding = threading.Thread(target=feed)
        feeding.start()
        try:
            yield
        finally:
            stopping.set()
            feeding.join()

    def wait_committed(self, bundle):
        """Live samples until it has proved itself; what serves after."""

        def is_committed():
            self.send()
            self.loop.sensor.wait_answered(self.names[-1:])
            return self.kept()["live"] == bundle.bundle_id

        wait_until(is_committed, f"{bundle.bundle_id[:12]} to be committed: {self.board.program.log[-2000:]}")
        self.serving = bundle.bundle_id

    def kept(self):
        """The state of the swap on the board's disk."""
        path = self.board.state_dir / "releases" / "tiny" / "state.json"
        return json.loads(path.read_bytes())["content"]["state"]


@pytest.fixture(scope="module")
def releases(tmp_path_factory, tiny_model_dir):
    made = Releases(tmp_path_factory.mktemp("swaps"), tiny_model_dir)
    try:
        made.loop.start()
        made.loop.sensor.start()
        # From its first connection on the broker keeps what comes while it is away.
        made.board.start()
        made.board.wait_ready()
        yield made
    finally:
        made.loop.stop()
        made.server.__exit__()


@pytest.mark.parametrize("course", COURSES, ids=" ".join)
def test_board_killed_at_points_serves_a_signed_bundle_and_the_next_attempt_succeeds(releases, course):
    board, sensor, wanted = releases.board, releases.loop.sensor, releases.next()
    allowed = {releases.serving, wanted.bundle_id}
    seen = len(releases.names)
    board.stop()
    releases.want(wanted)
    with releases.samples():
        for point in course:
            board.start(EDGE_CRASH_AT=point)
            board.program.wait_killed()
            assert releases.kept()["live"] in allowed
    board.start()
    board.wait_ready()
    releases.wait_committed(wanted)

    asked = releases.names[seen:]
    assert {answer["bundle"] for name in asked for answer in sensor.answers[name]} <= allowed
    balance = releases.loop.settle(asked)
    assert (balance.unanswered, balance.missing, balance.twice_in_hub) == (0, 0, 0)
    assert releases.loop.tracebacks() == []


def test_board_that_a_bundle_has_crashed_three_times_goes_back_by_itself(releases):
    board, before, wanted = releases.board, releases.serving, releases.next()
    board.stop()
    releases.want(wanted)
    with releases.samples():
        for _ in range(3):
            board.start(EDGE_CRASH_AT="swap.flipped")
            board.program.wait_killed()
    board.start()
    board.wait_ready()
    wait_until(lambda: releases.kept()["attempt"] is None, "the attempt to end")

    assert releases.kept()["live"] == before
    releases.send()
    releases.loop.sensor.wait_answered(releases.names[-1:])
    assert releases.loop.sensor.answers[releases.names[-1]][-1]["bundle"] == before
    history = (board.state_dir / "releases" / "tiny" / "history.jsonl").read_text(encoding="utf-8")
    assert json.loads(history.splitlines()[-1])["what"] == "reverted: crash"
