import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import types
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tuf", reason="needs python-tuf")

from edge_cascade.bundle import load_bundle
from edge_cascade.errors import ProtocolError
from edge_daemon.config import ReleasesConfig
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import ConfigError, RefusedError, StoppedError
from edge_daemon.ports import Wanted
from edge_daemon.releases.bundle_store import BundleStore
from edge_daemon.releases.downloader import LOOK_S, Downloader, open_downloader
from edge_daemon.releases.http_fetch import HttpFleet, UnreachableError, parse_address
from edge_daemon.releases.limits import (
    LONGEST_PAUSE_S,
    Bucket,
    Hours,
    next_bucket,
    next_opening_s,
    next_pause_s,
    parse_hours,
)
from edge_daemon.releases.tries import (
    FIRST_REMINDER_S,
    GONE,
    GONE_BEFORE_REFUSAL,
    GONE_PAUSE_S,
    LONGEST_REMINDER_S,
)
from edge_daemon.releases.trust import Trust
from tests.bundles import build
from tests.cascade.test_bundle import rewrite, rewrite_graph
from tests.device.file_server import FileServer
from tests.device.signed_fleet import DAY, NOON, FakeClock, SignedFleet, sha256

PARTS = ("graph", "weights")


@pytest.fixture(scope="module")
def better_dir(tmp_path_factory):
    """Another training of the same network: other weights, the same graph files."""
    out = tmp_path_factory.mktemp("better")
    build(out, seed=7)
    return out / "bundle"


@pytest.fixture
def server():
    with FileServer() as server:
        yield server


class Board:
    """A downloader over a real server, with a clock and waits that pass at once."""

    def __init__(self, server, tmp_path, shipped):
        self.server, self.shipped, self.tmp_path = server, shipped, tmp_path
        self.fleet = SignedFleet()
        self.stop = threading.Event()
        self.clock = FakeClock()
        self.waits = []
        self.day_s = 12 * 3600.0
        self.options = {}
        self.kbytes_per_s = 0.0
        self.token = None
        self.root = tmp_path / "state" / "releases"
        self.store = BundleStore(self.root)
        self.restart()

    def restart(self):
        token_file = None if self.token is None else str(self.token)
        address = parse_address(self.server.url, ca_file=None, token_file=token_file)
        http = HttpFleet(address, max_bytes_per_s=self.kbytes_per_s * 1000, clock=self.clock, wait=self.wait)
        trust = Trust(self.root / ".trust", root=self.fleet.first_root, stream=http.stream, clock=self.clock)
        self.downloader = Downloader(
            self.store,
            trust,
            http,
            shipped={"tiny": self.shipped},
            wait=self.wait,
            rng=random.Random(5),
            clock=self.clock,
            day_s=lambda: self.day_s % 86400,
            **self.options,
        )

    def wait(self, stop, delay_s):
        self.waits.append(delay_s)
        self.clock.now_s += delay_s
        self.day_s += delay_s
        return stop.is_set()

    def offer(self, bundle, *, sign=True, offline=True, size_bytes=None, model="tiny"):
        """Put a bundle's files on the server and sign its parts."""
        digests = {}
        total = 0
        for part in PARTS:
            for path in (bundle / part).iterdir():
                content = path.read_bytes()
                self.server.files[f"blobs/{sha256(content)}"] = content
                total += len(content)
            digests[part] = sha256((bundle / part / "manifest.json").read_bytes())
        if sign:
            manifests = {part: (bundle / part / "manifest.json").read_bytes() for part in PARTS}
            self.fleet.sign_graph(model, manifests["graph"])
            role = self.fleet.targets if offline else self.fleet.online
            self.fleet.sign_weights(model, manifests["weights"], digests["graph"], role=role)
        self.publish()
        bundle_id = hashlib.sha256(f"{digests['graph']}\n{digests['weights']}\n".encode()).hexdigest()
        size_bytes = total if size_bytes is None else size_bytes
        return Wanted(model, "r1", bundle_id, digests["graph"], digests["weights"], size_bytes)

    def publish(self, now=None):
        self.fleet.renew(now)
        for name, content in self.fleet.files.items():
            path = name if name.startswith("blobs/") else f"metadata/{name}.json"
            self.server.files[path] = content

    def fetch(self, wanted, *held):
        self.downloader.fetch(wanted, held, self.stop)

    def refusal(self, wanted, failure, *held):
        """Refused while it is fetched or verified."""
        with pytest.raises(RefusedError) as caught:
            self.fetch(wanted, *held)
            self.downloader.verify(wanted)
        assert caught.value.failure is failure, caught.value.detail
        return caught.value.detail

    def blobs_asked(self):
        return [(path, ranged) for path, ranged in self.server.asked if path.startswith("blobs/")]

    def directory(self, wanted):
        return self.store.directory_of(wanted.model, wanted.bundle)


@pytest.fixture
def board(server, tmp_path, tiny_bundle):
    return Board(server, tmp_path, tiny_bundle)


@pytest.fixture
def bundle_dir(tiny_model_dir, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tiny_model_dir / "bundle", tmp_path / "offered")


def blob_of(bundle, name="weights/weights.safetensors"):
    return f"blobs/{sha256((bundle / name).read_bytes())}"


def files_below(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "proven"
    }


