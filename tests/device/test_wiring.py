"""Which bundle answers at start, from what an earlier start has left on disk: real files, no network."""

import shutil

import pytest
from msgspec import structs

pytest.importorskip("tuf", reason="needs python-tuf")

from edge_cascade.bundle import load_bundle
from edge_cascade.messages import DesiredModel, DesiredState
from edge_daemon.clock import SystemClock
from edge_daemon.config import (
    Config,
    DeviceConfig,
    InletConfig,
    ModelConfig,
    ReleasesConfig,
    SourceConfig,
)
from edge_daemon.core.swap import MAX_CRASHES
from edge_daemon.core.swap_state import Attempt, Phase, SwapState
from edge_daemon.daemon import Daemon
from edge_daemon.releases import wiring
from edge_daemon.releases.starts import MAX_STARTS, STARTS_FILE, note_lasted
from edge_daemon.releases.state_file import STATE_FILE, Kept, read_state, save_state
from edge_daemon.releases.wiring import BoardReleases, count_start
from tests.bundles import build
from tests.device.file_server import FileServer
from tests.device.full_disk import fill_disk
from tests.device.signed_fleet import SignedFleet
from tests.device.spooling_cases import wait_until


@pytest.fixture(scope="module")
def newer_dir(tmp_path_factory):
    return build(tmp_path_factory.mktemp("newer"), seed=5) / "bundle"


class Board:
    """A state directory in which `newer` is the bundle that proved itself last."""

    def __init__(self, tmp_path, model_dir, newer_dir):
        self.installed = load_bundle(model_dir / "bundle")
        self.newer = load_bundle(newer_dir)
        root = tmp_path / "root.json"
        root.write_bytes(SignedFleet().first_root)
        self.directory = tmp_path / "state" / "releases" / "tiny"
        self.fetched = self.directory / "bundles" / self.newer.bundle_id
        shutil.copytree(newer_dir, self.fetched)
        self.save(SwapState(live=self.newer.bundle_id, release="r1", previous=self.installed.bundle_id))
        self.config = Config(
            device=DeviceConfig(id="board", state_dir=str(tmp_path / "state")),
            models=(ModelConfig(bundle=str(model_dir)),),
            inlet=InletConfig(sources=(SourceConfig(topic="s/{sensor}"),)),
            releases=ReleasesConfig(enabled=True, url="http://127.0.0.1:9/v1/fleet", root=str(root)),
        )

    def save(self, state):
        save_state(self.directory, Kept(state))

    def files(self):
        return {path: path.read_bytes() for path in self.directory.rglob("*") if path.is_file()}

    def at_start(self):
        """The bundle that answers in place of the installed one."""
        before = self.files()
        bundle = BoardReleases(self.config, SystemClock()).live_in_place_of(self.installed)
        # Who asks may be a command that only looks.
        assert self.files() == before
        return None if bundle is None else bundle.bundle_id


@pytest.fixture
def board(tmp_path, tiny_model_dir, newer_dir):
    return Board(tmp_path, tiny_model_dir, newer_dir)


def test_the_bundle_that_proved_itself_last_answers(board):
    assert board.at_start() == board.newer.bundle_id


def test_a_bundle_on_probation_waits_for_the_swapper_that_counts_the_start_first(board):
    attempt = Attempt(
        2, "r2", board.newer.bundle_id, 1000, is_return=False, is_fetched=True, phase=Phase.TRIAL
    )
    board.save(SwapState(live=board.installed.bundle_id, attempt=attempt, number=2))
    assert board.at_start() is None


def test_a_board_that_has_taken_nothing_begins_with_what_it_was_installed_with(board):
    (board.directory / STATE_FILE).unlink()
    assert board.at_start() is None


def _of_another_bundle(board):
    manifest = board.fetched / "weights" / "manifest.json"
    # The same bundle to any reader, and not the bytes that were committed.
    manifest.write_bytes(manifest.read_bytes() + b" ")


