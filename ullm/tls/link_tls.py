"""Mutual TLS between hosts: both ends show a certificate, and accept those of one authority only.

The authority is meant to be the deployment's own: whoever has a certificate of it is let in, as far as TLS is
concerned. The end that connects also checks that the other's certificate has the name or address by which it
was called.
"""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import dataclass

import trio

from ullm.config import EngineConfig
from ullm.errors import HandshakeRefused
from ullm.tls.certificates import load_authorities, load_certificate

OPTION = "--link"
ALERT_SECONDS = 1.0
"""For a few bytes to an end that is refused."""


@dataclass(frozen=True)
class LinkTls:
    """What connections between hosts are encrypted with, for either end; made by `link_tls`."""

    server: ssl.SSLContext
    client: ssl.SSLContext

    async def accept(self, stream: trio.SocketStream) -> trio.SSLStream[trio.SocketStream]:
        """Agree on keys with whoever has connected.

        Raises:
            HandshakeRefused: it shows no certificate of the authority, does not accept ours, or has gone.
        """
        tls = trio.SSLStream(stream, self.server, server_side=True, https_compatible=True)
        return await _agreed(tls)

    async def connect(self, stream: trio.SocketStream, host: str) -> trio.SSLStream[trio.SocketStream]:
        """Agree on keys with an end that listens. Whether it accepts our certificate shows in what follows.

        Args:
            host: the name or address by which it was called.

        Raises:
            HandshakeRefused: it shows no certificate of the authority for that name, or speaks no TLS.
        """
        tls = trio.SSLStream(stream, self.client, server_hostname=host, https_compatible=True)
        return await _agreed(tls)


def link_tls(config: EngineConfig) -> LinkTls | None:
    """Return what ``--link-certfile``, ``--link-keyfile`` and ``--link-ca-file`` say; None without them.

    Raises:
        ConfigError: a file that is missing, cannot be read, or does not belong to the other.
    """
    if config.link_certfile is None or config.link_keyfile is None or config.link_ca_file is None:
        return None
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)  # without the system's authorities
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        load_certificate(context, config.link_certfile, config.link_keyfile, OPTION)
        load_authorities(context, config.link_ca_file, f"{OPTION}-ca-file")
        contexts.append(context)
    return LinkTls(*contexts)


def tls_refusal(error: BaseException | None) -> str | None:
    """Return in one line why TLS has failed; None for an error that has another cause."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__
    match error:
        case None:
            return None
        case ssl.SSLCertVerificationError():
            why = error.verify_message or "it is not valid"
            return (
                f"the other end's certificate is not accepted: {why}; it must be of the --link-ca-file, and "
                "for the name by which the engine is called"
            )
    reason = error.reason or str(error)
    if "EOF" in reason:
        return "the other end has closed the connection during the TLS handshake"
    if "ALERT" in reason:
        alert = reason.partition("ALERT_")[2].replace("_", " ").lower()
        return (
            f"the other end does not accept this one's certificate ({alert}); --link-certfile must be of its "
            "--link-ca-file"
        )
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the other end shows no certificate; give it --link-certfile and --link-keyfile, too"
    return (
        f"the other end does not speak TLS ({reason.replace('_', ' ').lower()}); give both ends "
        "--link-certfile, or neither"
    )


async def _agreed(tls: trio.SSLStream[trio.SocketStream]) -> trio.SSLStream[trio.SocketStream]:
    try:
        try:
            await tls.do_handshake()
        except trio.BrokenResourceError as error:
            await _send_alert(tls)
            raise HandshakeRefused(tls_refusal(error) or "it left during the TLS handshake") from None
    except BaseException:
        await trio.aclose_forcefully(tls)
        raise
    return tls


async def _send_alert(tls: trio.SSLStream[trio.SocketStream]) -> None:
    """Send what OpenSSL has to say about a handshake that failed, which trio keeps to itself.

    Without it the other end could not tell a certificate that is refused from a host that has gone.
    """
    alert: bytes = tls._outgoing.read()
    with trio.move_on_after(ALERT_SECONDS), contextlib.suppress(trio.BrokenResourceError):
        await tls.transport_stream.send_all(alert)
