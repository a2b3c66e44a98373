"""A private certificate authority in a folder: EC P-256, one level, its own revocation list.

    ca.key           0600, made on first use; the hub's service does not need it
    ca.pem           what both ends check the other with
    crl.pem          revoked serial numbers; signed anew at each revocation
    server.pem|.key  the broker's
    issued/NAME.pem  the certificate that NAME has now: what a revocation revokes

A certificate is either for clients or for a server (RFC 5280, section 4.2.1.12), never both: the broker's key
does not log in as anybody, and a board's key does not pose as the broker.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud_hub.identity.accounts import IdentityError
from edge_cascade.durable import write_durably

CA_DAYS: Final = 20 * 365
CERTIFICATE_DAYS: Final = 5 * 365
# A board without a battery-backed clock may be a little behind.
CLOCK_SKEW: Final = datetime.timedelta(days=1)

_CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
_SERVER = ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True, slots=True)
class Issued:
    """A key with its certificate, both PEM."""

    certificate: bytes
    key: bytes
    fingerprint: str
    not_after: datetime.datetime


class Authority:
    """The authority in `directory`, which is created when something is first issued."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def ca_file(self) -> Path:
        """The authority's own certificate; absent before the first use."""
        return self._directory / "ca.pem"

    @property
    def crl_file(self) -> Path:
        """The revocation list; absent before the first use."""
        return self._directory / "crl.pem"

    @property
    def server_certificate_file(self) -> Path:
        """The broker's certificate; absent until `issue_server`."""
        return self._directory / "server.pem"

    @property
    def server_key_file(self) -> Path:
        """The broker's key; absent until `issue_server`."""
        return self._directory / "server.key"

    def issue_client(self, name: str, *, now: datetime.datetime) -> Issued:
        """A certificate with common name `name`; the one that `name` had before is revoked.

        Raises:
            IdentityError: when the folder cannot be read or written.
        """
        with self._opened(now) as ca:
            record = self._directory / "issued" / f"{name}.pem"
            issued = _issue(ca, name, _CLIENT, alternative_names=(), now=now)
            self._revoke_recorded(ca, record, now)
            record.parent.mkdir(mode=0o700, exist_ok=True)
            # Recorded before anybody has it: a certificate that is not on record could not be revoked.
            write_durably(record, issued.certificate)
            return issued

    def issue_server(self, hosts: Sequence[str], *, now: datetime.datetime) -> Issued:
        """A certificate for the broker under each of `hosts` (names or addresses), stored in the folder.

        Raises:
            IdentityError: for a host that is neither, or when the folder cannot be read or written.
        """
        names = [_general_name(host) for host in hosts]
        with self._opened(now) as ca:
            issued = _issue(ca, hosts[0][:64], _SERVER, alternative_names=names, now=now)
            write_durably(self.server_key_file, issued.key, mode=0o600)
            write_durably(self.server_certificate_file, issued.certificate)
            return issued

    def revoke_client(self, name: str, *, now: datetime.datetime) -> bool:
        """Put the certificate that `name` has on the revocation list; whether there was one.

        Raises:
            IdentityError: when the folder cannot be read or written.
        """
        record = self._directory / "issued" / f"{name}.pem"
        if not record.exists():
            return False
        with self._opened(now) as ca:
            self._revoke_recorded(ca, record, now)
        return True

    def prepare(self, *, now: datetime.datetime) -> None:
        """Create the authority and its empty revocation list where they are missing.

        Raises:
            IdentityError: when the folder cannot be read or written.
        """
        with self._opened(now):
            pass

    def expiry_of(self, name: str) -> datetime.datetime | None:
        """When the certificate that `name` has ends; None without one."""
        return certificate_expiry(self._directory / "issued" / f"{name}.pem")

    @contextmanager
    def _opened(self, now: datetime.datetime) -> Iterator[_Ca]:
        """The key and certificate under a lock: two commands at once must not make two authorities."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._directory / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                ca = self._load() if self.ca_file.exists() else self._create(now)
                if not self.crl_file.exists():
                    self._write_crl(ca, [], now)
                yield ca
        except OSError as error:
            raise IdentityError(
                f"certificate authority {str(self._directory)!r}: {error.strerror or error}"
            ) from error

    def _load(self) -> _Ca:
        try:
            key = serialization.load_pem_private_key((self._directory / "ca.key").read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate(self.ca_file.read_bytes())
        except (ValueError, TypeError) as error:
            raise IdentityError(
                f"in {str(self._directory)!r} ca.key or ca.pem is damaged, restore both ({error})"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise IdentityError(f"in {str(self._directory)!r} ca.key does not belong to ca.pem: restore both")
        return _Ca(key, certificate)

    def _create(self, now: datetime.datetime) -> _Ca:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge-daemon private CA")])
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        # ca.pem last: as long as it is missing nothing was issued, and the key may be made again.
        write_durably(self._directory / "ca.key", _key_pem(key), mode=0o600)
        write_durably(self.ca_file, certificate.public_bytes(serialization.Encoding.PEM))
        return _Ca(key, certificate)

    def _revoke_recorded(self, ca: _Ca, record: Path, now: datetime.datetime) -> None:
        if not record.exists():
            return
        try:
            serial = x509.load_pem_x509_certificate(record.read_bytes()).serial_number
            listed = list(x509.load_pem_x509_crl(self.crl_file.read_bytes()))
        except ValueError as error:
            raise IdentityError(
                f"{str(record)!r} or {str(self.crl_file)!r} is damaged ({error}): restore them from a backup"
            ) from error
        if any(entry.serial_number == serial for entry in listed):
            return
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        self._write_crl(ca, [*listed, entry], now)

    def _write_crl(self, ca: _Ca, revoked: Sequence[x509.RevokedCertificate], now: datetime.datetime) -> None:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(ca.certificate.subject)
            .last_update(now - CLOCK_SKEW)
            # Nobody fetches this list, it is replaced when it changes: a date in reach would one day lock out
            # the whole fleet, because OpenSSL refuses everybody once it has passed.
            .next_update(ca.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(len(revoked) + 1), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key()), critical=False
            )
        )
        for entry in revoked:
            builder = builder.add_revoked_certificate(entry)
        crl = builder.sign(ca.key, hashes.SHA256())
        write_durably(self.crl_file, crl.public_bytes(serialization.Encoding.PEM))


@dataclass(frozen=True, slots=True)
class _Ca:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def certificate_expiry(path: Path) -> datetime.datetime | None:
    """When the certificate in the PEM file `path` ends; None where there is none that can be read."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None


def _issue(
    ca: _Ca,
    common_name: str,
    usage: x509.ObjectIdentifier,
    *,
    alternative_names: Sequence[x509.GeneralName],
    now: datetime.datetime,
) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    public_key = key.public_key()
    authority_key = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    not_after = min(now + datetime.timedelta(days=CERTIFICATE_DAYS), ca.certificate.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(ca.certificate.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_key), critical=False
        )
    )
    if alternative_names:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternative_names), critical=False)
    certificate = builder.sign(ca.key, hashes.SHA256())
    return Issued(
        certificate.public_bytes(serialization.Encoding.PEM),
        _key_pem(key),
        certificate.fingerprint(hashes.SHA256()).hex(),
        not_after,
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        if not host or host.startswith("-") or any(character.isspace() for character in host):
            raise ValueError
        return x509.DNSName(host)
    except ValueError as error:
        raise IdentityError(
            f"--host {host!r} is neither an address nor a host name in ASCII (IDN: write the xn-- form)"
        ) from error
