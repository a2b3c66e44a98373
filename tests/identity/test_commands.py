"""The commands: what they write, with which rights, what they refuse and what they say."""

import re
import stat

import pytest

from cloud_hub.errors import NotFoundError
from cloud_hub.identity.accounts import IdentityError
from cloud_hub.identity.passwords import is_password_of
from tests.identity.desk import Desk


@pytest.fixture
def desk(tmp_path, quick_logins):
    return Desk(tmp_path)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def hash_of(desk, name):
    lines = (desk.broker / "passwords").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2] for line in lines if line.startswith(f"{name}:")), None)


def test_a_password_is_printed_once_and_stored_only_as_a_hash(desk, capsys):
    desk.type("device", "add", "board-1")
    said = capsys.readouterr().out
    password = re.search(r"kept only as a hash: (\S{43})$", said, re.MULTILINE)[1]
    assert f"next: cloud-hub broker config --out DIR --config {desk.config}" in said
    desk.configure()
    assert is_password_of(password, hash_of(desk, "board-1"))
    for path in desk.folder.rglob("*"):
        assert not path.is_file() or password.encode() not in path.read_bytes()


def test_what_to_type_next_depends_on_what_the_broker_has_to_learn(desk, capsys):
    def next_after(*words):
        capsys.readouterr()
        desk.type(*words)
        return capsys.readouterr().out.splitlines()[-1]

    accounts = f"next: cloud-hub broker accounts --out DIR --config {desk.config}, then kill -HUP"
    by_certificate = ("--certificate", "--out", desk.keys)
    desk.configure()
    assert next_after("device", "add", "a").startswith(accounts)
    assert next_after("device", "add", "b", *by_certificate).startswith("next: bring these files to b")
    assert next_after("device", "add", "b", "--renew", *by_certificate).startswith(accounts)
    assert next_after("sensor", "add", "s", "--device", "a", *by_certificate).startswith(accounts)
    assert next_after("device", "revoke", "b").startswith(accounts)
    assert next_after("broker", "accounts", "--out", desk.broker).startswith("next: kill -HUP the mosquitto")


def test_secrets_are_readable_by_their_owner_only(desk):
    desk.type("broker", "certificate", "--host", "localhost")
    desk.type("device", "add", "board-1", "--out", desk.keys)
    desk.type("device", "add", "board-2", "--certificate", "--out", desk.keys)
    desk.configure("--tls")
    secrets = ("*.password", "*.key", "passwords", "acl")
    found = {
        path.relative_to(desk.folder): mode_of(path) for name in secrets for path in desk.folder.rglob(name)
    }
    assert {str(path) for path in found} == {
        "keys/board-1.password",
        "keys/board-2.key",
        "broker/hub.password",
        "broker/server.key",
        "broker/passwords",
        "broker/acl",
        "state/authority/ca.key",
        "state/authority/server.key",
    }
    assert set(found.values()) == {0o600}


@pytest.mark.parametrize(
    "again", [("device", "add", "board-1"), ("sensor", "add", "board-1", "--device", "b")]
)
def test_a_name_belongs_to_one_account_of_any_role(desk, again):
    desk.type("device", "add", "b")
    desk.type("device", "add", "board-1")
    with pytest.raises(IdentityError, match="device 'board-1' exists: --renew"):
        desk.type(*again)


