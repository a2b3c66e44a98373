"""The attacks of the TUF specification, section 1.5.2, and ours: each is refused by its name."""

import contextlib
import json
import random
import re
import subprocess
import sys
import threading

import msgspec
import pytest

pytest.importorskip("tuf", reason="needs python-tuf")

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import MetaFile

from edge_cascade.signed_releases import ONLINE_ROLE, Policy
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import ConfigError, RefusedError
from edge_daemon.releases.http_fetch import StatusError, UnreachableError
from edge_daemon.releases.trust import Authorised, Trust, read_root
from tests.device.signed_fleet import DAY, NOON, FakeClock, SignedFleet, sha256

GRAPH = b'{"a graph": 1}'
WEIGHTS = b'{"weights": 1}'
ONLINE_ONLY = Authorised(release=1, graph_size=14, weights_size=14, is_online_only=True)


class Board:
    """A device's trust over a fleet; `restart` is a new process on the same disk."""

    def __init__(self, fleet, directory):
        self.fleet = fleet
        self.directory = directory
        self.clock = FakeClock()
        self.restart()

    def restart(self):
        self.clock.now_s = 5.0
        self.trust = Trust(
            self.directory,
            root=self.fleet.first_root,
            stream=self._stream,
            clock=self.clock,
        )

    def _stream(self, path, stop):
        # Looked up anew: tests put another one into the fleet.
        yield from self.fleet.stream(path)

    def ask(self, graph=GRAPH, weights=WEIGHTS, model="tiny"):
        return self.trust.authorise(model, "r1", sha256(graph), sha256(weights), threading.Event())

    def refusal(self, **asked):
        with pytest.raises(RefusedError) as caught:
            self.ask(**asked)
        assert caught.value.failure is Failure.DOWNLOAD
        return caught.value.detail


@pytest.fixture
def fleet():
    fleet = SignedFleet()
    fleet.sign_graph("tiny", GRAPH)
    fleet.sign_weights("tiny", WEIGHTS, sha256(GRAPH))
    fleet.renew()
    return fleet


@pytest.fixture
def board(fleet, tmp_path):
    return Board(fleet, tmp_path / "trust")


def test_parts_signed_by_the_roles_that_may_are_authorised_online_and_from_disk(board):
    assert board.ask() == ONLINE_ONLY
    board.fleet.files.clear()
    board.restart()
    assert board.trust.authorise_from_disk("tiny", "r1", sha256(GRAPH), sha256(WEIGHTS)) == ONLINE_ONLY
    with pytest.raises(UnreachableError):
        board.ask()


def test_weights_signed_offline_need_no_bounds(board):
    board.fleet.sign_weights("tiny", WEIGHTS, sha256(GRAPH), release=3, role=board.fleet.targets)
    board.fleet.renew()
    assert board.ask() == Authorised(3, 14, 14, is_online_only=False)


def test_nothing_on_disk_authorises_nothing(board):
    with pytest.raises(RefusedError, match="not on disk"):
        board.trust.authorise_from_disk("tiny", "r1", sha256(GRAPH), sha256(WEIGHTS))


def test_parts_of_nobody_or_of_another_model_are_refused(board):
    assert "signed by nobody" in board.refusal(graph=b"another")
    assert "signed by nobody" in board.refusal(weights=b"another")
    assert "signed by nobody" in board.refusal(model="other")


# --- what somebody between the hub and the board may try


def test_rollback_of_the_timestamp(board):
    old = board.fleet.files["timestamp"]
    board.fleet.renew()
    board.ask()
    board.fleet.files["timestamp"] = old
    assert board.refusal().startswith("rollback: New timestamp version 2")


def test_rollback_of_the_timestamp_is_known_after_the_metadata_were_lost(board):
    old = board.fleet.files["timestamp"]
    board.fleet.renew()
    board.ask()
    board.fleet.files["timestamp"] = old
    for path in board.directory.glob("*.json"):
        if path.name != "trusted_time.json":
            path.unlink()
    board.restart()
    assert board.refusal().startswith("rollback: New timestamp version 2")


def test_rollback_of_the_snapshot(board):
    board.fleet.renew()
    board.ask()
    board.fleet.timestamp.version += 1
    board.fleet.snapshot.version -= 1
    board.fleet.publish_snapshot()
    assert board.refusal().startswith("rollback: New snapshot version")


