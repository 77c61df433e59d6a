"""A process as a child: its end is the child's end, its lines are log lines, a stop is a signal to it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import trio

from ullm.supervision.actor import cleanup_scope
from ullm.supervision.errors import ProcessFailed

log = logging.getLogger("ullm.supervision")

LAST_WORDS = 0.2
"""Seconds in which lines are still read after the end of a process: others may hold its pipes open."""
LONGEST_LINE = 65536
"""Bytes after which a line is logged in pieces, so that a process that writes none fills no memory."""


@dataclass(frozen=True)
class ProcessFunction:
    """The async function that a child made by `ChildSpec.process` runs; see there for the arguments."""

    child_id: str
    command: Sequence[str]
    cwd: str | os.PathLike[str] | None
    env: Mapping[str, str] | None
    stop_signal: signal.Signals
    exit_codes: Collection[int]
    ready_line: str | None

    stdin: ClassVar[int] = subprocess.DEVNULL
    longest_line: ClassVar[int] = LONGEST_LINE

    async def __call__(self, *, task_status: trio.TaskStatus[trio.Process]) -> None:
        """Run the process to its end; a stop sends it ``stop_signal``, and the end of the budget kills it."""
        process = await self._open()
        await self._run(process, ProcessLife(self, process, task_status))

    async def _run(self, process: trio.Process, life: ProcessLife) -> None:
        killed = False
        readers = [
            _Reader(name, pipe, life, self.longest_line)
            for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr))
            if pipe is not None
        ]
        try:
            async with trio.open_nursery() as nursery:
                for reader in readers:
                    nursery.start_soon(reader.run)
                nursery.start_soon(life.work)
                try:
                    life.spawned()
                    await process.wait()
                finally:
                    try:
                        with trio.CancelScope(shield=True):
                            killed = process.returncode is None and await self._stop(process)
                            with trio.move_on_after(LAST_WORDS):
                                for reader in readers:
                                    await reader.done.wait()
                    finally:  # also if the process may not be sent a signal
                        for reader in readers:
                            reader.scope.cancel()
                        life.over()
        finally:
            if killed:
                what = f"did not end after {self.stop_signal.name} within its budget and was killed"
                raise ProcessFailed(self.child_id, what, process.returncode)
        if process.returncode not in self.exit_codes:
            raise ProcessFailed(self.child_id, _how(process.returncode), process.returncode)

    async def _open(self) -> trio.Process:
        # In a group of its own: Ctrl-C in the terminal is for the supervisor, which stops it in its turn.
        group: dict[str, Any] = {"process_group": 0}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        return await trio.lowlevel.open_process(
            list(self.command),
            stdin=self.stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.cwd,
            env=self.env,
            **group,
        )

    async def _stop(self, process: trio.Process) -> bool:
        """End a process; return whether that took force."""
        process.send_signal(self.stop_signal)
        with cleanup_scope():
            await process.wait()
            return False
        kill_group(process)
        await process.wait()
        return True


def kill_group(process: trio.Process) -> None:
    """Kill a process and what is left of its group."""
    if sys.platform == "win32":
        process.kill()
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has left its group, or has just ended
        process.kill()


def _how(returncode: int | None) -> str:
    if returncode is None or returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:  # a real-time signal
        return f"was ended by signal {-returncode}"


class ProcessLife:
    """What goes on while one process lives: it becomes ready, its lines are heard, work is done with it."""

    def __init__(
        self, function: ProcessFunction, process: trio.Process, task_status: trio.TaskStatus[trio.Process]
    ) -> None:
        self.child_id = function.child_id
        self.process = process
        self.ready = False
        self._line = function.ready_line
        self._task_status = task_status

    def spawned(self) -> None:
        """Take note that the process runs."""
        if self._line is None:
            self._is_ready()

    def heard(self, stream: str, line: bytes) -> None:
        """Log a line, and see whether it is the one that says that the process is ready.

        Args:
            stream: ``stdout`` or ``stderr``.
        """
        text = line.decode("utf-8", "replace").rstrip("\r")
        log.info(
            "child output  child=%(child)s stream=%(stream)s line=%(line)s",
            {"child": self.child_id, "stream": stream, "line": text},
        )
        if not self.ready and self._line is not None and self._line in text:
            self._is_ready()

    async def work(self) -> None:
        """Do nothing with the process but have it run."""

    def over(self) -> None:
        """Take note that the process has ended and that all its lines were heard: `work` must end, too."""

    def _is_ready(self) -> None:
        self.ready = True
        self._task_status.started(self.process)


class _Reader:
    """Reads the lines of one of the process's pipes; goes on while the process is stopped."""

    def __init__(self, stream: str, pipe: trio.abc.ReceiveStream, life: ProcessLife, longest: int) -> None:
        self._stream = stream
        self._pipe = pipe
        self._life = life
        self._longest = longest
        self.scope = trio.CancelScope(shield=True)
        self.done = trio.Event()

    async def run(self) -> None:
        rest = bytearray()
        try:
            with self.scope:
                async with self._pipe:
                    async for data in self._pipe:
                        first, *others = data.split(b"\n")
                        rest += first
                        for line in others:
                            self._heard(rest)
                            rest = bytearray(line)
                        while len(rest) >= self._longest:
                            self._heard(rest[: self._longest])
                            del rest[: self._longest]
            if rest:
                self._heard(rest)
        finally:
            self.done.set()

    def _heard(self, line: bytes | bytearray) -> None:
        self._life.heard(self._stream, bytes(line))
