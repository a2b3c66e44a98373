"""The thread that swaps, with real bundles, pipelines and children; only downloads come from a dictionary."""

from __future__ import annotations

import dataclasses
import random
import shutil
import threading
from concurrent.futures import Future
from itertools import count, pairwise

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from edge_cascade.bundle import load_bundle
from edge_cascade.messages import SHIPPED, DesiredModel, DesiredState
from edge_cascade.mqtt import Incoming
from edge_daemon.audit import AuditCoin
from edge_daemon.clock import SystemClock
from edge_daemon.config import ModelConfig
from edge_daemon.core.swap_events import Failure
from edge_daemon.core.swap_state import Phase, SwapLimits
from edge_daemon.errors import RefusedError, SpoolError, StoppedError
from edge_daemon.inference import InferenceThread
from edge_daemon.inlet.acks import OrderedAcks
from edge_daemon.inlet.queue import Queued, SampleQueue
from edge_daemon.models import Numbering, open_pipeline
from edge_daemon.pipeline import Sample
from edge_daemon.releases.hands import Hands, ServedModel
from edge_daemon.releases.history import read_history
from edge_daemon.releases.state_file import STATE_FILE, Kept, read_state, save_state
from edge_daemon.releases.swapper import REVERT_FILE, Swapper
from edge_daemon.releases.trial import Trial, TrialLimits
from tests.bundles import build
from tests.device.spooling_cases import wait_until

WAIT_S = 60.0
QUICK = SwapLimits(probation_samples=20, min_probation_s=0.0)
GENEROUS = TrialLimits(max_latency_factor=50.0, max_memory_factor=2.0)
MODEL = ModelConfig(bundle="tiny")


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory):
    return build(tmp_path_factory.mktemp("other"), seed=1) / "bundle"


@pytest.fixture(scope="session")
def third_dir(tmp_path_factory):
    return build(tmp_path_factory.mktemp("third"), seed=2) / "bundle"


class FakeStore:
    """Bundles below a directory."""

    def __init__(self, root):
        self.root = root
        self.kept = []
        self.room = 2**30

    def directory_of(self, model, bundle):
        return self.root / model / "bundles" / bundle

    def has(self, model, bundle):
        return self.directory_of(model, bundle).is_dir()

    def keep(self, model, bundles):
        self.kept.append(tuple(bundles))
        for path in (self.root / model / "bundles").glob("*"):
            if path.name not in bundles:
                shutil.rmtree(path)

    def room_for(self, model, bundle):
        return self.room


class FakeSource:
    """Copies bundles that it knows into the store; fails as it is told."""

    def __init__(self, store):
        self.store = store
        self.known = {}
        self.fetched = []
        self.refusal = None
        self.is_away = False
        self.released = threading.Event()
        """What blocks for ever, whatever it is told, ends with the test."""
        self.stuck = set()
        self.asked = threading.Event()

    def fetch(self, wanted, held, stop):
        self.asked.set()
        if wanted.model in self.stuck:
            self.released.wait(WAIT_S)
            raise StoppedError("stuck until the end")
        if self.is_away:
            stop.wait(WAIT_S)
            raise StoppedError("stopped")
        self.fetched.append(wanted)
        target = self.store.directory_of(wanted.model, wanted.bundle)
        if not target.is_dir():
            shutil.copytree(self.known[wanted.bundle], target)

    def verify(self, wanted):
        if self.refusal is not None:
            raise self.refusal