def test_rollback_of_the_targets(board):
    board.fleet.renew()
    board.ask()
    board.fleet.renew()
    board.fleet.targets.version -= 2
    board.fleet.publish()
    assert re.match(r"rollback: Expected targets\.json version", board.refusal())


def test_a_role_that_vanishes_from_the_snapshot_is_a_rollback(board):
    board.ask()
    board.fleet.renew()
    del board.fleet.snapshot.meta[f"{ONLINE_ROLE}.json"]
    board.fleet.publish_snapshot()
    assert board.refusal().startswith("rollback: New snapshot is missing")


def test_freeze(board):
    assert board.ask() == ONLINE_ONLY
    board.clock.now_s += DAY.total_seconds() - 1
    assert board.ask() == ONLINE_ONLY
    board.clock.now_s += 2
    assert board.refusal() == "freeze: timestamp.json is expired"
    # A restart brings no time back.
    board.restart()
    assert board.refusal() == "freeze: timestamp.json is expired"
    board.fleet.renew(NOON + DAY)
    assert board.ask() == ONLINE_ONLY


def test_freeze_of_the_snapshot(board):
    board.fleet.now = NOON + 8 * DAY
    board.fleet.timestamp.version += 1
    board.fleet.timestamp.expires = board.fleet.now + DAY
    board.fleet.publish_timestamp()
    assert board.refusal() == "freeze: snapshot.json is expired"


@pytest.mark.parametrize("role", ["targets", ONLINE_ROLE])
def test_mix_and_match_of_roles(board, role):
    board.ask()
    old = {each: board.fleet.files[f"2.{each}"] for each in ("targets", ONLINE_ROLE)}
    board.fleet.sign_graph("tiny", b"one more")
    board.fleet.sign_weights("tiny", b"two more", sha256(b"one more"))
    board.fleet.renew()
    board.fleet.files[f"3.{role}"] = old[role]
    assert board.refusal().startswith("mix-and-match: ")


def test_mix_and_match_of_the_snapshot(board):
    board.fleet.files["2.snapshot"] = board.fleet.files["1.snapshot"]
    assert board.refusal().startswith("mix-and-match: ")


def test_mix_and_match_of_parts(board):
    board.fleet.sign_graph("tiny", b"another graph")
    board.fleet.renew()
    assert board.refusal(graph=b"another graph").startswith("mix-and-match: weights")


@pytest.mark.parametrize("name", ["timestamp", "2.root", "2.snapshot", "2.targets", f"2.{ONLINE_ROLE}"])
def test_endless_data(board, name):
    read = []

    def endless(path):
        if name not in path:
            yield from SignedFleet.stream(board.fleet, path)
            return
        while True:
            read.append(1)
            yield bytes(65536)

    board.fleet.stream = endless
    assert board.refusal().startswith("endless data: ")
    assert len(read) < 100


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", ONLINE_ROLE])
def test_wrong_keys(board, role):
    board.fleet.signers[role] = CryptoSigner.generate_ed25519()
    board.fleet.renew()
    assert board.refusal().startswith("wrong keys: ")


def test_a_root_signed_by_itself_alone_is_wrong_keys(board):
    board.fleet.root.version += 1
    board.fleet.signers["root"] = CryptoSigner.generate_ed25519()
    board.fleet.publish_root()
    assert board.refusal().startswith("wrong keys: ")


def test_expired_targets(board):
    board.fleet.targets.expires = NOON
    board.fleet.renew(NOON + DAY)
    assert board.refusal() == "expired metadata: New targets is expired"


def test_expired_root(board):
    board.fleet.root.expires = NOON
    board.fleet.root.version += 1
    board.fleet.publish_root()
    board.fleet.renew(NOON + DAY)
    # The board hears what time it is only by the timestamp, after the root.
    assert board.refusal() == "expired metadata: Final root.json is expired"
    assert board.refusal() == "expired metadata: Final root.json is expired"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 40, b'{"signed": {}}'])
@pytest.mark.parametrize("name", ["timestamp", "2.root"])
def test_what_is_no_metadata_is_refused(board, name, content):
    board.fleet.files[name] = content
    assert board.refusal().startswith("malformed metadata: ")


# --- keys that change


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_a_rotated_key_is_followed_and_the_old_one_refused(board, role):
    board.ask()
    old = board.fleet.signers[role]
    board.fleet.rotate(role)
    board.fleet.renew()
    assert board.ask() == ONLINE_ONLY
    board.fleet.signers[role] = old
    board.fleet.renew()
    if role == "root":
        board.fleet.root.version += 1
        board.fleet.publish_root()
    assert board.refusal().startswith("wrong keys: ")


