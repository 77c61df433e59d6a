"""The worker loop: messages in, answers out, one step ahead. The same one in every kind of worker.

It is synchronous and owns its thread. While a step runs on a device, the next one may already be
submitted, so that the device never waits for the host; at most two are pending. On a CPU a submitted
step is done at once, and its result is sent before the next step is computed.
"""

from __future__ import annotations

import enum
import importlib
import queue
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TypeVar, cast

from ullm.errors import FrameBroken, ResourceUnavailable
from ullm.logs import get_logger
from ullm.protocol.messages import (
    AdapterKept,
    Asleep,
    Awake,
    BlocksExported,
    BlocksImported,
    ExportBlocks,
    Failed,
    FromWorker,
    ImportBlocks,
    Inject,
    KeepAdapter,
    ModelInfo,
    NotUnderstood,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Progress,
    Ready,
    Sleep,
    Start,
    Step,
    Stop,
    Stopped,
    ToWorker,
    Wake,
)
from ullm.protocol.runner import PendingStep, Runner
from ullm.worker.block_transfer import export_blocks, import_blocks
from ullm.worker.misbehavior import Misbehave, as_process

MAX_PENDING = 2
"""Maximum number of submitted steps: the one that runs and the next one. With more stages, one for each."""

POLL_SECONDS = 100e-6
"""Interval at which a pending step is polled while the next message may still come: a small part of the
fastest step. Applies only to devices; a message ends the wait at once."""

SLEEP_LEVELS = (1, 2)
"""Levels of sleep that concern a worker; at 0 it has nothing to do, at 3 it is stopped."""

SLEEP_BUDGET = 120.0
"""Seconds that freeing memory may take: weights cross the bus once, to memory that is pinned first."""

ADAPTER_BUDGET = 120.0
"""Seconds that reading an adapter from disk may take."""

IMPORT_BUDGET = 120.0
"""Seconds that importing the runner may take, including torch from a cold disk."""

NO_POOL = "there is no KV pool: the worker is asleep, or has not started"

A = TypeVar("A")
B = TypeVar("B")

log = get_logger(__name__)

Inbox = queue.SimpleQueue["ToWorker | NotUnderstood | FrameBroken"]
"""The queue that a worker reads. It also holds what could not be decoded, so that it is answered in turn."""


class Terminated(BaseException):
    """Raised into a runner to interrupt it, because of `Stop`."""


class Ended(enum.Enum):
    """How a worker loop ended."""

    STOPPED = "stopped"
    """The runner is closed and `Stopped` was sent."""
    FAILED = "failed"
    """`Failed` was sent; the runner is *not* closed, because closing may hang on a broken device."""


FORMER_RUNNERS = {"ullm.model.runner:ModelRunner": "ullm.model.execution.runner:ModelRunner"}
"""Path of a runner in earlier versions → its path now."""


