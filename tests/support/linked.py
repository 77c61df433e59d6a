"""A front end and its engines in one task tree, on a virtual clock, with connections in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from trio.testing import memory_stream_pair

from ullm.config import EngineConfig, ServerConfig
from ullm.engine import Engine
from ullm.link import Gate, RemoteEngine
from ullm.testing import open_scripted_engine

KEY = b"a key of the tests"


class Cable(trio.abc.Stream):
    """A front end's end of a connection, which can be cut.

    Args:
        frames: frames from the engine that get through; None for all.
    """

    def __init__(self, stream: trio.abc.Stream, frames: int | None = None) -> None:
        self._stream = stream
        self._left = frames
        self._buffer = b""
        self.silent = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return one frame."""
        while len(self._buffer) < 4 or len(self._buffer) < self._length():
            data = await self._stream.receive_some(1 << 16)
            if not data:
                return b""
            if self.silent:
                await trio.sleep_forever()
            self._buffer += data
        if self._left == 0:
            await self.aclose()
            return b""
        if self._left is not None:
            self._left -= 1
        end = self._length()
        frame, self._buffer = self._buffer[:end], self._buffer[end:]
        return frame

    def _length(self) -> int:
        return 4 + int.from_bytes(self._buffer[:4], "little")

    async def aclose(self) -> None:
        await self._stream.aclose()


class World:
    """Engines that come and go behind one front end.

    Args:
        cut_after: connection → frames that it lives for.

    Attributes:
        connections: how often the front end has connected.
        engines: all that there have been.
    """

    def __init__(
        self, model: Path, nursery: trio.Nursery, cut_after: Callable[[int], int | None] = lambda number: None
    ) -> None:
        self.model = model
        self.connections = 0
        self.engines: list[Engine] = []
        self.gate_key: bytes | None = KEY
        self._cut_after = cut_after
        self._nursery = nursery
        self._gate: Gate | None = None
        self._hangs = False
        self._cables: list[Cable] = []
        self._sessions: list[trio.CancelScope] = []
        self._engine_scopes: list[trio.CancelScope] = []

    def hang(self) -> None:
        """Have the engine say nothing any more, on any connection, until another one starts."""
        self._hangs = True
        for cable in self._cables:
            cable.silent = True

    async def open_stream(self) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if self._hangs:
            return memory_stream_pair()[0]
        if self._gate is None:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = memory_stream_pair()
        self._nursery.start_soon(self._serve, self._gate, theirs)
        self.connections += 1
        self._cables.append(Cable(ours, self._cut_after(self.connections)))
        return self._cables[-1]

    async def _serve(self, gate: Gate, stream: trio.abc.Stream) -> None:
        with trio.CancelScope() as scope:
            self._sessions.append(scope)
            await gate.serve_stream(stream)

    async def start_engine(self, **options: Any) -> Engine:
        """Start an engine, which front ends reach from now on."""
        engine: Engine = await self._nursery.start(self._run_engine, options)
        self.engines.append(engine)
        self._gate, self._hangs = Gate(engine, self.gate_key), False
        return engine

    async def _run_engine(
        self, options: dict[str, Any], *, task_status: trio.TaskStatus[Engine] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.CancelScope() as scope:
            self._engine_scopes.append(scope)
            options = {"step_seconds": 1.0, "shutdown_timeout": 3.0, **options}
            async with open_scripted_engine(self.model, **options) as engine:
                task_status.started(engine)
                await engine.wait_stopped()
                if self.engines[-1] is engine:
                    self._gate = None
                    self.cut()

    def cut(self) -> None:
        """Cut all connections; the engine lives on."""
        for scope in self._sessions:
            scope.cancel()
        self._sessions.clear()

    def kill(self) -> None:
        """Have the engine gone at once, as by SIGKILL: nothing that it does from now on gets through."""
        self._gate = None
        self.cut()
        for scope in self._engine_scopes:
            scope.cancel()


def front_end(world: World, **options: Any) -> RemoteEngine:
    """Return a front end, to be run."""
    key = options.pop("key", KEY)
    return RemoteEngine(
        EngineConfig(shutdown_timeout=30.0),
        ServerConfig(connect="unix:/in/memory", **options),
        open_stream=world.open_stream,
        key=key,
    )


@asynccontextmanager
async def linked(
    model: Path, *, cut_after: Callable[[int], int | None] = lambda number: None, **options: Any
) -> AsyncIterator[tuple[RemoteEngine, World]]:
    """Run a front end with an engine; stop both afterwards."""
    async with trio.open_nursery() as nursery:
        world = World(model, nursery, cut_after)
        await world.start_engine()
        engine = front_end(world, **options)
        await nursery.start(engine.run)
        yield engine, world
        await engine.wait_stopped() if engine.state != "running" else await _stop(engine)
        world.kill()


async def _stop(engine: RemoteEngine) -> None:
    engine.request_shutdown(0.0)
    await engine.wait_stopped()
