"""A process that hosts an engine: what `ullm serve` and `ullm.app` have in common when they stop it."""

from __future__ import annotations

import signal
from typing import Protocol

import trio

from ullm.engine import ShutdownReport
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.exit_codes import EXIT_ABANDONED
from ullm.server.api.types import EngineInterface
from ullm.supervision.signals import STOP_SIGNALS, Watchdog, forced_exit_code, leave_now, signal_ladder

log = get_logger(__name__)

RELOAD_SIGNALS = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
"""Windows has none."""


class HostedEngine(EngineInterface, Protocol):
    """What a host and its process need of an engine: `ullm.engine.Engine`, or a front end's remote one."""

    @property
    def report(self) -> ShutdownReport | None:
        """How the stop went; None until it is over."""

    def request_reload(self) -> None:
        """Begin a reload; return at once."""

    def expedite(self) -> None:
        """Skip the rest of the drain."""

    def kill(self, signal_number: int) -> None:
        """Kill what could hold up the stop."""

    async def wait_stop_requested(self) -> None:
        """Wait until a stop is requested."""

    async def wait_stopped(self) -> ShutdownReport:
        """Wait for the end."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Start, and run until stopped."""


class EngineHost:
    """Requests every stop of an engine together with the watchdog that ends a process in which it hangs.

    Attributes:
        watchdog: what it has to clean up before it ends the process is set by whoever makes it.
    """

    def __init__(self, engine: HostedEngine) -> None:
        self.engine = engine
        self.watchdog = Watchdog(exit_code=EXIT_ABANDONED)

    def request_stop(self, timeout: float | None = None, by: str = "admin") -> None:
        """Request the orderly stop; return at once.

        Args:
            timeout: seconds from now until all is gone; None: the configuration's.
            by: who requests it, for the report.
        """
        seconds = self.engine.config.shutdown_timeout if timeout is None else timeout
        self.watchdog.arm(stop_budget.watchdog_seconds(seconds))
        self.engine.request_shutdown(timeout, by=by)

    async def stop(self) -> ShutdownReport:
        """Stop in order, and return how it went."""
        self.request_stop(by="shutdown()")
        return await self.engine.wait_stopped()

    # --- signals, where the process is the engine's own ----------------------------------------------------

    async def answer_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Answer the first signal with a drain, the second with an abort, and the third by leaving now."""
        await signal_ladder(
            lambda number: self.request_stop(by=number.name),
            lambda number: self.engine.expedite(),
            self._leave,
            at_once=self._arm_watchdog,
            task_status=task_status,
        )

    def _arm_watchdog(self, number: signal.Signals, count: int) -> None:
        """Arm it in the signal handler: the event loop, which everything else here needs, may be stuck."""
        if count == 1:
            self.watchdog.arm(stop_budget.watchdog_seconds(self.engine.config.shutdown_timeout))
        elif count == 2:
            self.watchdog.arm(stop_budget.watchdog_seconds(0.0))
        else:
            self.watchdog.exit_code = forced_exit_code(number)
            self.watchdog.arm(stop_budget.FORCED_EXIT)

    def _leave(self, number: signal.Signals) -> None:
        self.engine.kill(number)
        try:
            self.watchdog.cleanup()
        finally:
            leave_now(number)

    async def answer_hangups(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Answer SIGHUP by a reload, unless ``nohup`` has it ignored, or the system has none."""
        signals = [number for number in RELOAD_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        if not signals:  # trio would refuse to wait for none
            task_status.started()
            return
        with trio.open_signal_receiver(*signals) as received:
            task_status.started()
            async for number in received:
                log.info("signal received", signal=signal.Signals(number).name, action="reload")
                self.engine.request_reload()


def leave_soon(exit_code: int) -> None:
    """Have the process end soon with this code: the engine is gone, and it is too late to change how it ends.

    A thread or a library that still holds the process then does not hold it for long.
    """
    for number in (*STOP_SIGNALS, *RELOAD_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    Watchdog(exit_code=exit_code).arm(stop_budget.PROCESS_LEAVE)
