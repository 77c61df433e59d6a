"""One rank of a worker group: how it starts, which answers it owes, and how its loss is noticed."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ullm.actors.step_watchdog import (
    FROZEN_SECONDS,
    LATE_SECONDS,
    LOOK_SECONDS,
    SUSPENDED_SECONDS,
    StepWatchdog,
)
from ullm.actors.transports.base import Transport
from ullm.actors.worker_failure import checked
from ullm.errors import WorkerLost
from ullm.logs import get_logger
from ullm.protocol.messages import FromWorker, Progress, Ready, Start, StepResult, ToWorker

log = get_logger(__name__)

NOTICE_SECONDS = 30.0
"""Seconds within which whoever sends to a lost worker is cancelled, because the loss ends the group."""


class WorkerRank:
    """A transport, and the watchdog of the answers that its worker owes.

    Args:
        transport: the worker.
        step_timeout: seconds without a sign of life after which a worker that owes an answer is lost.
    """

    def __init__(self, transport: Transport, step_timeout: float) -> None:
        self.transport = transport
        self._step_timeout = step_timeout
        self.watchdog = StepWatchdog(step_timeout)
        self._starting = trio.CancelScope()

    async def send(self, message: ToWorker, owed: object) -> None:
        """Send a message whose answer is ``owed`` from now on.

        If the worker is gone, wait to be cancelled: the task that receives sees the same loss, and ends the
        group with it. Raising it here as well would count one loss twice.

        Raises:
            WorkerLost: it is gone, and this task was not cancelled within `NOTICE_SECONDS`.
        """
        self.watchdog.owe(owed)
        try:
            await self.transport.send(message)
        except WorkerLost:
            await trio.sleep(NOTICE_SECONDS)
            raise

    # --- starting --------------------------------------------------------------------------------------

    async def start(
        self, start: Start, seconds: float, heard: Callable[[Progress], None] = lambda _: None
    ) -> Ready:
        """Send `Start` and wait for `Ready`.

        Args:
            heard: called with each sign of life.

        Raises:
            ModelError, ConfigError: the model cannot be loaded; trying again would not help.
            WorkerLost: the worker died, hung, or was not ready after ``seconds``.
        """
        self.watchdog.owe("ready")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.watch_suspension)
            ready = await self._start(start, seconds, heard)
            nursery.cancel_scope.cancel()
        self.watchdog.settle("ready")
        return ready

    async def _start(self, start: Start, seconds: float, heard: Callable[[Progress], None]) -> Ready:
        last = Progress("start", seconds)
        with trio.move_on_after(seconds) as self._starting:
            await self.transport.send(start)
            while not isinstance(message := await self._sign_of_life(last), Ready):
                log.debug("worker starting", worker=self.transport.name, progress=message)
                if isinstance(message, Progress):
                    last = message
                    heard(message)
            return message
        raise WorkerLost(self.transport.name, f"was not ready within --start-timeout {seconds:g} s")

    async def _sign_of_life(self, last: Progress) -> FromWorker:
        """Return the next message of a worker that starts; ``last`` announced how long it may take."""
        slept_through = True
        while slept_through:
            with trio.move_on_after(last.budget) as scope:
                return checked(self.transport, await self.transport.receive())
            slept_through = trio.current_time() - scope.deadline > FROZEN_SECONDS
        raise WorkerLost(
            self.transport.name, f"gave no sign of life for {last.budget:g} s at stage {last.stage!r}"
        )

    # --- running ---------------------------------------------------------------------------------------

    async def watch(self, handle: Callable[[FromWorker], None]) -> None:
        """Hand each message to ``handle``, until the worker is lost.

        Raises:
            WorkerLost: the worker died or failed, or an answer that it owes is overdue.
        """
        while True:
            with self.watchdog.renewed():
                while True:
                    self._take(await self.transport.receive(), handle)
            # The event loop may have been busy, and the answer waiting all the time.
            with trio.move_on_after(LATE_SECONDS) as late:
                self._take(await self.transport.receive(), handle)
            if late.cancelled_caught and not self.watchdog.excused():
                break
        raise WorkerLost(self.transport.name, f"made no progress for {self._step_timeout:g} s")

    async def watch_suspension(self) -> None:
        """Raise `WorkerLost` for a worker that is suspended: as good as hung, and noticed much sooner."""
        since = float("inf")
        while True:
            due = trio.current_time() + LOOK_SECONDS
            await trio.sleep_until(due)
            late = trio.current_time() - due
            if late > FROZEN_SECONDS:
                self.watchdog.thawed()
                log.info("this process was suspended", seconds=round(late, 1), worker=self.transport.name)
                self._starting.deadline += late
                since = float("inf")
            suspended = not self.watchdog.is_idle and self.transport.suspended()
            since = min(since, trio.current_time()) if suspended else float("inf")
            if trio.current_time() - since >= SUSPENDED_SECONDS:
                raise WorkerLost(self.transport.name, f"was suspended for {SUSPENDED_SECONDS:g} s (SIGSTOP)")

    def _take(self, message: FromWorker, handle: Callable[[FromWorker], None]) -> None:
        message = checked(self.transport, message)
        if isinstance(message, Progress):
            return self.watchdog.extend(message.budget)
        if isinstance(message, StepResult):
            missing = self.watchdog.skipped(message.step_id)
            if missing is not None:  # its tokens would be missing
                raise WorkerLost(
                    self.transport.name,
                    f"sent the result of step {message.step_id} and none of step {missing}",
                )
        handle(message)
