"""What the hub signs, held against the trust that boards have in it."""

import datetime
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("tuf", reason="needs python-tuf")

from sqlalchemy import select

from cloud_hub.__main__ import main
from cloud_hub.errors import SigningError
from cloud_hub.registry import release_directory
from cloud_hub.releases.create import create_repository
from cloud_hub.releases.keys import make_key, read_key
from cloud_hub.releases.online import NEXT_KEY, ONLINE_KEY
from cloud_hub.releases.pending import Progress
from cloud_hub.releases.repository import SignedRepository
from cloud_hub.store.database import Database
from cloud_hub.store.releases import insert_release
from cloud_hub.store.schema import acts as acts_table
from cloud_hub.store.store import database_url
from edge_cascade.bundle import load_bundle
from edge_cascade.signed_releases import Policy, graph_target, weights_target
from edge_daemon.errors import RefusedError
from edge_daemon.releases.http_fetch import StatusError
from edge_daemon.releases.trust import Trust
from tests.bundles import build
from tests.cascade.test_bundle import rewrite, rewrite_weights

NOW = datetime.datetime(2030, 5, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
LOUD = "int8/stage1.conv0.weight_scale"
GRAPH, WEIGHTS, BETTER = b'{"a graph": 1}', b'{"weights": 1}', b'{"weights": 2}'


class Clock:
    now_s = 5.0

    def monotonic_s(self):
        return self.now_s

    def wall_ms(self):
        return 0


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Hub:
    """A repository with two keys of each offline role, both of which are needed."""

    def __init__(self, directory):
        self.directory = directory / "tuf"
        self.keys = [make_key(directory / f"offline/{number}.pem", b"secret") for number in range(4)]
        self.root_keys, self.targets_keys = self.keys[:2], self.keys[2:]
        self.repository = create_repository(
            self.directory,
            self.root_keys,
            self.targets_keys,
            root_threshold=2,
            targets_threshold=2,
            now=NOW,
        )

    def sign(self, release=1, keys=None, weights=WEIGHTS, now=NOW):
        return self.repository.sign_offline(
            "tiny",
            release,
            graph=GRAPH,
            weights=weights,
            keys=self.targets_keys if keys is None else keys,
            now=now,
        )

    def sign_online(self, weights=BETTER, release=2):
        self.repository.sign_weights_online(
            "tiny", release, weights=weights, graph_sha256=sha256(GRAPH), now=NOW
        )

    def stream(self, path, stop):
        path = self.directory / path
        if not path.exists():
            raise StatusError(str(path), 404)
        yield path.read_bytes()


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path)


@pytest.fixture
def board(hub, tmp_path):
    return Trust(tmp_path / "board", root=hub.repository.first_root(), stream=hub.stream, clock=Clock())


def ask(board, weights=WEIGHTS):
    return board.authorise("tiny", "1", sha256(GRAPH), sha256(weights), threading.Event())


def test_boards_take_what_enough_offline_keys_have_signed(hub, board):
    hub.sign()
    assert ask(board).is_online_only is False
    assert hub.repository.is_signed("tiny", sha256(GRAPH), sha256(WEIGHTS))


def test_two_people_sign_one_after_the_other_and_nothing_is_published_before(hub, board):
    first, second = hub.targets_keys
    before = sorted(hub.repository.metadata_directory.iterdir())
    progress = hub.sign(keys=[first])
    assert progress == Progress(
        "release-1",
        signed={"targets": (first.public_key.keyid,)},
        missing={"targets": 1},
        waiting_for={"targets": (second.public_key.keyid,)},
    )
    # The same person again is no second one; nor does another process, or a day, forget the first.
    assert hub.sign(keys=[first]).missing == {"targets": 1}
    assert sorted(hub.repository.metadata_directory.iterdir()) == before
    hub.repository.renew_online(NOW + DAY)
    assert not hub.repository.is_signed("tiny", sha256(GRAPH), sha256(WEIGHTS))
    with pytest.raises(RefusedError, match="signed by nobody"):
        ask(board)
    hub.repository = SignedRepository(hub.directory)
    assert hub.sign(keys=[second], now=NOW + DAY).is_published
    assert ask(board).is_online_only is False
    assert hub.repository.changes.waiting() == []