# --- from nothing to a bundle


def test_a_bundle_is_fetched_whole_verified_and_loads(board, better_dir):
    wanted = board.offer(better_dir)
    board.fetch(wanted)
    board.downloader.verify(wanted)
    assert load_bundle(board.directory(wanted)).bundle_id == wanted.bundle
    assert files_below(board.directory(wanted)) == files_below(better_dir)
    assert sorted(path.name for path in board.directory(wanted).parent.iterdir()) == [wanted.bundle]
    assert {ranged for _, ranged in board.server.asked} == {None}


def test_what_is_there_already_is_not_fetched_twice(board, better_dir):
    wanted = board.offer(better_dir)
    board.fetch(wanted)
    asked = len(board.blobs_asked())
    board.fetch(wanted)
    assert len(board.blobs_asked()) == asked


def test_a_copy_damaged_on_disk_is_fetched_again(board, better_dir):
    wanted = board.offer(better_dir)
    board.fetch(wanted)
    path = board.directory(wanted) / "weights/weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert "damaged" in board_verify_refusal(board, wanted)
    board.fetch(wanted)
    board.downloader.verify(wanted)


def board_verify_refusal(board, wanted):
    with pytest.raises(RefusedError) as caught:
        board.downloader.verify(wanted)
    assert caught.value.failure is Failure.INTEGRITY
    return caught.value.detail


# --- differences


@pytest.fixture
def deltas(monkeypatch):
    """A difference begins with `delta:`; what follows is the wanted file but for its first 100 bytes."""

    def apply_weights(held, delta, *, max_bytes):
        if not delta.startswith(b"delta:"):
            raise ProtocolError("no difference")
        return held[:100] + delta[6:]

    module = types.ModuleType("edge_cascade.weights_delta")
    module.apply_weights = apply_weights
    monkeypatch.setitem(sys.modules, "edge_cascade.weights_delta", module)


def test_files_that_a_held_bundle_has_are_copied_not_fetched(board, bundle_dir, tiny_model_dir, deltas):
    held = tiny_model_dir / "bundle"
    rewrite(bundle_dir / "weights", lambda manifest: manifest.update(tolerance={"fp32": 0.5, "int8": 0.5}))
    wanted = board.offer(bundle_dir)
    board.fetch(wanted, held)
    board.downloader.verify(wanted)
    # All but what changed is near; and nothing is shared with the bundle that answers.
    assert board.blobs_asked() == [(blob_of(bundle_dir, "weights/manifest.json"), None)]
    inodes = {path.stat().st_ino for path in held.rglob("*")}
    assert not inodes & {path.stat().st_ino for path in board.directory(wanted).rglob("*")}


@pytest.mark.parametrize("damage", ["truncated", "other bytes", "gone"])
def test_a_damaged_held_bundle_gives_nothing_wrong(board, bundle_dir, better_dir, deltas, damage):
    held = bundle_dir
    path = held / "graph/golden_inputs.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "truncated" else bytes(path.stat().st_size))
    (held / "weights/manifest.json").write_text("{")
    wanted = board.offer(better_dir)
    board.fetch(wanted, held)
    board.downloader.verify(wanted)


def offer_delta(board, wanted, held, content):
    manifest = sha256((held / "weights/manifest.json").read_bytes())
    board.server.files[f"deltas/tiny/{manifest}/{wanted.weights}"] = content


def test_a_difference_saves_the_whole_file(board, better_dir, tiny_model_dir, monkeypatch):
    whole = (better_dir / "weights/weights.safetensors").read_bytes()
    module = types.ModuleType("edge_cascade.weights_delta")
    seen = []
    module.apply_weights = lambda held, delta, *, max_bytes: seen.append((held, delta, max_bytes)) or whole
    monkeypatch.setitem(sys.modules, "edge_cascade.weights_delta", module)
    held = tiny_model_dir / "bundle"
    wanted = board.offer(better_dir)
    offer_delta(board, wanted, held, b"short")
    board.fetch(wanted, held)
    board.downloader.verify(wanted)
    assert seen == [((held / "weights/weights.safetensors").read_bytes(), b"short", len(whole))]
    assert blob_of(better_dir) not in {path for path, _ in board.server.asked}


@pytest.mark.parametrize("content", [b"nonsense", b"delta:wrong", None, bytes(2**20)])
def test_a_difference_that_is_wrong_missing_or_too_long_costs_the_whole_file(
    board, better_dir, tiny_model_dir, deltas, content
):
    held = tiny_model_dir / "bundle"
    wanted = board.offer(better_dir)
    if content is not None:
        offer_delta(board, wanted, held, content)
    board.fetch(wanted, held)
    board.downloader.verify(wanted)
    assert blob_of(better_dir) in {path for path, _ in board.server.asked}


# --- a bad network


@pytest.fixture
def offered(board, better_dir, tiny_model_dir, deltas):
    """A bundle of which there is a difference; its path."""
    held = tiny_model_dir / "bundle"
    wanted = board.offer(better_dir)
    whole = (better_dir / "weights/weights.safetensors").read_bytes()
    offer_delta(board, wanted, held, b"delta:" + whole[100:])
    (delta,) = (path for path in board.server.files if path.startswith("deltas/"))
    board.delta, board.blob, board.held = delta, blob_of(better_dir), held
    return wanted


