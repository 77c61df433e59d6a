"""One process that the launcher runs, as a supervised child: started, heard, and stopped."""

from __future__ import annotations

import math
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from ullm.cli.orders import Order
from ullm.errors import UllmError
from ullm.logs import get_logger
from ullm.supervision import cleanup_scope
from ullm.system.interpreter import python_command, python_environment
from ullm.system.lifeline import CONTINUE, Lifeline

READY = "ready: "

log = get_logger(__name__)


class PartLost(UllmError):
    """A process that the launcher had started has ended by itself.

    Raised by: the launcher, to its supervisor, which starts it again.
    Remedy: none is needed once; the process's last lines are in the log.
    """


class Part:
    """An engine or a front end in a process of its own.

    Args:
        name: in the log.
        order: what it is to be.
        ended: called with this part and its exit status when the process has ended by itself; returns whether
            it is to be started again.

    Attributes:
        ready: set when it has said that it is ready, and from then on.
        said: the line by which it did.
    """

    def __init__(self, name: str, order: Order, ended: Callable[[Part, int], bool]) -> None:
        self.name = name
        self.ready = trio.Event()
        self.said = ""
        self._order = order
        self._ended = ended
        self._process: trio.Process | None = None
        self._gone = trio.Event()
        self._gone.set()

    @property
    def pid(self) -> int | None:
        """Process id; None while it does not run."""
        return None if self._process is None else self._process.pid

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run the process to its end; a cancellation stops it in order.

        Raises:
            PartLost: it has ended by itself, and is to be started again.
        """
        # By the end of stdin it learns that the launcher has gone; then it stops in order, unless suspended.
        with Lifeline(CONTINUE) as lifeline:
            await self._run(lifeline, task_status)

    async def _run(self, lifeline: Lifeline, task_status: trio.TaskStatus[None]) -> None:
        # A session of its own: a terminal's Ctrl-C is for the launcher, which stops its parts in order.
        inherited = [*self._order.sockets, *lifeline.pass_fds]
        options: dict[str, Any] = {"pass_fds": inherited, "start_new_session": True}
        process = await trio.lowlevel.open_process(
            python_command("-X", "faulthandler", "-m", "ullm.cli.launched", self.name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=python_environment(),
            **options,
        )
        lifeline.started(process)
        self._process, self._gone = process, trio.Event()
        log.info("part started", part=self.name, pid=process.pid)
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._give_order, process)
                nursery.start_soon(self._listen, process)
                status = await process.wait()
                nursery.cancel_scope.cancel()
        finally:
            with cleanup_scope(math.inf):
                await self._end(process)
        if self._ended(self, status):
            raise PartLost(f"{self.name} ended with status {status}")

    async def _give_order(self, process: trio.Process) -> None:
        assert process.stdin is not None, "it is a pipe"
        with suppress(trio.BrokenResourceError):  # it has ended; its status says why
            await process.stdin.send_all(self._order.encode())

    async def _listen(self, process: trio.Process) -> None:
        """Read what it says on stdout, which is one line when it is ready."""
        assert process.stdout is not None, "it is a pipe"
        text = ""
        async for data in process.stdout:
            text += data.decode("utf-8", "replace")
            *lines, text = text.split("\n")
            for line in lines:
                if line.startswith(READY):
                    self.said = line
                    self.ready.set()

    async def _end(self, process: trio.Process) -> None:
        """Stop it in order, if it still runs; kill it at the deadline."""
        try:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
            self._process = None
            self._gone.set()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with trio.CancelScope(shield=True):
                        await pipe.aclose()

    async def wait_gone(self) -> None:
        """Wait until it does not run."""
        await self._gone.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it, if it runs; may be called from any thread."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