def _absurd_name(board):
    board.save(SwapState(live="../../elsewhere"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda board: (board.directory / STATE_FILE).write_bytes(b"\0" * 512), "malformed"),
        (lambda board: (board.directory / STATE_FILE).write_bytes(b"{}"), "sha256"),
        (lambda board: shutil.rmtree(board.fetched), "no such directory"),
        (lambda board: (board.fetched / "weights" / "weights.safetensors").write_bytes(b""), "weights"),
        (_of_another_bundle, "the files of the other are not its own"),
        (_absurd_name, "no name of a bundle"),
    ],
)
def test_whatever_is_damaged_the_installed_bundle_answers_and_it_is_said(board, caplog, spoil, said):
    spoil(board)
    assert board.at_start() is None
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("serving the installed bundle of tiny: ")
    assert said in record.getMessage()


# --- a live bundle with which no start lasts


def test_bundle_with_which_no_start_lasts_gives_way_to_the_installed_one(board, caplog):
    for _ in range(MAX_STARTS):
        count_start(board.config)
        assert board.at_start() == board.newer.bundle_id
    count_start(board.config)
    assert board.at_start() is None
    assert "no start with bundle" in caplog.text


def test_start_that_lasts_or_ends_as_it_was_asked_to_begins_the_count_anew(board):
    for _ in range(3 * MAX_STARTS):
        count_start(board.config)
        assert board.at_start() == board.newer.bundle_id
        note_lasted(board.directory)


def test_power_cuts_and_starts_with_another_bundle_do_not_count(board, monkeypatch):
    boots = iter(f"boot-{number // MAX_STARTS}" for number in range(1000))
    for _ in range(3 * MAX_STARTS):
        boot = next(boots)
        monkeypatch.setattr(wiring, "read_machine_boot", lambda boot=boot: boot)
        count_start(board.config)
        assert board.at_start() == board.newer.bundle_id


def test_crashes_of_an_attempt_count_against_that_one(board):
    attempt = Attempt(2, "r2", "ab" * 32, 1000, is_return=False, is_fetched=True, phase=Phase.TRIAL)
    board.save(SwapState(live=board.newer.bundle_id, attempt=attempt, number=2))
    for _ in range(2 * MAX_STARTS):
        count_start(board.config)
        assert board.at_start() == board.newer.bundle_id


def test_daemon_that_is_not_let_in_says_so_where_people_and_the_hub_look(board):
    with FileServer() as server:
        server.status["metadata/timestamp.json"] = 401
        releases = structs.replace(board.config.releases, url=server.url, jitter_s=0.0)
        daemon = Daemon(structs.replace(board.config, releases=releases))
        assert not any(problem.startswith("releases: ") for problem in daemon.health().problems)
        assert daemon.metrics.snapshot()["edge_releases_denied"] == 0
        daemon.start()
        try:
            asked = DesiredModel("tiny", "r2", *(bytes([number]) * 32 for number in range(3)), size_bytes=9)
            daemon.swapper.hear(DesiredState("board", 1, [asked]))
            said = "releases: metadata: the hub answers 401: this board is not let in"
            wait_until(lambda: any(each.startswith(said) for each in daemon.health().problems), 30.0)
            assert daemon.metrics.snapshot()["edge_releases_denied"] == 1
            assert not daemon.health().ready
        finally:
            daemon.stop()


def test_ordinary_stops_on_a_full_disk_are_no_crashes_of_the_bundle_on_probation(board, monkeypatch):
    newer, installed = board.newer.bundle_id, board.installed.bundle_id
    attempt = Attempt(2, "r2", newer, 1000, is_return=False, is_fetched=True, phase=Phase.TRIAL)
    board.save(SwapState(live=installed, attempt=attempt, number=2))
    for _ in range(2 + MAX_CRASHES):
        daemon = Daemon(board.config)
        daemon.start()
        wait_until(lambda daemon=daemon: daemon.swapper.on_probation("tiny") == newer, 30.0)
        with monkeypatch.context() as full:
            fill_disk(full)
            daemon.stop()
        kept = read_state(board.directory).state
        assert (kept.is_stopped, kept.attempt.bundle, kept.attempt.crashes) == (False, newer, 0)


def test_damaged_count_or_a_disk_that_takes_none_keeps_nothing_from_starting(board, caplog):
    (board.directory / STARTS_FILE).mkdir()
    count_start(board.config)
    assert board.at_start() == board.newer.bundle_id
    assert "are not counted" in caplog.text