class Board:
    """A daemon's inner part: queue, inference thread, swapper; answers and reports are kept."""

    def __init__(self, root, installed_dir, *, limits=QUICK, boot="boot-1", trial=GENEROUS):
        self.root = root / "releases"
        self.installed = load_bundle(installed_dir)
        self.coin = AuditCoin(0.0, 0.0, random.Random(0))
        self.numbering = Numbering(bytes(16), count().__next__)
        self.outcomes, self.reports = [], []
        self.is_spool_broken = False
        self.store = FakeStore(self.root)
        self.source = FakeSource(self.store)
        self.pipelines = {"tiny": self.open(self.installed)}
        self.queue = SampleQueue(100_000, lambda _: None)
        self.acks = OrderedAcks(lambda message: None)
        self.inference = InferenceThread(
            self.pipelines,
            self.queue,
            publish=self.outcomes.append,
            submit=lambda *_: _done(),
            tally=self,
            on_failed=lambda pipeline: None,
        )
        self.served = []
        self.shadowings = []
        self.swapper = Swapper(
            [
                ServedModel(name, self.installed.bundle_id, installed_dir, self.installed.bundle_id)
                for name in ("other", "tiny")
            ],
            self.root,
            Hands(
                source=self.source,
                store=self.store,
                trial=Trial(root / "trials", trial),
                install=lambda bundle: self.inference.install("tiny", self.open(bundle)),
                report=self.report,
                clock=SystemClock(),
                machine_boot=boot,
                on_served=lambda bundle: self.served.append(bundle.bundle_id),
                on_shadowing=self.shadowings.append,
            ),
            limits,
        )

    def __enter__(self):
        self.inference.start()
        self.swapper.start()
        return self

    def __exit__(self, *_):
        self.swapper.stop()
        assert self.inference.stop(WAIT_S)

    def open(self, bundle):
        return open_pipeline(bundle, MODEL, self.coin, self.numbering, now_s=SystemClock().monotonic_s)

    def count_outcome(self, pipeline, outcome):
        is_failed = outcome.answer is None or outcome.climb.failed
        self.swapper.count("tiny", pipeline.bundle.bundle_id, is_failed=is_failed)

    def report(self, model, end, serving):
        assert model == "tiny"
        if not self.is_spool_broken:
            self.reports.append((end.release, end.failure, serving))
            return _done()
        failed = Future()
        failed.set_exception(SpoolError("full"))
        return failed

    def want(self, release, directory=None, *, model="tiny"):
        """Have the hub want a bundle; its id."""
        if directory is None:
            asked = DesiredModel(model, release, bytes(32))
            bundle_id = self.installed.bundle_id
        else:
            bundle = load_bundle(directory)
            bundle_id = bundle.bundle_id
            self.source.known[bundle_id] = directory
            parts = (bundle.graph_sha256, bundle.weights_sha256)
            asked = DesiredModel(
                model, release, bytes.fromhex(bundle_id), *map(bytes.fromhex, parts), size_bytes=1000
            )
        self.swapper.hear(DesiredState("dev-1", 1, [asked]))
        return bundle_id

    def put(self, samples, x=None):
        x = np.zeros((1, 128), np.float32) if x is None else x
        for number in range(samples):
            ticket = self.acks.open(Incoming("s", b"", 1, False, number + 1), 1)
            self.queue.put(Queued("tiny", Sample("s", x, 0.0, 0), ticket))

    @property
    def serving(self):
        return self.pipelines["tiny"].bundle.bundle_id

    @property
    def state(self):
        kept = read_state(self.root / "tiny")
        return None if kept is None else kept.state

    def wait_for_probation(self, bundle):
        wait_until(lambda: self.swapper.on_probation("tiny") == bundle, WAIT_S, "probation")

    def swap(self, bundle):
        """Answer samples until the bundle is committed."""
        self.wait_for_probation(bundle)
        self.put(20)
        wait_until(lambda: self.state.live == bundle and self.state.attempt is None, WAIT_S, "commit")


def _done():
    future = Future()
    future.set_result(None)
    return future


@pytest.fixture
def installed_dir(tiny_model_dir):
    return tiny_model_dir / "bundle"


@pytest.fixture
def board(tmp_path, installed_dir):
    with Board(tmp_path, installed_dir) as board:
        yield board


def whats(board):
    return [entry.what for entry in read_history(board.root / "tiny")]


def test_a_release_is_fetched_tried_served_on_probation_and_committed(board, other_dir):
    other = board.want("7", other_dir)
    board.swap(other)
    assert board.serving == other
    wait_until(lambda: board.reports, WAIT_S)
    assert board.reports == [("7", None, other)]
    wait_until(lambda: board.state.ends == (), WAIT_S)
    assert board.state.previous == board.installed.bundle_id
    assert board.served == [other]
    assert (board.swapper.committed, board.swapper.reverted) == (1, 0)
    assert whats(board) == ["attempted", "verified", "trial", "on probation", "committed"]


