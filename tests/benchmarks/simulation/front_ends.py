"""Front ends beside the engine that they are connected to, in the same task tree."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio
from trio.testing import memory_stream_pair

from ullm.config import EngineConfig, ServerConfig
from ullm.engine import Engine
from ullm.link import Gate, RemoteEngine

KEY = b"a key of the simulation"


class FrontEnds:
    """Front ends of one engine, each with a connection in memory that can be cut.

    Attributes:
        engines: what requests are asked of, one for each front end.
    """

    def __init__(self, engine: Engine, nursery: trio.Nursery) -> None:
        self.engines: list[RemoteEngine] = []
        self._gate = Gate(engine, KEY)
        self._nursery = nursery
        self._sessions: dict[int, trio.CancelScope] = {}

    async def start(self, max_queue: int) -> None:
        """Start one more front end."""
        number = len(self.engines)
        engine = RemoteEngine(
            EngineConfig(max_queue=max_queue),
            ServerConfig(connect="unix:/in/memory"),
            open_stream=partial(self._connect, number),
            key=KEY,
        )
        self.engines.append(engine)
        await self._nursery.start(engine.run)

    async def stop(self) -> None:
        """Stop all of them."""
        for engine in self.engines:
            engine.request_shutdown(0.0)
            await engine.wait_stopped()

    def cut(self, source: random.Random) -> None:
        """Cut the connection of one of them, which then makes another one."""
        if self._sessions:
            self._sessions[source.choice(sorted(self._sessions))].cancel()

    async def _connect(self, number: int) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        ours, theirs = memory_stream_pair()
        self._nursery.start_soon(self._serve, number, theirs)
        return ours

    async def _serve(self, number: int, stream: trio.abc.Stream) -> None:
        with trio.CancelScope() as scope:
            self._sessions[number] = scope
            await self._gate.serve_stream(stream)
        if self._sessions.get(number) is scope:
            del self._sessions[number]


@asynccontextmanager
async def open_front_ends(engine: Engine, count: int, max_queue: int) -> AsyncIterator[FrontEnds]:
    """Run front ends of an engine."""
    async with trio.open_nursery() as nursery:
        front_ends = FrontEnds(engine, nursery)
        for _ in range(count):
            await front_ends.start(max_queue)
        yield front_ends
        await front_ends.stop()
        nursery.cancel_scope.cancel()
