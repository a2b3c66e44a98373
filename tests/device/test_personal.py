"""Private heads at work: who is asked, who answers, and who answers for a while only."""

import dataclasses
import itertools
import json
import threading
from concurrent.futures import Future

import numpy as np
import pytest

from edge_cascade.bundle import load_bundle
from edge_cascade.errors import BackendError
from edge_cascade.gate import Exit
from edge_cascade.ladder import Climb, Ladder
from edge_cascade.messages import DesiredModel, DesiredState
from edge_cascade.mqtt import Broker
from edge_cascade.shipped import find_bundle
from edge_daemon.config import (
    AuditConfig,
    Config,
    DeviceConfig,
    HttpConfig,
    HubConfig,
    InletConfig,
    ModelConfig,
    SourceConfig,
    TrainingConfig,
)
from edge_daemon.daemon import Daemon
from edge_daemon.errors import ModelError, StoppedError
from edge_daemon.example_ledger import Truth
from edge_daemon.models import Numbering, open_stage
from edge_daemon.personal import SCENE_S, Personal, Surroundings
from edge_daemon.side_thread import MAX_WAITING
from edge_daemon.training.arrays import dump_arrays
from edge_daemon.training.state import ModelState
from edge_daemon.training.wiring import make_personal
from tests.device.signed_fleet import FakeClock
from tests.device.spooling_cases import wait_until
from tests.identity.party import Party
from tests.services import start_mosquitto

BOOT = bytes(range(8))
SHARED_SAYS, OWN_SAYS = 3, 8
ENOUGH = 7
"""Scenes won, and none lost, after which heads are served."""


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(find_bundle("digits"))


def heads_of(bundle, change=0.25):
    parameters = bundle.parameters()
    return {name: parameters[name] + np.float32(change) for name in bundle.graph.head_parameters}


class FakeLadder:
    """Says one label; `gate` holds it up."""

    def __init__(self, label):
        self.label = label
        self.failed = False
        self.error = None
        self.asked = 0
        self.gate = threading.Event()
        self.gate.set()

    def climb(self, _):
        self.asked += 1
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        exit_ = Exit(0, self.label, 0.9, 0.1)
        return Climb((exit_,), exit_, accepted=True, failed=self.failed)


class Board:
    """A board that serves the digits bundle; `installed` says whose heads were to answer, one after the other."""

    def __init__(self, bundle):
        self.bundle = bundle
        self.shared, self.own = FakeLadder(SHARED_SAYS), FakeLadder(OWN_SAYS)
        self.opened, self.installed, self.refusal, self.refused = [], [], None, 0
        self.clock = FakeClock()
        self.seqs = itertools.count()
        self.sensors = itertools.count()
        self.personal = Personal(
            {"digits": bundle},
            Surroundings(Numbering(BOOT, self.seqs.__next__), self.clock, self._open, self._install),
        )
        self.personal.start()

    def is_own(self, bundle):
        return bundle.weights.certificates == ()

    def _open(self, bundle):
        self.opened.append(bundle)
        return self.own if self.is_own(bundle) else self.shared

    def _install(self, bundle):
        if self.refusal is not None:
            self.refused += 1
            raise self.refusal
        self.installed.append("own" if self.is_own(bundle) else "shared")
        done = Future()
        done.set_result(None)
        return done

    def take_heads(self, change=0.25):
        opened = len(self.opened)
        self.personal.take_heads("digits", dump_arrays(heads_of(self.bundle, change)))
        wait_until(lambda: len(self.opened) == opened + 2)

    def tell(self, label, *, sensor=None, boot=BOOT, seq=None):
        """A truth about a sample answered just now; each of a sensor of its own."""
        seq = next(self.seqs) if seq is None else seq
        sensor = f"s{next(self.sensors)}" if sensor is None else sensor
        asked = self.shared.asked
        self.personal.hear_truth(
            Truth("digits", (boot, seq), sensor, label), lambda: np.zeros((64,), np.float32)
        )
        return asked

    def tell_and_wait(self, label, **where):
        asked = self.tell(label, **where)
        wait_until(lambda: self.shared.asked > asked)

    def end_scenes(self, scenes):
        wait_until(lambda: len(self.personal._contests["digits"].scenes._open) == scenes)
        self.clock.now_s += SCENE_S
        self.personal.wake()

    def judge(self, scenes, label):
        """So many scenes in which this is true."""
        for _ in range(scenes):
            self.tell_and_wait(label)
        before = self.personal.wins + self.personal.losses
        self.end_scenes(scenes)
        wait_until(lambda: self.personal.wins + self.personal.losses == before + scenes)

    def hear(self, **asked):
        self.personal.hear(DesiredState("board", 1, [DesiredModel("digits", "4", bytes(32), **asked)]))