def test_a_key_that_is_none_of_those_asked_for_begins_nothing(hub):
    with pytest.raises(SigningError, match="is none of targets"):
        hub.sign(keys=[hub.targets_keys[0], hub.root_keys[0]])
    assert hub.repository.changes.waiting() == []


def test_a_change_that_another_overtook_is_refused_by_name_and_begun_again(hub, board):
    first, second = hub.targets_keys
    hub.sign(keys=[first])
    hub.sign(release=2, weights=BETTER)
    for again in (
        lambda: hub.sign(keys=[second]),
        lambda: hub.repository.changes.sign("release-1", keys=[second], now=NOW),
    ):
        with pytest.raises(SigningError, match="pending release-1: another change was published since"):
            again()
    ((_, _, is_stale),) = hub.repository.changes.waiting()
    assert is_stale
    hub.repository.changes.drop("release-1")
    assert hub.sign(keys=[first]).missing == {"targets": 1}
    assert hub.repository.changes.sign("release-1", keys=[second], now=NOW).is_published
    assert ask(board).release == 1
    for gone in (
        lambda: hub.repository.changes.drop("release-1"),
        lambda: hub.repository.changes.sign("release-1", keys=[second], now=NOW),
    ):
        with pytest.raises(SigningError, match="release-1"):
            gone()
    with pytest.raises(SigningError, match="is no name of a change"):
        hub.repository.changes.drop("../keys/online")


def test_the_second_one_signs_what_the_first_one_meant_or_nothing(hub):
    first, second = hub.targets_keys
    hub.sign(keys=[first])
    with pytest.raises(SigningError, match="over something else than this"):
        hub.sign(keys=[second], weights=BETTER)
    # Whoever can write on the hub cannot slip another content under the first signature.
    path = hub.directory / "pending/release-1.json"
    content = json.loads(path.read_bytes())
    targets = json.loads(content["roles"]["targets"])
    targets["signed"]["targets"].popitem()
    content["roles"]["targets"] = json.dumps(targets)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SigningError, match="over something else than this"):
        hub.sign(keys=[second])
    assert hub.repository.changes.sign("release-1", keys=[second], now=NOW).missing == {"targets": 1}


def test_a_damaged_change_keeps_the_hub_from_nothing(hub, board):
    hub.sign(keys=hub.targets_keys[:1])
    (hub.directory / "pending/release-1.json").write_bytes(b"{")
    hub.repository.renew_online(NOW + DAY)
    with pytest.raises(SigningError, match="keys drop release-1"):
        hub.sign()
    hub.repository.changes.drop("release-1")
    hub.sign()
    ask(board)


def test_the_online_key_signs_weights_of_signed_graphs_alone(hub, board):
    with pytest.raises(SigningError, match="is not signed"):
        hub.sign_online()
    hub.sign()
    hub.sign_online()
    authorised = ask(board, BETTER)
    assert (authorised.is_online_only, authorised.release) == (True, 2)
    assert hub.repository.is_signed("tiny", sha256(GRAPH), sha256(BETTER))


def test_what_is_below_the_floor_is_refused_and_what_is_revoked_is_signed_by_nobody(hub, board):
    hub.sign()
    hub.repository.set_policy(Policy({"tiny": 2}), keys=hub.targets_keys, now=NOW)
    with pytest.raises(RefusedError, match="floor"):
        ask(board)
    hub.sign(release=2)
    ask(board)
    assert hub.repository.policy() == Policy({"tiny": 2})
    names = [weights_target("tiny", sha256(WEIGHTS)), graph_target("tiny", sha256(GRAPH))]
    hub.repository.revoke("1", names, keys=hub.targets_keys, now=NOW)
    with pytest.raises(RefusedError, match="signed by nobody"):
        ask(board)
    with pytest.raises(SigningError, match="nothing to revoke"):
        hub.repository.revoke("1", names[:1], keys=hub.targets_keys, now=NOW)


