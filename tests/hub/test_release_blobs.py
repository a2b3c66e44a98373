"""Files and differences of releases: what boards were shipped with is among them, each difference is made once."""

import hashlib
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloud_hub.registry import release_directory
from cloud_hub.releases import blobs as blobs_module
from cloud_hub.releases.blobs import DELTAS, ReleaseBlobs, prune_deltas
from edge_cascade.bundle import WEIGHTS, WEIGHTS_BLOB, load_bundle
from edge_cascade.weights_delta import apply_weights
from tests.bundles import build


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The directories of two trainings of one network."""
    return [build(tmp_path_factory.mktemp(f"seed{seed}"), seed=seed) / "bundle" for seed in (0, 7)]


@pytest.fixture
def shipped(bundles):
    return load_bundle(bundles[0])


@pytest.fixture
def better(bundles, tmp_path):
    """The other one, as a release."""
    bundle = load_bundle(bundles[1])
    shutil.copytree(bundles[1], release_directory(tmp_path, bundle.bundle_id))
    return bundle


@pytest.fixture
def made(monkeypatch):
    """Which differences were made."""
    made, encode = [], blobs_module.encode_weights

    def note(held, wanted):
        made.append((held, wanted))
        return encode(held, wanted)

    monkeypatch.setattr(blobs_module, "encode_weights", note)
    return made


def test_the_first_update_is_a_difference_from_what_boards_were_shipped_with(
    bundles, shipped, better, tmp_path
):
    blobs = ReleaseBlobs(tmp_path, [bundles[0]])
    delta = blobs.delta(shipped.weights_sha256, better.weights_sha256)
    before, after = ((bundle / WEIGHTS / WEIGHTS_BLOB).read_bytes() for bundle in bundles)
    assert apply_weights(before, delta, max_bytes=len(after)) == after
    assert ReleaseBlobs(tmp_path).delta(shipped.weights_sha256, better.weights_sha256) is None


def test_a_difference_is_made_once_whoever_asks_and_survives_the_process(
    bundles, shipped, better, tmp_path, made
):
    blobs = ReleaseBlobs(tmp_path, [bundles[0]])
    ways = shipped.weights_sha256, better.weights_sha256
    assert blobs.kept_delta(*ways) is None
    with ThreadPoolExecutor(8) as threads:
        answers = set(threads.map(lambda _: blobs.delta(*ways), range(8)))
    assert len(answers) == len(made) == 1
    kept = blobs.kept_delta(*ways)
    assert (kept.path.read_bytes(), kept.size_bytes) == (min(answers), len(min(answers)))
    assert kept.sha256 == hashlib.sha256(min(answers)).hexdigest()
    assert ReleaseBlobs(tmp_path, [bundles[0]]).delta(*ways) in answers
    assert len(made) == 1


def test_while_one_difference_is_made_files_and_other_differences_are_had(
    bundles, shipped, better, tmp_path, monkeypatch
):
    blobs = ReleaseBlobs(tmp_path, [bundles[0]])
    back = better.weights_sha256, shipped.weights_sha256
    assert blobs.delta(*back) is not None
    is_asked, goes_on = threading.Event(), threading.Event()

    def slow(held, wanted):
        is_asked.set()
        assert goes_on.wait(20)
        return b""

    monkeypatch.setattr(blobs_module, "encode_weights", slow)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(blobs.delta, *reversed(back))
        assert is_asked.wait(20)
        assert blobs.delta(*back) is not None
        assert blobs.find(better.weights_sha256) is not None
        goes_on.set()
        waiting.result()


def test_what_cannot_be_read_now_is_tried_again_and_nonsense_leaves_nothing_behind(
    bundles, shipped, better, tmp_path, monkeypatch
):
    blobs = ReleaseBlobs(tmp_path, [bundles[0]])
    ways = shipped.weights_sha256, better.weights_sha256

    def fails(held, wanted):
        raise OSError("an I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(blobs_module, "encode_weights", fails)
        assert blobs.delta(*ways) is None
    assert blobs.delta(*ways) is not None
    for digit in "0123456789abcdef":
        assert blobs.delta(digit * 64, better.weights_sha256) is None
    assert not blobs._making
    assert [path.name for path in (tmp_path / DELTAS).iterdir()] == [".".join(ways)]


def test_a_release_that_could_not_be_read_once_is_served_later(better, tmp_path, monkeypatch):
    blobs = ReleaseBlobs(tmp_path)

    def too_many(path):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", too_many)
        assert blobs.find(better.weights_sha256) is None
    assert blobs.find(better.weights_sha256) is not None


def test_what_another_version_wrote_is_made_anew(bundles, shipped, better, tmp_path, made):
    ways = shipped.weights_sha256, better.weights_sha256
    (tmp_path / DELTAS).mkdir()
    (tmp_path / DELTAS / ".".join(ways)).write_bytes(b"EWD0 in another way")
    assert ReleaseBlobs(tmp_path, [bundles[0]]).delta(*ways).startswith(b"EWD1")


def test_no_more_than_so_many_are_kept_and_none_that_leads_to_what_is_gone(
    bundles, shipped, better, tmp_path, monkeypatch
):
    monkeypatch.setattr(blobs_module, "MAX_DELTAS", 1)
    blobs = ReleaseBlobs(tmp_path, [bundles[0]])
    ways = shipped.weights_sha256, better.weights_sha256
    for each in (ways, ways[::-1]):
        assert blobs.delta(*each) is not None
    assert len(list((tmp_path / DELTAS).iterdir())) == 1
    assert blobs.delta(*ways) is not None
    shutil.rmtree(release_directory(tmp_path, better.bundle_id).parent)
    assert blobs.kept_delta(*ways) is None
    prune_deltas(tmp_path)
    assert list((tmp_path / DELTAS).iterdir()) == []


def test_what_is_kept_is_bounded_by_bytes_and_the_last_one_stays(
    bundles, shipped, better, tmp_path, monkeypatch
):
    blobs = ReleaseBlobs(tmp_path, [bundles[0]])
    ways = shipped.weights_sha256, better.weights_sha256
    both = sum(len(blobs.delta(*each)) for each in (ways, ways[::-1]))
    for bound, kept in ((both, 2), (both - 1, 1), (1, 1)):
        monkeypatch.setattr(blobs_module, "MAX_DELTA_BYTES", bound)
        shutil.rmtree(tmp_path / DELTAS)
        assert blobs.delta(*ways[::-1]) is not None
        os.utime(tmp_path / DELTAS / ".".join(ways[::-1]), (1e9, 1e9))
        assert blobs.delta(*ways) is not None
        left = sorted(path.name for path in (tmp_path / DELTAS).iterdir())
        assert len(left) == kept
        assert ".".join(ways) in left


def test_what_a_process_that_was_killed_has_half_written_goes_after_a_day(bundles, shipped, better, tmp_path):
    deltas = tmp_path / DELTAS
    deltas.mkdir()
    old, fresh = deltas / ".aa.bb.17.tmp", deltas / ".aa.bb.18.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    assert ReleaseBlobs(tmp_path, [bundles[0]]).delta(shipped.weights_sha256, better.weights_sha256)
    assert (old.exists(), fresh.exists()) == (False, True)