def ranges_asked(board):
    """Of the difference, and of the file that it saves."""
    return [ranged for path, ranged in board.server.asked if path in {board.delta, board.blob}]


@pytest.mark.parametrize("cut_after", [0, 500])
def test_a_difference_that_never_gets_further_gives_way_to_the_file_which_goes_on_where_it_was(
    board, offered, cut_after
):
    # Where a try can go on from nothing: nothing came, or the hub gives it no tag.
    if cut_after:
        board.server.etags[board.delta] = 'W/"weak"'
    board.server.cuts = {board.delta: [cut_after] * 10, board.blob: [500] * 3}
    board.fetch(offered, board.held)
    board.downloader.verify(offered)
    assert ranges_asked(board) == [None, None, None, None, "bytes=500-", "bytes=1000-", "bytes=1500-"]


def test_a_hub_without_ranges_that_cuts_differences_in_one_place_is_asked_for_the_file(board, offered):
    board.server.does_ranges = False
    board.server.cuts = {board.delta: [500] * 10}
    board.fetch(offered, board.held)
    board.downloader.verify(offered)
    # The first one may be gone on from, as far as the board knows.
    assert ranges_asked(board) == [None, "bytes=500-", "bytes=500-", "bytes=500-", None]


def test_a_difference_that_is_cut_goes_on_where_it_was(board, offered):
    board.server.cuts = {board.delta: [500] * 10}
    board.fetch(offered, board.held)
    board.downloader.verify(offered)
    assert ranges_asked(board) == [None, *(f"bytes={500 * cut}-" for cut in range(1, 11))]


@pytest.mark.parametrize("come", [700, None])
def test_a_restart_goes_on_with_a_difference_also_where_all_of_it_had_come(board, offered, come):
    come = len(board.server.files[board.delta]) if come is None else come
    board.server.on_get = lambda path: board.stop.set() if path == board.delta else None
    with pytest.raises(StoppedError):
        board.fetch(offered, board.held)
    manifest = board.delta.split("/")[2]
    part = board.store.part_of("tiny", offered.bundle)
    (part / f"{manifest}.delta.partial").write_bytes(board.server.files[board.delta][:come])
    (part / f"{manifest}.delta.etag").write_text(f'"{board.delta}"')
    board.stop.clear()
    board.server.on_get = lambda path: None
    board.server.asked.clear()
    board.restart()
    board.fetch(offered, board.held)
    board.downloader.verify(offered)
    assert ranges_asked(board) == [f"bytes={come}-"]
    assert not list(board.directory(offered).glob("*delta*"))


def test_a_difference_that_a_power_cut_spoiled_costs_the_file(board, offered):
    part = board.store.begin("tiny", offered.bundle)
    manifest = board.delta.split("/")[2]
    (part / f"{manifest}.delta.partial").write_bytes(bytes(1000))
    (part / f"{manifest}.delta.etag").write_text(f'"{board.delta}"')
    board.fetch(offered, board.held)
    board.downloader.verify(offered)
    assert ranges_asked(board) == ["bytes=1000-", None]


def test_a_difference_waits_for_its_hours(board, offered):
    board.options = {"hours": parse_hours("22:00-06:00")}
    board.day_s = 23 * 3600.0
    board.restart()
    over = []

    def end(path):
        if path == board.delta and not over:
            over.append(path)
            board.day_s = 7 * 3600.0

    board.server.on_get = end
    board.fetch(offered, board.held)
    assert sum(board.waits) == 15 * 3600
    first, second = ranges_asked(board)
    assert first is None
    assert second.startswith("bytes=")
    board.downloader.verify(offered)


def test_a_difference_that_is_cut_twice_still_saves_the_file(board, better_dir, tiny_model_dir, monkeypatch):
    whole = (better_dir / "weights/weights.safetensors").read_bytes()
    module = types.ModuleType("edge_cascade.weights_delta")
    module.apply_weights = lambda held, delta, *, max_bytes: whole
    monkeypatch.setitem(sys.modules, "edge_cascade.weights_delta", module)
    held = tiny_model_dir / "bundle"
    wanted = board.offer(better_dir)
    offer_delta(board, wanted, held, b"short")
    (delta,) = (path for path in board.server.files if path.startswith("deltas/"))
    board.server.cuts = {delta: [2, 2]}
    board.fetch(wanted, held)
    board.downloader.verify(wanted)
    assert blob_of(better_dir) not in {path for path, _ in board.server.asked}


def test_connections_that_are_cut_go_on_by_range(board, better_dir):
    wanted = board.offer(better_dir)
    blob = blob_of(better_dir)
    size = len(board.server.files[blob])
    board.server.cuts[blob] = [1000, 500, 1]
    board.fetch(wanted)
    board.downloader.verify(wanted)
    asked = [ranged for path, ranged in board.blobs_asked() if path == blob]
    assert asked == [None, "bytes=1000-", "bytes=1500-", "bytes=1501-"]
    assert len(board.waits) == 3
    assert size > 1501