@pytest.fixture
def board(bundle):
    made = Board(bundle)
    yield made
    made.own.gate.set()
    made.personal.stop()


def test_own_heads_answer_once_enough_scenes_were_won_and_not_before(board):
    board.take_heads()
    board.judge(ENOUGH - 1, OWN_SAYS)
    assert board.installed == []
    board.judge(1, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)
    assert (board.installed, board.personal.wins, board.personal.losses) == (["own"], ENOUGH, 0)


def test_own_heads_that_get_worse_answer_no_longer(board):
    board.take_heads()
    board.judge(ENOUGH, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)
    board.judge(ENOUGH - 1, SHARED_SAYS)
    assert board.installed == ["own"]
    board.judge(1, SHARED_SAYS)
    wait_until(lambda: board.personal.serving == 0)
    assert board.installed == ["own", "shared"]


def test_a_hundred_truths_of_one_scene_are_one_reason(board):
    board.take_heads()
    for _ in range(100):
        board.tell_and_wait(OWN_SAYS, sensor="pump")
    board.end_scenes(1)
    wait_until(lambda: board.personal.wins == 1)
    assert board.installed == []


def test_a_truth_is_counted_once_whoever_repeats_it(board):
    board.take_heads()
    seq = next(board.seqs)
    board.tell_and_wait(OWN_SAYS, sensor="pump", seq=seq)
    board.tell(SHARED_SAYS, sensor="pump", seq=seq)
    board.tell_and_wait(SHARED_SAYS, sensor="fan")
    board.end_scenes(2)
    wait_until(lambda: board.personal.losses == 1)
    assert board.personal.wins == 1


def test_what_was_answered_before_the_heads_were_kept_or_in_another_life_tells_nothing(board):
    early = next(board.seqs)
    board.tell(OWN_SAYS)
    board.take_heads()
    board.tell(OWN_SAYS, seq=early)
    board.tell(OWN_SAYS, boot=bytes(8), seq=10**6)
    board.judge(1, SHARED_SAYS)
    assert (board.personal.wins, board.own.asked) == (0, 1)


def test_where_both_are_right_or_wrong_nothing_is_told(board):
    board.take_heads()
    board.own.label = SHARED_SAYS
    board.tell_and_wait(SHARED_SAYS)
    board.tell_and_wait(OWN_SAYS)
    board.end_scenes(2)
    board.own.label = OWN_SAYS
    board.judge(1, OWN_SAYS)
    assert (board.personal.wins, board.personal.losses) == (1, 0)


@pytest.mark.parametrize("asked", [{"shadow_ppm": 1}, {"audit_ppm": 1}])
def test_while_a_release_is_judged_the_bundles_heads_answer_and_counting_goes_on(board, asked):
    board.take_heads()
    board.hear(**asked)
    board.judge(ENOUGH, OWN_SAYS)
    assert board.installed == []
    board.hear()
    wait_until(lambda: board.personal.serving == 1)
    board.hear(**asked)
    wait_until(lambda: board.personal.serving == 0)
    board.hear()
    wait_until(lambda: board.personal.serving == 1)
    assert board.installed == ["own", "shared", "own"]


