"""The certificate of the REST server: checked at the start, and read again when its files change. No sockets.

Whoever renews a certificate replaces two files, one after the other. So every handshake looks at both files'
times, a pair is loaded into a context of its own, and one that does not fit is left: that before serves on.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any, Final

from cloud_hub.config import HttpSection
from cloud_hub.errors import ConfigError
from edge_cascade.errors import first_line

log = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]
# An empty password: OpenSSL would ask at the terminal for the one of an encrypted key.
_NO_PASSWORD: Final = ""


class Certificate:
    """A certificate with its chain, and its key: two PEM files, which may be one."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read them.

        Raises:
            ConfigError: in one line.
        """
        self._certificate = certificate
        self._key = key
        self._stamp = self._look()
        self._newest = _load(certificate, key)

    def context(self) -> ssl.SSLContext:
        """For a listener: TLS 1.2 or newer, with the newest certificate at every handshake."""
        context = _load(self._certificate, self._key)
        # Called for every handshake, also for one that names no server (RFC 6066, section 3).
        context.sni_callback = self._choose
        return context

    def _choose(self, connection: Any, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = self._renewed()

    def _renewed(self) -> ssl.SSLContext:
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._newest = _load(self._certificate, self._key)
            except ConfigError as error:
                log.warning("the certificate before serves on: %s", error)
            else:
                log.info("certificate read again file=%s", self._certificate)
        return self._newest

    def _look(self) -> _Stamp:
        stamps = []
        for path in (self._certificate, self._key):
            try:
                status = path.stat()
            except OSError:
                stamps.append((0, 0, 0))
            else:
                stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(stamps)


def certificate_of(config: HttpSection) -> Certificate | None:
    """What the configuration names, None for plain HTTP.

    Raises:
        ConfigError: for files that are missing, damaged, or do not belong together.
    """
    if config.certificate_file is None or config.key_file is None:
        return None
    return Certificate(Path(config.certificate_file), Path(config.key_file))


def _load(certificate: Path, key: Path) -> ssl.SSLContext:
    for name, path in (("certificate_file", certificate), ("key_file", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"http.{name} = {str(path)!r}: {error.strerror}") from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_NO_PASSWORD)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"http.key_file = {str(key)!r}: the key is not the certificate's") from error
        raise ConfigError(
            f"http.certificate_file = {str(certificate)!r}, http.key_file = {str(key)!r}: no PEM certificate "
            f"with an unencrypted key ({first_line(error)})"
        ) from error
    return context
