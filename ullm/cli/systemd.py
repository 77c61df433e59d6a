"""systemd's notification protocol (sd_notify): that the server is ready, stops, and is alive."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import MutableMapping
from typing import Protocol

import trio

from ullm.logs import get_logger

log = get_logger(__name__)

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
PATIENCE = 1.0
"""Seconds that a message may wait for systemd to take it."""


class Stoppable(Protocol):
    """What is accompanied."""

    async def wait_stop_requested(self) -> None:
        """Wait until a stop is requested."""


class ServiceManager:
    """Tells systemd about this process, if systemd has started it and listens.

    Args:
        address: of the socket that takes messages; an ``@`` stands for the abstract namespace. Empty: nobody.
        watchdog: seconds without a sign of life after which systemd ends the process; None: any number.
    """

    def __init__(self, address: str = "", watchdog: float | None = None) -> None:
        self._address = address
        self._watchdog = watchdog
        self._warned = False

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> ServiceManager:
        """Read the variables that systemd sets, and remove them: they are not for child processes."""
        address, microseconds, pid = (environ.pop(name, "") for name in VARIABLES)
        meant = microseconds.isdecimal() and int(microseconds) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(microseconds) / 1e6 if meant else None)

    def ready(self, status: str) -> None:
        """Say that the server is ready, and what ``systemctl status`` shows about it."""
        self._tell("READY=1", f"STATUS={status}")

    async def accompany(self, engine: Stoppable) -> None:
        """Say when a stop is requested; show signs of life until cancelled.

        They come from the event loop that serves, so a stuck one is noticed.
        """
        async with trio.open_nursery() as nursery:
            if self._watchdog is not None:
                nursery.start_soon(self._show_life, self._watchdog / 2)
            await engine.wait_stop_requested()
            self._tell("STOPPING=1", "STATUS=stopping")

    async def _show_life(self, seconds: float) -> None:
        while True:
            self._tell("WATCHDOG=1")
            await trio.sleep(seconds)

    def _tell(self, *lines: str) -> None:
        if not self._address or sys.platform == "win32":
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(PATIENCE)
                sock.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("systemd takes no messages", NOTIFY_SOCKET=self._address, cause=str(error))
