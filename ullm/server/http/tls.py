"""TLS: the certificate, checked before anything is started, and streams whose every wait has an end."""

from __future__ import annotations

import contextlib
import ssl

import trio

from ullm.errors import ConfigError

CLOSE_WITHIN = 1.0
"""Seconds for telling the client that the connection ends; its socket is closed in any case."""


class _EncryptedKey(Exception):
    """The key wants a password; OpenSSL would ask for it on the terminal."""


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """Return what connections are encrypted with, from two PEM files; None without them.

    TLS 1.2 and 1.3, ciphers by Python's defaults; HTTP/1.1 is all that is negotiated.

    Raises:
        ConfigError: a file that is missing, cannot be read, or does not belong to the other.
    """
    if certificate is None or key is None:
        return None
    for option, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        _check_readable(option, path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except _EncryptedKey:
        raise ConfigError(
            f"--ssl-keyfile {key}: the key is encrypted; give one without a password, readable only by the "
            "server's user"
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(_cause(error, certificate, key)) from None
    return context


def _check_readable(option: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from None


def _refuse_password() -> str:
    raise _EncryptedKey


def _cause(error: ssl.SSLError, certificate: str, key: str) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"--ssl-keyfile {key} does not belong to --ssl-certfile {certificate}"
    try:
        ssl.create_default_context().load_verify_locations(certificate)
    except ssl.SSLError:
        return f"--ssl-certfile {certificate}: no certificate in PEM format"
    return f"--ssl-keyfile {key}: no private key in PEM format that fits --ssl-certfile ({error.reason})"


class TlsStream:
    """A connection's TLS, with the methods of `trio.SSLStream` that Hypercorn calls."""

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext) -> None:
        self.transport_stream = stream
        self._tls = trio.SSLStream(stream, context, server_side=True)

    async def do_handshake(self) -> None:
        """Agree on keys, once; further calls do nothing.

        Raises:
            trio.BrokenResourceError: the client speaks no TLS that is accepted, or has left.
        """
        await self._tls.do_handshake()

    def selected_alpn_protocol(self) -> str | None:
        """Return the protocol that the handshake agreed on, if the client names any."""
        protocol: str | None = self._tls.selected_alpn_protocol()
        return protocol

    async def receive_some(self, max_bytes: int) -> bytes:
        """Receive some bytes; none at the end."""
        return bytes(await self._tls.receive_some(max_bytes))

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all bytes."""
        await self._tls.send_all(data)

    async def aclose(self) -> None:
        """Tell the client that this is the end, if it reads, and close the socket."""
        with (
            trio.move_on_after(CLOSE_WITHIN),
            contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError),
        ):
            await self._tls.aclose()
        self.transport_stream.socket.close()
