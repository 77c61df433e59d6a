"""Running under Hypercorn's own command: drain before it stops, although it does not wait for that.

``graceful_timeout`` seconds (3 by default) after a request to stop, Hypercorn's command cancels everything
that runs, and only then tells the application. Its servers wait for the request in a function that they
look up when they start to serve, ``raise_shutdown``. `DrainFirst` replaces it by one that drains first. It
is a private name, and the only one that ``ullm.app`` depends on: where it is missing, a warning says what
that means, and everything else still works. `tests/hosting/test_hypercorn.py` fails when a release moves it.

A worker process of Hypercorn has no handler for SIGTERM, which would kill it on the spot when a whole
process group gets the signal; `DrainFirst` installs one. Hypercorn's parent sends SIGTERM more than once,
so further ones are ignored.

Whether Hypercorn serves is told by the tasks of the loop, not by what is imported: Quart imports Hypercorn
under any server. A program that calls Hypercorn's ``serve`` keeps its signal handlers; it gets the drain.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import PurePath
from types import CodeType, FrameType, TracebackType
from typing import Any

import trio

from ullm.logs import get_logger
from ullm.supervision.signals import STOP_SIGNALS

log = get_logger(__name__)

_NAME = "raise_shutdown"
"""The private function of Hypercorn's that is replaced."""
_MAIN = "worker_serve"
"""The coroutine function that Hypercorn's command runs as a loop's first task."""
Trigger = Callable[[], Awaitable[Any]]


def serves() -> bool:
    """Return whether Hypercorn serves in the loop of the calling task."""
    return any(_is_hypercorns(code) for code in _tasks())


def is_command() -> bool:
    """Return whether the loop of the calling task is that of Hypercorn's own command."""
    return any(code.co_name == _MAIN and _is_hypercorns(code) for code in _tasks())


def _tasks() -> Iterator[CodeType]:
    """Yield what runs in the loop's tasks: all of them in asyncio, in trio those around the caller."""
    coroutines: list[Any] = []
    if trio.lowlevel.in_trio_task():
        task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        while task is not None:
            coroutines.append(task.coro)
            task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
    else:
        import asyncio

        coroutines += [each.get_coro() for each in asyncio.all_tasks()]
    for coroutine in coroutines:
        code = getattr(coroutine, "cr_code", None)  # compiled coroutines have none
        if code is not None:
            yield code


def _is_hypercorns(code: CodeType) -> bool:
    package = getattr(sys.modules.get("hypercorn"), "__file__", None)
    return package is not None and PurePath(package).parent in PurePath(code.co_filename).parents


class DrainFirst:
    """While entered, Hypercorn's server in this process drains before it stops.

    Args:
        module: the server's module, ``hypercorn.trio.run`` or ``hypercorn.asyncio.run``; None: not Hypercorn.
        drain: returns when every admitted request has ended; awaited in the server's own loop.
        wait_signalled: waits, in that loop, until `signalled` was called.
        wait_either: waits, in that loop, until one of two awaitables has finished.
        signalled: called in a signal handler, and by `stop_server`.
        reload: called in the handler of SIGHUP. Hypercorn's own parent answers SIGHUP differently: it stops
            its workers, which drain, and starts new ones.
        signals: whether to answer signals; not in a program that calls Hypercorn, whose handlers are its own.
    """

    def __init__(
        self,
        module: str | None,
        drain: Callable[[], Awaitable[None]],
        wait_signalled: Callable[[], Awaitable[None]],
        wait_either: Callable[[Trigger, Trigger], Awaitable[None]],
        signalled: Callable[[], object],
        reload: Callable[[], object] = bool,
        *,
        signals: bool = True,
    ) -> None:
        self._module: Any = sys.modules.get(module) if module is not None else None
        self._signals = signals
        self._drain = drain
        self._wait_signalled = wait_signalled
        self._wait_either = wait_either
        self._signalled = signalled
        self._reload = reload
        self._original: Any = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> DrainFirst:
        if self._module is None:
            return self  # another server
        self._original = getattr(self._module, _NAME, None)
        if self._original is None:
            log.warning(
                "this release of Hypercorn cannot be made to drain: requests are cut off --graceful-timeout "
                "seconds after a request to stop; use `ullm serve`, or set it higher"
            )
            return self
        setattr(self._module, _NAME, self._raise_shutdown)
        if self._signals and threading.current_thread() is threading.main_thread():
            self._install_handlers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._original is not None:
            setattr(self._module, _NAME, self._original)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def stop_server(self) -> None:
        """Stop Hypercorn as a signal does; may be called from any thread.

        Hypercorn's parent would replace a worker that ends by itself, so the parent gets the signal.
        """
        parent = multiprocessing.parent_process() if self._signals else None
        if self._original is not None and parent is not None and parent.pid is not None:
            os.kill(parent.pid, signal.SIGTERM)
        self._signalled()

    async def _raise_shutdown(self, trigger: Trigger) -> None:
        """Wait for ``trigger`` and raise, as Hypercorn's own function does, but drain in between."""
        await self._wait_either(trigger, self._wait_signalled)
        await self._drain()
        await self._original(_at_once)

    def _install_handlers(self) -> None:
        for number in STOP_SIGNALS:
            previous = signal.getsignal(number)
            if previous is not signal.SIG_IGN and previous is not None:
                self._handlers[number] = signal.signal(number, self._on_signal)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) in (signal.SIG_DFL, _no_reload):
            self._handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._on_hangup)

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        self._reload()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled()


def survive_hangups() -> None:
    """Ignore SIGHUP in a worker process of Hypercorn until `DrainFirst` handles it: the model is loading."""
    if multiprocessing.parent_process() is None or not is_command():
        return
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _no_reload)


def _no_reload(number: int, frame: FrameType | None) -> None:
    """Ignore the signal. Unlike SIG_IGN, a handler is not inherited by other programs."""


async def _at_once() -> None:
    """Stand in for a trigger that has fired already."""


async def trio_either(first: Trigger, second: Trigger) -> None:
    """Wait until one of two has finished, in trio."""

    async def wait(trigger: Trigger) -> None:
        await trigger()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, first)
        nursery.start_soon(wait, second)


async def asyncio_either(first: Trigger, second: Trigger) -> None:
    """Wait until one of two has finished, in asyncio."""
    import asyncio

    tasks = [asyncio.ensure_future(trigger()) for trigger in (first, second)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
