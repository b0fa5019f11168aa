"""TLS of the listening socket: a certificate and key from files, exchanged while the server runs.

TLS 1.2 at least, with Python's own choice of ciphers. New files are tried in a context of their own, and handed to
connections that begin afterwards; files that do not fit leave the old ones in use.
"""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

from ..config import ServeConfig
from ..errors import UserError

HANDSHAKE_TIMEOUT_S = 10.0


class Certificate:
    """What the files hold now. Raises `UserError` for files that cannot be used."""

    def __init__(self, certfile: str, keyfile: str | None):
        self._certfile, self._keyfile = certfile, keyfile
        self.listening = self._current = self._load()
        self.listening.sni_callback = self._choose  # called in every handshake, with a server name or without

    def reload(self) -> None:
        """Read the files again. Raises `UserError` and changes nothing when they cannot be used."""
        self._current = self._load()

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        for name, file in (("tls_certfile", self._certfile), ("tls_keyfile", self._keyfile)):
            try:
                if file is None:
                    continue
                if not file or not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would be waited for
                    raise UserError(f"{name}: {file!r} is not a regular file; name a PEM file", param=name)
                Path(file).open("rb").close()  # OpenSSL does not say which of both it cannot read
            except OSError as error:
                raise UserError(f"{name}: cannot read {file}: {error.strerror}", param=name) from None
        try:
            context.load_cert_chain(self._certfile, self._keyfile, password=self._no_password)
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
            raise UserError(
                f"tls_certfile {self._certfile} and tls_keyfile {self._keyfile or 'in it'} are no PEM certificate and "
                f"its key: {reason}",
                param="tls_certfile",
            ) from None
        return context

    def _no_password(self) -> str:
        """Instead of asking at the terminal."""
        raise UserError(
            f"the key in {self._keyfile or self._certfile} has a password; give one without", param="tls_keyfile"
        )


def certificate_of(config: ServeConfig) -> Certificate | None:
    """None without TLS. Raises `UserError`."""
    if config.tls_certfile is None:
        if config.tls_keyfile is not None:
            raise UserError("tls_keyfile needs tls_certfile", param="tls_certfile")
        return None
    return Certificate(config.tls_certfile, config.tls_keyfile)