def test_a_revoked_name_is_not_handed_to_somebody_else(desk):
    desk.type("device", "add", "board-1")
    desk.type("device", "add", "board-2")
    desk.type("device", "revoke", "board-1")
    with pytest.raises(IdentityError, match="device 'board-1' was revoked: --renew"):
        desk.type("device", "add", "board-1")
    with pytest.raises(IdentityError):
        desk.type("sensor", "add", "board-1", "--device", "board-2")
    with pytest.raises(NotFoundError):
        desk.type("sensor", "add", "board-1", "--device", "board-2", "--renew")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("device", "add", "hub"), IdentityError, "taken by the hub itself"),
        (("device", "add", "a/b"), IdentityError, "name 'a/b' is not 1 to 64"),
        (("device", "add", "a", "--certificate"), IdentityError, "--certificate needs --out DIR"),
        (("device", "add", "a", "--renew"), NotFoundError, "there is no device 'a'"),
        (("device", "revoke", "hub"), NotFoundError, "there is no device 'hub'"),
        (("sensor", "add", "s", "--device", "a"), NotFoundError, "cloud-hub device add a"),
        (("sensor", "revoke", "s"), NotFoundError, "there is no sensor 's'"),
        (("broker", "accounts", "--out", "nowhere"), IdentityError, "broker config --out"),
        (("broker", "config", "--out", "x", "--tls"), IdentityError, "broker certificate --host NAME"),
        (("broker", "certificate", "--host", "bad name"), IdentityError, "neither an address nor a host"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(desk, monkeypatch, words, error, message):
    monkeypatch.chdir(desk.folder)
    with pytest.raises(error) as caught:
        desk.type(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sensor_of_a_revoked_board_or_of_a_sensor_is_refused(desk):
    desk.type("device", "add", "board")
    desk.type("sensor", "add", "probe", "--device", "board")
    with pytest.raises(NotFoundError, match="there is no device 'probe'"):
        desk.type("sensor", "add", "other", "--device", "probe")
    desk.type("device", "revoke", "board")
    with pytest.raises(IdentityError, match="device 'board' is revoked"):
        desk.type("sensor", "add", "other", "--device", "board")


def test_revoking_a_board_names_the_sensors_that_are_left(desk, capsys):
    desk.type("device", "add", "board")
    desk.type("sensor", "add", "probe", "--device", "board")
    desk.type("device", "revoke", "board")
    assert "still active, because they feed board: sensor probe" in capsys.readouterr().out
    desk.type("device", "revoke", "board")
    assert "device board: was revoked before" in capsys.readouterr().out


def test_the_list_shows_every_account_of_its_role_and_no_secret(desk, capsys):
    desk.type("device", "list")
    assert "no devices yet" in capsys.readouterr().out
    desk.type("device", "add", "b")
    desk.type("device", "add", "a", "--certificate", "--out", desk.keys)
    desk.type("sensor", "add", "s", "--device", "a")
    desk.type("device", "revoke", "b")
    capsys.readouterr()
    desk.type("device", "list")
    lines = capsys.readouterr().out.splitlines()
    day = r"\d{4}-\d\d-\d\d"
    assert len(lines) == 3
    assert re.fullmatch(r"NAME +DEVICE +STATE +CREATED +CREDENTIAL", lines[0])
    assert re.fullmatch(rf"a +a +active +{day} +certificate [0-9a-f]{{16}} until {day}", lines[1])
    assert re.fullmatch(rf"b +b +revoked {day} +{day} +-", lines[2])


def test_running_config_again_keeps_the_hubs_password_and_takes_over_the_accounts(desk, capsys):
    desk.configure()
    assert f"next: mosquitto -c {desk.broker}/mosquitto.conf" in capsys.readouterr().out
    password = desk.password_of("hub")
    assert hash_of(desk, "board-1") is None
    desk.type("device", "add", "board-1")
    desk.configure()
    assert "next: kill -HUP" in capsys.readouterr().out
    assert desk.password_of("hub") == password
    assert is_password_of(password, hash_of(desk, "hub"))
    assert hash_of(desk, "board-1") is not None
    desk.configure("--new-hub-credential")
    assert desk.password_of("hub") != password
    assert is_password_of(desk.password_of("hub"), hash_of(desk, "hub"))


def test_accounts_alone_leave_the_configuration_as_it_is(desk):
    desk.configure("--host", "0.0.0.0")
    before = (desk.broker / "mosquitto.conf").read_bytes()
    desk.type("device", "add", "board-1")
    desk.rewrite_accounts()
    assert (desk.broker / "mosquitto.conf").read_bytes() == before
    assert hash_of(desk, "board-1") is not None


def test_who_cannot_log_in_with_the_chosen_security_is_named(desk, capsys):
    desk.type("broker", "certificate", "--host", "localhost")
    desk.type("device", "add", "by-password")
    desk.type("device", "add", "by-certificate", "--certificate", "--out", desk.keys)
    capsys.readouterr()
    desk.configure("--mutual-tls")
    assert "without a certificate, so unable to log in here: by-password " in capsys.readouterr().out
    desk.configure("--tls")
    assert "without a password, so unable to log in here: by-certificate " in capsys.readouterr().out
    desk.configure("--host", "0.0.0.0")
    assert "warning: on 0.0.0.0 passwords and samples cross the network" in capsys.readouterr().out


def test_somebody_elses_mosquitto_conf_is_not_overwritten(desk):
    desk.broker.mkdir()
    (desk.broker / "mosquitto.conf").write_text("listener 1883\n", encoding="utf-8")
    with pytest.raises(IdentityError, match="was not written by cloud-hub"):
        desk.configure()
    assert (desk.broker / "mosquitto.conf").read_text(encoding="utf-8") == "listener 1883\n"


def test_every_file_for_the_broker_says_where_it_comes_from(desk):
    desk.configure()
    for name in ("mosquitto.conf", "passwords", "acl"):
        first = (desk.broker / name).read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# Written by `cloud-hub broker")
        assert "run it again instead of editing" in first