def test_a_stolen_online_key_is_replaced_and_what_it_signed_is_forgotten(hub, board):
    hub.sign()
    hub.sign_online()
    ask(board, BETTER)
    stolen = (hub.directory / ONLINE_KEY).read_bytes()
    for keys, missing in (
        ([], {"root": 2, "targets": 2}),
        (hub.root_keys[:1], {"root": 1, "targets": 2}),
        (hub.targets_keys, {"root": 1}),
    ):
        assert hub.repository.rotate_online_key(keys=keys, now=NOW).missing == missing
    ask(board, BETTER)
    assert hub.repository.rotate_online_key(keys=hub.root_keys[1:], now=NOW).is_published
    with pytest.raises(RefusedError, match="signed by nobody"):
        ask(board, BETTER)
    ask(board)
    fresh = (hub.directory / ONLINE_KEY).read_bytes()
    (hub.directory / ONLINE_KEY).write_bytes(stolen)
    with pytest.raises(SigningError, match="not the key that is named for timestamp"):
        hub.repository.renew_online(NOW)
    (hub.directory / ONLINE_KEY).write_bytes(fresh)
    hub.repository.renew_online(NOW)
    ask(board)


def test_renewed_daily_nothing_expires_that_the_hub_can_renew(hub, tmp_path):
    hub.sign()
    hub.sign_online()
    for day in range(0, 300, 2):
        hub.repository.renew_online(NOW + day * DAY)
    fresh = Trust(tmp_path / "fresh", root=hub.repository.first_root(), stream=hub.stream, clock=Clock())
    assert ask(fresh, BETTER).release == 2


def test_a_revocation_holds_for_both_roles_once_enough_have_signed_it(hub, board):
    hub.sign()
    hub.sign_online()
    first, second = hub.targets_keys
    name = weights_target("tiny", sha256(BETTER))
    assert hub.repository.revoke("2", [name], keys=[first], now=NOW).missing == {"targets": 1}
    hub.repository.renew_online(NOW)
    assert ask(board, BETTER).release == 2
    # What the online key signs meanwhile is not lost.
    hub.sign_online(b"others", release=3)
    assert hub.repository.revoke("2", [name], keys=[second], now=NOW).is_published
    with pytest.raises(RefusedError, match="signed by nobody"):
        ask(board, BETTER)
    assert ask(board, b"others").release == 3


