"""A worker as a process: frames over its stdin and stdout, its stderr forwarded to the log.

The worker is the leader of a session of its own, so that Ctrl-C in a terminal reaches only the parent,
which then stops its workers in order. The other half is `ullm.worker.main`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from ullm.actors.transports.background import background_tasks
from ullm.actors.transports.base import STDERR_TAIL_LINES, StopReport, Transport, WorkerSpec
from ullm.actors.transports.spawn import lifeline, spawn
from ullm.errors import FrameBroken, WorkerLost
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.frames import FrameReader, encode
from ullm.protocol.messages import FromWorker, Ready, Stop, Stopped, ToWorker

OUTBOX = 64
"""Frames that may wait for the pipe before a sender waits itself."""

READ_BYTES = 1 << 16

LINE_BYTES = 8192
"""A longer line of stderr is cut into several."""

log = get_logger(__name__)


@asynccontextmanager
async def open_process(spec: WorkerSpec) -> AsyncIterator[Transport]:
    """Start a worker process; on leaving, it is gone and reaped.

    Raises:
        OSError: the process cannot be started at all.
    """
    with lifeline() as inherited:
        process = await spawn(spec, inherited)
        transport = ProcessTransport(spec.rank.name, process)
        async with background_tasks() as nursery:
            nursery.start_soon(transport.write_frames)
            nursery.start_soon(transport.forward_stderr)
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
        """As in logs; a standby worker gets the name of the one whose place it takes."""
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._outbox, self._to_write = trio.open_memory_channel[bytes](OUTBOX)
        self._reader: FrameReader[FromWorker] = FrameReader(FromWorker)
        self._reading = trio.Lock()
        self._backlog: deque[FromWorker] = deque()
        self._stderr_tail: deque[str] = deque(maxlen=STDERR_TAIL_LINES)
        self._stderr_ended = trio.Event()
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
        """Whether the process is stopped by a signal, as Linux tells; a debugger's stop is another state."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2].startswith(b"T")
        except OSError:  # it is gone, or this is not Linux
            return False

    async def send(self, message: ToWorker) -> None:
        """Queue one frame. A cancelled sender never leaves half a frame on the pipe."""
        await self.send_bytes(encode(message))

    async def send_bytes(self, frame: bytes) -> None:
        """As `send`, for a frame that is encoded already, or is none: see `ullm.actors.transports.faulty`."""
        try:
            if self.alive():
                return await self._outbox.send(frame)
        except trio.BrokenResourceError:
            log.debug("worker closed its pipe", worker=self.name)
        raise await self._lost()

    async def receive(self) -> FromWorker:
        """The next message; messages that were sent before the worker's end come first."""
        async with self._turn():
            return self._backlog.popleft() if self._backlog else await self._read_message()

    def unread(self, data: bytes) -> None:
        """Have these bytes read next, as if the worker had sent them."""
        self._reader.unread(data)

    def kill(self) -> None:
        """SIGKILL for the worker and for whatever it started itself."""
        if not self.alive():
            return
        self._process.kill()
        if os.name == "posix":
            with suppress(ProcessLookupError, PermissionError):  # the group is gone, or only a zombie
                os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self, budget: float) -> StopReport:
        """`Stop`, then SIGTERM for the last quarter of the budget, then SIGKILL.

        A worker that is not ready has nothing to finish: it gets `stop_budget.STARTING_WORKER` at most.
        """
        began = trio.current_time()
        if not self.alive():
            return self._report("stopped" if self._stopped else "lost", began)
        if not self._ready:
            budget = min(budget, stop_budget.STARTING_WORKER)
        with trio.move_on_at(began + stop_budget.SIGTERM_SHARE * budget):
            await self._ask(Stop(stop_budget.SIGTERM_SHARE * budget))
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
        """Task: the only writer of the pipe."""
        with self._to_write:
            try:
                async for frame in self._to_write:
                    await self._stdin.send_all(frame)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # the worker is gone; `receive` says how

    async def forward_stderr(self) -> None:
        """Task: what the worker prints goes to the log, line by line, and its tail is kept."""
        rest = b""
        try:
            async for data in self._stderr:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._forward(line)
                while len(rest) > LINE_BYTES:
                    self._forward(rest[:LINE_BYTES])
                    rest = rest[LINE_BYTES:]
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("stderr closed", worker=self.name)
        finally:
            self._forward(rest)
            self._stderr_ended.set()

    async def reap(self) -> None:
        """Kill what still runs, and wait until the kernel has taken it back."""
        with trio.CancelScope(shield=True):
            if self.alive():
                self.kill()
            await self._wait_gone(stop_budget.PROCESS_EXIT)
            for stream in (self._stdin, self._stdout):
                await stream.aclose()
            with trio.move_on_after(stop_budget.STDERR_TAIL):
                await self._stderr_ended.wait()
            await self._stderr.aclose()

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
            raise WorkerLost(self.name, self._cause, tuple(self._stderr_tail)) from None

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One reader at a time: the engine's, or `stop`, which reads on where the engine has ceased to."""
        try:
            self._reading.acquire_nowait()  # unlike acquire(), without a round through trio's scheduler
        except trio.WouldBlock:
            await self._reading.acquire()
        try:
            yield
        finally:
            self._reading.release()

    async def _ask(self, message: ToWorker) -> None:
        try:
            await self.send(message)
        except WorkerLost:
            log.debug("worker ended before it was asked to", worker=self.name)

    async def _drain(self) -> None:
        """Read on, so that the worker can write, until it is gone; what it says can still be received."""
        with suppress(WorkerLost):
            while True:
                async with self._turn():
                    self._backlog.append(await self._read_message())

    async def _lost(self) -> WorkerLost:
        if not await self._wait_gone(stop_budget.PROCESS_EXIT):
            self._cause = self._cause or "closed its pipe without ending"
            self.kill()
        with trio.move_on_after(stop_budget.STDERR_TAIL):
            await self._stderr_ended.wait()
        tail = tuple(self._stderr_tail)
        return WorkerLost(self.name, self._cause or _describe_exit(self._process.returncode, tail), tail)

    async def _wait_gone(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._process.wait()
        return not self.alive()

    def _report(self, outcome: str, began: float) -> StopReport:
        timings = self._stopped.timings if self._stopped else {}
        return StopReport(self.name, outcome, trio.current_time() - began, timings)

    def _forward(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            logger, level, event = _parse_record(text)
            self._stderr_tail.append(event)
            get_logger(logger).log(level, event, worker=self.name)


def _parse_record(line: str) -> tuple[str, int, str]:
    """Logger, level and text of a line: a record of ullm's own, or anything that was printed."""
    try:
        record = json.loads(line)
        level = logging.getLevelNamesMapping()[record.pop("level").upper()]
        logger, text = record.pop("logger"), record.pop("event")
        record.pop("time")
    except (ValueError, KeyError, TypeError, AttributeError):
        return __name__, logging.INFO, line
    return logger, level, " ".join([text, *(f"{key}={value}" for key, value in record.items())])


def _describe_exit(status: int | None, stderr_tail: tuple[str, ...]) -> str:
    if status is None:
        return "does not end"
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    shown = f"{status:#x}" if status > 255 else str(status)  # Windows' codes are known in hexadecimal
    reason = f": {stderr_tail[-1]}" if status and stderr_tail else ""
    return f"exited with status {shown}{reason}"
