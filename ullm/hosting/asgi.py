"""``hypercorn ullm.app:app``: the engine and its API inside any ASGI server, on asyncio or on trio.

Configured by ``ULLM_*`` variables. The engine starts with the server's lifespan; importing this module
starts nothing. Under a trio server everything runs in that server's loop; under an asyncio server the
engine and the app run in a trio loop of their own, in a thread, and messages are carried between the loops.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import trio

from ullm.config import EngineConfig, ServerConfig
from ullm.errors import EngineDead, EngineNotReady, LifespanMissing, RequestError
from ullm.hosting.bridge import BackgroundTask, TrioThread
from ullm.hosting.config_sources import from_env
from ullm.hosting.hosted_app import HostedApp
from ullm.hosting.hypercorn import (
    DrainFirst,
    asyncio_either,
    is_command,
    serves,
    survive_hangups,
    trio_either,
)
from ullm.hosting.process_settings import settings_of_the_process
from ullm.logs import configure, get_logger, is_configured
from ullm.protocol import stop_budget

if TYPE_CHECKING:
    from ullm.engine import Engine
    from ullm.link import RemoteEngine

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
OpenEngine: TypeAlias = Callable[
    [], "AbstractAsyncContextManager[tuple[Engine | RemoteEngine, ServerConfig]]"
]


@asynccontextmanager
async def open_from_env() -> AsyncIterator[tuple[Engine | RemoteEngine, ServerConfig]]:
    """Open an engine as ``ULLM_*`` variables configure it, and return the server's configuration with it.

    With ``ULLM_CONNECT`` it is one in another process.
    """
    from ullm.engine import open_engine
    from ullm.hosting.front_ends import check_asgi, open_remote_engine

    config, server_config = from_env(EngineConfig), from_env(ServerConfig)
    with settings_of_the_process(config.log_level, as_json=config.log_format == "json"):
        if server_config.ssl_certfile is not None:
            get_logger(__name__).warning("ULLM_SSL_CERTFILE ignored: this server's own options configure TLS")
        if server_config.http2:
            get_logger(__name__).warning("ULLM_HTTP2 ignored: this server's own options configure HTTP/2")
        check_asgi(server_config)
        if server_config.connect is not None:
            async with open_remote_engine(config, server_config) as remote:
                yield remote, server_config
            return
        async with open_engine(config) as engine:
            yield engine, server_config


class App:
    """The ASGI callable; one engine per lifespan.

    Args:
        open_engine: opens the engine; called in trio, once per lifespan.
    """

    def __init__(self, open_engine: OpenEngine = open_from_env) -> None:
        self._open_engine = open_engine
        self._hosted: HostedApp | None = None
        self._thread: TrioThread | None = None
        self._had_lifespan = False
        self._said_absence = False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection or lifespan, in whichever loop this is called."""
        if scope["type"] == "lifespan":
            survive_hangups()
            await self._lifespan(receive, send)
        elif self._hosted is None:
            await _refuse(scope, send, self._absence())
        elif trio.lowlevel.in_trio_task():
            await self._hosted.app(scope, receive, send)
        else:
            await self._carry(self._hosted, scope, receive, send)

    def _absence(self) -> RequestError:
        """Return why there is no engine; say it in the log once if it will not come by itself."""
        if self._had_lifespan:
            return EngineNotReady("not started, or has stopped")
        error = LifespanMissing()
        if not self._said_absence:
            self._said_absence = True
            if not is_configured():
                configure("warning")
            get_logger(__name__).error(str(error))
        return error

    @asynccontextmanager
    async def lifespan(self, outer: object = None) -> AsyncIterator[None]:
        """Have the engine run, for the lifespan of an application that mounts this one, on asyncio or trio.

        Starlette and FastAPI do not run the lifespan of what is mounted in them. Either
        ``FastAPI(lifespan=ullm.app.app.lifespan)``, or ``async with ullm.app.app.lifespan():`` in their own.

        Args:
            outer: the application around this one, which those frameworks pass.

        Raises:
            UllmError: the engine could not start; one line that names the cause and the remedy.
        """
        self._had_lifespan = True
        native = trio.lowlevel.in_trio_task()
        try:
            async with self._open_in_trio() if native else self._open_in_asyncio():
                yield
        finally:
            self._hosted = self._thread = None

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Follow the ASGI protocol; the server ends this task when all of the engine is gone."""
        await receive()
        started = False
        try:
            async with self.lifespan():
                started = True
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except Exception as error:
            if started:
                raise
            get_logger(__name__).error("could not start", cause=_one_line(error))
            await send({"type": "lifespan.startup.failed", "message": _one_line(error)})
        else:
            await send({"type": "lifespan.shutdown.complete"})

    async def _host(self, *, task_status: trio.TaskStatus[HostedApp]) -> None:
        """Keep the engine open until the lifespan ends. If it fails meanwhile, the probes report it."""
        from ullm.hosting.engine_host import EngineHost

        hosted: HostedApp | None = None
        try:
            async with self._open_engine() as (engine, server_config):
                candidate = HostedApp(EngineHost(engine), server_config)
                async with candidate.admin_listener():
                    hosted = candidate
                    task_status.started(hosted)
                    await hosted.stop.wait()
        except Exception as error:
            if hosted is None:
                raise
            get_logger(__name__).error("the engine has failed", cause=str(error))

    # --- under a trio server ---

    @asynccontextmanager
    async def _open_in_trio(self) -> AsyncIterator[None]:
        failure: BaseException | None = None
        async with trio.open_nursery() as nursery:
            try:
                self._hosted = hosted = await nursery.start(self._host)
                try:
                    with self._draining_in_trio(hosted):
                        yield
                finally:
                    hosted.stop.set()
            except BaseException as error:  # raised again outside of the nursery, which would wrap it
                failure = error
        if failure is not None:
            raise failure

    def _draining_in_trio(self, hosted: HostedApp) -> AbstractContextManager[object]:
        signalled = trio.Event()
        token = trio.lowlevel.current_trio_token()
        drain_first = DrainFirst(
            "hypercorn.trio.run" if serves() else None,
            hosted.drain,
            signalled.wait,
            trio_either,
            partial(token.run_sync_soon, signalled.set, idempotent=True),
            partial(token.run_sync_soon, hosted.host.engine.request_reload, idempotent=True),
            signals=is_command(),
        )
        hosted.stop_server = drain_first.stop_server if serves() else None
        return drain_first

    # --- under an asyncio server ---

    @asynccontextmanager
    async def _open_in_asyncio(self) -> AsyncIterator[None]:
        thread = self._thread = TrioThread().start()
        try:
            task = await thread.start_task_async(self._host)
            self._hosted = task.value
            with self._draining_in_asyncio(thread, task.value):
                try:
                    yield
                except Exception:  # not a cancellation, which does not wait for a drain
                    await self._leave(thread, task)
                    raise
                await self._leave(thread, task)
        finally:
            thread.stop(timeout=0)  # also when this task is cancelled
            await thread.stop_async(stop_budget.WATCHDOG_MARGIN)

    async def _leave(self, thread: TrioThread, task: BackgroundTask) -> None:
        with suppress(EngineDead):  # the thread has died; there is nothing left to stop
            thread.post(task.value.stop.set)
            await task.wait_async()

    def _draining_in_asyncio(self, thread: TrioThread, hosted: HostedApp) -> AbstractContextManager[object]:
        import asyncio

        async def drain() -> None:
            with suppress(EngineDead):
                await thread.call_async(hosted.drain)

        async def wait_signalled() -> None:
            await signalled.wait()

        def reload() -> None:
            with suppress(EngineDead):
                thread.post(hosted.host.engine.request_reload)

        signalled = asyncio.Event()
        loop = asyncio.get_running_loop()
        drain_first = DrainFirst(
            "hypercorn.asyncio.run" if serves() else None,
            drain,
            wait_signalled,
            asyncio_either,
            partial(loop.call_soon_threadsafe, signalled.set),
            reload,
            signals=is_command(),
        )
        hosted.stop_server = drain_first.stop_server if serves() else None
        return drain_first

    async def _carry(self, hosted: HostedApp, scope: Message, receive: Receive, send: Send) -> None:
        """Run the app in the trio thread, and carry its messages there and back."""
        import asyncio

        thread = self._thread
        assert thread is not None, "an engine hosted under asyncio has a thread"
        inbox, outbox = trio.open_memory_channel[Message](1)
        limit = hosted.server_config.stall_timeout

        async def pump() -> None:
            while True:
                await thread.call_async(inbox.send, await receive())

        began = False
        pumping = asyncio.ensure_future(pump())
        try:
            async with thread.pipe(partial(hosted.app, scope, outbox.receive)) as messages:
                while batch := await messages.next_batch():
                    for message in _joined(batch):
                        began = True
                        async with asyncio.timeout(limit):
                            await send(message)
        except TimeoutError:
            get_logger(__name__).warning("client does not read; its request is aborted", seconds=limit)
        except EngineDead as error:
            if began:
                raise
            await _refuse(scope, send, EngineDead(error.message))  # to a client it makes no difference why
        finally:
            pumping.cancel()
            await asyncio.gather(pumping, return_exceptions=True)


def _joined(batch: list[Message]) -> list[Message]:
    """Join adjacent pieces of a body into one message, so that what has piled up costs one write."""
    joined: list[Message] = []
    for message in batch:
        last = joined[-1] if joined else None
        if last is not None and message["type"] == last["type"] == "http.response.body":
            body = last.get("body", b"") + message.get("body", b"")
            joined[-1] = {**message, "body": body}
        else:
            joined.append(message)
    return joined


async def _refuse(scope: Message, send: Send, error: RequestError) -> None:
    """Answer where there is no engine: 503 with OpenAI's body, or a closed websocket."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013})
        return
    from ullm.server.api.errors import error_body

    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if not isinstance(error, LifespanMissing):  # which no waiting mends
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": error_body(error), "more_body": False})


def _one_line(error: BaseException) -> str:
    return str(error).strip().replace("\n", " ") or type(error).__name__


app = App()
