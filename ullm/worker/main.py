"""The entry point of a worker process: ``python -m ullm.worker.main``, started by its transport.

It reads frames from stdin and writes frames to stdout. Both descriptors are moved away first, and prints of
Python and C code go to stderr, so that none can corrupt a frame.

The worker never outlives its parent. A reader thread ends the process at the end of stdin, even while
the main thread is in a kernel. On Linux the kernel itself does so by a second pipe (see `arm_lifeline`),
even while an extension holds the interpreter's lock. Signals that a terminal or a service manager sends
to a whole group do not concern the worker: it ignores SIGINT and SIGHUP, and reacts to SIGTERM only
after `Stop`, as the second step of the transport's escalation.
"""

from __future__ import annotations

import _thread
import argparse
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from ullm import logs
from ullm.errors import FrameBroken
from ullm.machine import lasting_imports
from ullm.protocol.frames import FrameReader, encode
from ullm.protocol.messages import (
    Awake,
    FromWorker,
    NotUnderstood,
    Prepare,
    Progress,
    Ready,
    Start,
    Stop,
    Stopped,
    ToWorker,
    Wake,
)
from ullm.protocol.runner import Runner
from ullm.system.lifeline import tie
from ullm.worker.loop import IMPORT_BUDGET, Ended, Inbox, Terminated, failed, load_runner, run_worker
from ullm.worker.low_priority import import_at_low_priority

READ_BYTES = 1 << 16


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one worker until it is stopped, fails, or loses its parent. Never returns."""
    options = _parser().parse_args(arguments)
    frames_in, frames_out = _take_pipes()
    if options.lifeline is not None:
        arm_lifeline(options.lifeline)
    logs.configure(as_json=True, at_once=True)  # the transport parses these records and logs them
    worker = WorkerProcess(frames_in, frames_out)
    try:
        ended = worker.run(options.runner, standby=options.standby)
    except Terminated:  # SIGTERM came while it was ending anyway
        ended = Ended.FAILED
    _exit(0 if ended is Ended.STOPPED else 1)


class WorkerProcess:
    """The worker loop, connected to two descriptors."""

    def __init__(self, frames_in: int, frames_out: int) -> None:
        self._in = frames_in
        self._out = frames_out
        self._inbox: Inbox = queue.SimpleQueue()
        self._writing = threading.Lock()
        self._interrupted = False
        self._ready = False
        self._stop_seen = False

    def run(self, runner_path: str, *, standby: bool = False) -> Ended:
        """Import the runner while the parent prepares `Start`, then serve; return how it ended."""
        runner: Runner | None = None
        for name in ("SIGINT", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            threading.Thread(target=self._read, name="reader", daemon=True).start()
            self.send(Progress("import", IMPORT_BUDGET))
            with lasting_imports():
                if standby:
                    import_at_low_priority(runner_path.partition(":")[0])
                runner = load_runner(runner_path)
            return run_worker(runner, self._inbox, self.send)
        except Terminated:
            self.send(Stopped(runner.close() if runner is not None else {}))
            return Ended.STOPPED
        except Exception as error:
            self.send(failed(error))
            return Ended.FAILED
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # there is nothing left to interrupt

    def send(self, message: FromWorker) -> None:
        """Write one frame, from any thread; end the process if the parent is gone."""
        frame = memoryview(encode(message))
        self._ready |= isinstance(
            message, Ready | Awake
        )  # before writing, because the parent may answer at once
        with self._writing:
            try:
                while frame:
                    frame = frame[os.write(self._out, frame) :]
            except OSError:
                os._exit(1)
        if self._interrupted:
            interrupt_main_thread()

    def _read(self) -> None:
        """Read frames in a thread of its own, so that the end of the parent is noticed at any time."""
        reader: FrameReader[ToWorker] = FrameReader(ToWorker)
        while data := os.read(self._in, READ_BYTES):
            reader.feed(data)
            try:
                while (message := reader.next()) is not None:
                    self._take(message)
            except FrameBroken as error:
                return self._inbox.put(error)
        os._exit(1)  # the parent is gone; nobody would read what is flushed

    def _take(self, message: ToWorker | NotUnderstood) -> None:
        self._inbox.put(message)
        if isinstance(message, Start | Prepare):
            logging.getLogger("ullm").setLevel(message.config.log_level.upper())
        if isinstance(message, Wake):
            self._ready = False
        if isinstance(message, Stop):
            self._stop_seen = True
            if not self._ready:
                interrupt_main_thread()  # loading and waking need not be completed

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if not self._stop_seen:
            return
        if self._writing.locked():
            self._interrupted = True  # not within a frame: nothing after it could be read
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated


def interrupt_main_thread() -> None:
    """Run the SIGTERM handler in the main thread; on POSIX this also interrupts a blocking system call."""
    if sys.platform == "win32":
        _thread.interrupt_main(signal.SIGTERM)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def arm_lifeline(descriptor: int) -> None:
    """Have the kernel kill this process when the other end of a pipe closes (Linux only).

    The parent has done so already, unless it ended before it could.
    """
    if sys.platform != "linux":
        raise AssertionError("only Linux signals the end of a pipe")
    import select

    tie(descriptor, os.getpid(), signal.SIGKILL)
    poll = select.poll()
    poll.register(descriptor, 0)
    if poll.poll(0):  # it closed before this was set up
        os._exit(1)


def _take_pipes() -> tuple[int, int]:
    """Return private duplicates of stdin and stdout; redirect the originals to /dev/null and stderr."""
    frames_in, frames_out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    if sys.platform == "win32":
        import msvcrt

        msvcrt.setmode(frames_in, os.O_BINARY)
        msvcrt.setmode(frames_out, os.O_BINARY)
    return frames_in, frames_out


def _exit(status: int) -> NoReturn:
    """Exit at once, without destructors, which may hang on a device, and without waiting for threads."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the parent no longer reads
            pass
    os._exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ullm.worker.main", description=__doc__)
    parser.add_argument("--name", required=True, help="name shown in process lists")
    parser.add_argument("--runner", required=True, help="runner to build, as module:class")
    parser.add_argument("--standby", action="store_true", help="import at a low priority")
    parser.add_argument(
        "--lifeline", type=int, help="descriptor of a pipe; this process is killed when its other end closes"
    )
    return parser


if __name__ == "__main__":
    main()
