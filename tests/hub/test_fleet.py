"""What boards fetch, from a service that listens: files by Range, and over TLS, by the board's own fetcher."""

import asyncio
import hashlib
import http.client
import logging
import os
import shutil
import ssl
import threading
from contextlib import contextmanager

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.admin.metrics import Vitals
from cloud_hub.admin.ranges import CHUNK_BYTES, Part, decide_part
from cloud_hub.admin.service import Service
from cloud_hub.admin.tls import Certificate, certificate_of
from cloud_hub.admin.tokens import create_token
from cloud_hub.config import HttpSection, load_config, warnings_about
from cloud_hub.errors import ConfigError
from cloud_hub.registry import release_directory
from cloud_hub.releases.blobs import DELTAS, ReleaseBlobs
from cloud_hub.releases.layout import BLOBS, METADATA
from cloud_hub.rollouts.settings import TUF
from cloud_hub.store.store import Store
from edge_cascade.bundle import WEIGHTS, WEIGHTS_BLOB, load_bundle
from edge_cascade.weights_delta import apply_weights
from edge_daemon.clock import SystemClock
from edge_daemon.releases.http_fetch import HttpFleet, UnreachableError, parse_address
from tests.bundles import build
from tests.device.test_http_fetch import certificate

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TAG = f'"{SHA256}"'
BLOB = f"/v1/fleet/blobs/{SHA256}"


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "hub")
    store.open()
    for name, file, content in ((BLOBS, SHA256, CONTENT), (METADATA, "timestamp.json", b'{"a": 1}')):
        directory = store.state_dir / TUF / name
        directory.mkdir(parents=True)
        (directory / file).write_bytes(content)
    yield store
    store.close()


@pytest.fixture
def token(store, tmp_path):
    return store.database.run(lambda c: create_token(c, "boards", ["fetch"], now_ms=1, expires_at_ms=None))


@contextmanager
def listening(store, certificate=None, *, models=None):
    """A service on a loop of its own; its port."""
    vitals = Vitals(True, 0, 0, (), 0, True)
    service = Service(store, models or {}, vitals=lambda: vitals, problems=list, on_labelled=lambda _: None)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield _call(loop, service.start("127.0.0.1", 0, certificate))
    finally:
        _call(loop, service.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _call(loop, coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)


@pytest.fixture
def port(store):
    with listening(store) as port:
        yield port


class Fetcher:
    """One kept connection; what came is told as status, headers and body."""

    def __init__(self, port, token):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        self.token = token

    def get(self, path=BLOB, **headers):
        self.ask(path, **headers)
        return self.answer()

    def ask(self, path, **headers):
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}", **fields})

    def answer(self):
        answer = self.connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()


@pytest.fixture
def fetcher(port, token):
    fetcher = Fetcher(port, token)
    yield fetcher
    fetcher.connection.close()


# --- Range


def test_a_whole_file_has_its_digest_as_its_strong_etag(fetcher):
    status, headers, body = fetcher.get()
    assert (status, headers["ETag"], headers["Accept-Ranges"]) == (200, TAG, "bytes")
    assert (headers["Content-Type"], headers["Content-Length"]) == (
        "application/octet-stream",
        str(len(CONTENT)),
    )
    assert body == CONTENT


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=1000-", 1000, len(CONTENT) - 1),
        ("bytes=1000-1999", 1000, 1999),
        ("bytes=-300000", len(CONTENT) - 300_000, len(CONTENT) - 1),
        (f"bytes=7-{10**17}", 7, len(CONTENT) - 1),
        (f"bytes=5-{CHUNK_BYTES + 5}", 5, CHUNK_BYTES + 5),
    ],
)
def test_a_range_of_the_same_file_is_answered_with_that_part(fetcher, asked, first, last):
    status, headers, body = fetcher.get(Range=asked, If_Range=TAG)
    assert (status, headers["ETag"]) == (206, TAG)
    assert headers["Content-Range"] == f"bytes {first}-{last}/{len(CONTENT)}"
    assert body == CONTENT[first : last + 1]


