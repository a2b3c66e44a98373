"""The broker with TLS, real on both sides: client certificates, and passwords over a server certificate."""

import queue
import ssl

import pytest

from cloud_hub.identity.authority import Authority
from cloud_hub.identity.commands import now
from edge_cascade.mqtt import Broker, MqttSession
from tests.identity.desk import Desk
from tests.identity.party import TIMEOUT_S, Party, alert_from, tls_context


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    desk = Desk(tmp_path_factory.mktemp("tls"))
    desk.type("broker", "certificate", "--host", "localhost", "127.0.0.1")
    for name in ("board-a", "board-b"):
        desk.type("device", "add", name, "--certificate", "--out", desk.keys)
    desk.type("sensor", "add", "probe", "--device", "board-a", "--certificate", "--out", desk.keys)
    desk.configure("--mutual-tls")
    return desk


@pytest.fixture(scope="module")
def broker(desk):
    with desk.start() as broker:
        yield broker


def identity_of(desk, name):
    folder = desk.broker if name == "hub" else desk.keys
    return tls_context(desk.broker / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")


def connect(desk, broker, name, **options):
    party = Party(broker.port, tls=identity_of(desk, name), **options)
    assert party.connected == "Success"
    return party


def test_the_certificates_name_is_the_user_name(desk, broker):
    with (
        connect(desk, broker, "hub") as hub,
        connect(desk, broker, "board-a", client_id="board-b", user="board-b") as board,
        connect(desk, broker, "probe") as probe,
    ):
        hub.subscribe("edge/v1/+/up/#")
        board.subscribe("edge/v1/+/down/#")
        assert not board.may_publish("edge/v1/board-b/up/cases", b"forged")
        assert not probe.may_publish("edge/v1/probe/up/cases", b"forged")
        assert not hub.may_publish("edge/v1/hub/up/cases", b"forged")
        assert board.may_publish("edge/v1/board-a/up/cases", b"own")
        assert probe.may_publish("sensors/board-a/pump")
        hub.publish("edge/v1/board-b/down/acks", b"for b")
        hub.publish("edge/v1/board-a/down/acks", b"for a")
        assert board.received_until(b"for a") == [("edge/v1/board-a/down/acks", b"for a")]
        assert hub.received_until(b"own") == [("edge/v1/board-a/up/cases", b"own")]


def test_a_client_without_a_certificate_is_refused(desk, broker):
    assert alert_from(broker.port, tls_context(desk.broker / "ca.pem")) == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


def test_a_certificate_of_a_foreign_authority_is_refused(desk, broker, tmp_path):
    forged = Authority(tmp_path / "foreign").issue_client("board-a", now=now())
    (tmp_path / "board-a.pem").write_bytes(forged.certificate)
    (tmp_path / "board-a.key").write_bytes(forged.key)
    context = tls_context(desk.broker / "ca.pem", tmp_path / "board-a.pem", tmp_path / "board-a.key")
    # The foreign authority has our authority's name: only its signature gives it away.
    assert alert_from(broker.port, context) in {"TLSV1_ALERT_UNKNOWN_CA", "TLSV1_ALERT_DECRYPT_ERROR"}


def test_the_brokers_own_certificate_logs_nobody_in(desk, broker):
    context = tls_context(desk.broker / "ca.pem", desk.broker / "server.pem", desk.broker / "server.key")
    assert alert_from(broker.port, context) == "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE"


def test_a_boards_certificate_poses_as_no_broker(desk):
    client = tls_context(desk.broker / "ca.pem")
    client.check_hostname = False
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(desk.keys / "board-a.pem", desk.keys / "board-a.key")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    posing = server.wrap_bio(to_server, to_client, server_side=True)
    with pytest.raises(ssl.SSLWantReadError):
        asking.do_handshake()
    with pytest.raises(ssl.SSLWantReadError):
        posing.do_handshake()
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        asking.do_handshake()


def test_a_revoked_certificate_loses_its_rights_at_the_reload_and_comes_in_no_more(desk, broker):
    desk.type("device", "add", "board-c", "--certificate", "--out", desk.keys)
    old = identity_of(desk, "board-c")
    # A new certificate needs nothing from the broker: the patterns know the board by its name.
    with connect(desk, broker, "board-c") as board:
        assert board.may_publish("edge/v1/board-c/up/cases")
        desk.type("device", "revoke", "board-c")
        desk.rewrite_accounts()
        broker.reload()
        assert not board.may_publish("edge/v1/board-c/up/cases")
    assert alert_from(broker.port, old) == "SSLV3_ALERT_CERTIFICATE_REVOKED"

    desk.type("device", "add", "board-c", "--certificate", "--renew", "--out", desk.keys)
    desk.rewrite_accounts()
    broker.reload()
    assert alert_from(broker.port, old) == "SSLV3_ALERT_CERTIFICATE_REVOKED"
    with connect(desk, broker, "board-c") as board:
        assert board.may_publish("edge/v1/board-c/up/cases")


def test_our_session_works_with_a_certificate(desk, broker):
    exchange_one_message(
        Broker(
            host="localhost",
            port=broker.port,
            ca_file=str(desk.keys / "ca.pem"),
            certificate_file=str(desk.keys / "board-b.pem"),
            key_file=str(desk.keys / "board-b.key"),
        ),
        connect(desk, broker, "hub"),
        "board-b",
    )


def test_our_session_works_with_a_password_over_tls(tmp_path):
    desk = Desk(tmp_path)
    desk.type("broker", "certificate", "--host", "localhost")
    desk.type("device", "add", "board-a", "--out", desk.keys)
    desk.configure("--tls")
    with desk.start() as broker:
        trust = tls_context(desk.broker / "ca.pem")
        with Party(broker.port, "board-a", "wrong", tls=trust) as party:
            assert party.connected == "Not authorized"
        with pytest.raises(ssl.SSLCertVerificationError):
            alert_from(broker.port, ssl.create_default_context())
        exchange_one_message(
            Broker(
                host="localhost",
                port=broker.port,
                username="board-a",
                password_file=str(desk.keys / "board-a.password"),
                ca_file=str(desk.keys / "ca.pem"),
            ),
            Party(broker.port, "hub", desk.password_of("hub"), tls=trust),
            "board-a",
        )


def exchange_one_message(address, hub, name):
    """Up and down once, through the session that daemon and hub use."""
    received = queue.Queue()
    subscribed = queue.Queue()
    session = MqttSession(
        address,
        f"{name}-session",
        subscriptions=[f"edge/v1/{name}/down/#"],
        on_message=received.put,
        on_up=lambda: subscribed.put(True),
    )
    session.start()
    try:
        with hub:
            assert hub.connected == "Success"
            hub.subscribe(f"edge/v1/{name}/up/#")
            subscribed.get(timeout=TIMEOUT_S)
            # Behind the session's own subscription in the broker's one queue for it.
            assert session.publish(f"edge/v1/{name}/up/cases", b"up") is not None
            assert hub.received_until(b"up") == [(f"edge/v1/{name}/up/cases", b"up")]
            hub.publish(f"edge/v1/{name}/down/acks", b"down")
            assert received.get(timeout=TIMEOUT_S).payload == b"down"
            assert session.max_packet_bytes == 128 * 1024
    finally:
        session.stop()