def test_new_heads_begin_from_zero_behind_those_of_the_bundle(board):
    board.take_heads()
    board.judge(ENOUGH, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)
    board.take_heads(0.5)
    wait_until(lambda: board.installed == ["own", "shared"])
    board.judge(ENOUGH - 1, OWN_SAYS)
    assert board.personal.serving == 0
    board.judge(1, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)


def test_the_same_heads_again_change_nothing(board):
    board.take_heads()
    board.judge(ENOUGH, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)
    board.personal.take_heads("digits", dump_arrays(heads_of(board.bundle)))
    board.judge(1, OWN_SAYS)
    assert (board.personal.serving, board.installed, len(board.opened)) == (1, ["own"], 2)


def test_after_a_swap_the_count_begins_anew_and_the_old_bundle_is_never_brought_back(board, bundle):
    board.take_heads()
    board.judge(ENOUGH, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)
    board.personal.take_bundle(dataclasses.replace(bundle, bundle_id="1" * 64))
    wait_until(lambda: board.personal.serving == 0)
    assert board.installed == ["own"]
    board.judge(ENOUGH, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)
    assert board.opened[-1].bundle_id == "1" * 64


def test_heads_are_not_put_on_another_graph(board, bundle):
    board.take_heads()
    board.personal.take_bundle(dataclasses.replace(bundle, bundle_id="1" * 64, graph_sha256="2" * 64))
    wait_until(lambda: not board.personal._contests)
    board.tell(OWN_SAYS)
    assert (len(board.opened), board.own.asked) == (2, 0)


def test_heads_that_do_not_belong_are_refused_and_said_once(board, caplog):
    board.personal.take_heads("digits", dump_arrays({"other": np.zeros(3, np.float32)}))
    wait_until(lambda: "private heads not served model=digits: private heads: 'exit0" in caplog.text)
    board.personal.take_heads("digits", b"no arrays")
    wait_until(lambda: "private heads not served model=digits: no arrays" in caplog.text)
    board.tell(OWN_SAYS)
    assert not board.opened
    board.take_heads()
    board.judge(1, OWN_SAYS)
    assert (board.personal.wins, caplog.text.count("not served")) == (1, 2)


def test_a_bundle_that_does_not_open_is_no_end(board, caplog):
    board.refusal = ModelError("another bundle answers for 'digits' by now")
    board.take_heads()
    board.judge(ENOUGH, OWN_SAYS)
    wait_until(lambda: "another bundle answers" in caplog.text)
    assert board.personal.serving == 0
    board.refusal = None
    board.judge(ENOUGH, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)


def test_the_way_back_is_tried_until_it_is_open(board):
    board.take_heads()
    board.judge(ENOUGH, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)
    board.refusal = StoppedError("not now")
    board.judge(ENOUGH, SHARED_SAYS)
    board.refusal = None
    board.personal.wake()
    wait_until(lambda: board.installed == ["own", "shared"])


def test_new_heads_wait_until_those_before_are_taken_back(board):
    board.take_heads()
    board.judge(ENOUGH, OWN_SAYS)
    wait_until(lambda: board.personal.serving == 1)
    board.refusal = MemoryError("not now")
    board.personal.take_heads("digits", dump_arrays(heads_of(board.bundle, 0.5)))
    wait_until(lambda: board.refused)
    assert len(board.opened) == 2
    board.refusal = None
    board.personal.wake()
    wait_until(lambda: len(board.opened) == 4)
    assert board.installed == ["own", "shared"]


def test_what_the_thread_does_not_get_to_is_counted(board):
    board.take_heads()
    board.own.gate.clear()
    board.tell(OWN_SAYS)
    wait_until(lambda: board.own.asked == 1)
    for _ in range(MAX_WAITING + 3):
        board.tell(OWN_SAYS)
    assert board.personal.dropped == 3


