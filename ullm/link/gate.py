"""The engine's side of the link: listens for front ends, lets in those that may, serves each in a task."""

from __future__ import annotations

import os
import socket
import sys

import trio

from ullm.engine import Engine
from ullm.errors import HandshakeRefused, LinkLost
from ullm.link.calls import Calls, Shutdown
from ullm.link.channel import Channel
from ullm.link.front_end_session import FrontEndSession
from ullm.link.messages import Greeting, Login, Rejected, ToEngine, Welcome
from ullm.link.secret import is_proven, proof
from ullm.logs import get_logger
from ullm.protocol import shared_secret
from ullm.release import __version__
from ullm.system.peers import foreign_user
from ullm.tls.link_tls import LinkTls

LOGIN_SECONDS = 5.0
"""Seconds in which a front end must have logged in."""
TCP = (socket.AF_INET, socket.AF_INET6)
MAX_CONNECTIONS = 256
"""Connections at a time, those included that have not logged in."""

log = get_logger(__name__)


class Gate:
    """Lets front ends in; a supervised child of the engine.

    Args:
        key: front ends must know it, too; None on a unix socket that only this user may open.
        tls: encrypts connections through TCP; None: nothing does.
        shutdown: begins the stop of the process, for ``POST /admin/shutdown`` through a front end; default:
            the engine's own.
    """

    def __init__(
        self,
        engine: Engine,
        key: bytes | None,
        shutdown: Shutdown | None = None,
        tls: LinkTls | None = None,
    ) -> None:
        self._engine = engine
        self._tls = tls
        self._key = key
        self._calls = Calls(engine, shutdown or (lambda timeout, by: engine.request_shutdown(timeout, by=by)))
        self._places = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def serve(
        self, listener: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept front ends until cancelled.

        Args:
            listener: listens already, and stays open if this fails, so that a supervisor can restart it.
        """
        duplicate = trio.SocketListener(trio.socket.from_stdlib_socket(listener.dup()))
        async with trio.open_nursery() as nursery:
            task_status.started()
            await trio.serve_listeners(self._serve_stream, [duplicate], handler_nursery=nursery)

    async def _serve_stream(self, stream: trio.SocketStream) -> None:
        if self._places.available_tokens < 1:
            log.warning("front end turned away: too many connections", limit=MAX_CONNECTIONS)
            await trio.aclose_forcefully(stream)
            return
        async with self._places:
            stranger, secured = _stranger(stream), await self._secured(stream)
            if secured is not None:
                await self.serve_stream(secured, stranger=stranger)

    async def _secured(self, stream: trio.SocketStream) -> trio.abc.Stream | None:
        """Return the stream to talk over; None for a front end that may not come in, which is told by TLS."""
        if self._tls is None or stream.socket.family not in TCP:
            return stream
        peer = str(stream.socket.getpeername()[0])
        cause = f"no TLS handshake within {LOGIN_SECONDS:g} s"
        with trio.move_on_after(LOGIN_SECONDS):
            try:
                return await self._tls.accept(stream)
            except HandshakeRefused as error:
                cause = str(error)
        log.warning("front end turned away", address=peer, cause=cause)
        await trio.aclose_forcefully(stream)
        return None

    async def serve_stream(self, stream: trio.abc.Stream, *, stranger: str = "") -> None:
        """Serve one front end until it leaves, or is cancelled; its requests end with it.

        Args:
            stranger: why whoever is at the other end may not come in; empty if that is not known.
        """
        channel: Channel[ToEngine] = Channel(stream, ToEngine)
        try:
            login = await self._let_in(channel, stranger)
            if login is not None:
                await FrontEndSession(self._engine, self._calls, channel, login).run()
        except LinkLost as error:
            log.info("front end gone", cause=str(error))
        except BaseExceptionGroup as group:
            lost, rest = group.split(LinkLost)
            if rest is not None:
                raise
            log.info("front end gone", cause=str(_first(lost)))
        finally:
            await trio.aclose_forcefully(stream)

    async def _let_in(self, channel: Channel[ToEngine], stranger: str) -> Login | None:
        """Open the connection; return the login of a front end that may come in."""
        nonce = shared_secret.nonce()
        with trio.move_on_after(LOGIN_SECONDS) as patience:
            await channel.send(Greeting(__version__, nonce, self._key is not None))
            login = await channel.receive()
            if not isinstance(login, Login):
                raise LinkLost(f"its first frame is no Login, but a {type(login).__name__}")
            reason = stranger or self._objection(login, nonce)
            if not reason:
                await channel.send(Welcome(proof(self._key, "engine", nonce, login.nonce)))
                channel.trust()
                return login
            log.warning("front end turned away", front_end=login.name, cause=reason)
            await channel.send(Rejected(reason))
        if patience.cancelled_caught:
            log.info("front end turned away: it did not log in", seconds=LOGIN_SECONDS)
        return None

    def _objection(self, login: Login, nonce: bytes) -> str:
        """Return why a front end may not come in; empty if it may."""
        ours = __version__
        if login.version != ours:
            return (
                f"the engine is ullm {ours}, the front end {login.version}; install the same version on both"
            )
        if not is_proven(login.proof, self._key, "front end", nonce, login.nonce):
            return "the front end does not know the engine's key; give both the same one"
        return ""


def _stranger(stream: trio.SocketStream) -> str:
    """Return why another user of this machine may not come in through a unix socket."""
    user = None if stream.socket.family in TCP else foreign_user(stream.socket)
    if sys.platform == "win32" or user is None:
        return ""  # through TCP a key is needed
    return f"the front end runs as user {user}, the engine as {os.geteuid()}; run both as the same user"


def _first(group: BaseException | None) -> BaseException | None:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group