@pytest.mark.parametrize(
    "validator", ['"another"', f"W/{TAG}", SHA256, "Sat, 29 Oct 2094 19:43:31 GMT", f'{TAG}, "b"', ""]
)
def test_if_range_with_anything_but_this_strong_etag_gets_the_whole_file(fetcher, validator):
    status, headers, body = fetcher.get(Range="bytes=1000-", If_Range=validator)
    assert (status, body) == (200, CONTENT)
    assert "Content-Range" not in headers


@pytest.mark.parametrize("asked", ["bytes=0-1,5-9", "bytes=9-3", "bytes=-", "lines=1-2", "bytes=x-", "bytes"])
def test_a_range_that_is_none_or_several_gets_the_whole_file(fetcher, asked):
    assert fetcher.get(Range=asked)[0] == 200


@pytest.mark.parametrize("asked", [f"bytes={len(CONTENT)}-", "bytes=-0", f"bytes={10**17}-{10**17}"])
def test_a_range_behind_the_end_says_how_long_the_file_is(fetcher, asked):
    status, headers, body = fetcher.get(Range=asked)
    assert (status, headers["Content-Range"], body) == (416, f"bytes */{len(CONTENT)}", b"")
    # Of another file it is no error, and the connection goes on.
    assert fetcher.get(Range=asked, If_Range='"another"')[0] == 200


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("If_None_Match", TAG, 304),
        ("If_None_Match", f'"x", W/{TAG}', 304),
        ("If_None_Match", "*", 304),
        ("If_None_Match", '"x"', 200),
        ("If_Match", '"x"', 412),
        ("If_Match", f"W/{TAG}", 412),
        ("If_Match", TAG, 200),
    ],
)
def test_preconditions_are_those_of_rfc_9110(fetcher, field, value, status):
    found, _, body = fetcher.get(**{field: value})
    assert (found, body) == (status, CONTENT if status == 200 else b"")
    assert fetcher.get(Range="bytes=0-1")[2] == CONTENT[:2]


def test_a_digest_that_no_release_has_is_404_and_so_is_a_file_that_went(fetcher, store):
    assert fetcher.get(f"/v1/fleet/blobs/{'0' * 64}")[0] == 404
    assert fetcher.get(f"/v1/fleet/blobs/{SHA256.upper()}")[0] == 404
    (store.state_dir / TUF / BLOBS / SHA256).unlink()
    assert fetcher.get()[0] == 404


def test_metadata_come_whole_whatever_is_asked(fetcher):
    status, headers, body = fetcher.get("/v1/fleet/metadata/timestamp.json", Range="bytes=3-")
    assert (status, headers["Content-Type"], body) == (200, "application/json", b'{"a": 1}')
    assert fetcher.get("/v1/fleet/metadata/2.root.json")[0] == 404
    assert fetcher.get("/v1/fleet/metadata/..%2Fkey.json")[0] == 404


def test_however_many_wait_for_a_difference_files_are_served(fetcher, port, token, monkeypatch):
    is_asked, goes_on = threading.Event(), threading.Event()

    def slow(blobs, held, wanted):
        is_asked.set()
        assert goes_on.wait(20)
        return b"a difference"

    monkeypatch.setattr(ReleaseBlobs, "delta", slow)
    waiting = [Fetcher(port, token) for _ in range(40)]
    for each in waiting:
        each.ask(f"/v1/fleet/deltas/pump/{'0' * 64}/{'1' * 64}")
    assert is_asked.wait(20)
    assert fetcher.get()[0] == 200
    goes_on.set()
    for each in waiting:
        assert each.answer()[::2] == (200, b"a difference")
        each.connection.close()