def test_a_rotated_root_is_found_after_a_restart_without_the_old_ones(board):
    for _ in range(3):
        board.fleet.rotate("root")
    board.fleet.renew()
    board.ask()
    board.restart()
    assert board.ask() == ONLINE_ONLY


def test_a_revoked_online_role_signs_nothing_any_more(board):
    board.ask()
    board.fleet.targets.delegations.roles.clear()
    board.fleet.renew()
    assert "signed by nobody" in board.refusal()


# --- a stolen online key


def test_a_stolen_online_key_signs_no_graph(board):
    board.fleet.sign_graph("tiny", b"evil", role=board.fleet.online)
    board.fleet.sign_weights("tiny", b"evil too", sha256(b"evil"))
    board.fleet.renew()
    assert "signed by the online role alone" in board.refusal(graph=b"evil", weights=b"evil too")


def test_a_stolen_online_key_gives_itself_no_other_delegation(board):
    key = board.fleet.signers[ONLINE_ROLE].public_key
    board.fleet.online.delegations = board.fleet.targets.delegations
    board.fleet.sign_graph("tiny", b"evil", role=board.fleet.online)
    board.fleet.renew()
    assert key.keyid in board.fleet.online.delegations.keys
    assert "offline keys must" in board.refusal(graph=b"evil")


def test_a_stolen_online_key_does_not_lower_the_floor(board):
    board.fleet.sign_policy(msgspec.json.encode(Policy({"tiny": 5})))
    board.fleet.sign_weights("tiny", WEIGHTS, sha256(GRAPH), release=999)
    board.fleet.renew()
    assert "its graph are of release 1, below the security floor 5" in board.refusal()


def test_a_stolen_timestamp_key_that_says_the_year_3000_is_forgotten_with_the_key(board):
    board.ask()
    board.fleet.timestamp.expires = NOON.replace(year=3000)
    board.fleet.timestamp.version += 1
    board.fleet.now = NOON.replace(year=2999)
    board.fleet.publish_timestamp()
    assert board.refusal() == "expired metadata: Final root.json is expired"
    board.fleet.rotate("timestamp")
    board.fleet.rotate("snapshot")
    board.fleet.renew(NOON)
    assert board.ask() == ONLINE_ONLY


def test_issued_in_the_future_of_its_own_expiry_is_no_time(board):
    board.fleet.now = NOON.replace(year=2999)
    board.fleet.timestamp.version += 1
    board.fleet.publish_timestamp()
    assert board.refusal().startswith("freeze")
    board.fleet.renew(NOON + DAY)
    assert board.ask() == ONLINE_ONLY


# --- the security floor


def test_below_the_security_floor_nothing_is_taken_and_at_it_everything(board):
    board.fleet.sign_policy(msgspec.json.encode(Policy({"tiny": 2, "other": 9})))
    board.fleet.renew()
    assert "below the security floor 2" in board.refusal()
    board.fleet.sign_policy(msgspec.json.encode(Policy({"tiny": 1})))
    board.fleet.renew()
    assert board.ask() == ONLINE_ONLY
    assert board.trust.authorise_from_disk("tiny", "r1", sha256(GRAPH), sha256(WEIGHTS)) == ONLINE_ONLY


def test_a_policy_of_other_bytes_is_not_believed(board):
    content = msgspec.json.encode(Policy({"tiny": 2}))
    board.fleet.sign_policy(content)
    board.fleet.renew()
    board.fleet.files[f"blobs/{sha256(content)}"] = msgspec.json.encode(Policy({"tiny": 0}))
    with pytest.raises(UnreachableError, match="not the bytes that were signed"):
        board.ask()
    board.fleet.files[f"blobs/{sha256(content)}"] = content * 2
    assert board.refusal().startswith("endless data: ")


# --- time and power


@pytest.mark.parametrize("wall_ms", [0, 1, 4_000_000_000_000, 10**15])
def test_a_clock_that_jumps_bars_nothing(board, wall_ms):
    board.ask()
    board.clock.wall = wall_ms
    assert board.ask() == ONLINE_ONLY
    board.restart()
    assert board.ask() == ONLINE_ONLY


def test_the_wall_clock_is_not_read_at_all(board, monkeypatch):
    board.ask()
    monkeypatch.setattr(board.clock, "wall_ms", None)
    board.fleet.renew()
    assert board.ask() == ONLINE_ONLY