def load_runner(path: str) -> Runner:
    """Import and build the runner that ``module:class`` names.

    Raises:
        ResourceUnavailable: there is no such module or class.
    """
    module_name, _, class_name = FORMER_RUNNERS.get(path, path).partition(":")
    try:
        runner_class = getattr(importlib.import_module(module_name), class_name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise ResourceUnavailable(f"--runner {path!r} cannot be imported as module:class: {error}") from error
    return cast(Runner, runner_class())


def run_worker(
    runner: Runner, inbox: Inbox, send: Callable[[FromWorker], None], misbehave: Misbehave = as_process
) -> Ended:
    """Serve ``inbox`` until `Stop` or the first failure.

    Exceptions of the runner become one `Failed`, which is the last message. ``misbehave`` carries out
    injected faults as this kind of worker can.
    """
    loop = WorkerLoop(runner, send, misbehave)
    try:
        while not loop.stopped:
            loop.handle(_next_message(loop, inbox))
    except Exception as error:
        log.debug("worker failed", exc_info=True)
        send(failed(error))
        return Ended.FAILED
    return Ended.STOPPED


def _next_message(loop: WorkerLoop, inbox: Inbox) -> ToWorker | NotUnderstood | FrameBroken:
    """Return the next message; send results that are ready before it, in order."""
    while loop.pending:
        if loop.full or loop.ready():
            loop.send_oldest()
            continue
        try:
            return inbox.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
    return inbox.get()


class WorkerLoop:
    """Carries out messages one by one; the caller decides when to wait for steps."""

    def __init__(
        self, runner: Runner, send: Callable[[FromWorker], None], misbehave: Misbehave = as_process
    ) -> None:
        self._runner = runner
        self._send = send
        self._misbehave = misbehave
        self._info: ModelInfo | None = None
        self._last_step: int | None = None
        self._level = 0
        self._given_back: dict[str, int] = {}
        self._pending: deque[PendingStep] = deque()
        self._max_pending = MAX_PENDING
        self.stopped = False

    @property
    def pending(self) -> int:
        """Steps submitted whose results have not been sent."""
        return len(self._pending)

    @property
    def full(self) -> bool:
        """Whether a result must be sent before the next step can be submitted."""
        return len(self._pending) >= self._max_pending

    def ready(self) -> bool:
        """Whether the oldest pending step is done."""
        return bool(self._pending) and self._pending[0].done()

    def send_oldest(self) -> None:
        """Wait for the oldest pending step and send its result."""
        result = self._pending[0].result()
        self._pending.popleft()
        self._send(result)

    def handle(self, message: ToWorker | NotUnderstood | FrameBroken) -> None:
        """Carry out one message.

        Raises:
            FrameBroken: the inbox held one.
            Exception: any exception of the runner.
        """
        match message:
            case Step():
                self._submit(message)
            case Ping(number):
                self._send(Pong(number))
            case Start():
                self._load(message)
            case Stop():
                self._stop()
            case Prepare():
                self._prepare(message)
            case Sleep(level):
                self._sleep(level)
            case Wake():
                self._wake()
            case KeepAdapter():
                self._keep_adapter(message)
            case ExportBlocks():
                self._send(
                    self._move_blocks(export_blocks, message) or BlocksExported(message.number, error=NO_POOL)
                )
            case ImportBlocks():
                self._send(
                    self._move_blocks(import_blocks, message) or BlocksImported(message.number, NO_POOL)
                )
            case Inject():
                self._misbehave(message, self._info is not None)
            case FrameBroken():
                raise message
            case NotUnderstood(detail):
                log.error("message not understood", detail=detail)
                self._send(message)
            case _:
                self.handle(NotUnderstood(f"{type(message).__name__} is not a message to a worker"))

    def _prepare(self, prepare: Prepare) -> None:
        if self._info is not None:
            return self.handle(NotUnderstood("Prepare came after Start"))
        began = time.perf_counter()
        self._runner.prepare(prepare, self._send_progress)
        self._send(Prepared({"prepare": time.perf_counter() - began}))

    def _load(self, start: Start) -> None:
        if self._info is not None:
            return self.handle(NotUnderstood("Start came twice"))
        began = time.perf_counter()
        self._max_pending = max(MAX_PENDING, start.rank.num_stages)
        info = self._info = self._runner.load(start, self._send_progress)
        self._send(Ready(info, {"load": time.perf_counter() - began}))

    def _send_progress(self, progress: Progress) -> None:
        self._send(progress)

    def _submit(self, step: Step) -> None:
        if self._info is None:
            return self.handle(NotUnderstood("Step came before Start"))
        if self._level:
            return self.handle(NotUnderstood(f"Step came while asleep at level {self._level}"))
        last, self._last_step = self._last_step, step.step_id
        if last is not None and step.step_id != last + 1:  # a delta to another state than this one
            return self.handle(NotUnderstood(f"Step {step.step_id} came after step {last}"))
        self._pending.append(self._runner.submit(step))

    def _sleep(self, level: int) -> None:
        """Free memory. A level that is reached already changes nothing, and gets the same answer."""
        if self._info is None:
            return self.handle(NotUnderstood("Sleep came before Start"))
        if level not in SLEEP_LEVELS:
            return self.handle(NotUnderstood(f"Sleep has level {level}; workers know {SLEEP_LEVELS}"))
        self._finish_pending()
        began = time.perf_counter()
        if level > self._level:
            self._send(Progress("sleep", SLEEP_BUDGET))
            for kind, size in self._runner.sleep(level).items():
                self._given_back[kind] = self._given_back.get(kind, 0) + size
            self._level = level
        self._send(Asleep(dict(self._given_back), time.perf_counter() - began))

    def _wake(self) -> None:
        """Undo all sleep. A worker that is awake keeps its sequences, and gives the same answer."""
        if self._info is None:
            return self.handle(NotUnderstood("Wake came before Start"))
        began = time.perf_counter()
        if self._level:
            self._info = self._runner.wake(self._send_progress)
            self._level, self._given_back, self._last_step = 0, {}, None
        self._send(Awake(self._info, {"wake": time.perf_counter() - began}))

    def _keep_adapter(self, message: KeepAdapter) -> None:
        """Load or drop an adapter; asleep, it is loaded when it is needed."""
        if self._info is None:
            return self.handle(NotUnderstood("KeepAdapter came before Start"))
        error = ""
        if not self._level:
            self._finish_pending()
            self._send(Progress("adapter", ADAPTER_BUDGET))
            error = self._runner.keep_adapter(message.adapter, wanted=message.wanted)
        self._send(AdapterKept(message.adapter.number, error))

    def _move_blocks(self, move: Callable[[Runner, ModelInfo, B], A], message: B) -> A | None:
        """Copy KV blocks after the steps that were submitted before; None while there is no pool."""
        if self._info is None or self._level:
            return None
        self._finish_pending()
        return move(self._runner, self._info, message)

    def _finish_pending(self) -> None:
        while self._pending:
            self.send_oldest()

    def _stop(self) -> None:
        self._finish_pending()
        self._send(Stopped(self._runner.close()))
        self.stopped = True


def failed(error: BaseException) -> Failed:
    """Return the message about the exception that ends a worker."""
    lines = str(error).strip().splitlines() or ["no message"]
    trace = "".join(traceback.format_exception(error))
    return Failed(kind=type(error).__name__, message=lines[0], traceback=trace)