def test_a_difference_is_made_by_the_first_who_asks_and_sent_from_the_disk(fetcher, store, tmp_path):
    parts, contents = [], []
    for seed in (0, 7):
        directory = build(tmp_path / f"seed{seed}", seed=seed) / "bundle"
        bundle = load_bundle(directory)
        shutil.copytree(directory, release_directory(store.state_dir, bundle.bundle_id))
        parts.append(bundle.weights_sha256)
        contents.append((directory / WEIGHTS / WEIGHTS_BLOB).read_bytes())
    path = f"/v1/fleet/deltas/tiny/{parts[0]}/{parts[1]}"
    for _ in range(2):
        status, headers, body = fetcher.get(path)
        assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
        assert headers["ETag"] == f'"{hashlib.sha256(body).hexdigest()}"'
        assert apply_weights(contents[0], body, max_bytes=len(contents[1])) == contents[1]
    status, _, rest = fetcher.get(path, Range="bytes=10-", If_Range=headers["ETag"])
    assert (status, rest) == (206, body[10:])
    assert fetcher.get(f"/v1/fleet/deltas/tiny/{parts[0]}/{parts[0]}")[0] == 404
    # A disk that takes nothing: it is made anew for each.
    shutil.rmtree(store.state_dir / DELTAS)
    (store.state_dir / DELTAS).touch()
    assert fetcher.get(path)[::2] == (200, body)


def test_whoever_leaves_in_the_middle_disturbs_nobody(fetcher, port, token, store, caplog):
    long = bytes(32 * 2**20)
    digest = hashlib.sha256(long).hexdigest()
    (store.state_dir / TUF / BLOBS / digest).write_bytes(long)
    with caplog.at_level(logging.WARNING):
        leaver = Fetcher(port, token)
        leaver.ask(f"/v1/fleet/blobs/{digest}")
        answer = leaver.connection.getresponse()
        answer.read(10)
        answer.close()
        leaver.connection.close()
        assert fetcher.get(f"/v1/fleet/blobs/{digest}")[2] == long
    assert caplog.messages == []


@given(
    st.one_of(st.none(), st.text(max_size=12), st.from_regex(r"bytes=\d{0,3}-\d{0,3}", fullmatch=True)),
    st.sampled_from([None, TAG, '"other"']),
    st.integers(0, 500),
)
def test_whatever_is_asked_is_inside_the_file_or_refused(asked, if_range, size_bytes):
    part = decide_part(asked, if_range, TAG, size_bytes)
    if part is None:
        assert asked.startswith("bytes=")
        assert if_range in {None, TAG}
        return
    assert 0 <= part.start <= part.start + part.size_bytes <= size_bytes
    if if_range == '"other"':
        assert part == Part(0, size_bytes)


# --- TLS


@pytest.fixture
def authority(tmp_path):
    ca, _, issuer = certificate(tmp_path, "ca")
    return ca, issuer


@pytest.fixture
def files(tmp_path, authority):
    pem, key, _ = certificate(tmp_path, "hub", issuer=authority[1])
    return pem, key


@pytest.fixture
def tls_port(store, files):
    with listening(store, Certificate(*files)) as port:
        yield port


def board(port, tmp_path, token, ca):
    (tmp_path / "token").write_text(token, encoding="ascii")
    address = parse_address(
        f"https://127.0.0.1:{port}/v1/fleet", ca_file=str(ca), token_file=str(tmp_path / "token")
    )
    return HttpFleet(address, max_bytes_per_s=0, clock=SystemClock(), wait=lambda stop, delay_s: False)


def read(fleet):
    return b"".join(fleet.stream(f"blobs/{SHA256}", threading.Event()))


