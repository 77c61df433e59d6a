"""Background tasks of a context, which leave the errors of its body as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


class BackgroundTasks:
    """Tasks that keep running while the body is being cancelled, because its cleanup needs them."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scopes: list[trio.CancelScope] = []

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run ``function()`` until it returns or the body has ended."""
        scope = trio.CancelScope(shield=True)
        self._scopes.append(scope)
        self._nursery.start_soon(self._run, scope, function)

    def cancel(self) -> None:
        """Cancel all of them."""
        for scope in self._scopes:
            scope.cancel()

    async def _run(self, scope: trio.CancelScope, function: Callable[[], Awaitable[None]]) -> None:
        with scope:
            await function()


@asynccontextmanager
async def background_tasks() -> AsyncIterator[BackgroundTasks]:
    """Run tasks that are cancelled when the body has ended; the body's error is raised unchanged.

    A plain nursery would wrap it in a group, and every ``except WorkerLost`` around a transport would
    miss it.
    """
    error: BaseException
    try:
        async with trio.open_nursery() as nursery:
            tasks = BackgroundTasks(nursery)
            try:
                yield tasks
            finally:
                tasks.cancel()
        return
    except BaseExceptionGroup as group:
        if len(group.exceptions) != 1:
            raise
        error = group.exceptions[0]
    raise error
