"""A running engine and the HTTP app around it, as `ullm.hosting.asgi` puts them below any ASGI server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from ullm.config import ServerConfig

if TYPE_CHECKING:
    from ullm.hosting.engine_host import EngineHost


@dataclass
class HostedApp:
    """A running engine and the app around it, in a trio loop.

    Args:
        stop: set to leave the engine's block.
        stop_server: makes the server stop; may be called from any thread. None: the server is the program's
            own, and is not ended from here.
    """

    host: EngineHost
    server_config: ServerConfig
    stop: trio.Event = field(default_factory=trio.Event)
    stop_server: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        from ullm.server import create_app

        self.app: Any = create_app(self.host.engine, self.server_config, shutdown=self.shutdown)

    def shutdown(self, timeout: float | None) -> None:
        """Stop the engine, and the server if it is Hypercorn; ``POST /admin/shutdown`` requests it.

        An engine in another process is stopped there, and this front end stays.

        The watchdog, which ends the process if the engine hangs, is for a process that is the engine's own.
        """
        from ullm.link import RemoteEngine

        engine = self.host.engine
        if isinstance(engine, RemoteEngine):
            engine.request_engine_shutdown(timeout)
            return
        if self.stop_server is None:
            self.host.engine.request_shutdown(timeout, by="admin")
            return
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
        from ullm.protocol import start_budget
        from ullm.server import file_remover, open_admin_socket, serve_admin
        from ullm.supervision import ChildSpec, open_supervisor

        engine, config = self.host.engine, self.server_config
        with open_admin_socket(self.server_config.admin_listen) as sock:
            self.host.watchdog.cleanup = file_remover(sock)
            serve = partial(serve_admin, engine, config, sock=sock, shutdown=self.shutdown)
            child = ChildSpec("admin", serve, start_timeout=start_budget.HTTP_SERVER)
            async with open_supervisor("admin", [child], intensity=3, period=60):
                yield
