"""Names, the password file's hash, the broker's files as text: nothing but values in and values out."""

import subprocess
from pathlib import Path

import pytest

from cloud_hub.identity.accounts import Account, IdentityError, check_account_name, check_tree
from cloud_hub.identity.broker_files import (
    BrokerSettings,
    render_acl,
    render_configuration,
    render_passwords,
)
from cloud_hub.identity.passwords import ITERATIONS, hash_password, is_password_of, new_password
from edge_cascade.errors import ProtocolError
from tests.services import require_program


def account(name, role="device", device=None, password_hash="$7$1$x$y", revoked_at_ms=None):
    return Account(name, role, device, password_hash, None, 0, revoked_at_ms)


@pytest.mark.parametrize("name", ["board-1", "a", "B.2_c", "x" * 64, "hub2", "server-room"])
def test_a_name_that_is_a_topic_level_and_a_user_name_is_taken_as_it_is(name):
    assert check_account_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * 65, "-a", ".a", "a/b", "a+", "#", "a:b", "a b", "a\nuser hub", "%u", "$SYS", "é", "a\x00"],
)
def test_a_name_that_could_mean_something_else_to_the_broker_is_refused(name):
    with pytest.raises(IdentityError, match=r"^name .* is not 1 to 64 letters"):
        check_account_name(name)


@pytest.mark.parametrize("name", ["hub", "Hub", "HUB", "ca", "server", "crl"])
def test_names_of_the_hub_and_of_its_files_are_reserved(name):
    with pytest.raises(IdentityError, match="is taken by the hub itself"):
        check_account_name(name)


@pytest.mark.parametrize("prefix", ["sensors", "results", "sensors/v1", "results/x/y"])
def test_a_prefix_that_the_sensors_rules_reach_into_is_refused(prefix):
    with pytest.raises(IdentityError, match="belongs to sensors"):
        check_tree(prefix)
    with pytest.raises(IdentityError):
        render_acl(prefix, [])


def test_passwords_are_long_and_never_the_same():
    passwords = {new_password() for _ in range(100)}
    assert len(passwords) == 100
    assert {len(password) for password in passwords} == {43}


def test_a_hash_is_salted_and_says_how_it_was_made():
    one, other = hash_password("secret", iterations=10), hash_password("secret", iterations=10)
    assert one != other
    assert one.startswith("$7$10$")
    assert is_password_of("secret", one)
    assert is_password_of("secret", other)
    assert not is_password_of("Secret", one)


def test_a_password_has_256_random_bits_so_that_iterations_need_not_slow_guessing():
    assert len(new_password()) == 43
    assert hash_password("secret").startswith(f"$7${ITERATIONS}$")


@pytest.mark.parametrize(
    "text", ["", "secret", "$6$x$y", "$7$x$eA==$eA==", "$7$0$eA==$eA==", "$7$1$?$?", "$7$1$"]
)
def test_what_is_no_hash_is_nobodys_password(text):
    assert not is_password_of("secret", text)


def test_mosquittos_own_tool_makes_the_same_hash(tmp_path):
    file = tmp_path / "passwords"
    program = require_program("mosquitto_passwd", package="mosquitto")
    subprocess.run([program, "-c", "-b", str(file), "board", "a secret"], check=True, capture_output=True)
    name, _, theirs = file.read_text(encoding="utf-8").strip().partition(":")
    assert name == "board"
    assert is_password_of("a secret", theirs)
    assert not is_password_of("another", theirs)


def test_the_password_file_has_only_active_accounts_with_a_password():
    text = render_passwords(
        [account("b"), account("gone", revoked_at_ms=1), account("cert", password_hash=None), account("a")]
    )
    assert text.splitlines()[1:] == ["a:$7$1$x$y", "b:$7$1$x$y"]


def test_the_rules_are_patterns_over_the_user_and_take_back_what_they_give_to_others():
    text = render_acl(
        "site/edge",
        [
            account("board", device="board"),
            account("hub", "hub"),
            account("probe", "sensor", "board"),
            account("gone", revoked_at_ms=1),
        ],
    )
    assert [line for line in text.splitlines() if line and not line.startswith("#")] == [
        "pattern write site/edge/v1/%u/up/#",
        "pattern read site/edge/v1/%u/down/#",
        "pattern read sensors/%u/#",
        "pattern read labels/%u/#",
        "pattern write results/%u/#",
        "user gone",
        "topic deny #",
        "user hub",
        "topic deny site/edge/v1/hub/#",
        "topic deny sensors/hub/#",
        "topic deny labels/hub/#",
        "topic deny results/hub/#",
        "topic read site/edge/v1/+/up/#",
        "topic write site/edge/v1/+/down/#",
        "user probe",
        "topic deny site/edge/v1/probe/#",
        "topic deny sensors/probe/#",
        "topic deny labels/probe/#",
        "topic deny results/probe/#",
        "topic write sensors/board/#",
        "topic write labels/board/#",
        "topic read results/board/#",
    ]
    assert "%c" not in text


@pytest.mark.parametrize("prefix", ["", "a/#", "a b", "/a", "a\nuser x", "$SYS"])
def test_a_prefix_that_starts_no_topic_is_refused(prefix):
    with pytest.raises(ProtocolError):
        render_acl(prefix, [])


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ("plain", ["password_file /b/passwords"]),
        (
            "tls",
            [
                "tls_version tlsv1.2",
                "cafile /b/ca.pem",
                "certfile /b/server.pem",
                "keyfile /b/server.key",
                "password_file /b/passwords",
            ],
        ),
        (
            "mutual-tls",
            [
                "tls_version tlsv1.2",
                "cafile /b/ca.pem",
                "certfile /b/server.pem",
                "keyfile /b/server.key",
                "require_certificate true",
                "use_identity_as_username true",
                "crlfile /b/crl.pem",
            ],
        ),
    ],
)
def test_the_configuration_lets_in_nobody_without_a_credential(security, expected):
    text = render_configuration(BrokerSettings(Path("/b"), 1884, "127.0.0.1", security, None))
    assert [line for line in text.splitlines() if line and not line.startswith("#")] == [
        "listener 1884 127.0.0.1",
        "allow_anonymous false",
        *expected,
        "acl_file /b/acl",
        "set_tcp_nodelay true",
        "max_packet_size 131072",
        "max_inflight_messages 100",
        "max_queued_messages 20000",
        "max_queued_bytes 67108864",
        "retain_available true",
        "persistence true",
        "persistence_location /b/persistence/",
        "autosave_interval 60",
        "persistent_client_expiration 14d",
    ]


def test_a_password_in_clear_text_on_the_network_is_pointed_out():
    text = render_configuration(BrokerSettings(Path("/b"), 1883, "0.0.0.0", "plain", "mosquitto"))
    assert "use --tls" in text
    assert "user mosquitto\n" in text
