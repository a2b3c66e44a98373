"""The certificate authority: what it signs, what it refuses, and that it survives a cut."""

import datetime
import stat
import threading

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud_hub.identity.accounts import IdentityError
from cloud_hub.identity.authority import Authority

NOW = datetime.datetime(2026, 11, 20, 12, tzinfo=datetime.UTC)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


def revoked(authority):
    return [entry.serial_number for entry in x509.load_pem_x509_crl(authority.crl_file.read_bytes())]


def serial(issued):
    return x509.load_pem_x509_certificate(issued.certificate).serial_number


def test_a_client_certificate_names_its_board_and_is_for_clients_only(authority):
    issued = authority.issue_client("board-1", now=NOW)
    certificate = x509.load_pem_x509_certificate(issued.certificate)
    ca = x509.load_pem_x509_certificate(authority.ca_file.read_bytes())
    certificate.verify_directly_issued_by(ca)
    assert [name.value for name in certificate.subject] == ["board-1"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_before_utc == NOW - datetime.timedelta(days=1)
    assert certificate.not_valid_after_utc == issued.not_after == NOW + datetime.timedelta(days=5 * 365)
    assert issued.fingerprint == certificate.fingerprint(certificate.signature_hash_algorithm).hex()


def test_a_server_certificate_has_all_its_names_and_is_for_servers_only(authority):
    authority.issue_server(["broker.example", "192.0.2.7", "::1"], now=NOW)
    certificate = x509.load_pem_x509_certificate(authority.server_certificate_file.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "::1"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize("host", ["", "a b", "münchen.example", "-x", "a\n"])
def test_a_host_that_is_no_name_is_refused(authority, host):
    with pytest.raises(IdentityError, match="--host"):
        authority.issue_server([host], now=NOW)


def test_the_authority_is_made_once_and_its_key_is_secret(authority):
    authority.issue_client("board-1", now=NOW)
    key = authority.ca_file.with_name("ca.key")
    before = key.read_bytes(), authority.ca_file.read_bytes()
    authority.issue_client("board-2", now=NOW)
    assert (key.read_bytes(), authority.ca_file.read_bytes()) == before
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


def test_two_commands_at_once_make_one_authority(tmp_path):
    issued = []
    threads = [
        threading.Thread(
            target=lambda name=name: issued.append(Authority(tmp_path / "a").issue_client(name, now=NOW))
        )
        for name in ("one", "two", "three", "four")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ca = x509.load_pem_x509_certificate((tmp_path / "a/ca.pem").read_bytes())
    assert len(issued) == 4
    for one in issued:
        x509.load_pem_x509_certificate(one.certificate).verify_directly_issued_by(ca)


def test_a_cut_between_key_and_certificate_of_the_authority_is_repaired(authority):
    authority.issue_client("board-1", now=NOW)
    authority.ca_file.unlink()
    authority.crl_file.unlink()
    issued = authority.issue_client("board-2", now=NOW)
    ca = x509.load_pem_x509_certificate(authority.ca_file.read_bytes())
    x509.load_pem_x509_certificate(issued.certificate).verify_directly_issued_by(ca)


def test_the_revocation_list_keeps_every_revoked_certificate(authority):
    one, two = authority.issue_client("one", now=NOW), authority.issue_client("two", now=NOW)
    assert revoked(authority) == []
    assert authority.revoke_client("one", now=NOW)
    assert authority.revoke_client("one", now=NOW)
    assert authority.revoke_client("two", now=NOW)
    assert not authority.revoke_client("three", now=NOW)
    assert revoked(authority) == [serial(one), serial(two)]


def test_a_new_certificate_revokes_the_one_before(authority):
    first = authority.issue_client("one", now=NOW)
    second = authority.issue_client("one", now=NOW)
    assert revoked(authority) == [serial(first)]
    assert authority.expiry_of("one") == second.not_after


def test_the_revocation_list_does_not_end_before_the_authority(authority):
    authority.issue_client("one", now=NOW)
    crl = x509.load_pem_x509_crl(authority.crl_file.read_bytes())
    ca = x509.load_pem_x509_certificate(authority.ca_file.read_bytes())
    assert crl.next_update_utc == ca.not_valid_after_utc
    assert crl.is_signature_valid(ca.public_key())
    assert ca.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "edge-daemon private CA"


@pytest.mark.parametrize("name", ["ca.key", "ca.pem"])
def test_a_damaged_authority_is_reported_and_never_replaced(authority, name):
    authority.issue_client("one", now=NOW)
    file = authority.ca_file.with_name(name)
    file.write_bytes(b"damaged")
    with pytest.raises(IdentityError, match="restore both"):
        authority.issue_client("two", now=NOW)
    assert file.read_bytes() == b"damaged"


def test_a_key_of_another_authority_is_not_used(authority, tmp_path):
    authority.issue_client("one", now=NOW)
    other = Authority(tmp_path / "other")
    other.issue_client("one", now=NOW)
    authority.ca_file.with_name("ca.key").write_bytes(other.ca_file.with_name("ca.key").read_bytes())
    with pytest.raises(IdentityError, match="does not belong to"):
        authority.issue_client("two", now=NOW)


def test_a_damaged_record_stops_a_revocation(authority):
    authority.issue_client("one", now=NOW)
    (authority.ca_file.parent / "issued/one.pem").write_bytes(b"damaged")
    with pytest.raises(IdentityError, match="damaged"):
        authority.revoke_client("one", now=NOW)