@pytest.mark.parametrize("write", range(1, 9))
def test_a_rotation_that_is_killed_is_renewed_by_the_hub_and_finished_by_asking_again(
    hub, board, write, tmp_path
):
    hub.sign()
    hub.sign_online()
    ask(board, BETTER)
    old = (hub.directory / ONLINE_KEY).read_bytes()
    program = (
        "import sys, datetime, pathlib; from cloud_hub.releases.keys import read_key;"
        "from cloud_hub.releases.repository import SignedRepository;"
        "d = pathlib.Path(sys.argv[1]); keys = [read_key(d / f'offline/{n}.pem', b'secret') for n in range(4)];"
        "SignedRepository(d / 'tuf').rotate_online_key(keys=keys,"
        "now=datetime.datetime(2030, 5, 1, 12, tzinfo=datetime.UTC))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"EDGE_CRASH_AT": f"durable.after-rename:{write}"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    # Seven files are written: the key, the change, targets, root, weights, snapshot, timestamp.
    assert done.returncode == (-9 if write <= 7 else 0)
    hub.repository.renew_online(NOW)
    ask(board)
    hub.repository.rotate_online_key(keys=hub.keys, now=NOW)
    assert (hub.directory / ONLINE_KEY).read_bytes() != old
    assert not (hub.directory / NEXT_KEY).exists()
    ask(board)
    with pytest.raises(RefusedError, match="signed by nobody"):
        ask(board, BETTER)


@pytest.mark.parametrize(
    "point", ["tuf.pending-written", "tuf.targets-written", "tuf.snapshot-written", "durable.before-rename:4"]
)
def test_killed_while_it_signs_boards_still_believe_what_there_is(hub, board, point, tmp_path):
    hub.sign()
    program = (
        "import sys, datetime, pathlib; from cloud_hub.releases.keys import read_key;"
        "from cloud_hub.releases.repository import SignedRepository;"
        "d = pathlib.Path(sys.argv[1]); keys = [read_key(d / f'offline/{n}.pem', b'secret') for n in (2, 3)];"
        "SignedRepository(d / 'tuf').sign_offline('tiny', 2, graph=b'another', weights=b'others', keys=keys,"
        "now=datetime.datetime(2030, 5, 1, 12, tzinfo=datetime.UTC))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"EDGE_CRASH_AT": point},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == -9
    ask(board)
    hub.sign(release=3)
    assert ask(board).release == 3


def test_keys_are_under_their_passphrase_and_never_replaced(tmp_path):
    key = make_key(tmp_path / "root.pem", b"secret")
    assert (tmp_path / "root.pem").stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in (tmp_path / "root.pem").read_bytes()
    assert read_key(tmp_path / "root.pem", b"secret").public_key == key.public_key
    for passphrase, says in ((None, "a passphrase is needed"), (b"wrong", "wrong passphrase")):
        with pytest.raises(SigningError, match=says):
            read_key(tmp_path / "root.pem", passphrase)
    with pytest.raises(SigningError, match="never replaced"):
        make_key(tmp_path / "root.pem", b"secret")
    with pytest.raises(SigningError, match="No such file"):
        read_key(tmp_path / "none.pem", None)


def test_keys_are_written_to_a_memory_stick_without_hard_links_and_never_replaced_there(
    tmp_path, monkeypatch
):
    def refuse(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "stick" / "root.pem"
    key = make_key(path, b"secret")
    assert read_key(path, b"secret").public_key == key.public_key
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SigningError, match="never replaced"):
        make_key(path, b"secret")
    assert read_key(path, b"secret").public_key == key.public_key
    assert [each.name for each in path.parent.iterdir()] == ["root.pem"]


def test_a_repository_is_begun_once_and_with_enough_keys(hub, tmp_path):
    with pytest.raises(SigningError, match="already"):
        create_repository(
            hub.directory, hub.root_keys, hub.targets_keys, root_threshold=1, targets_threshold=1, now=NOW
        )
    with pytest.raises(SigningError, match="cannot be met"):
        create_repository(
            tmp_path / "other",
            hub.root_keys,
            hub.keys[:1] * 2,
            root_threshold=1,
            targets_threshold=2,
            now=NOW,
        )
    with pytest.raises(SigningError, match="keys init"):
        SignedRepository(tmp_path / "none").first_root()


@pytest.fixture
def registry(tmp_path):
    """A hub's configuration, with three releases: a bundle, one that accepts everything, and a loud one."""
    config = tmp_path / "hub.toml"
    state_dir = tmp_path / "state"
    config.write_text(f'[hub]\nstate_dir = "{state_dir}"\n')
    (tmp_path / "passphrase").write_text("secret\n")
    bundle_dir = build(tmp_path / "built") / "bundle"
    greedy_dir = shutil.copytree(bundle_dir, tmp_path / "greedy")
    rewrite(greedy_dir / "weights", accept_all)
    loud_dir = shutil.copytree(bundle_dir, tmp_path / "loud")
    rewrite_weights(loud_dir, lambda tensors: tensors.update({LOUD: tensors[LOUD] * 100}))
    with Database(database_url(state_dir, None)) as database:
        for number, directory in enumerate((bundle_dir, greedy_dir, loud_dir)):
            bundle = load_bundle(directory)
            place = release_directory(state_dir, bundle.bundle_id)
            place.parent.mkdir(parents=True)
            directory.rename(place)
            row = {
                "model": "tiny",
                "bundle": bytes.fromhex(bundle.bundle_id),
                "graph": bytes.fromhex(bundle.graph_sha256),
                "weights": bytes.fromhex(bundle.weights_sha256),
                "state": "draft",
                "series": None,
                "lineage": "{}",
                "figures": "{}",
                "created_at_ms": number,
                "created_by": "a test",
            }
            database.run(lambda c, row=row: insert_release(c, row))
    return config


def accept_all(manifest):
    for plan in manifest["plans"]:
        plan["chosen"] = len(plan["points"]) - 1


def command(registry, *arguments):
    return main([*arguments, "--config", str(registry)])


def acts(registry):
    with Database(database_url(registry.parent / "state", None)) as database:
        return database.run(
            lambda c: [(row.act, row.subject, row.detail) for row in c.execute(select(acts_table))]
        )


@pytest.fixture
def passphrase(registry):
    return ("--passphrase-file", str(registry.parent / "passphrase"))


@pytest.fixture
def offline(registry, passphrase):
    folder = registry.parent / "offline"
    assert command(registry, "keys", "init", "--offline", str(folder), *passphrase) == 0
    return folder


def test_keys_are_made_and_releases_signed_from_the_command_line(registry, passphrase, capfd):
    folder = registry.parent
    assert command(registry, "keys", "root") == 14
    assert "keys init" in capfd.readouterr().err
    assert command(registry, "keys", "init", "--offline", str(folder / "offline"), *passphrase) == 0
    assert command(registry, "release", "sign", "1") == 14
    assert "sign the whole release with the offline keys" in capfd.readouterr().err
    key = str(folder / "offline/targets-1.pem")
    assert command(registry, "release", "sign", "1", "--key", key, *passphrase) == 0
    assert command(registry, "release", "sign", "2") == 14
    assert "leaves the bounds of its graph: plan" in capfd.readouterr().err
    assert command(registry, "release", "sign", "3") == 14
    assert f"the norm of {LOUD} is" in capfd.readouterr().err
    assert command(registry, "release", "sign", "1") == 0
    capfd.readouterr()
    assert command(registry, "keys", "root") == 0
    assert json.loads(capfd.readouterr().out)["signed"]["_type"] == "root"
    assert command(registry, "keys", "renew") == 0
    root_key = str(folder / "offline/root-1.pem")
    assert command(registry, "keys", "rotate", "--key", root_key, "--key", key, *passphrase) == 0
    assert command(registry, "keys", "init", "--offline", str(folder / "offline"), *passphrase) == 14
    assert "there is a repository already" in capfd.readouterr().err
    assert acts(registry) == [
        ("release.sign", "release 1", "offline, published"),
        ("release.sign", "release 1", "online"),
        ("keys.rotate", "keys online", "published"),
    ]


def test_two_people_with_two_passphrases_sign_a_release_in_two_commands(registry, capfd):
    folder = registry.parent
    for number in (1, 2, 3):
        (folder / f"word-{number}").write_text(f"secret {number}\n")
    words = [part for number in (1, 2, 3) for part in ("--passphrase-file", str(folder / f"word-{number}"))]
    init = ("keys", "init", "--offline", str(folder / "offline"))
    assert command(registry, *init, *words[:4], "--targets-keys", "2", "--targets-threshold", "2") == 14
    assert "2 times for 3 keys" in capfd.readouterr().err
    assert command(registry, *init, *words, "--targets-keys", "2", "--targets-threshold", "2") == 0
    mine = ("--key", str(folder / "offline/targets-1.pem"), "--passphrase-file", str(folder / "word-2"))
    theirs = ("--key", str(folder / "offline/targets-2.pem"), "--passphrase-file", str(folder / "word-3"))
    capfd.readouterr()
    assert command(registry, "release", "sign", "1", *mine) == 0
    said = capfd.readouterr().out
    assert "pending release-1: targets is signed by" in said
    assert "1 missing of" in said
    assert command(registry, "release", "sign", "1") == 14
    assert command(registry, "keys", "show", "--json") == 0
    (waiting,) = json.loads(capfd.readouterr().out)["pending"]
    assert (waiting["name"], waiting["missing"], waiting["stale"]) == ("release-1", {"targets": 1}, False)
    assert command(registry, "release", "sign", "1", *theirs[:2], *mine[2:]) == 14
    assert "wrong passphrase" in capfd.readouterr().err
    assert command(registry, "release", "sign", "1", *theirs) == 0
    assert "release 1: signed offline" in capfd.readouterr().out
    assert command(registry, "release", "sign", "1") == 0
    assert command(registry, "release", "floor", "2", *mine) == 0
    assert command(registry, "keys", "drop", "floor") == 0
    assert command(registry, "keys", "drop", "floor") == 14
    assert command(registry, "release", "revoke", "1", "--why", "wrong labels", *mine) == 0
    assert command(registry, "keys", "sign", "revoke-1", *theirs) == 0
    assert acts(registry)[-4:] == [
        ("release.floor", "release 2", "tiny, waits for 1 of targets"),
        ("keys.drop", "keys floor", ""),
        ("release.revoke", "release 1", "wrong labels (waits for 1 of targets)"),
        ("keys.sign", "keys revoke-1", "published"),
    ]


def test_floors_are_set_and_shown_from_the_command_line(registry, offline, passphrase, capfd):
    key = ("--key", str(offline / "targets-1.pem"), *passphrase)
    assert command(registry, "release", "floor", "show") == 0
    assert "no model has a floor" in capfd.readouterr().out
    assert command(registry, "release", "floor", "2") == 0
    assert "targets is signed by nobody, 1 missing" in capfd.readouterr().out
    assert command(registry, "release", "floor", "2", *key) == 0
    assert command(registry, "release", "floor", "show") == 0
    assert "tiny: boards refuse releases below 2" in capfd.readouterr().out
    assert command(registry, "release", "floor", "show", "--json") == 0
    assert json.loads(capfd.readouterr().out) == {"tiny": 2}
    assert command(registry, "release", "revoke", "1", "--why", "never signed", *key) == 14
    assert "nothing to revoke" in capfd.readouterr().err


def test_offline_keys_are_rotated_renewed_and_shown_from_the_command_line(
    registry, offline, passphrase, capfd
):
    root, targets = (("--key", str(offline / f"{role}-1.pem")) for role in ("root", "targets"))
    new = ("--offline", str(offline), "--new-passphrase-file", passphrase[1])
    rotate = ("keys", "rotate", "--new-keys", "2", "--threshold", "2", *passphrase)
    assert command(registry, *rotate, "--role", "targets", *root) == 14
    assert "--offline DIR is needed" in capfd.readouterr().err
    assert command(registry, *rotate, "--role", "targets", *root, *new, "--threshold", "3") == 14
    assert "a threshold of 3 cannot be met by 2 keys" in capfd.readouterr().err
    assert command(registry, *rotate, "--role", "targets", *root, *new) == 0
    assert command(registry, "release", "sign", "1", *targets, *passphrase) == 14
    assert "is none of targets" in capfd.readouterr().err
    fresh = [part for number in (1, 2) for part in ("--key", str(offline / f"targets-v2-{number}.pem"))]
    assert command(registry, "release", "sign", "1", *fresh, *passphrase) == 0
    assert command(registry, *rotate, "--role", "root", *root, *new) == 0
    assert command(registry, "keys", "renew", "--role", "root", *root, *passphrase) == 14
    fresh_root = [part for number in (1, 2) for part in ("--key", str(offline / f"root-v3-{number}.pem"))]
    assert command(registry, "keys", "renew", "--role", "root", *fresh_root[:2], *passphrase) == 0
    assert command(registry, "keys", "sign", "renew-root", *fresh_root[2:], *passphrase) == 0
    assert command(registry, "keys", "renew", *root) == 14
    capfd.readouterr()
    assert command(registry, "keys", "show") == 0
    said = capfd.readouterr().out
    assert "root       4        2 of 2" in said
    assert "due" not in said
    assert command(registry, "keys", "show", "--json") == 0
    roles = {each["role"]: each for each in json.loads(capfd.readouterr().out)["roles"]}
    assert roles.keys() == {"root", "targets", "weights", "snapshot", "timestamp"}
    assert 364 < roles["root"]["days_left"] <= 365


def test_somebody_makes_a_key_that_nobody_else_sees_and_it_signs(registry, offline, passphrase, capfd):
    folder = registry.parent
    mine = folder / "elsewhere/mine.pem"
    assert main(["keys", "make", str(mine), *passphrase]) == 0
    assert b"PRIVATE" not in mine.with_suffix(".pub").read_bytes()
    root = ("--key", str(offline / "root-1.pem"), *passphrase)
    rotate = ("keys", "rotate", "--role", "targets", *root)
    assert command(registry, *rotate, "--public", str(mine)) == 14
    assert "no public key in PEM" in capfd.readouterr().err
    assert command(registry, *rotate, "--public", str(mine.with_suffix(".pub"))) == 0
    assert "1 missing of" in capfd.readouterr().out
    sign = ("--key", str(mine), *passphrase)
    assert command(registry, "keys", "sign", "rotate-targets", *sign) == 0
    assert command(registry, "release", "sign", "1", *sign) == 0
    assert "release 1: signed offline" in capfd.readouterr().out


def test_a_new_key_overwrites_neither_itself_nor_anothers_public_part(tmp_path, passphrase, capfd):
    assert main(["keys", "make", str(tmp_path / "mine.pub"), *passphrase]) == 14
    assert "the public part goes there" in capfd.readouterr().err
    assert main(["keys", "make", str(tmp_path / "mine.pem"), *passphrase]) == 0
    before = (tmp_path / "mine.pub").read_bytes()
    assert main(["keys", "make", str(tmp_path / "mine.key"), *passphrase]) == 14
    assert "another key's" in capfd.readouterr().err
    assert (tmp_path / "mine.pub").read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("mine*")) == ["mine.pem", "mine.pub"]


def test_a_second_init_makes_no_keys_that_open_nothing(registry, offline, passphrase, capfd):
    elsewhere = registry.parent / "second"
    assert command(registry, "keys", "init", "--offline", str(elsewhere), *passphrase) == 14
    assert "there is a repository already" in capfd.readouterr().err
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"roles": {"snapshot": "{}"}}, "a change of 'snapshot'"),
        ({"roles": {}}, "a change of nothing"),
        ({"blobs": ['{"thresholds": "harmless"}']}, "a policy comes with it that it does not name"),
    ],
)
def test_a_change_that_shows_something_else_than_it_signs_is_not_signed(
    registry, offline, passphrase, capfd, change, says
):
    assert command(registry, "release", "sign", "1", "--offline") == 0
    capfd.readouterr()
    assert command(registry, "keys", "export", "release-1") == 0
    away = registry.parent / "release-1.json"
    away.write_text(json.dumps(json.loads(capfd.readouterr().out) | change))
    before = away.read_bytes()
    assert main(["keys", "sign-file", str(away), "--key", str(offline / "targets-1.pem"), *passphrase]) == 14
    assert says in capfd.readouterr().err
    assert away.read_bytes() == before


