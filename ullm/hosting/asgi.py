"""``hypercorn ullm.app:app``: the engine and its API inside any ASGI server, on asyncio or on trio.

Configured by ``ULLM_*`` variables. The engine starts with the server's lifespan; importing this module
starts nothing. Under a trio server everything runs in that server's loop; under an asyncio server the
engine and the app run in a trio loop of their own, in a thread, and messages are carried between the loops.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import trio

from ullm.config import EngineConfig, ServerConfig, from_env
from ullm.errors import EngineDead, EngineNotReady, RequestError
from ullm.hosting.bridge import BackgroundTask, TrioThread
from ullm.hosting.hypercorn import DrainFirst, asyncio_either, survive_hangups, trio_either
from ullm.logs import configure, get_logger
from ullm.machine import collect_rarely
from ullm.protocol import stop_budget

if TYPE_CHECKING:
    from ullm.engine import Engine
    from ullm.hosting.engine_host import EngineHost

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
OpenEngine: TypeAlias = Callable[[], "AbstractAsyncContextManager[tuple[Engine, ServerConfig]]"]


@asynccontextmanager
async def open_from_env() -> AsyncIterator[tuple[Engine, ServerConfig]]:
    """Open an engine as ``ULLM_*`` variables configure it, and return the server's configuration with it."""
    from ullm.engine import open_engine

    config, server_config = from_env(EngineConfig), from_env(ServerConfig)
    configure(config.log_level)
    if server_config.ssl_certfile is not None:
        get_logger(__name__).warning("ULLM_SSL_CERTFILE ignored: this server's own options configure TLS")
    collect_rarely()
    async with open_engine(config) as engine:
        yield engine, server_config


@dataclass
class HostedApp:
    """A running engine and the app around it, in a trio loop.

    Args:
        stop: set to leave the engine's block.
        stop_server: makes the server stop; may be called from any thread.
    """

    host: EngineHost
    server_config: ServerConfig
    stop: trio.Event = field(default_factory=trio.Event)
    stop_server: Callable[[], object] = bool

    def __post_init__(self) -> None:
        from ullm.server import create_app

        self.app: Any = create_app(self.host.engine, self.server_config, shutdown=self.shutdown)

    def shutdown(self, timeout: float | None) -> None:
        """Stop the engine and the server, as ``POST /admin/shutdown`` requests it."""
        self.host.request_stop(timeout)
        self.stop_server()

    async def drain(self) -> None:
        """Let admitted requests run to their ends, within the shutdown timeout, and stop the engine."""
        await self.host.stop()

    @asynccontextmanager
    async def admin_listener(self) -> AsyncIterator[None]:
        """Serve the admin endpoints on a listener of their own, if there is to be one."""
        if self.server_config.admin_listen is None:
            yield
            return
        from ullm.server import file_remover, open_admin_socket, serve_admin
        from ullm.supervision import ChildSpec, open_supervisor

        engine, config = self.host.engine, self.server_config
        with open_admin_socket(self.server_config.admin_listen) as sock:
            self.host.watchdog.cleanup = file_remover(sock)
            serve = partial(serve_admin, engine, config, sock=sock, shutdown=self.shutdown)
            async with open_supervisor("admin", [ChildSpec("admin", serve)], intensity=3, period=60):
                yield


class App:
    """The ASGI callable; one engine per lifespan.

    Args:
        open_engine: opens the engine; called in trio, once per lifespan.
    """

    def __init__(self, open_engine: OpenEngine = open_from_env) -> None:
        self._open_engine = open_engine
        self._hosted: HostedApp | None = None
        self._thread: TrioThread | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection or lifespan, in whichever loop this is called."""
        native = trio.lowlevel.in_trio_task()
        if scope["type"] == "lifespan":
            survive_hangups()
            await (self._trio_lifespan if native else self._asyncio_lifespan)(receive, send)
        elif self._hosted is None:
            await _refuse(scope, send, EngineNotReady("not started, or has stopped"))
        elif native:
            await self._hosted.app(scope, receive, send)
        else:
            await self._carry(self._hosted, scope, receive, send)

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

    async def _trio_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            try:
                hosted: HostedApp = await nursery.start(self._host)
            except Exception as error:
                failure = error
            else:
                self._hosted = hosted
                with self._draining_in_trio(hosted):
                    await send({"type": "lifespan.startup.complete"})
                    await receive()
                    hosted.stop.set()
        await self._end(failure, send)

    def _draining_in_trio(self, hosted: HostedApp) -> AbstractContextManager[object]:
        signalled = trio.Event()
        token = trio.lowlevel.current_trio_token()
        drain_first = DrainFirst(
            "hypercorn.trio.run",
            hosted.drain,
            signalled.wait,
            trio_either,
            partial(token.run_sync_soon, signalled.set, idempotent=True),
            partial(token.run_sync_soon, hosted.host.engine.request_reload, idempotent=True),
        )
        hosted.stop_server = drain_first.stop_server
        return drain_first

    async def _end(self, failure: Exception | None, send: Send) -> None:
        """Tell the server, which then ends this task: all of the engine is gone."""
        self._hosted = self._thread = None
        if failure is None:
            await send({"type": "lifespan.shutdown.complete"})
        else:
            get_logger(__name__).error("could not start", cause=_one_line(failure))
            await send({"type": "lifespan.startup.failed", "message": _one_line(failure)})

    # --- under an asyncio server ---

    async def _asyncio_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        failure: Exception | None = None
        thread = self._thread = TrioThread().start()
        try:
            try:
                task = await thread.start_task_async(self._host)
            except Exception as error:
                failure = error
            else:
                self._hosted = task.value
                with self._draining_in_asyncio(thread, task.value):
                    await send({"type": "lifespan.startup.complete"})
                    await receive()
                    await self._leave(thread, task)
        finally:
            thread.stop(timeout=0)  # also when this task is cancelled
        await thread.stop_async(stop_budget.WATCHDOG_MARGIN)
        await self._end(failure, send)

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
            "hypercorn.asyncio.run",
            drain,
            wait_signalled,
            asyncio_either,
            partial(loop.call_soon_threadsafe, signalled.set),
            reload,
        )
        hosted.stop_server = drain_first.stop_server
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
            await _refuse(scope, send, error)
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

    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": error_body(error), "more_body": False})


def _one_line(error: BaseException) -> str:
    return str(error).strip().replace("\n", " ") or type(error).__name__


app = App()