def test_the_same_wish_again_swaps_nothing(board, other_dir):
    other = board.want("7", other_dir)
    board.swap(other)
    board.want("7", other_dir)
    board.want(SHIPPED)
    board.swap(board.installed.bundle_id)
    assert board.served == [other, board.installed.bundle_id]
    wait_until(lambda: len(board.reports) == 2, WAIT_S)
    assert [release for release, _, _ in board.reports] == ["7", SHIPPED]
    assert len(board.source.fetched) == 1


def test_what_is_to_be_shadowed_is_told_again_only_where_it_changes(board, other_dir):
    other = board.want("7", other_dir)
    board.swap(other)
    asked = DesiredModel("tiny", "7", bytes.fromhex(other), shadow_ppm=1000, size_bytes=1000)
    for each in (
        asked,
        replace(asked, size_bytes=0),
        replace(asked, audit_ppm=5000),
        replace(asked, shadow_ppm=2000),
    ):
        board.swapper.hear(DesiredState("dev-1", 1, [each]))
        wait_until(lambda each=each: board.swapper._swaps["tiny"].asked == each, WAIT_S)
    wait_until(lambda: board.shadowings[-1].asked.shadow_ppm == 2000, WAIT_S)
    told = [shadowing.asked.shadow_ppm for shadowing in board.shadowings]
    assert told[-3:] == [0, 1000, 2000]


def test_the_bundle_on_trial_is_named_on_disk_before_it_answers(board, other_dir):
    other = board.want("7", other_dir)
    board.wait_for_probation(other)
    state = board.state
    assert (state.live, state.attempt.bundle) == (board.installed.bundle_id, other)
    assert state.attempt.phase is Phase.TRIAL


def test_failing_samples_bring_the_old_bundle_back(board, other_dir):
    other = board.want("7", other_dir)
    board.wait_for_probation(other)
    for _ in range(20):
        board.swapper.count("tiny", other, is_failed=True)
    wait_until(lambda: board.reports, WAIT_S)
    assert board.reports == [("7", Failure.PROBATION, board.installed.bundle_id)]
    assert board.serving == board.installed.bundle_id
    wait_until(lambda: not board.store.has("tiny", other), WAIT_S)


def test_the_installed_bundle_comes_back_however_slow_it_is(board, other_dir, third_dir, monkeypatch):
    compared = []
    run = Trial.run
    monkeypatch.setattr(
        Trial, "run", lambda trial, *given: (compared.append(given[1] is not None), run(trial, *given))[1]
    )
    board.swap(board.want("7", other_dir))
    board.swap(board.want("8", third_dir))
    board.want(SHIPPED)
    board.swap(board.installed.bundle_id)
    assert compared == [True, True, False]


def test_what_the_source_refuses_is_reported_and_never_loaded(board, other_dir):
    board.source.refusal = RefusedError(Failure.INTEGRITY, "not what was signed")
    other = board.want("7", other_dir)
    wait_until(lambda: board.reports, WAIT_S)
    assert board.reports == [("7", Failure.INTEGRITY, board.installed.bundle_id)]
    assert board.state.bars[other].until_s is None
    assert board.served == []


def test_a_bundle_that_fails_its_trial_never_answers(tmp_path, installed_dir, other_dir):
    with Board(tmp_path, installed_dir, trial=TrialLimits(max_memory_bytes=24 * 2**20)) as board:
        board.want("7", other_dir)
        wait_until(lambda: board.reports, WAIT_S)
        assert board.reports == [("7", Failure.MEMORY, board.installed.bundle_id)]
        assert board.served == []


def test_without_room_nothing_is_fetched(board, other_dir):
    board.store.room = 999
    board.want("7", other_dir)
    wait_until(lambda: board.reports, WAIT_S)
    assert board.reports == [("7", Failure.SPACE, board.installed.bundle_id)]
    assert board.source.fetched == []