def served_certificate(port):
    """As PEM, from whoever answers."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=20).strip()


def replace(files, renewed):
    for old, new in zip(files, renewed, strict=True):
        new.replace(old)


def test_a_board_fetches_over_tls_from_a_hub_that_its_ca_has_signed(tls_port, tmp_path, token, authority):
    fleet = board(tls_port, tmp_path, token, authority[0])
    assert read(fleet) == CONTENT
    with fleet.open(f"blobs/{SHA256}", threading.Event(), start=1000, etag=TAG) as body:
        assert (body.start, body.etag, b"".join(body.chunks)) == (1000, TAG, CONTENT[1000:])
    with fleet.open(f"blobs/{SHA256}", threading.Event(), start=1000, etag='"of another file"') as body:
        assert (body.start, body.etag, b"".join(body.chunks)) == (0, TAG, CONTENT)


def test_a_board_with_another_ca_does_not(tls_port, tmp_path, token):
    other, _, _ = certificate(tmp_path, "other")
    with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
        read(board(tls_port, tmp_path, token, other))


def test_nothing_older_than_tls_1_2_is_spoken(files):
    assert Certificate(*files).context().minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_renewed_certificate_is_served_from_the_next_connection_on(tls_port, files, tmp_path, authority):
    before = served_certificate(tls_port)
    assert before == files[0].read_text(encoding="ascii").strip()
    replace(files, certificate(tmp_path, "renewed", issuer=authority[1])[:2])
    after = served_certificate(tls_port)
    assert after == files[0].read_text(encoding="ascii").strip() != before


def test_while_only_one_of_both_files_is_new_the_old_pair_is_served(
    tls_port, files, tmp_path, authority, caplog
):
    before = served_certificate(tls_port)
    pem, key, _ = certificate(tmp_path, "renewed", issuer=authority[1])
    renewed = pem.read_text(encoding="ascii").strip()
    pem.replace(files[0])
    assert [served_certificate(tls_port), served_certificate(tls_port)] == [before, before]
    assert [message.split(":")[0] for message in caplog.messages] == ["the certificate before serves on"]
    key.replace(files[1])
    assert served_certificate(tls_port) == renewed


def test_a_certificate_that_went_away_is_served_on(tls_port, files):
    before = served_certificate(tls_port)
    files[0].unlink()
    assert served_certificate(tls_port) == before


def test_files_that_cannot_be_used_are_named_in_one_line(files, tmp_path, authority):
    pem, key = files
    other_key = certificate(tmp_path, "another", issuer=authority[1])[1]
    (tmp_path / "text").write_text("no certificate", encoding="ascii")
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        authority[1][0].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    nowhere = tmp_path / "nowhere"
    for given_pem, given_key, says in (
        (nowhere, key, f"http.certificate_file = '{nowhere}': No such file or directory"),
        (pem, nowhere, f"http.key_file = '{nowhere}': No such file or directory"),
        (pem, tmp_path, f"http.key_file = '{tmp_path}': Is a directory"),
        (pem, other_key, f"http.key_file = '{other_key}': the key is not the certificate's"),
        (tmp_path / "text", key, "no PEM certificate with an unencrypted key"),
        (pem, tmp_path / "text", "no PEM certificate with an unencrypted key"),
        (pem, locked, "no PEM certificate with an unencrypted key"),
    ):
        with pytest.raises(ConfigError) as caught:
            certificate_of(HttpSection(certificate_file=str(given_pem), key_file=str(given_key)))
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_key_that_may_not_be_read_is_said(files):
    files[1].chmod(0)
    with pytest.raises(ConfigError, match=r"key_file.*Permission denied"):
        Certificate(*files)


def test_a_certificate_without_its_key_is_a_wrong_configuration(tmp_path):
    path = tmp_path / "hub.toml"
    for given_one, missing in (("certificate_file", "key_file"), ("key_file", "certificate_file")):
        path.write_text(f"[http]\n{given_one} = 'x'\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"http\.{missing}: missing; TLS needs"):
            load_config(path, {})


def test_with_tls_listening_on_the_network_is_not_warned_of(tmp_path):
    path = tmp_path / "hub.toml"
    path.write_text(
        "[http]\nhost = '0.0.0.0'\ncertificate_file = 'a'\nkey_file = 'b'\n[[models]]\nbundle = 'digits'\n",
        encoding="utf-8",
    )
    assert warnings_about(load_config(path, {})) == []