def test_a_restart_goes_on_where_the_last_process_was(board, better_dir):
    wanted = board.offer(better_dir)
    blob = blob_of(better_dir)
    board.server.cuts[blob] = [2000]
    board.options = {}
    stop_on_wait(board)
    with pytest.raises(StoppedError):
        board.fetch(wanted)
    assert not board.store.has("tiny", wanted.bundle)
    board.stop.clear()
    board.restart()
    board.fetch(wanted)
    asked = [ranged for path, ranged in board.blobs_asked() if path == blob]
    assert asked == [None, "bytes=2000-"]
    # No other blob came twice.
    paths = [path for path, _ in board.blobs_asked() if path != blob]
    assert len(paths) == len(set(paths))
    board.downloader.verify(wanted)


def stop_on_wait(board):
    wait = board.wait

    def once(stop, delay_s):
        board.downloader._wait = wait
        stop.set()
        return True

    board.downloader._wait = once


def test_a_file_that_changed_on_the_hub_begins_anew(board, better_dir):
    wanted = board.offer(better_dir)
    blob = blob_of(better_dir)
    board.server.cuts[blob] = [1000]

    def change(path):
        if path == blob and len(board.server.asked) > 1:
            board.server.etags[blob] = f'"{len([each for each in board.server.asked if each[0] == blob])}"'

    board.server.on_get = change
    board.fetch(wanted)
    board.downloader.verify(wanted)
    assert [ranged for path, ranged in board.blobs_asked() if path == blob] == [None, "bytes=1000-"]


def test_a_hub_without_ranges_is_served_by_patience(board, better_dir):
    wanted = board.offer(better_dir)
    board.server.does_ranges = False
    board.server.cuts[blob_of(better_dir)] = [1000]
    board.fetch(wanted)
    board.downloader.verify(wanted)


def test_bytes_that_a_power_cut_spoiled_are_fetched_again(board, better_dir):
    wanted = board.offer(better_dir)
    blob = blob_of(better_dir)
    part = board.store.begin("tiny", wanted.bundle)
    (part / f"{blob[6:]}.partial").write_bytes(bytes(3000))
    (part / f"{blob[6:]}.etag").write_text(f'"{blob}"')
    (part / "graph" / ".manifest.json.99.tmp").write_bytes(b"half")
    board.fetch(wanted)
    board.downloader.verify(wanted)
    assert [ranged for path, ranged in board.blobs_asked() if path == blob] == ["bytes=3000-", None]


def test_wrong_bytes_every_time_are_refused_and_bar_no_digest_for_good(board, better_dir):
    wanted = board.offer(better_dir)
    blob = blob_of(better_dir)
    board.server.files[blob] = board.server.files[blob][:-1] + b"\0"
    assert board.refusal(wanted, Failure.DOWNLOAD).startswith("wrong bytes: weights/weights.safetensors")
    assert not board.store.has("tiny", wanted.bundle)


def test_endless_data_are_cut_at_the_signed_length(board, better_dir):
    wanted = board.offer(better_dir)
    board.server.endless.add(blob_of(better_dir))
    assert board.refusal(wanted, Failure.DOWNLOAD).startswith("endless data: ")
    size = sum(path.stat().st_size for path in board.root.rglob("*") if path.is_file())
    assert size < 2 * wanted.size_bytes


def test_a_hub_that_is_away_is_asked_again_with_growing_pauses(board, better_dir, caplog):
    caplog.set_level(logging.WARNING, "edge_daemon.releases.downloader")
    wanted = board.offer(better_dir)
    board.server.status["metadata/timestamp.json"] = 503

    def recover(path):
        if path == "metadata/timestamp.json" and len(board.waits) == 20:
            board.server.status.clear()

    board.server.on_get = recover
    board.fetch(wanted)
    assert len(board.waits) == 20
    assert all(0 <= delay_s <= LONGEST_PAUSE_S for delay_s in board.waits)


def test_a_blob_that_the_hub_no_longer_has_is_refused(board, better_dir):
    wanted = board.offer(better_dir)
    del board.server.files[blob_of(better_dir)]
    assert "answers 404" in board.refusal(wanted, Failure.DOWNLOAD)
    assert sum(board.waits) >= (GONE_BEFORE_REFUSAL - 1) * GONE_PAUSE_S


@pytest.mark.parametrize("status", sorted(GONE))
def test_files_that_the_hub_does_not_have_for_a_moment_are_asked_for_again(board, better_dir, status):
    wanted = board.offer(better_dir)
    paths = ["metadata/timestamp.json", blob_of(better_dir)]
    missed = []

    def recover(path):
        if path in paths and missed.count(path) < GONE_BEFORE_REFUSAL - 1:
            missed.append(path)
            board.server.status[path] = status
        else:
            board.server.status.pop(path, None)

    board.server.on_get = recover
    board.fetch(wanted)
    assert len(missed) == 2 * (GONE_BEFORE_REFUSAL - 1)


