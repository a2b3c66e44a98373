"""Power cuts with everything lost that was not fsynced: a bundle, its metadata and the state of a swap."""

import os

import pytest

pytest.importorskip("tuf", reason="needs python-tuf")

from edge_cascade import durable
from edge_cascade.bundle import load_bundle
from edge_daemon.core.swap_state import SwapState
from edge_daemon.releases import bundle_store, downloader, growing_file, part_fetch, state_file
from edge_daemon.releases.state_file import Kept, load_state, save_state
from tests.device.lossy_disk import LossyDisk, PowerCutError, cut_at
from tests.device.test_download import Board, better_dir, files_below, server  # noqa: F401 - fixtures

MODULES = (durable, growing_file, part_fetch, bundle_store, downloader, state_file)


def test_the_model_of_the_disk_loses_what_was_not_synced(tmp_path, monkeypatch):
    root = tmp_path / "disk"
    (root / "old").mkdir(parents=True)
    (root / "old" / "kept").write_bytes(b"kept")
    disk = LossyDisk(root, monkeypatch)
    (root / "old" / "kept").write_bytes(b"changed")
    (root / "unnamed").write_bytes(b"synced, but not its name")
    with (root / "unnamed").open("rb+") as file:
        os.fsync(file.fileno())
    durable.write_durably(root / "old" / "durable", b"x")
    (root / "empty").touch()
    durable.sync_directory(root)
    (root / "old").rename(root / "new")
    disk.cut()
    assert files_below(root) == {
        "old/kept": b"kept", "old/durable": b"x", "unnamed": b"synced, but not its name", "empty": b"",
    }  # fmt: skip


@pytest.fixture
def board(server, tmp_path, tiny_bundle, better_dir):  # noqa: F811 - the fixtures
    (tmp_path / "state").mkdir()
    board = Board(server, tmp_path, tiny_bundle)
    board.wanted, board.files = board.offer(better_dir), files_below(better_dir)
    return board


PLACES = [
    *(("download.part", passage) for passage in (1, 2)),
    *(("download.file", passage) for passage in (1, 3, 6, 9)),
    ("download.whole", 1),
    ("verify.done", 1),
    *(("durable.before-rename", passage) for passage in (1, 2, 4, 6)),
    *(("durable.after-rename", passage) for passage in (1, 3, 5, 7)),
]


@pytest.mark.parametrize(("point", "passage"), PLACES, ids=str)
def test_cut_anywhere_the_next_start_ends_with_the_whole_bundle(board, monkeypatch, point, passage):
    disk = LossyDisk(board.tmp_path / "state", monkeypatch)
    with monkeypatch.context() as patch:
        cut_at(patch, MODULES, point, passage)
        with pytest.raises(PowerCutError):
            board.fetch(board.wanted)
            board.downloader.verify(board.wanted)
    disk.cut()
    # What has its name is whole, whatever was lost.
    if board.store.has("tiny", board.wanted.bundle):
        assert load_bundle(board.directory(board.wanted)).bundle_id == board.wanted.bundle
    board.restart()
    board.fetch(board.wanted)
    board.downloader.verify(board.wanted)
    assert files_below(board.directory(board.wanted)) == board.files
    # And what is told as done lasts.
    disk.cut()
    assert load_bundle(board.directory(board.wanted)).bundle_id == board.wanted.bundle
    board.restart()
    board.downloader.verify(board.wanted)


@pytest.mark.parametrize("point", ["swap.before-state", "durable.before-rename", "durable.after-rename"])
@pytest.mark.parametrize("is_first", [True, False])
def test_state_of_a_swap_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, point, is_first):
    root = tmp_path / "disk"
    root.mkdir()
    disk = LossyDisk(root, monkeypatch)
    old, new = Kept(SwapState("old", release="r1"), 1.0), Kept(SwapState("new", release="r2"), 2.0)
    if not is_first:
        save_state(root / "tiny", old)
    with monkeypatch.context() as patch:
        cut_at(patch, MODULES, point)
        with pytest.raises(PowerCutError):
            save_state(root / "tiny", new)
    disk.cut()
    found = load_state(root / "tiny")
    assert found == (None if is_first else old) or found == new
    save_state(root / "tiny", new)
    disk.cut()
    assert load_state(root / "tiny") == new
