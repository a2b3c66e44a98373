"""The keys of root and targets are renewed and replaced, by several people, under boards that follow."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("tuf", reason="needs python-tuf")

from securesystemslib.signer import Signature

from cloud_hub.errors import SigningError
from cloud_hub.releases.elsewhere import lines_of, sign_blindly
from cloud_hub.releases.keys import make_key
from cloud_hub.releases.metadata import MetadataFiles
from cloud_hub.releases.online import NEXT_KEY, ONLINE_KEY
from cloud_hub.releases.repository import SignedRepository
from cloud_hub.releases.status import keys_status
from edge_cascade.manifest import Norms
from edge_cascade.signed_releases import Policy, weights_target
from edge_daemon.errors import RefusedError
from edge_daemon.releases.trust import Trust
from tests.hub.test_signing import (  # noqa: F401 - two are fixtures
    BETTER,
    DAY,
    GRAPH,
    NOW,
    WEIGHTS,
    Clock,
    ask,
    board,
    hub,
    sha256,
)


@pytest.fixture
def fresh(tmp_path):
    """Two new keys."""
    return [make_key(tmp_path / f"offline/new-{number}.pem", b"secret") for number in range(2)]


def fresh_board(hub, directory, root):  # noqa: F811 - not the fixture
    return Trust(directory, root=root, stream=hub.stream, clock=Clock())


def test_new_keys_of_targets_sign_and_the_old_ones_sign_nothing(hub, board, fresh):  # noqa: F811
    hub.sign()
    ask(board)
    rotate = hub.repository.rotate_offline_keys
    first, second = hub.root_keys
    progress = rotate("targets", fresh, threshold=2, keys=[first], now=NOW)
    assert (progress.missing, progress.name) == ({"root": 1}, "rotate-targets")
    assert hub.repository.changes.sign("rotate-targets", keys=[second], now=NOW).is_published
    ask(board)
    with pytest.raises(SigningError, match="is none of targets"):
        hub.sign(release=2)
    assert hub.sign(release=2, keys=fresh).is_published
    assert ask(board).release == 2


def test_a_new_root_needs_both_thresholds_and_boards_follow_from_the_first_one(
    hub,  # noqa: F811
    board,  # noqa: F811
    fresh,
    tmp_path,
):
    hub.sign()
    ask(board)
    first_root = hub.repository.first_root()
    rotate = hub.repository.rotate_offline_keys
    assert rotate("root", fresh, threshold=2, keys=hub.root_keys[:1], now=NOW).missing == {"root": 1}
    hub.repository.renew_online(NOW)
    assert hub.repository.first_root() == first_root
    done = hub.repository.changes.sign("rotate-root", keys=hub.root_keys[1:], now=NOW)
    assert done.is_published
    ask(board)
    ask(fresh_board(hub, tmp_path / "fresh", first_root))
    with pytest.raises(SigningError, match="is none of root"):
        hub.repository.renew_offline("root", keys=hub.root_keys, now=NOW)
    assert hub.repository.renew_offline("root", keys=fresh, now=NOW + DAY).is_published
    ask(fresh_board(hub, tmp_path / "another", first_root))


def test_one_person_is_replaced_and_the_other_one_keeps_the_key(hub, board, fresh):  # noqa: F811
    lost, kept = hub.targets_keys
    rotate = hub.repository.rotate_offline_keys
    progress = rotate(
        "targets",
        fresh[:1],
        keep=[kept.public_key.keyid[:12]],
        threshold=2,
        keys=[*hub.root_keys, kept],
        now=NOW,
    )
    assert progress.is_published
    assert hub.sign(keys=[kept, fresh[0]]).is_published
    ask(board)
    with pytest.raises(SigningError, match="is none of targets"):
        hub.sign(release=2, keys=[lost])
    with pytest.raises(SigningError, match="root has no key '0000'"):
        rotate("root", fresh, keep=["0000"], threshold=2, keys=hub.root_keys, now=NOW)


def test_keys_are_not_made_for_a_change_that_waits_or_cannot_be(hub, fresh):  # noqa: F811
    check = hub.repository.check_rotation
    assert check("root", new_keys=2, threshold=2, keep=[], keys=hub.root_keys) == 2
    for wrong, says in (
        ({"threshold": 3, "keep": []}, "cannot be met by 2 keys"),
        ({"threshold": 2, "keep": [""]}, "has no key"),
        ({"threshold": 2, "keep": [], "keys": hub.targets_keys}, "is none of root"),
    ):
        with pytest.raises(SigningError, match=says):
            check("root", new_keys=2, **{"keys": [], **wrong})
    hub.repository.rotate_offline_keys("root", fresh, threshold=2, keys=[], now=NOW)
    with pytest.raises(SigningError, match="pending rotate-root: waits already"):
        check("root", new_keys=2, threshold=2, keep=[], keys=hub.root_keys)


def test_a_clock_that_is_years_ahead_signs_nothing_that_boards_could_never_forget(hub):  # noqa: F811
    before = (hub.repository.metadata_directory / "timestamp.json").read_bytes()
    with pytest.raises(
        SigningError, match="root expired on 2031-05-01, by this machine's clock, which says 2041"
    ):
        hub.repository.renew_online(NOW + 4000 * DAY)
    assert (hub.repository.metadata_directory / "timestamp.json").read_bytes() == before
    hub.repository.renew_online(NOW + DAY)


@pytest.mark.parametrize("days", [3, 10_000])
def test_a_clock_that_is_behind_signs_nothing_that_boards_would_refuse(hub, board, days):  # noqa: F811
    hub.sign()
    hub.repository.renew_online(NOW + DAY)
    names = sorted(path.name for path in hub.repository.metadata_directory.iterdir())
    behind = NOW + DAY - days * DAY
    for act in (
        lambda: hub.repository.renew_online(behind),
        lambda: hub.sign(release=2, weights=BETTER, now=behind),
        lambda: hub.repository.forget_weights([], behind),
    ):
        with pytest.raises(
            SigningError, match=f"clock says {behind:%Y-%m-%d}, the last .* on 2030-05-02: boards"
        ):
            act()
    assert sorted(path.name for path in hub.repository.metadata_directory.iterdir()) == names
    # It was the other one that was wrong: boards that have not seen it go on.
    hub.repository.renew_online(behind, clock_was_ahead=True)
    hub.repository.renew_online(behind + DAY)
    # Less than what a timestamp holds is worth something still.
    hub.repository.renew_online(behind - 1.5 * DAY)


def test_what_is_renewed_before_it_expires_is_believed_for_years(hub, tmp_path):  # noqa: F811
    hub.sign()
    for month in range(0, 36, 6):
        now = NOW + month * 30 * DAY
        for role, keys in (("root", hub.root_keys), ("targets", hub.targets_keys)):
            assert hub.repository.renew_offline(role, keys=keys, now=now).is_published
        hub.repository.renew_online(now)
        ask(fresh_board(hub, tmp_path / f"board-{month}", hub.repository.first_root()))


def test_status_says_what_is_due_and_what_waits(hub):  # noqa: F811
    files = MetadataFiles(hub.directory)
    status = keys_status(hub.repository, files, NOW)
    assert [(each.role, each.threshold, each.days_left, each.due) for each in status.roles] == [
        ("root", 2, 365.0, ""),
        ("targets", 2, 365.0, ""),
        ("weights", 1, 90.0, ""),
        ("snapshot", 1, 14.0, ""),
        ("timestamp", 1, 3.0, ""),
    ]
    assert status.pending == []
    hub.sign(keys=hub.targets_keys[:1])
    status = keys_status(hub.repository, files, NOW + 320 * DAY)
    assert [each.role for each in status.roles if "keys renew" in each.due] == [
        "root",
        "targets",
        "weights",
        "snapshot",
        "timestamp",
    ]
    assert "--role root" in status.roles[0].due
    assert [(each.name, each.missing, each.stale) for each in status.pending] == [
        ("release-1", {"targets": 1}, False)
    ]


_ROTATE = (
    "import sys, datetime, pathlib; from cloud_hub.releases.keys import read_key;"
    "from cloud_hub.releases.repository import SignedRepository;"
    "d = pathlib.Path(sys.argv[1]);"
    "keys = [read_key(d / f'offline/{n}.pem', b'secret') for n in sys.argv[3].split(',')];"
    "fresh = [read_key(d / f'offline/new-{n}.pem', b'secret') for n in range(2)];"
    "SignedRepository(d / 'tuf').rotate_offline_keys(sys.argv[2], fresh, threshold=2, keys=keys,"
    "now=datetime.datetime(2030, 5, 1, 12, tzinfo=datetime.UTC))"
)


_SIGN_PENDING = (
    "import sys, datetime, pathlib; from cloud_hub.releases.keys import read_key;"
    "from cloud_hub.releases.repository import SignedRepository;"
    "d = pathlib.Path(sys.argv[1]);"
    "SignedRepository(d / 'tuf').changes.sign('release-1', keys=[read_key(d / 'offline/3.pem', b'secret')],"
    "now=datetime.datetime(2030, 5, 1, 12, tzinfo=datetime.UTC))"
)


@pytest.mark.parametrize("role", ["root", "targets"])
@pytest.mark.parametrize("write", range(1, 7))
def test_killed_between_any_two_files_a_rotation_is_carried_out_by_whoever_comes_next(
    hub,  # noqa: F811
    board,  # noqa: F811
    fresh,
    role,
    write,
    tmp_path,
):
    hub.sign()
    ask(board)
    # The change, targets, root, snapshot, timestamp; a new root alone writes one less.
    writes = 5 if role == "targets" else 4
    done = subprocess.run(
        [sys.executable, "-c", _ROTATE, str(tmp_path), role, "0,1"],
        env=os.environ | {"EDGE_CRASH_AT": f"durable.after-rename:{write}"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == (-9 if write <= writes else 0)
    hub.repository.renew_online(NOW)
    assert hub.repository.changes.waiting() == []
    ask(board)
    old, new = (hub.root_keys, fresh) if role == "root" else (hub.targets_keys, fresh)
    with pytest.raises(SigningError, match="is none of"):
        hub.repository.renew_offline(role, keys=old, now=NOW)
    assert hub.repository.renew_offline(role, keys=new, now=NOW).is_published
    ask(board)


_REVOKE = (
    "import sys, datetime, pathlib; from cloud_hub.releases.keys import read_key;"
    "from cloud_hub.releases.repository import SignedRepository;"
    "d = pathlib.Path(sys.argv[1]); keys = [read_key(d / f'offline/{n}.pem', b'secret') for n in (2, 3)];"
    "SignedRepository(d / 'tuf').revoke('2', [sys.argv[2]], keys=keys,"
    "now=datetime.datetime(2030, 5, 1, 12, tzinfo=datetime.UTC))"
)


@pytest.mark.parametrize("write", range(1, 7))
def test_killed_between_any_two_files_a_revocation_holds(hub, board, write):  # noqa: F811
    hub.sign()
    hub.sign_online()
    ask(board, BETTER)
    # The change, weights, targets, snapshot, timestamp.
    done = subprocess.run(
        [sys.executable, "-c", _REVOKE, str(hub.directory.parent), weights_target("tiny", sha256(BETTER))],
        env=os.environ | {"EDGE_CRASH_AT": f"durable.after-rename:{write}"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == (-9 if write <= 5 else 0)
    ask(board)
    hub.repository.renew_online(NOW)
    with pytest.raises(RefusedError, match="signed by nobody"):
        ask(board, BETTER)
    ask(board)


def test_killed_before_the_last_signature_counts_nothing_has_happened(hub, board):  # noqa: F811
    hub.sign(keys=hub.targets_keys[:1])
    before = (hub.directory / "pending/release-1.json").read_bytes()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _SIGN_PENDING,
            str(hub.directory.parent),
        ],
        env=os.environ | {"EDGE_CRASH_AT": "durable.before-rename:1"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == -9
    assert (hub.directory / "pending/release-1.json").read_bytes() == before
    with pytest.raises(RefusedError, match="signed by nobody"):
        ask(board)
    assert hub.sign(keys=hub.targets_keys[1:]).is_published
    ask(board)


def test_a_rotation_that_is_given_up_takes_its_key_with_it(hub, board):  # noqa: F811
    hub.sign()
    hub.repository.rotate_online_key(keys=[], now=NOW)
    seen = (hub.directory / NEXT_KEY).read_bytes()
    hub.repository.changes.drop("rotate-online")
    assert not (hub.directory / NEXT_KEY).exists()
    assert hub.repository.rotate_online_key(keys=hub.keys, now=NOW).is_published
    assert (hub.directory / ONLINE_KEY).read_bytes() != seen
    ask(board)


def test_what_is_signed_and_not_published_is_not_dropped(hub, fresh, tmp_path):  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-c", _ROTATE, str(tmp_path), "root", "0,1"],
        env=os.environ | {"EDGE_CRASH_AT": "tuf.pending-written"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == -9
    with pytest.raises(SigningError, match="rotate-root: is signed already"):
        hub.repository.changes.drop("rotate-root")
    SignedRepository(hub.directory).renew_online(NOW)
    assert hub.repository.changes.waiting() == []
    assert hub.repository.first_root() == (hub.repository.metadata_directory / "2.root.json").read_bytes()


def elsewhere(hub, name, keys):  # noqa: F811
    """Taken away, signed and brought back."""
    return sign_blindly(hub.repository.changes.get(name), keys)


def test_signed_elsewhere_and_brought_back_one_after_the_other(hub, board):  # noqa: F811
    first, second = hub.targets_keys
    assert hub.sign(keys=[]).missing == {"targets": 2}
    one, two = (elsewhere(hub, "release-1", [key]) for key in (first, second))
    assert hub.repository.changes.take_signatures(one, now=NOW).missing == {"targets": 1}
    assert hub.repository.changes.take_signatures(one, now=NOW).missing == {"targets": 1}
    assert hub.repository.changes.take_signatures(two, now=NOW).is_published
    ask(board)
    with pytest.raises(SigningError, match="no such change waits"):
        hub.repository.changes.take_signatures(two, now=NOW)


def test_signatures_over_something_else_or_of_nobody_are_not_taken(hub):  # noqa: F811
    hub.sign(keys=[])
    signed = elsewhere(hub, "release-1", hub.root_keys)
    assert hub.repository.changes.take_signatures(signed, now=NOW).missing == {"targets": 2}
    hub.repository.changes.drop("release-1")
    hub.sign(keys=[], weights=BETTER)
    with pytest.raises(SigningError, match="is not what waits here"):
        hub.repository.changes.take_signatures(signed, now=NOW)


def test_a_forged_signature_does_not_take_the_place_of_a_real_one(hub, board):  # noqa: F811
    first, second = hub.targets_keys
    hub.sign(keys=[])
    forged = elsewhere(hub, "release-1", [first])
    targets = forged.metadata("targets")
    targets.signatures[second.public_key.keyid] = Signature(
        second.public_key.keyid, targets.signatures[first.public_key.keyid].signature
    )
    forged = msgspec.structs.replace(forged, roles={"targets": targets.to_bytes().decode()})
    assert hub.repository.changes.take_signatures(forged, now=NOW).missing == {"targets": 1}
    assert hub.repository.changes.take_signatures(elsewhere(hub, "release-1", [second]), now=NOW).is_published
    ask(board)


def test_who_signs_elsewhere_reads_what_would_hold(hub, fresh):  # noqa: F811
    norms = Norms(64.0, {"w": 2.0})
    hub.repository.sign_offline("tiny", 1, graph=GRAPH, weights=WEIGHTS, keys=[], now=NOW, norms=norms)
    (said, online, graph, weights) = lines_of(hub.repository.changes.get("release-1"))
    assert said == "targets version 2, until 2031-05-01"
    assert "may sign weights/*/*" in online
    assert (graph[:20], weights[:21]) == ("  release 1: graphs/", "  release 1: weights/")
    assert graph.endswith(".json, weights of all together up to 64")
    hub.repository.rotate_offline_keys("root", fresh, threshold=2, keys=[], now=NOW)
    lines = lines_of(hub.repository.changes.get("rotate-root"))
    assert lines[0] == "root version 2, until 2031-05-01"
    assert f"  root: 2 of {fresh[0].public_key.keyid[:12]}" in lines[1]
    hub.repository.set_policy(Policy({"tiny": 3}), keys=[], now=NOW)
    assert lines_of(hub.repository.changes.get("floor"))[-1] == '  policy: {"security_floor":{"tiny":3}}'


def test_a_change_with_a_note_that_is_none_is_not_to_be_signed(hub):  # noqa: F811
    hub.sign(keys=[])
    waiting = hub.repository.changes.get("release-1")
    spoiled = waiting.roles["targets"].replace('"release":1', '"release":"one"')
    with pytest.raises(SigningError, match="do not sign this"):
        lines_of(msgspec.structs.replace(waiting, roles={"targets": spoiled}))