@pytest.mark.parametrize(
    "name",
    ["timestamp.json", "snapshot.json", "targets.json", f"{ONLINE_ROLE}.json", "root_history/2.root.json"],
)
@pytest.mark.parametrize("left", [0, 20])
def test_metadata_cut_off_by_a_power_cut_are_fetched_again(board, name, left):
    board.fleet.rotate("targets")
    board.fleet.renew()
    board.ask()
    path = board.directory / name
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    board.restart()
    assert board.ask() == ONLINE_ONLY
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"{", b'{"seconds": 1e300}', b'{"seconds": "now"}', b"\xff"])
def test_a_damaged_time_begins_anew(board, content):
    board.ask()
    (board.directory / "trusted_time.json").write_bytes(content)
    board.restart()
    assert board.ask() == ONLINE_ONLY
    assert json.loads((board.directory / "trusted_time.json").read_text())["seconds"] >= NOON.timestamp()


def test_metadata_are_written_durably(board, monkeypatch):
    written = []
    from edge_daemon.releases import tuf_client

    real = tuf_client.write_durably
    monkeypatch.setattr(
        tuf_client, "write_durably", lambda path, content: (written.append(path.name), real(path, content))
    )
    board.ask()
    assert {"1.root.json", "timestamp.json", "snapshot.json", "targets.json", f"{ONLINE_ROLE}.json"} <= set(
        written
    )


def test_a_hub_that_answers_with_errors_is_away_and_no_attack(board):
    def broken(path):
        raise StatusError(path, 500)
        yield b""

    board.fleet.stream = broken
    with pytest.raises(UnreachableError, match="500"):
        board.ask()


def test_a_snapshot_without_lengths_and_hashes_is_enough(board):
    board.fleet.renew()
    board.fleet.snapshot.meta = {
        name: MetaFile(meta.version) for name, meta in board.fleet.snapshot.meta.items()
    }
    board.fleet.publish_snapshot()
    assert board.ask() == ONLINE_ONLY


@pytest.mark.parametrize("custom", [None, {}, {"release": "one"}, [1]])
def test_a_target_without_its_note_is_refused(board, custom):
    for target in board.fleet.online.targets.values():
        target.unrecognized_fields["custom"] = custom
    board.fleet.renew()
    assert "signed without its note" in board.refusal()


def test_the_root_of_the_configuration_is_one_or_said_to_be_none(tmp_path):
    path = tmp_path / "root.json"
    with pytest.raises(ConfigError, match="No such file"):
        read_root(path)
    path.write_bytes(b"{}")
    with pytest.raises(ConfigError, match="no root metadata"):
        read_root(path)
    path.write_bytes(SignedFleet().first_root)
    assert read_root(path) == path.read_bytes()


NASTY = [
    b"[" * 100_000,
    b'{"signed": ' * 5000,
    b'{"signed": {"_type": "timestamp", "version": ' + b"9" * 5000 + b"}}",
    b'{"signatures": [], "signed": {"_type": "timestamp", "version": 1e999, "x": NaN}}',
    b'{"signatures": [{"keyid": "x", "sig": "zz"}], "signed": {"_type": "root"}}',
    b"\x00" * 16000,
]


@pytest.mark.parametrize("content", NASTY, ids=range(len(NASTY)))
@pytest.mark.parametrize("name", ["timestamp", "2.root"])
def test_nasty_json_is_refused_like_any_other(board, name, content):
    board.fleet.files[name] = content
    assert re.match("malformed metadata|endless data", board.refusal())


@pytest.mark.parametrize("name", ["timestamp", "2.snapshot", "2.targets", f"2.{ONLINE_ROLE}", "2.root"])
def test_a_spoiled_byte_anywhere_is_refused_or_changes_nothing(board, tmp_path, name):
    rng = random.Random(11)
    board.fleet.rotate("snapshot")
    board.fleet.targets.version = board.fleet.online.version = board.fleet.snapshot.version = 1
    board.fleet.renew()
    good = board.fleet.files[name]
    for number in range(60):
        content = bytearray(good)
        for _ in range(rng.choice([1, 1, 3])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        board.fleet.files[name] = bytes(content)
        other = Board(board.fleet, tmp_path / str(number))
        with contextlib.suppress(RefusedError):
            assert other.ask() == ONLINE_ONLY


def test_who_wants_no_releases_pays_for_no_signatures():
    code = "import sys, edge_daemon.releases.downloader; sys.exit(bool({'tuf', 'cryptography'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
