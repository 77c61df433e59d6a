"""Running an engine, or what is like one, within a block: which errors come out, and how it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from ullm.engine.shutdown_report import ShutdownReport
from ullm.errors import EngineDead
from ullm.supervision import root_cause


class Runs(Protocol):
    """What `running` needs of an engine."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Start, be ready, and run until stopped."""

    def request_shutdown(self, timeout: float | None = None, *, by: str = "shutdown()") -> None:
        """Begin the orderly stop; return at once."""

    async def wait_stopped(self) -> ShutdownReport:
        """Wait for the end."""


@asynccontextmanager
async def running(engine: Runs) -> AsyncIterator[None]:
    """Run an engine within this block, and stop it in order on leaving; see `open_engine`."""
    own: BaseException | None = None
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            try:
                yield
            except trio.Cancelled:
                raise
            except BaseException as error:  # raised below: the nursery would wrap it, and rebuild a group
                if nursery.cancel_scope.cancel_called:  # the engine has failed; its cancellation ends here
                    raise
                own = error
            finally:
                engine.request_shutdown(by="the end of its block")
                with trio.CancelScope(shield=True):
                    await engine.wait_stopped()
    except BaseExceptionGroup as group:
        failure = root_cause(group)
    if own is not None and (failure is None or isinstance(failure, trio.Cancelled)):
        raise own
    if own is not None and failure is not None and not isinstance(own, EngineDead):  # else it is that failure
        raise BaseExceptionGroup("the engine and its block", [failure, own])
    if failure is not None:
        raise failure