def test_a_stage_that_does_not_run_tells_nothing(board):
    board.take_heads()
    board.own.error = BackendError("broken")
    board.tell(OWN_SAYS)
    wait_until(lambda: board.own.asked == 1)
    board.own.error, board.own.failed = None, True
    board.tell(OWN_SAYS)
    wait_until(lambda: board.own.asked == 2)
    board.own.failed = False
    board.judge(1, OWN_SAYS)
    assert (board.personal.wins, board.personal.losses) == (1, 0)


def test_a_defect_ends_nothing(board, caplog):
    board.take_heads()
    board.own.error = RuntimeError("a defect")
    board.tell(OWN_SAYS)
    wait_until(lambda: "turn failed thread=personal" in caplog.text)
    board.own.error = None
    board.judge(1, OWN_SAYS)
    assert board.personal.wins == 1


def test_a_model_on_litert_is_left_out_with_a_word(bundle, caplog):
    config = Config(
        device=DeviceConfig(id="press-3"),
        models=(ModelConfig(bundle="digits", runtime="litert"),),
        inlet=InletConfig(sources=(SourceConfig(topic="sensors/{sensor}"),)),
        training=TrainingConfig(enabled=True, serve_private_heads=True),
    )
    personal = make_personal(
        config,
        {"digits": config.models[0]},
        {"digits": bundle},
        lambda _: Future(),
        clock=FakeClock(),
        numbering=Numbering(BOOT, itertools.count().__next__),
    )
    personal.take_heads("digits", dump_arrays(heads_of(bundle)))
    assert not personal._heads
    assert "private heads of digits are not served: weights are inside of LiteRT's stages" in caplog.text


# --- a whole board -------------------------------------------------------------------------------------


def exchanged(bundle):
    """Heads that say 3 for 8 and 8 for 3: what a site that labels so has taught them."""
    heads = {name: bundle.parameters()[name].copy() for name in bundle.graph.head_parameters}
    for array in heads.values():
        array[[SHARED_SAYS, OWN_SAYS]] = array[[OWN_SAYS, SHARED_SAYS]]
    return heads


class Site:
    """A board with heads from an earlier round, a broker and whoever says what samples are."""

    def __init__(self, daemon, party, clock, x):
        self.daemon, self.party, self.clock, self.x = daemon, party, clock, x
        self.sensors = itertools.count()

    def ask(self):
        sensor = f"s{next(self.sensors)}"
        self.party.publish(f"sensors/{sensor}", json.dumps(self.x.tolist()).encode())
        return sensor, json.loads(self.party.received.get(timeout=20)[1])

    def judge(self, label, scenes=ENOUGH):
        personal = self.daemon.personal
        told = personal.wins + personal.losses
        used = sum(self.daemon.examples.counts().labels.values())
        for _ in range(scenes):
            sensor, answer = self.ask()
            self.party.publish(
                f"labels/{sensor}", json.dumps({"label": str(label), "id": answer["id"]}).encode()
            )
        wait_until(lambda: sum(self.daemon.examples.counts().labels.values()) == used + scenes)
        scenes_of = personal._contests["digits"].scenes
        wait_until(lambda: len(scenes_of._open) == scenes)
        self.clock.now_s += SCENE_S
        wait_until(lambda: personal.wins + personal.losses == told + scenes)

    def wait_serving(self, count):
        wait_until(lambda: self.daemon.metrics.snapshot()["edge_personal_serving"] == count)