def test_another_wish_ends_the_download_that_runs(board, other_dir, third_dir):
    board.source.is_away = True
    board.want("7", other_dir)
    assert board.source.asked.wait(WAIT_S)
    board.source.is_away = False
    third = board.want("8", third_dir)
    board.swap(third)
    wait_until(lambda: len(board.reports) == 2, WAIT_S)
    assert [report[:2] for report in board.reports] == [("7", Failure.SUPERSEDED), ("8", None)]


def test_a_download_that_hangs_for_ever_holds_up_no_other_model(board, other_dir):
    board.source.stuck.add("other")
    board.want("6", other_dir, model="other")
    assert board.source.asked.wait(WAIT_S)
    other = board.want("7", other_dir)
    board.swap(other)
    wait_until(lambda: board.reports, WAIT_S)
    assert board.reports == [("7", None, other)]
    assert read_state(board.root / "other").state.attempt.phase is Phase.DOWNLOADING
    board.source.released.set()


def test_somebody_at_the_board_can_ask_for_the_bundle_before(board, other_dir):
    other = board.want("7", other_dir)
    board.swap(other)
    (board.root / "tiny" / REVERT_FILE).touch()
    wait_until(lambda: board.serving == board.installed.bundle_id, WAIT_S)
    wait_until(lambda: len(board.reports) == 2, WAIT_S)
    assert board.reports[1] == ("7", Failure.ASKED, board.installed.bundle_id)
    wait_until(lambda: board.shadowings[-1].serving == board.installed.bundle_id, WAIT_S)
    assert board.shadowings[-1].other_directory is None
    assert not (board.root / "tiny" / REVERT_FILE).exists()


def test_after_a_start_the_bundle_on_probation_answers_again_and_is_committed(
    tmp_path, installed_dir, other_dir
):
    with Board(tmp_path, installed_dir) as board:
        other = board.want("7", other_dir)
        board.wait_for_probation(other)
    assert board.state.is_stopped
    with Board(tmp_path, installed_dir) as board:
        board.swap(other)
        assert board.state.previous == board.installed.bundle_id


def test_a_daemon_that_ends_while_a_bundle_opens_says_nothing_against_it(
    tmp_path, installed_dir, other_dir, monkeypatch
):
    opening, ended = threading.Event(), threading.Event()
    with Board(tmp_path, installed_dir) as board:

        def open_slowly(bundle):
            opening.set()
            assert ended.wait(WAIT_S)
            return Board.open(board, bundle)

        monkeypatch.setattr(board, "open", open_slowly)
        other = board.want("7", other_dir)
        assert opening.wait(WAIT_S)
        assert board.inference.stop(WAIT_S)
        ended.set()
    assert (board.state.attempt.bundle, board.state.attempt.phase) == (other, Phase.TRIAL)
    assert (board.state.bars, board.reports, board.state.is_stopped) == ({}, [], True)
    with Board(tmp_path, installed_dir) as board:
        board.swap(other)


def test_a_defect_while_a_bundle_is_put_in_place_ends_the_attempt(board, other_dir, monkeypatch, caplog):
    opened = Board.open

    def open_or_not(bundle):
        if bundle.bundle_id != board.installed.bundle_id:
            raise ValueError("odd")
        return opened(board, bundle)

    monkeypatch.setattr(board, "open", open_or_not)
    board.want("7", other_dir)
    wait_until(lambda: board.reports, WAIT_S)
    assert board.reports == [("7", Failure.LOAD, board.installed.bundle_id)]
    assert "defect while a bundle is put in place" in caplog.text


def test_running_time_goes_on_over_a_start(tmp_path, installed_dir, other_dir):
    with Board(tmp_path, installed_dir):
        pass
    first_s = read_state(tmp_path / "releases" / "tiny").running_s
    with Board(tmp_path, installed_dir):
        pass
    assert read_state(tmp_path / "releases" / "tiny").running_s > first_s


def test_a_report_that_the_spool_did_not_take_is_given_again_at_the_next_start(
    tmp_path, installed_dir, other_dir
):
    with Board(tmp_path, installed_dir) as board:
        board.is_spool_broken = True
        board.store.room = 0
        board.want("7", other_dir)
        wait_until(lambda: board.state and board.state.ends, WAIT_S)
    with Board(tmp_path, installed_dir) as board:
        wait_until(lambda: board.reports, WAIT_S)
        assert board.reports == [("7", Failure.SPACE, board.installed.bundle_id)]
        wait_until(lambda: board.state.ends == (), WAIT_S)