def with_token(board):
    board.token = board.tmp_path / "token"
    board.token.write_text("revoked")
    board.restart()


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("place", ["metadata", "files"])
def test_a_board_that_is_not_let_in_says_so_again_and_again_and_less_and_less_often(
    board, better_dir, caplog, status, place
):
    wanted = board.offer(better_dir)
    path = "metadata/timestamp.json" if place == "metadata" else blob_of(better_dir)
    board.server.status[path] = status
    caplog.set_level(logging.WARNING, "edge_daemon.releases.downloader")
    said, problems = [], []
    wait = board.wait

    def watch(stop, delay_s):
        said[len(said) :] = [board.clock.now_s] * (len(caplog.records) - len(said))
        problems.append(board.downloader.problem)
        days = (board.clock.now_s - 1000.0) / 86400
        if days > 5:
            board.server.status.clear()
        # The hub's daily work.
        if NOON + days * DAY > board.fleet.now + 0.9 * DAY:
            board.publish(NOON + days * DAY)
        return wait(stop, delay_s)

    board.downloader._wait = watch
    assert board.downloader.problem == ""
    board.fetch(wanted)
    assert board.downloader.problem == ""
    assert all(f"the hub answers {status}: this board is not let in" in each for each in problems)
    assert {record.getMessage().partition(" ")[0] for record in caplog.records} == {"release=r1"}
    gaps_h = [(after - before) / 3600.0 for before, after in pairwise(said)]
    # A try may come a pause later than the reminder is due.
    expected = [1, 2, 4, 8, 16, 24, 24, 24, 24]
    assert gaps_h == [pytest.approx(hours, abs=LONGEST_PAUSE_S / 3600.0) for hours in expected[: len(gaps_h)]]
    assert len(gaps_h) >= 7
    assert (FIRST_REMINDER_S, LONGEST_REMINDER_S) == (3600.0, 86400.0)


def test_an_exchanged_token_ends_the_wait_at_once(board, better_dir, caplog):
    wanted = board.offer(better_dir)
    with_token(board)
    path = "metadata/timestamp.json"

    def let_in(asked):
        if asked == path:
            is_known = "Bearer good" in board.server.authorization
            board.server.status = {} if is_known else {path: 401}

    board.server.on_get = let_in
    wait = board.wait

    def exchange(stop, delay_s):
        if len(board.waits) == 2000:
            # The second one is wrong, too: said at once, although the last reminder was a moment ago.
            board.token.write_text("wrong too")
        if len(board.waits) == 2001:
            board.token.write_text("good")
        return wait(stop, delay_s)

    board.downloader._wait = exchange
    board.fetch(wanted)
    board.downloader.verify(wanted)
    assert len(board.waits) == 2002
    assert max(board.waits) <= LOOK_S
    tokens = board.server.authorization
    assert tokens == {"Bearer revoked", "Bearer wrong too", "Bearer good"}


def test_a_token_that_is_missing_is_waited_for(board, better_dir):
    wanted = board.offer(better_dir)
    with_token(board)
    board.token.unlink()
    wait = board.wait

    def bring(stop, delay_s):
        if len(board.waits) == 500:
            board.token.write_text("good")
        return wait(stop, delay_s)

    board.downloader._wait = bring
    board.fetch(wanted)
    assert len(board.waits) == 501


def test_a_hub_that_has_the_metadata_and_fails_at_a_file_is_given_time(board, better_dir, caplog):
    caplog.set_level(logging.WARNING, "edge_daemon.releases.downloader")
    wanted = board.offer(better_dir)
    blob = blob_of(better_dir)
    board.server.status[blob] = 500

    def recover(path):
        if path == blob and len(board.waits) == 20:
            board.server.status.clear()

    board.server.on_get = recover
    board.fetch(wanted)
    assert sum(board.waits) > LONGEST_PAUSE_S
    assert len(caplog.records) == 1


def test_a_stop_ends_the_download_between_two_chunks_and_before_it(board, better_dir):
    wanted = board.offer(better_dir)
    blob = blob_of(better_dir)
    board.server.on_get = lambda path: board.stop.set() if path == blob else None
    with pytest.raises(StoppedError):
        board.fetch(wanted)
    with pytest.raises(StoppedError):
        board.fetch(wanted)
    assert not board.store.has("tiny", wanted.bundle)


def test_two_models_fetch_side_by_side(board, bundle_dir, better_dir):
    hangs = board.offer(bundle_dir, model="other")
    wanted = board.offer(better_dir)
    is_asked, goes_on = threading.Event(), threading.Event()

    def hang(path):
        if path == blob_of(bundle_dir):
            is_asked.set()
            assert goes_on.wait(30)

    board.server.on_get = hang
    thread = threading.Thread(target=board.fetch, args=(hangs,))
    thread.start()
    assert is_asked.wait(30)
    board.fetch(wanted)
    board.downloader.verify(wanted)
    assert not board.store.has("other", hangs.bundle)
    goes_on.set()
    thread.join(30)
    assert board.store.has("other", hangs.bundle)


def test_an_unsigned_bundle_costs_not_one_blob(board, better_dir):
    wanted = board.offer(better_dir, sign=False)
    assert "signed by nobody" in board.refusal(wanted, Failure.DOWNLOAD)
    assert board.blobs_asked() == []


def test_more_bytes_than_announced_are_refused_before_they_are_fetched(board, better_dir):
    wanted = board.offer(better_dir, size_bytes=1000)
    assert "only 1000 were announced" in board.refusal(wanted, Failure.DOWNLOAD)
    assert len(board.blobs_asked()) == 2


# --- power cuts