def _with_other_role(targets):
    delegations = targets["signed"]["delegations"]
    delegations["roles"] = [*delegations["roles"], {**delegations["roles"][0], "name": "evil"}]


def _by_hashes(targets):
    role = targets["signed"]["delegations"]["roles"][0]
    del role["paths"]
    role["path_hash_prefixes"] = [""]


def _under_a_false_id(targets):
    keys = targets["signed"]["delegations"]["keys"]
    (keyid,) = keys
    keys[keyid]["keyval"]["public"] = "00" * 31 + "01"


def _without_roles(targets):
    targets["signed"]["delegations"]["roles"] = []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_with_other_role, "delegates to 'weights', 'evil', not to 'weights' alone"),
        (_by_hashes, "may sign by hashes of names"),
        (_under_a_false_id, "is not the one of that id"),
        (_without_roles, "delegates to no role"),
    ],
)
def test_what_would_hold_and_is_not_said_is_not_signed(registry, offline, passphrase, capfd, spoil, says):
    assert command(registry, "release", "sign", "1", "--offline") == 0
    capfd.readouterr()
    assert command(registry, "keys", "export", "release-1") == 0
    away = registry.parent / "release-1.json"
    change = json.loads(capfd.readouterr().out)
    targets = json.loads(change["roles"]["targets"])
    spoil(targets)
    change["roles"]["targets"] = json.dumps(targets)
    away.write_text(json.dumps(change))
    before = away.read_bytes()
    assert main(["keys", "sign-file", str(away), "--key", str(offline / "targets-1.pem"), *passphrase]) == 14
    said = capfd.readouterr().err
    assert says in said
    assert "do not sign this" in said
    assert away.read_bytes() == before


