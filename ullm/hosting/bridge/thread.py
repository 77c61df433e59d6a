"""A trio loop in a background thread."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, TypeVar, cast

import sniffio
import trio

from ullm.errors import EngineDead, EngineForked, EngineStopped
from ullm.hosting.bridge import tasks
from ullm.hosting.bridge.channel import AsyncioLoop, Channel, ConsumerLoop, TrioLoop
from ullm.hosting.bridge.handles import BackgroundTask, Stream
from ullm.system.forks import forks

T = TypeVar("T")
STOPPED = "it was stopped"
"""Why the loop of a thread does not run, if nothing failed."""
FORKED = "it runs in the process that this one was forked from"
"""Likewise, in a forked child, which has no copy of the thread."""


def in_trio() -> bool:
    """Return whether the calling task is trio's; with trio-asyncio one thread runs tasks of both kinds."""
    try:
        return sniffio.current_async_library() == "trio"
    except sniffio.AsyncLibraryNotFoundError:
        return False


class TrioThread:
    """A trio loop in a daemon thread.

    Work that is running when the thread stops is cancelled; its callers, and all later ones, get `EngineDead`
    at once. It has more than 20 methods because every kind of call exists for callers that block and for
    callers that await.
    """

    def __init__(self, name: str = "ullm-trio") -> None:
        self._lock = threading.Lock()
        self._channels: set[Channel[Any]] = set()
        self._dirty: list[ConsumerLoop] = []
        self._loops: weakref.WeakValueDictionary[int, ConsumerLoop] = weakref.WeakValueDictionary()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._running = threading.Event()
        self._dead: str | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        forks.tell(self)

    def start(self) -> TrioThread:
        """Start the loop and wait until it runs. May be called once."""
        self._thread.start()
        self._running.wait()
        return self

    @property
    def alive(self) -> bool:
        """Whether the loop runs and takes calls."""
        return self._token is not None and self._dead is None and self._thread.is_alive()

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Run a function that must not raise in the loop's thread, soon, without waiting for it.

        Raises:
            EngineDead: the loop has stopped.
        """
        if self._token is None or self._dead is not None:
            raise self._death()
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            raise self._death() from None

    def call(self, async_fn: Callable[..., Awaitable[T]], *args: Any, timeout: float | None = None) -> T:
        """Run ``async_fn(*args)`` in the loop and block until it returns.

        Args:
            timeout: seconds; then, and on KeyboardInterrupt, the work is cancelled without waiting for it.

        Raises:
            EngineDead: the loop has stopped, before or meanwhile.
            TimeoutError: ``timeout`` has passed.
        """
        channel = self._submit(partial(tasks.call, async_fn, args))
        try:
            if not channel.block(until_end=True, timeout=timeout):
                raise TimeoutError(f"no result within {timeout:g} s")
        except BaseException:
            channel.cancel()
            raise
        result: T = channel.result()
        return result

    async def call_async(self, async_fn: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run ``async_fn(*args)`` in the loop for a caller in asyncio or in another trio loop.

        Cancelling the caller cancels ``async_fn`` and waits until it has ended.

        Raises:
            EngineDead: the loop has stopped, before or meanwhile.
        """
        loop = self._current_loop()
        channel = self._submit(partial(tasks.call, async_fn, args))
        try:
            await channel.wait(loop, until_end=True)
        except BaseException:
            channel.cancel()
            with loop.shield():
                await channel.wait(loop, until_end=True)
            raise
        result: T = channel.result()
        return result

    def start_task(self, async_fn: Callable[..., Awaitable[object]], *args: Any) -> BackgroundTask:
        """Run ``async_fn(*args, task_status=…)`` in the background; block until it has called ``started()``.

        Raises:
            EngineDead: the loop has stopped.
            Exception: whatever ``async_fn`` raised before it was started.
        """
        task = self._start_task(async_fn, args)
        try:
            task.channel.block(until_end=False)
        except BaseException:
            task.cancel()
            raise
        return task.take_started()

    async def start_task_async(
        self, async_fn: Callable[..., Awaitable[object]], *args: Any
    ) -> BackgroundTask:
        """`start_task` for a caller in asyncio or in another trio loop; cancelling it cancels the task."""
        loop = self._current_loop()
        task = self._start_task(async_fn, args)
        try:
            await task.channel.wait(loop, until_end=False)
        except BaseException:
            task.cancel()
            with loop.shield():
                await task.channel.wait(loop, until_end=True)
            raise
        return task.take_started()

    def stream(self, open_stream: Callable[[], AbstractAsyncContextManager[AsyncIterable[T]]]) -> Stream[T]:
        """Return an iterator, for any loop or none, over the items of ``async with open_stream() as items``.

        ``open_stream`` is called in the loop's thread, at once.

        Raises:
            EngineDead: the loop has stopped.
        """
        return Stream(self._current_loop, self._submit(partial(tasks.iterate, open_stream)))

    def pipe(self, async_fn: Callable[[Callable[[T], Awaitable[None]]], Awaitable[object]]) -> Stream[T]:
        """Run ``async_fn(send)`` in the loop; return an iterator, for any loop or none, over what it sends.

        ``send`` waits while the consumer is far behind.

        Raises:
            EngineDead: the loop has stopped.
        """
        return Stream(self._current_loop, self._submit(partial(tasks.push, async_fn)))

    def stop(self, timeout: float | None = None) -> bool:
        """Cancel everything in the loop and wait for its end; idempotent, from any thread but its own.

        Returns:
            True if it has ended; False if something in it has ignored its cancellation for ``timeout``
            seconds. The thread is a daemon and does not keep the process alive.
        """
        self._post_if_alive(self._scope.cancel)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    async def stop_async(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109  # as `stop`
        """`stop` for a caller in asyncio or in another trio loop."""
        if in_trio():
            return await trio.to_thread.run_sync(self.stop, timeout, abandon_on_cancel=True)
        import asyncio

        return await asyncio.to_thread(self.stop, timeout)

    def forked(self) -> None:
        """Note that this is a forked child's copy: everything ends here, as everybody will be told."""
        self._lock = threading.Lock()
        self._dead = self._dead or FORKED
        self._dirty.clear()
        for channel in self._channels:
            channel.forked(self._death())
        self._channels.clear()

    def _main(self) -> None:
        cause = STOPPED
        try:
            trio.run(self._serve, instruments=[_EndOfTurn(self._flush)])
        except BaseException as error:  # the callers get it, below
            cause = repr(error)
        finally:
            with self._lock:
                self._dead = cause
                orphans = list(self._channels)
            self._flush()
            for channel in orphans:
                channel.finish(self._death())
            self._running.set()

    async def _serve(self) -> None:
        with self._scope:
            async with trio.open_nursery() as self._nursery:
                self._token = trio.lowlevel.current_trio_token()
                self._running.set()
                await trio.sleep_forever()

    def _death(self) -> EngineDead:
        if self._dead == STOPPED:
            return EngineStopped()
        if self._dead == FORKED:
            return EngineForked()
        return EngineDead(f"the engine's event loop does not run: {self._dead or 'it was never started'}")

    def _post_if_alive(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(EngineDead):
            self.post(function)

    def _submit(self, body: Callable[[Channel[Any]], Awaitable[None]]) -> Channel[Any]:
        if threading.current_thread() is self._thread:
            raise RuntimeError("called from the loop's own thread; await the function itself there")
        channel: Channel[Any] = Channel(self._post_if_alive)
        with self._lock:
            self._channels.add(channel)
        try:
            self.post(self._spawn, channel, body)
        except EngineDead:
            self._forget(channel)
            raise
        return channel

    def _spawn(self, channel: Channel[Any], body: Callable[[Channel[Any]], Awaitable[None]]) -> None:
        try:
            cast(trio.Nursery, self._nursery).start_soon(self._run, channel, body)
        except RuntimeError:  # the nursery has closed between the call and now
            self._forget(channel)
            channel.finish(self._death())

    async def _run(self, channel: Channel[Any], body: Callable[[Channel[Any]], Awaitable[None]]) -> None:
        error: BaseException | None = None
        try:
            with channel.scope:
                await body(channel)
            if channel.scope.cancelled_caught:
                error = EngineDead("the work was cancelled")
        except trio.Cancelled:  # the loop is being stopped
            error = EngineStopped()
            raise
        except BaseException as raised:  # belongs to the caller, whatever it is
            error = tasks.without_cancelled(raised)
        finally:
            self._forget(channel)
            channel.finish(error)

    def _forget(self, channel: Channel[Any]) -> None:
        with self._lock:
            self._channels.discard(channel)

    def _start_task(
        self, async_fn: Callable[..., Awaitable[object]], args: tuple[Any, ...]
    ) -> BackgroundTask:
        return BackgroundTask(self._current_loop, self._submit(partial(tasks.start, async_fn, args)))

    def _flush_soon(self, loop: ConsumerLoop) -> None:
        if self._dead is None:
            self._dirty.append(loop)
        else:
            loop.flush()

    def _flush(self) -> None:
        while self._dirty:
            self._dirty.pop().flush()

    def _current_loop(self) -> ConsumerLoop:
        """Return the loop that the caller runs in."""
        if in_trio():
            loop: Any = trio.lowlevel.current_trio_token()
            kind: type[ConsumerLoop] = TrioLoop
        else:
            import asyncio

            loop, kind = asyncio.get_running_loop(), AsyncioLoop
        with self._lock:
            consumer = self._loops.get(id(loop))
            if consumer is None:
                consumer = self._loops[id(loop)] = kind(loop, self._flush_soon)
            return consumer


class _EndOfTurn(trio.abc.Instrument):
    """Wakes other loops once per turn of this one, however many streams got items in that turn."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush

    def before_io_wait(self, timeout: float) -> None:
        self._flush()
