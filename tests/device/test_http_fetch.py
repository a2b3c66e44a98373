import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_daemon.releases.http_fetch import HttpFleet, StatusError, UnreachableError, parse_address
from tests.device.file_server import FileServer
from tests.device.signed_fleet import FakeClock

NOT_BEFORE = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
NOT_AFTER = datetime.datetime(2060, 1, 1, tzinfo=datetime.UTC)


def fleet_of(url, ca_file=None, clock=None):
    address = parse_address(url, ca_file=ca_file and str(ca_file), token_file=None)
    return HttpFleet(address, max_bytes_per_s=0, clock=clock or FakeClock(), wait=lambda stop, delay_s: False)


def read(fleet, path="blobs/x"):
    return b"".join(fleet.stream(path, threading.Event()))


# --- TLS


def certificate(tmp_path, name, *, host="127.0.0.1", issuer=None):
    """A key and a certificate, signed by itself or by `issuer`; their files, and both for signing others."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer_key, issuer_name = (key, subject) if issuer is None else issuer
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )
    pem = tmp_path / f"{name}.pem"
    pem.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    secret = tmp_path / f"{name}.key"
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return pem, secret, (key, subject)


def over_tls(server, tmp_path, *, host="127.0.0.1", newest=None):
    """Serve over TLS from here on; the file of the CA."""
    ca, _, issuer = certificate(tmp_path, "ca")
    pem, key, _ = certificate(tmp_path, "hub", host=host, issuer=issuer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if newest is not None:
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = newest
        context.set_ciphers("ALL:@SECLEVEL=0")
    context.load_cert_chain(pem, key)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    return ca


@pytest.fixture
def server():
    with FileServer() as server:
        server.files["blobs/x"] = b"content"
        yield server


@pytest.fixture
def tls_server():
    server = FileServer()
    server.files["blobs/x"] = b"content"
    yield server
    server.http.server_close()


def test_a_hub_of_the_configured_ca_is_believed(tls_server, tmp_path):
    ca = over_tls(tls_server, tmp_path)
    with tls_server:
        assert read(fleet_of(tls_server.url.replace("http:", "https:"), ca)) == b"content"


@pytest.mark.parametrize("case", ["another CA", "the system's CAs", "another host", "TLS 1.1"])
def test_any_other_hub_is_not(tls_server, tmp_path, case):
    newest = {"TLS 1.1": "TLSv1_1"}.get(case)
    if newest is not None:
        with pytest.warns(DeprecationWarning, match="TLS"):
            ca = over_tls(tls_server, tmp_path, newest=ssl.TLSVersion[newest])
    else:
        ca = over_tls(tls_server, tmp_path, host="127.0.0.2" if case == "another host" else "127.0.0.1")
    if case == "another CA":
        (tmp_path / "other").mkdir()
        ca, _, _ = certificate(tmp_path / "other", "ca")
    if case == "the system's CAs":
        ca = None
    with (
        tls_server,
        pytest.raises(UnreachableError, match=r"blobs/x: .*(verify failed|alert|protocol|version)"),
    ):
        read(fleet_of(tls_server.url.replace("http:", "https:"), ca))
    assert tls_server.asked == []


def test_a_ca_file_that_is_none_is_said(server, tmp_path):
    for content in (None, b"no certificate"):
        if content is not None:
            (tmp_path / "ca").write_bytes(content)
        with pytest.raises(UnreachableError, match=r"releases\.ca_file"):
            read(fleet_of(server.url.replace("http:", "https:"), tmp_path / "ca"))


def test_a_replaced_authority_is_believed_without_a_restart(tls_server, tmp_path):
    right = over_tls(tls_server, tmp_path)
    (tmp_path / "other").mkdir()
    other, _, _ = certificate(tmp_path / "other", "ca")
    ca = tmp_path / "authority.pem"
    ca.write_bytes(other.read_bytes())
    with tls_server:
        fleet = fleet_of(tls_server.url.replace("http:", "https:"), ca)
        with pytest.raises(UnreachableError, match="verify failed"):
            read(fleet)
        before = fleet.credentials()
        # As certificates are renewed: written beside, and renamed.
        (tmp_path / "new.pem").write_bytes(right.read_bytes())
        (tmp_path / "new.pem").replace(ca)
        assert fleet.credentials() != before
        assert read(fleet) == b"content"
        ca.write_bytes(other.read_bytes())
        with pytest.raises(UnreachableError, match="verify failed"):
            read(fleet)
        ca.unlink()
        with pytest.raises(UnreachableError, match=r"releases\.ca_file"):
            read(fleet)


def test_a_board_without_token_and_authority_has_nothing_to_exchange(server):
    assert fleet_of(server.url).credentials() is None


# --- answers


@pytest.mark.parametrize("status", [301, 302, 401, 403, 404, 416, 500, 503])
def test_every_other_status_is_an_error_and_no_redirect_is_followed(server, status):
    server.status["blobs/x"] = status
    with pytest.raises(StatusError) as caught:
        read(fleet_of(server.url))
    assert caught.value.status == status
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "path", ["", "../admin", "blobs/../../x", "blobs/x?y", "blobs/\r\nx", "blobs/ä", "x" * 600]
)
def test_paths_that_lead_elsewhere_are_not_asked_for(server, path):
    with pytest.raises(StatusError):
        read(fleet_of(server.url), path)
    assert server.asked == []


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/fleet"
        with pytest.raises(UnreachableError, match="refused"):
            read(fleet_of(url))


def test_a_body_that_trickles_is_as_good_as_none(server):
    clock = FakeClock()
    server.files["blobs/x"] = bytes(100_000)
    fleet = fleet_of(server.url, clock=clock)
    with fleet.open("blobs/x", threading.Event()) as body, pytest.raises(UnreachableError, match="bytes in"):
        for _ in body.chunks:
            clock.now_s += 1000.0


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nshort",
        b"HTTP/1.1 206 Partial\r\nContent-Length: 5\r\n\r\nshort",
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes x-y/z\r\nContent-Length: 5\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
        b"HTTP/1.1 200 " + b"x" * 100_000,
    ],
)
def test_answers_that_are_none_or_half_are_a_bad_network(answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                # Until the other side has had enough: else the rest becomes a reset.
                connection.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UnreachableError):
            read(fleet_of(f"http://127.0.0.1:{listening.getsockname()[1]}"))
        thread.join()