def test_names_that_would_move_the_cursor_are_not_shown_and_nothing_is_signed(
    registry, offline, passphrase, capfd
):
    assert command(registry, "release", "sign", "1", "--offline") == 0
    capfd.readouterr()
    assert command(registry, "keys", "export", "release-1") == 0
    away = registry.parent / "release-1.json"
    change = json.loads(capfd.readouterr().out)
    targets = json.loads(change["roles"]["targets"])
    named = targets["signed"]["targets"]
    targets["signed"]["targets"] = {f"{name}\x1b[1A\x1b[2K": named[name] for name in named}
    change["roles"]["targets"] = json.dumps(targets)
    away.write_text(json.dumps(change))
    assert main(["keys", "sign-file", str(away), "--key", str(offline / "targets-1.pem"), *passphrase]) == 14
    assert "cannot be shown, do not sign this" in capfd.readouterr().err


def test_a_release_is_signed_on_a_machine_that_has_no_hub(registry, offline, passphrase, capfd):
    away = registry.parent / "stick/release-1.json"
    away.parent.mkdir()
    assert command(registry, "release", "sign", "1", "--offline") == 0
    capfd.readouterr()
    assert command(registry, "keys", "export", "release-1") == 0
    away.write_text(capfd.readouterr().out)
    assert main(["keys", "sign-file", str(away)]) == 0
    assert "release 1: weights/tiny/" in capfd.readouterr().out
    assert command(registry, "keys", "import", str(away)) == 0
    assert "1 missing of" in capfd.readouterr().out
    assert main(["keys", "sign-file", str(away), "--key", str(offline / "targets-1.pem"), *passphrase]) == 0
    assert command(registry, "keys", "import", str(away)) == 0
    assert "release-1: signed by enough, published" in capfd.readouterr().out
    assert command(registry, "release", "sign", "1") == 0
    assert command(registry, "keys", "export", "release-1") == 14
    away.write_text("{")
    assert main(["keys", "sign-file", str(away)]) == 14
    assert "no change that waits can be read" in capfd.readouterr().err
    assert acts(registry)[1:3] == [
        ("keys.import", "keys release-1", "waits for 1 of targets"),
        ("keys.import", "keys release-1", "published"),
    ]