def test_a_live_bundle_that_is_gone_gives_way_to_the_installed_one_and_is_fetched_again(
    tmp_path, installed_dir, other_dir
):
    with Board(tmp_path, installed_dir) as board:
        other = board.want("7", other_dir)
        board.swap(other)
        shutil.rmtree(board.store.directory_of("tiny", other))
    with Board(tmp_path, installed_dir) as board:
        board.source.known[other] = other_dir
        board.swap(other)
        assert board.serving == other


@pytest.mark.parametrize("has_previous", [True, False])
def test_live_bundle_with_which_no_start_lasts_gives_way_and_comes_back_by_a_new_attempt_alone(
    tmp_path, installed_dir, other_dir, has_previous
):
    with Board(tmp_path, installed_dir) as board:
        other = board.want("7", other_dir)
        board.swap(other)
        installed = board.installed.bundle_id
    if not has_previous:
        kept = read_state(board.root / "tiny")
        state = msgspec.structs.replace(kept.state, previous=None)
        save_state(board.root / "tiny", Kept(state, kept.running_s, kept.wanted))
    board = Board(tmp_path, installed_dir)
    board.swapper._models = [dataclasses.replace(each, distrusted=other) for each in board.swapper._models]
    board.source.known[other] = other_dir
    with board:
        wait_until(lambda: board.state.live == installed, WAIT_S, "the one before")
        # What the hub wants is tried again, like any other bundle.
        board.swap(other)
        assert board.serving == other


def test_a_damaged_state_is_moved_aside_and_the_installed_bundle_answers(
    tmp_path, installed_dir, other_dir, caplog
):
    with Board(tmp_path, installed_dir) as board:
        board.swap(board.want("7", other_dir))
    path = board.root / "tiny" / STATE_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with Board(tmp_path, installed_dir) as board:
        wait_until(path.with_name(f"{STATE_FILE}.corrupt").exists, WAIT_S)
        wait_until(lambda: board.state is not None, WAIT_S)
        assert board.state.live == board.installed.bundle_id
    assert "damaged state of releases moved to" in caplog.text


def test_no_answer_is_a_mixture_of_two_bundles_and_none_is_lost(board, other_dir):
    """Samples without a pause, while bundles change: each answer is exactly what its bundle computes."""
    inputs = board.installed.golden_inputs
    expected = {}
    for directory in (None, other_dir):
        bundle = board.installed if directory is None else load_bundle(directory)
        pipeline = board.open(bundle)
        for index, x in enumerate(inputs):
            answer = pipeline.process(Sample(str(index), x, 0.0, 0)).answer
            expected[bundle.bundle_id, str(index)] = (answer.label, answer.exit)
    assert len({label for label, _ in expected.values()}) > 1
    sent, done = 0, threading.Event()

    def pour():
        nonlocal sent
        while not done.wait(0.002):
            index = sent % len(inputs)
            ticket = board.acks.open(Incoming("s", b"", 1, False, sent + 1), 1)
            board.queue.put(Queued("tiny", Sample(str(index), inputs[index], 0.0, 0), ticket))
            sent += 1

    pouring = threading.Thread(target=pour)
    pouring.start()
    try:
        other = board.want("7", other_dir)
        wait_until(lambda: board.state and board.state.live == other, WAIT_S)
        board.want(SHIPPED)
        wait_until(lambda: board.state.live == board.installed.bundle_id, WAIT_S)
    finally:
        done.set()
        pouring.join()
    wait_until(lambda: len(board.outcomes) == sent, WAIT_S)
    answers = [outcome.answer for outcome in board.outcomes]
    assert {answer.bundle for answer in answers} == {board.installed.bundle_id, other}
    for answer in answers:
        assert (answer.label, answer.exit) == expected[answer.bundle, answer.sensor]
    # There and back, and never to and fro.
    changes = sum(one.bundle != two.bundle for one, two in pairwise(answers))
    assert changes == 2
