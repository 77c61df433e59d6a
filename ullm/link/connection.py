"""A front end's connection to its engine: opened again and again, as long as the front end lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from ullm.errors import EngineNotReady, HandshakeRefused, LinkLost, LinkRefused
from ullm.link.channel import Channel
from ullm.link.faults import to_error
from ullm.link.messages import (
    Admitted,
    Alive,
    Answer,
    Call,
    Failed,
    Greeting,
    Login,
    Model,
    Pulse,
    Refused,
    Rejected,
    ToFrontEnd,
    Tokens,
    Welcome,
)
from ullm.link.remote_router import RemoteRouter
from ullm.link.secret import is_proven, proof
from ullm.logs import get_logger
from ullm.protocol import shared_secret
from ullm.protocol.messages import Frame
from ullm.release import __version__
from ullm.tls.link_tls import tls_refusal

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5
"""Seconds between two attempts to connect: they double from the first to the longest."""
REFUSED_PAUSE = 5.0
"""Seconds after which a front end that was turned away tries again: somebody may have changed that."""
CONNECT_SECONDS = 5.0
"""Seconds for one attempt, until the engine has let the front end in."""
ALIVE_SECONDS = 5.0
"""Seconds between signs of life to the engine."""
SILENCE_SECONDS = 10.0
"""Seconds without a pulse after which an engine counts as lost: it hangs, or its host has gone."""

OpenStream = Callable[[], Awaitable[trio.abc.Stream]]
"""Connects to the engine; raises OSError if that is not there."""

log = get_logger(__name__)


class Listens(Protocol):
    """Hears what the engine says of itself."""

    async def take_model(self, model: Model) -> None:
        """New requests get this from now on."""

    def take_pulse(self, pulse: Pulse) -> None:
        """The engine has changed, or is alive."""

    def take_loss(self) -> None:
        """The engine is gone."""

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer's files that are known; empty for none."""