@pytest.mark.parametrize(
    "crash_at",
    [
        "download.part",
        "download.part:3",
        "download.file",
        "download.file:5",
        "download.whole",
        "verify.done",
        "durable.before-rename",
        "durable.before-rename:4",
        "durable.after-rename:2",
        "durable.after-rename:6",
    ],
)
def test_killed_anywhere_the_next_process_ends_with_the_whole_bundle(
    board, better_dir, tiny_model_dir, tmp_path, crash_at
):
    wanted = board.offer(better_dir)
    root = tmp_path / "root.json"
    root.write_bytes(board.fleet.first_root)
    arguments = [board.server.url, root, tmp_path / "state", tiny_model_dir / "bundle", *astuple(wanted)]
    command = [sys.executable, "-m", "tests.device.fetch_child", *map(str, arguments)]
    environ = {name: value for name, value in os.environ.items() if name != "EDGE_CRASH_AT"}
    killed = subprocess.run(command, env={**environ, "EDGE_CRASH_AT": crash_at}, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    # What has its name by now is whole.
    if board.store.has("tiny", wanted.bundle):
        assert load_bundle(board.directory(wanted)).bundle_id == wanted.bundle
    board.fetch(wanted)
    board.downloader.verify(wanted)
    assert files_below(board.directory(wanted)) == files_below(better_dir)
    assert [path.name for path in board.directory(wanted).parent.iterdir()] == [wanted.bundle]


def test_everything_is_fsynced_before_it_has_its_name(board, better_dir, monkeypatch):
    wanted = board.offer(better_dir)
    synced = {}
    real_sync, real_rename = os.fsync, Path.rename
    renamed = []

    def sync(descriptor):
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        real_sync(descriptor)

    def rename(path, target):
        if path.name.endswith(".part"):
            # With the power cut here and all that was not synced dropped, this is what would be left.
            renamed.extend(
                (each.name, each.is_dir() or synced.get(each.stat().st_ino) == each.stat().st_size)
                for each in (path, *path.rglob("*"))
                if not each.is_dir() or each.stat().st_ino in synced
            )
            synced.clear()
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    board.fetch(wanted)
    names = [name for name, _ in renamed]
    assert all(is_synced for _, is_synced in renamed)
    assert {"graph", "weights", f"{wanted.bundle}.part"} <= set(names)
    assert len(names) == 3 + len(files_below(better_dir))
    assert board.directory(wanted).parent.stat().st_ino in synced


# --- politeness


def test_the_bandwidth_limit_holds_over_the_whole_download(board, better_dir):
    board.kbytes_per_s = 10.0
    board.restart()
    wanted = board.offer(better_dir)
    board.fetch(wanted)
    sent = board.server.sent
    assert sum(board.waits) == pytest.approx(sent / 10_000 - 1.0)


def test_jitter_comes_first(board, better_dir):
    board.options = {"jitter_s": 300.0}
    board.restart()
    board.fetch(board.offer(better_dir))
    assert len(board.waits) == 1
    assert 0 < board.waits[0] <= 300.0


def test_outside_of_the_hours_nothing_is_asked_and_their_end_pauses(board, better_dir):
    board.options = {"hours": Hours(22 * 3600, 6 * 3600)}
    board.restart()
    wanted = board.offer(better_dir)
    blob = blob_of(better_dir)

    def over(path):
        if path == blob and len(board.waits) < 100:
            board.day_s = 7 * 3600.0

    board.server.on_get = over
    started = []
    board.server.on_get = lambda path: (started.append(board.day_s), over(path))
    board.fetch(wanted)
    board.downloader.verify(wanted)
    assert sum(board.waits) == (10 + 15) * 3600
    assert started[0] == 22 * 3600.0
    assert next(ranged for path, ranged in board.blobs_asked() if path == blob) is None


@given(st.integers(0, 86399), st.integers(0, 86399), st.floats(0, 86399.5))
def test_after_the_wait_the_hours_have_begun(begin_s, end_s, day_s):
    hours = Hours(begin_s, end_s)
    delay_s = next_opening_s(hours, day_s)
    assert 0 <= delay_s < 86400
    assert next_opening_s(hours, round((day_s + delay_s) % 86400, 6)) == 0 or delay_s == 0


@given(st.lists(st.tuples(st.integers(1, 65536), st.floats(0, 100)), max_size=50), st.floats(1000, 1e6))
def test_a_bucket_lets_no_more_pass_than_its_rate_and_one_burst(chunks, bytes_per_s):
    bucket, now_s, total = Bucket(at_s=0.0), 0.0, 0
    for size, idle_s in chunks:
        now_s += idle_s
        bucket, delay_s = next_bucket(bucket, size, now_s=now_s, bytes_per_s=bytes_per_s)
        now_s += delay_s
        total += size
        assert total <= bytes_per_s * (now_s + 1.0) * 1.000001 + 1


@given(st.integers(1, 10_000), st.integers(0, 2**32))
def test_pauses_stay_below_their_ceiling(failures, seed):
    assert (
        0 <= next_pause_s(failures, random.Random(seed)) <= min(2.0 ** min(failures - 1, 20), LONGEST_PAUSE_S)
    )


@pytest.mark.parametrize("text", ["", "22-6", "24:00-06:00", "22:00-06:60", "22:00_06:00", " 22:00-06:00"])
def test_hours_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"releases\.hours"):
        parse_hours(text)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hub",
        "ftp://hub/",
        "http://hub.example/v1",
        "https://",
        "https://a:99999/",
        "https://u:p@hub/",
        "https://h/?a",
    ],
)
def test_addresses_that_cannot_be_meant_or_would_show_the_token_are_refused(url):
    with pytest.raises(ConfigError, match=r"releases\.url"):
        parse_address(url, ca_file=None, token_file=None)


