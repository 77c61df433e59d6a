"""Tasks that serve a context, without showing in the errors of its body."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background_tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery that is cancelled when the body ends, and raises the body's error as it was.

    A plain nursery would wrap it in a group, and every ``except WorkerLost`` around a transport would
    miss it.
    """
    error: BaseException
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
        return
    except BaseExceptionGroup as group:
        if len(group.exceptions) != 1:
            raise
        error = group.exceptions[0]
    raise error