class Connection:
    """Keeps a front end connected; a supervised child.

    Args:
        address: of the engine, for messages.
        open_stream: connects to it.
        key: that it shares with the engine.
        router: whose requests it submits.
        listener: hears the rest.

    Attributes:
        refusal: why the engine did not let this front end in, the last time it was asked.
        first_try: set once it is known whether the engine lets it in.
    """

    def __init__(
        self,
        address: str,
        open_stream: OpenStream,
        key: bytes | None,
        router: RemoteRouter,
        listener: Listens,
    ) -> None:
        self._address = address
        self._open_stream = open_stream
        self._key = key
        self._router = router
        self._listener = listener
        self._outbox: list[Frame] = []
        self._news = trio.Event()
        self._calls: dict[int, _Pending] = {}
        self._numbers = 0
        self._said = ""
        self._serving = False
        self.refusal: LinkRefused | None = None
        self.first_try = trio.Event()

    @property
    def is_open(self) -> bool:
        """Whether an engine runs at the other end."""
        return self._serving

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, serve the connection until it is lost, and connect again."""
        task_status.started()
        pause = FIRST_PAUSE
        while True:
            try:
                with trio.fail_after(CONNECT_SECONDS) as patience:
                    stream = await self._open()
                    async with _closing(stream):
                        channel = await self._log_in(stream)
                        patience.deadline = float("inf")
                        self.refusal, pause, self._said = None, FIRST_PAUSE, ""
                        self.first_try.set()
                        await self._serve(channel)
            except LinkRefused as error:
                self._note_refusal(error)
                await trio.sleep(REFUSED_PAUSE)
            except (OSError, LinkLost, trio.TooSlowError) as error:
                self._say(
                    "the engine does not answer" if isinstance(error, trio.TooSlowError) else _cause(error)
                )
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def call(self, method: str, **arguments: Any) -> Any:
        """Have the engine do something, and return its result as it came.

        Raises:
            RequestError: the engine refuses it, or is lost meanwhile.
        """
        if not self._serving:
            raise EngineNotReady("away")
        self._numbers += 1
        number = self._numbers
        pending = self._calls[number] = _Pending()
        self.post(Call(number, method, arguments))
        try:
            await pending.done.wait()
        finally:
            self._calls.pop(number, None)
        if pending.error is not None:
            raise pending.error
        return pending.result

    def post_call(self, method: str, arguments: dict[str, Any]) -> None:
        """Have the engine do something, if it is there; nobody waits for the answer."""
        if self._serving:
            self._numbers += 1
            self.post(Call(self._numbers, method, arguments))

    def post(self, message: Frame) -> None:
        """Send a message, if the connection lives long enough."""
        self._outbox.append(message)
        self._news.set()

    async def _open(self) -> trio.abc.Stream:
        try:
            return await self._open_stream()
        except HandshakeRefused as error:
            raise LinkRefused(self._address, str(error)) from None

    # --- opening -------------------------------------------------------------------------------------------

    async def _log_in(self, stream: trio.abc.Stream) -> Channel[ToFrontEnd]:
        channel: Channel[ToFrontEnd] = Channel(stream, ToFrontEnd)
        try:
            greeting = await channel.receive()
        except LinkLost as error:  # with TLS it shows only now whether the engine accepts the certificate
            if reason := tls_refusal(error):
                raise LinkRefused(self._address, reason) from None
            raise
        if not isinstance(greeting, Greeting):
            raise LinkLost("its first frame is no greeting; is it an engine?")
        nonce = shared_secret.nonce()
        mine = proof(self._key if greeting.needs_key else None, "front end", greeting.nonce, nonce)
        name = f"{socket.gethostname()}:{os.getpid()}"
        await channel.send(Login(__version__, nonce, mine, name, self._listener.tokenizer_digest))
        self._check(greeting)  # after the login, so that the engine can say what does not fit, too
        answer = await channel.receive()
        if isinstance(answer, Rejected):
            raise LinkRefused(self._address, answer.reason)
        if not isinstance(answer, Welcome):
            raise LinkLost("it neither welcomes nor rejects; is it an engine?")
        if not is_proven(answer.proof, self._key, "engine", greeting.nonce, nonce):
            raise LinkRefused(self._address, "what listens there does not know the engine's key")
        channel.trust()
        return channel

    def _check(self, greeting: Greeting) -> None:
        if greeting.version != __version__:
            raise LinkRefused(
                self._address,
                f"the engine is ullm {greeting.version}, this front end is {__version__}; install the "
                "same version on both",
            )
        if greeting.needs_key and self._key is None:
            raise LinkRefused(
                self._address,
                "the engine wants a key; set --engine-key-file or ULLM_ENGINE_KEY to the engine's",
            )
        if self._key is not None and not greeting.needs_key:
            raise LinkRefused(
                self._address, "the engine has no key; give it this front end's, or neither one"
            )

    def _note_refusal(self, error: LinkRefused) -> None:
        if self.refusal is None or str(self.refusal) != str(error):
            log.error("not let in by the engine", cause=str(error))
        self.refusal = error
        self.first_try.set()

    def _say(self, cause: str) -> None:
        """Log why there is no engine, once for each reason."""
        if cause != self._said:
            self._said = cause
            log.warning("no engine", address=self._address, cause=cause)

    # --- serving -------------------------------------------------------------------------------------------

    async def _serve(self, channel: Channel[ToFrontEnd]) -> None:
        self._outbox.clear()
        log.info("connected to the engine", address=self._address)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, channel)
                nursery.start_soon(self._show_life)
                await self._receive(channel)
        except BaseExceptionGroup as group:
            lost, rest = group.split(LinkLost)
            if rest is not None or lost is None:
                raise
            cause = _first(lost)
            log.warning("engine lost; requests wait for it", requests=self._router.live, cause=str(cause))
            raise cause from None
        finally:
            self._lose()

    def _lose(self) -> None:
        self._serving = False
        self._router.disconnect()
        self._listener.take_loss()
        for pending in self._calls.values():
            pending.fail(EngineNotReady("lost; it may or may not have done that"))

    async def _receive(self, channel: Channel[ToFrontEnd]) -> None:
        while True:
            with trio.move_on_after(SILENCE_SECONDS) as patience:
                message = await channel.receive()
            if patience.cancelled_caught:
                raise LinkLost(f"no sign of life for {SILENCE_SECONDS:g} s")
            match message:
                case Tokens() | Admitted() | Refused() | Failed():
                    try:
                        self._router.take(message)
                    except ValueError as error:
                        raise LinkLost(str(error)) from None
                case Pulse():
                    self._listener.take_pulse(message)
                case Model():
                    await self._take_model(message)
                case Answer():
                    self._take_answer(message)
                case _:
                    raise LinkLost(f"it sent a {type(message).__name__}, which is out of place")

    async def _take_model(self, model: Model) -> None:
        await self._listener.take_model(model)
        if not self._serving:
            self._serving = True
            resumed = self._router.connect(self.post)
            log.info("engine runs", requests_resumed=resumed)

    def _take_answer(self, answer: Answer) -> None:
        pending = self._calls.get(answer.number)
        if pending is None:
            return
        if answer.error is not None:
            pending.fail(to_error(answer.error))
        else:
            pending.succeed(answer.result)

    async def _send(self, channel: Channel[ToFrontEnd]) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            messages, self._outbox = self._outbox, []
            if messages:
                await channel.send(*messages)

    async def _show_life(self) -> None:
        while True:
            await trio.sleep(ALIVE_SECONDS)
            self.post(Alive())


class _Pending:
    """A call that waits for its answer."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def succeed(self, result: Any) -> None:
        self.result = result
        self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


class _closing:
    """Closes a stream at once, whatever happens: nobody waits for a lost engine."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *exception: object) -> None:
        await trio.aclose_forcefully(self._stream)


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _cause(error: BaseException) -> str:
    """Return why there is no connection; trio wraps the errors of several addresses."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    cause = error.__cause__
    return _cause(_first(cause)) if cause is not None else str(error)
