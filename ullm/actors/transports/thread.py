"""A worker as a dedicated thread of this process: fed by a queue, answering through trio's token.

A thread cannot be killed. One that hangs is reported as ``abandoned``: it keeps its memory, and the process
should exit with a non-zero status. One that hangs while it holds the interpreter's lock stops the whole
process; only worker processes avoid that.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ullm.actors.transports.base import StopReport, Transport, WorkerSpec
from ullm.errors import WorkerLost
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.messages import FromWorker, Progress, Stop, Stopped, ToWorker
from ullm.protocol.runner import Runner
from ullm.worker.loop import IMPORT_BUDGET, Ended, Inbox, Terminated, failed, load_runner, run_worker
from ullm.worker.misbehavior import Crashed, as_thread

log = get_logger(__name__)


@asynccontextmanager
async def open_thread(spec: WorkerSpec) -> AsyncIterator[Transport]:
    """Start a worker thread; leaving the context stops it, unless it hangs."""
    transport = ThreadTransport(spec)
    transport.start()
    try:
        yield transport
    finally:
        await transport.leave()


class ThreadTransport:
    """See `Transport`. Messages are handed over without a copy: neither side changes them."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._trio = trio.lowlevel.current_trio_token()
        self._inbox: Inbox = queue.SimpleQueue()
        self._deliver, self._delivered = trio.open_memory_channel[FromWorker](math.inf)
        self._thread = threading.Thread(target=self._work, name=spec.rank.name, daemon=True)
        self._ended = trio.Event()
        self._cause = "ended"
        self._killed = False
        self._stopping = False
        self._abandoned = False
        self._stopped: Stopped | None = None

    @property
    def name(self) -> str:
        """As in logs."""
        return self._spec.rank.name

    @property
    def pid(self) -> None:
        """A thread has no process of its own."""
        return None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def alive(self) -> bool:
        """Whether the thread runs and is not counted as lost."""
        return not self._killed and not self._ended.is_set()

    def suspended(self) -> bool:
        """Return False: a thread cannot be suspended alone."""
        return False

    async def send(self, message: ToWorker) -> None:
        """Hand one message over."""
        await trio.lowlevel.checkpoint()
        if not self.alive():
            raise WorkerLost(self.name, self._cause)
        self._inbox.put(message)

    async def receive(self) -> FromWorker:
        """Return the next message; none after `kill`, even if the thread still sends some."""
        try:
            return await self._delivered.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise WorkerLost(self.name, self._cause) from None

    def kill(self) -> None:
        """Tell the thread to stop, and count it as lost from now on."""
        if self.alive():
            self._killed = self._stopping = True
            self._cause = "was given up; its thread cannot be killed"
            self._inbox.put(Stop(0.0))
            self._deliver.close()

    async def stop(self, budget: float) -> StopReport:
        """Send `Stop` and wait for the end; then abandon a thread that still runs.

        One that was killed before is known to hang, and gets only `stop_budget.THREAD_GIVEN_UP`.
        """
        began = trio.current_time()
        if not self._ended.is_set():
            patience = stop_budget.THREAD_GIVEN_UP if self._killed else math.inf
            self._stopping = True
            self._inbox.put(Stop(budget))
            with trio.move_on_after(max(0.0, min(patience, budget - stop_budget.THREAD_REPORT))):
                await self._ended.wait()
        if not self._ended.is_set():
            self.kill()
            self._abandoned = True
            log.error("worker thread hangs and is abandoned", worker=self.name)
            return self._report("abandoned", began)
        return self._report("stopped" if self._stopped else "lost", began)

    async def leave(self) -> None:
        """Stop the thread and wait for it, unless it was abandoned."""
        self.kill()
        if self._abandoned:
            return  # `stop` has waited for it
        with trio.move_on_after(stop_budget.THREAD_LEAVE, shield=True):
            await self._ended.wait()
        if self._ended.is_set():
            self._thread.join(stop_budget.THREAD_LEAVE)  # it only has to return

    def _report(self, outcome: str, began: float) -> StopReport:
        timings = self._stopped.timings if self._stopped else {}
        return StopReport(self.name, outcome, trio.current_time() - began, timings)

    # --- on the worker's thread ---

    def _work(self) -> None:
        self._serve()  # afterwards the runner is gone: freeing weights takes time, and belongs to the end
        self._to_trio(self._end)

    def _serve(self) -> None:
        runner: Runner | None = None
        ended = Ended.FAILED
        try:
            self._answer(Progress("import", IMPORT_BUDGET))
            runner = load_runner(self._spec.runner)
            ended = run_worker(runner, self._inbox, self._answer, as_thread)
        except Terminated:
            self._answer(Stopped(_close(runner, self.name)))
            ended = Ended.STOPPED
        except Crashed as crash:
            self._to_trio(self._crash, crash.cause)
        except Exception as error:
            self._answer(failed(error))
        if ended is Ended.FAILED:
            _close(runner, self.name)

    def _answer(self, message: FromWorker) -> None:
        if self._stopping and isinstance(message, Progress):
            raise Terminated  # loading reports progress often, so it can be interrupted here
        self._to_trio(self._take, message)

    def _to_trio(self, callback: object, *arguments: object) -> None:
        try:
            self._trio.run_sync_soon(callback, *arguments)  # type: ignore[arg-type]
        except trio.RunFinishedError:
            log.debug("trio ended before its worker thread", worker=self.name)

    # --- on trio's thread, where nothing may be raised ---

    def _take(self, message: FromWorker) -> None:
        if self._killed:
            return
        if isinstance(message, Stopped):
            self._stopped = message
        self._deliver.send_nowait(message)

    def _crash(self, cause: str) -> None:
        if not self._killed:
            self._cause = cause

    def _end(self) -> None:
        self._ended.set()
        self._deliver.close()


def _close(runner: Runner | None, name: str) -> dict[str, float]:
    """Close a runner after a failure: this process goes on, so its memory must be freed."""
    try:
        return runner.close() if runner is not None else {}
    except Exception:
        log.warning("worker did not close cleanly", worker=name, exc_info=True)
        return {}
