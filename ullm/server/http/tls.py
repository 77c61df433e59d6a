"""TLS: the certificate, checked before anything is started, and streams whose every wait has an end."""

from __future__ import annotations

import contextlib
import ssl

import trio

from ullm.tls.certificates import load_certificate

CLOSE_WITHIN = 1.0
"""Seconds for telling the client that the connection ends; its socket is closed in any case."""


def tls_context(certificate: str | None, key: str | None, *, http2: bool = False) -> ssl.SSLContext | None:
    """Return what connections are encrypted with, from two PEM files; None without them.

    TLS 1.2 and 1.3, ciphers by Python's defaults; HTTP/1.1 is negotiated, and HTTP/2 if it is wanted.

    Raises:
        ConfigError: a file that is missing, cannot be read, or does not belong to the other.
    """
    if certificate is None or key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
    load_certificate(context, certificate, key, "--ssl")
    return context


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