def test_the_token_is_shown_and_a_missing_one_is_a_reason_to_wait(board, server, tmp_path):
    token = tmp_path / "token"
    address = parse_address(server.url, ca_file=None, token_file=str(token))
    fleet = HttpFleet(address, max_bytes_per_s=0, clock=board.clock, wait=board.wait)
    server.files["metadata/x.json"] = b"x"
    with pytest.raises(UnreachableError, match="token_file"), fleet.open("metadata/x.json", board.stop):
        pass
    token.write_text("secret\n")
    with fleet.open("metadata/x.json", board.stop) as body:
        assert b"".join(body.chunks) == b"x"
    assert server.authorization == {"Bearer secret"}
    assert "secret" not in repr(fleet)


def test_the_configuration_makes_a_downloader_that_touches_nothing(board, tmp_path, tiny_bundle):
    root = tmp_path / "root.json"
    root.write_bytes(board.fleet.first_root)
    config = ReleasesConfig(enabled=True, url=board.server.url, root=str(root), hours="22:00-06:00")
    store, _ = open_downloader(config, tmp_path / "other", shipped={"tiny": tiny_bundle}, clock=board.clock)
    assert not (tmp_path / "other").exists()
    assert store.room_for("tiny", "0" * 64) > 0


# --- bundles that somebody with the offline keys made badly, or with evil intent


def hostile_graph(change):
    return lambda bundle: rewrite_graph(bundle, change)


def replace_model(change):
    """Edit the first stage's ONNX file, digests and all."""

    def spoil(bundle):
        onnx = pytest.importorskip("onnx")
        path = bundle / "graph/stage0.fp32.onnx"
        model = onnx.load_from_string(path.read_bytes())
        change(onnx, model)
        content = model.SerializeToString()
        path.write_bytes(content)
        entry = {"sha256": sha256(content), "size_bytes": len(content)}
        rewrite_graph(bundle, lambda manifest: manifest["files"].update({"stage0.fp32.onnx": entry}))

    return spoil


def external(location):
    def change(onnx, model):
        tensor = model.graph.initializer.add(name="leak", data_type=1, dims=(2,), data_location=1)
        tensor.external_data.add(key="location", value=location)

    return replace_model(change)


def local_functions(onnx, model):
    for number in range(200):
        calls = [onnx.helper.make_node(f"f{number + 1}", ["x"], ["y"], domain="bomb") for _ in range(10)]
        model.functions.append(
            onnx.helper.make_function(
                "bomb", f"f{number}", ["x"], ["y"], calls, [onnx.helper.make_opsetid("bomb", 1)]
            )
        )