@pytest.fixture
def site(tmp_path, bundle):
    ladder = Ladder(bundle, bundle.plan(), open_stage)
    x = next(x for x in bundle.golden_inputs if ladder.climb(x).answer.label == SHARED_SAYS)
    state = ModelState(tmp_path / "state" / "training" / "digits", bytes.fromhex(bundle.graph_sha256))
    state.load()
    state.keep_heads(dump_arrays(exchanged(bundle)))
    clock = FakeClock()
    with start_mosquitto(tmp_path) as mosquitto, Party(mosquitto.port) as party:
        broker = Broker(port=mosquitto.port)
        daemon = Daemon(
            Config(
                device=DeviceConfig(id="press-3", state_dir=str(tmp_path / "state"), drain_s=0.5),
                models=(ModelConfig(bundle="digits"),),
                inlet=InletConfig(broker=broker, sources=(SourceConfig(topic="sensors/{sensor}"),)),
                hub=HubConfig(broker=broker),
                audit=AuditConfig(rate=0.0),
                training=TrainingConfig(
                    enabled=True, hub_key="00" * 32, own_per_minute=0.0, serve_private_heads=True
                ),
                http=HttpConfig(enabled=False),
            ),
            clock=clock,
        )
        daemon.start()
        try:
            party.subscribe("results/+")
            wait_until(lambda: daemon._inlet.session.is_listening)
            wait_until(lambda: "digits" in daemon.personal._contests)
            yield Site(daemon, party, clock, x)
        finally:
            daemon.stop()
            # What collects memory while this runs may end paho's sockets before the client that closes them.
            for owner in (daemon._inlet.session, daemon.uplink._session):
                owner._client = None
    party._client = None


def test_a_board_whose_site_labels_otherwise_comes_to_answer_so_and_back(site, bundle):
    _, answer = site.ask()
    assert (answer["label"], answer["uncertified"]) == ("3", False)

    site.judge(OWN_SAYS)
    site.wait_serving(1)
    _, answer = site.ask()
    assert (answer["label"], answer["uncertified"], answer["bundle"]) == ("8", True, bundle.bundle_id)

    # A release is judged here.
    judged = DesiredModel("digits", "4", bytes.fromhex(bundle.bundle_id), audit_ppm=1)
    site.daemon._hear_desired(DesiredState("press-3", 1, [judged]))
    site.wait_serving(0)
    _, answer = site.ask()
    assert (answer["label"], answer["uncertified"]) == ("3", False)
    site.daemon._hear_desired(DesiredState("press-3", 2, []))
    site.wait_serving(1)

    # The site labels as everybody again.
    site.judge(SHARED_SAYS)
    site.wait_serving(0)
    _, answer = site.ask()
    assert (answer["label"], answer["uncertified"]) == ("3", False)
    numbers = site.daemon.metrics.snapshot()
    assert (numbers["edge_personal_wins"], numbers["edge_personal_losses"]) == (ENOUGH, ENOUGH)


def test_a_swap_brings_the_heads_of_the_new_bundle_and_no_heads_bring_the_old_one_back(site, bundle):
    site.judge(OWN_SAYS)
    site.wait_serving(1)
    own = site.daemon._pipelines["digits"].bundle
    newer = dataclasses.replace(bundle, bundle_id="1" * 64)

    before = site.daemon._installer.install(newer).result(20)
    assert before.is_personal
    with pytest.raises(ModelError, match="another bundle answers for 'digits' by now"):
        site.daemon._installer.install_heads(own)
    _, answer = site.ask()
    assert (answer["label"], answer["bundle"]) == ("3", "1" * 64)
    site.daemon._now_serving(newer)
    site.wait_serving(0)

    wait_until(lambda: site.daemon.personal._contests["digits"].shared is newer)
    site.judge(OWN_SAYS)
    site.wait_serving(1)
    _, answer = site.ask()
    assert (answer["label"], answer["bundle"]) == ("8", "1" * 64)


def test_personal_answers_are_not_shadowed(site):
    seen = []
    site.daemon.shadow = type("Shadow", (), {"observe": lambda _, *what: seen.append(what)})()
    daemon = site.daemon
    daemon._shadow_shared("digits", None, None)
    assert len(seen) == 1
    daemon._pipelines["digits"].is_personal = True
    daemon._shadow_shared("digits", None, None)
    daemon.shadow = None
    assert len(seen) == 1
