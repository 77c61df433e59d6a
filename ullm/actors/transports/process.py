"""A worker as a process: frames over its stdin and stdout, stderr forwarded to the log.

The worker is the leader of a session of its own, so that Ctrl-C in a terminal reaches only the parent,
which then stops its workers in order. The worker's side is `ullm.worker.main`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from ullm.actors.transports.background import background_tasks
from ullm.actors.transports.base import StopReport, Transport, WorkerSpec
from ullm.actors.transports.spawn import spawn
from ullm.actors.transports.stderr import StderrForwarder
from ullm.errors import FrameBroken, WorkerLost
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.frames import FrameReader, encode
from ullm.protocol.messages import FromWorker, Ready, Stop, Stopped, ToWorker
from ullm.system.forks import forks
from ullm.system.lifeline import Lifeline

OUTBOX = 64
"""Frames that may queue for the pipe before senders wait."""

READ_BYTES = 1 << 16

log = get_logger(__name__)


@asynccontextmanager
async def open_process(spec: WorkerSpec) -> AsyncIterator[Transport]:
    """Start a worker process; leaving the context kills and reaps it.

    Raises:
        OSError: the process cannot be started.
    """
    with Lifeline() as lifeline:
        process = await spawn(spec, lifeline)
        transport = ProcessTransport(spec.rank.name, process)
        async with background_tasks() as nursery:
            nursery.start_soon(transport.write_frames)
            nursery.start_soon(transport.stderr.run)
            try:
                yield transport
            finally:
                await transport.reap()


class ProcessTransport:
    """See `Transport`."""

    def __init__(self, name: str, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.name = name
        """As in logs; a standby worker gets the name of the worker that it replaces."""
        self.stderr = StderrForwarder(process.stderr, self)
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        # Its end tells the worker that this process has gone; a child of this process must not hold it.
        if sys.platform != "win32" and isinstance(process.stdin, trio.lowlevel.FdStream):
            forks.close_in_child(process.stdin.fileno())
        self._outbox, self._to_write = trio.open_memory_channel[bytes](OUTBOX)
        self._reader: FrameReader[FromWorker] = FrameReader(FromWorker)
        self._reading = trio.Lock()
        self._backlog: deque[FromWorker] = deque()
        self._ready = False
        self._stopped: Stopped | None = None
        self._cause: str | None = None

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def suspended(self) -> bool:
        """Whether a signal has stopped the process, on Linux; a debugger's stop is another state."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2].startswith(b"T")
        except OSError:  # the process is gone, or this is not Linux
            return False

    async def send(self, message: ToWorker) -> None:
        """Queue one frame. A cancelled sender never leaves half a frame on the pipe."""
        await self.send_bytes(encode(message))

    async def send_bytes(self, frame: bytes) -> None:
        """Queue bytes that need not be a valid frame: see `ullm.actors.transports.faulty`."""
        try:
            if self.alive():
                return await self._outbox.send(frame)
        except trio.BrokenResourceError:
            log.debug("worker closed its pipe", worker=self.name)
        raise await self._lost()

    async def receive(self) -> FromWorker:
        """Return the next message; those sent before the worker's end come first."""
        async with self._reading_turn():
            return self._backlog.popleft() if self._backlog else await self._read_message()

    def unread(self, data: bytes) -> None:
        """Put bytes in front of those still to be read, as if the worker had sent them."""
        self._reader.unread(data)

    def kill(self) -> None:
        """Send SIGKILL to the worker and to every process that it started itself."""
        if not self.alive():
            return
        self._process.kill()
        if sys.platform != "win32":
            with suppress(ProcessLookupError, PermissionError):  # the group is gone, or a zombie
                os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self, budget: float) -> StopReport:
        """Send `Stop`, after three quarters of the budget SIGTERM, and near its end SIGKILL.

        A worker that is not ready has nothing to finish, and gets at most `stop_budget.STARTING_WORKER`.
        """
        began = trio.current_time()
        if not self.alive():
            return self._report("stopped" if self._stopped else "lost", began)
        if not self._ready:
            budget = min(budget, stop_budget.STARTING_WORKER)
        with trio.move_on_at(began + stop_budget.SIGTERM_SHARE * budget):
            await self._send_if_alive(Stop(stop_budget.SIGTERM_SHARE * budget))
            await self._drain()
        if self.alive() and os.name == "posix":
            log.warning("worker does not stop: SIGTERM", worker=self.name)
            self._process.terminate()
            with trio.move_on_at(began + stop_budget.SIGKILL_SHARE * budget):
                await self._drain()
        if self.alive():
            log.warning("worker does not stop: SIGKILL", worker=self.name)
            self.kill()
            await self._wait_gone(stop_budget.PROCESS_EXIT)
        return self._report("stopped" if self._stopped else "killed", began)

    async def write_frames(self) -> None:
        """Write queued frames to the pipe; a task of the transport, and the only writer."""
        with self._to_write:
            try:
                async for frame in self._to_write:
                    await self._stdin.send_all(frame)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # the worker is gone; `receive` reports it

    async def reap(self) -> None:
        """Kill the process if it still runs, and wait until the kernel has reaped it."""
        with trio.CancelScope(shield=True):
            if self.alive():
                self.kill()
            await self._wait_gone(stop_budget.PROCESS_EXIT)
            for stream in (self._stdin, self._stdout):
                await stream.aclose()
            await self.stderr.close()

    async def _read_message(self) -> FromWorker:
        while (message := self._next_frame()) is None:
            try:
                data = await self._stdout.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                raise await self._lost()
            self._reader.feed(data)
        if isinstance(message, Stopped):
            self._stopped = message
        self._ready |= isinstance(message, Ready)
        return message

    def _next_frame(self) -> FromWorker | None:
        try:
            return self._reader.next()
        except FrameBroken as error:
            self._cause = f"sent {error}"
            self.kill()
            raise WorkerLost(self.name, self._cause, self.stderr.tail) from None

    @asynccontextmanager
    async def _reading_turn(self) -> AsyncIterator[None]:
        """Become the only reader: the engine, or `stop`, which reads on where the engine has ceased to."""
        try:
            self._reading.acquire_nowait()  # unlike acquire(), without a checkpoint
        except trio.WouldBlock:
            await self._reading.acquire()
        try:
            yield
        finally:
            self._reading.release()

    async def _send_if_alive(self, message: ToWorker) -> None:
        try:
            await self.send(message)
        except WorkerLost:
            log.debug("worker ended by itself before the stop", worker=self.name)

    async def _drain(self) -> None:
        """Read on until the worker is gone, so that it can write; its messages can still be received."""
        with suppress(WorkerLost):
            while True:
                async with self._reading_turn():
                    self._backlog.append(await self._read_message())

    async def _lost(self) -> WorkerLost:
        if not await self._wait_gone(stop_budget.PROCESS_EXIT):
            self._cause = self._cause or "closed its pipe without ending"
            self.kill()
        await self.stderr.wait_ended()
        tail = self.stderr.tail
        return WorkerLost(self.name, self._cause or _describe_exit(self._process.returncode, tail), tail)

    async def _wait_gone(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._process.wait()
        return not self.alive()

    def _report(self, outcome: str, began: float) -> StopReport:
        timings = self._stopped.timings if self._stopped else {}
        return StopReport(self.name, outcome, trio.current_time() - began, timings)


def _describe_exit(status: int | None, stderr_tail: tuple[str, ...]) -> str:
    if status is None:
        return "does not end"
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    shown = f"{status:#x}" if status > 255 else str(status)  # Windows' codes are customarily hexadecimal
    reason = f": {stderr_tail[-1]}" if status and stderr_tail else ""
    return f"exited with status {shown}{reason}"