ENTRY = {"sha256": "0" * 64, "size_bytes": 10}
NAMES = [
    "../escaped",
    "../../../../escaped",
    "/etc/escaped",
    "a/b",
    "..",
    ".",
    "",
    ".hidden",
    "nul\0",
    "manifest.json",
    "x" * 200,
    "a\\b",
]
HOSTILE = {
    **{
        f"name {name[:12]!r}": hostile_graph(lambda m, name=name: m["files"].update({name: ENTRY}))
        for name in NAMES
    },
    "a digest that is a path": hostile_graph(
        lambda m: m["files"].update(evil={"sha256": "../../../root", "size_bytes": 1})
    ),
    "terabytes": hostile_graph(lambda m: m["files"].update(evil={"sha256": "0" * 64, "size_bytes": 2**42})),
    "a negative size": hostile_graph(
        lambda m: m["files"].update(evil={"sha256": "0" * 64, "size_bytes": -1})
    ),
    "thousands of files": hostile_graph(lambda m: m["files"].update({f"f{n}": ENTRY for n in range(5000)})),
    "no manifest": lambda bundle: (bundle / "graph/manifest.json").write_text("[" * 100_000),
    "another format": hostile_graph(lambda m: m.update(format=9)),
    "external data by ..": external("../../../../etc/passwd"),
    "external data by an absolute path": external("/etc/passwd"),
    "a custom operator": replace_model(
        lambda onnx, model: model.graph.node.append(
            onnx.helper.make_node("Evil", ["x"], ["z"], domain="custom")
        )
    ),
    "local functions bomb": replace_model(local_functions),
    "other labels": hostile_graph(lambda m: m.update(labels=["a", "b", "c", "x"])),
    "another wire": hostile_graph(lambda m: m.update(wire={"encoding": "float32"})),
    "another window": hostile_graph(lambda m: m.update(window={"length": 128, "hop": 32})),
    "another model": hostile_graph(lambda m: m.update(model="other")),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_bundle_is_refused_and_nothing_outside_the_store_is_touched(board, bundle_dir, spoil):
    spoil(bundle_dir)
    if not json_or_none(bundle_dir / "graph/manifest.json"):
        rewrite(
            bundle_dir / "weights",
            lambda m: m.update(graph_sha256=sha256((bundle_dir / "graph/manifest.json").read_bytes())),
        )
    wanted = board.offer(bundle_dir)
    before = outside(board)
    board.refusal(wanted, Failure.INTEGRITY)
    assert outside(board) == before
    assert not list(board.root.rglob("*escaped*"))


def json_or_none(path):
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        return None


def outside(board):
    return {
        str(path): path.stat().st_mtime_ns
        for path in board.tmp_path.rglob("*")
        if board.root.parent not in (path, *path.parents)
    } | {"cwd": sorted(Path.cwd().iterdir()), "tmp": (board.tmp_path.parent / "escaped").exists()}


@pytest.mark.parametrize("how", ["symlink", "hard link", "directory link", "fifo"])
def test_links_that_wait_in_the_place_of_a_file_are_not_written_through(board, better_dir, tmp_path, how):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    wanted = board.offer(better_dir)
    part = board.store.part_of("tiny", wanted.bundle)
    partial = part / f"{blob_of(better_dir)[6:]}.partial"
    target = part / "weights/weights.safetensors"
    if how == "directory link":
        (tmp_path / "elsewhere").mkdir()
        part.mkdir(parents=True)
        (part / "graph").symlink_to(tmp_path / "elsewhere")
    else:
        board.store.begin("tiny", wanted.bundle)
        for path in (target,) if how == "fifo" else (target, partial):
            if how == "symlink":
                path.symlink_to(victim)
            elif how == "hard link":
                path.hardlink_to(victim)
            else:
                os.mkfifo(path)
    board.fetch(wanted)
    board.downloader.verify(wanted)
    assert victim.read_bytes() == b"precious"
    assert not list(tmp_path.glob("elsewhere/*"))


@pytest.mark.parametrize(
    ("model", "bundle"), [("../x", "0" * 64), ("tiny", "../../x"), ("", "0" * 64), ("a/b", "0" * 64)]
)
def test_names_that_are_paths_are_no_names(tmp_path, model, bundle):
    store = BundleStore(tmp_path)
    for ask in (store.directory_of, store.has, store.room_for, store.begin, store.drop):
        with pytest.raises(RefusedError, match="no name of a bundle"):
            ask(model, bundle)


# --- what the online role alone has signed


@pytest.fixture
def bounds(monkeypatch):
    module = types.ModuleType("edge_cascade.bounds")
    module.problems = []
    module.bounds_problems = lambda *_: list(module.problems)
    monkeypatch.setitem(sys.modules, "edge_cascade.bounds", module)
    return module


def test_online_weights_within_their_bounds_are_taken_and_beyond_them_refused(board, better_dir, bounds):
    wanted = board.offer(better_dir, offline=False)
    bounds.problems = ["epsilon 0.5 above 0.05"]
    assert "epsilon" in board.refusal(wanted, Failure.INTEGRITY)
    bounds.problems = []
    board.downloader.verify(wanted)


def test_offline_weights_are_not_held_to_them(board, better_dir, bounds):
    bounds.problems = ["far too large"]
    wanted = board.offer(better_dir)
    board.fetch(wanted)
    board.downloader.verify(wanted)


def test_a_return_needs_no_signature_that_has_gone_since(board, better_dir):
    wanted = board.offer(better_dir)
    board.fetch(wanted)
    board.downloader.verify(wanted)
    shutil.rmtree(board.root / ".trust")
    board.restart()
    board.downloader.verify(wanted)


def test_a_bundle_never_proven_needs_its_signatures_from_disk(board, better_dir):
    wanted = board.offer(better_dir)
    board.fetch(wanted)
    shutil.rmtree(board.root / ".trust")
    board.restart()
    with pytest.raises(RefusedError, match="not on disk"):
        board.downloader.verify(wanted)


# --- the store


def test_keep_removes_everything_else_and_what_a_power_cut_left(tmp_path):
    store = BundleStore(tmp_path / "releases")
    names = [character * 64 for character in "abcd"]
    for name in names:
        store.begin("tiny", name)
    for name in names[:3]:
        (store.part_of("tiny", name) / "graph" / "f").write_bytes(b"x")
        store.finish("tiny", name)
    home = store.directory_of("tiny", names[0]).parent
    (home / ("e" * 64 + ".gone")).mkdir()
    (home / "stray").write_bytes(b"x")
    (home / "link").symlink_to(tmp_path)
    store.keep("tiny", [names[0], names[3]])
    assert sorted(path.name for path in home.iterdir()) == [names[0], f"{names[3]}.part"]
    assert store.has("tiny", names[0])
    assert not store.has("tiny", names[3])
    assert tmp_path.is_dir()


def test_what_a_download_has_already_counts_as_room(tmp_path, monkeypatch):
    store = BundleStore(tmp_path)
    free = types.SimpleNamespace(f_bavail=20 * 2**20, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    assert store.room_for("tiny", "a" * 64) == 4 * 2**20
    (store.begin("tiny", "a" * 64) / "graph" / "f").write_bytes(bytes(1000))
    assert store.room_for("tiny", "a" * 64) == 4 * 2**20 + 1000
    # Killed after the rename, before anybody wrote down that all of it is here.
    store.finish("tiny", "a" * 64)
    assert store.room_for("tiny", "a" * 64) == 4 * 2**20 + 1000
    free.f_bavail = 0
    assert store.room_for("tiny", "b" * 64) == 0
