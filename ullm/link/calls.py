"""What a front end may have the engine do, beside running requests: method → how it is done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from ullm.config import SleepMode
from ullm.engine.adapters import Adapters
from ullm.engine.status import ReloadReport, SleepHealth
from ullm.faults import FaultAction, FaultReport
from ullm.protocol.messages import Adapter


class Operable(Protocol):
    """The part of `ullm.engine.Engine` that administrators use."""

    async def sleep(self, level: int | None = None, mode: SleepMode = "wait") -> SleepHealth:
        """See `Engine.sleep`."""

    async def wake(self) -> SleepHealth:
        """See `Engine.wake`."""

    async def reload(self, model: str | None = None, revision: str | None = None) -> ReloadReport:
        """See `Engine.reload`."""

    def request_reload(self) -> None:
        """See `Engine.request_reload`."""

    @property
    def adapters(self) -> Adapters:
        """See `Engine.adapters`."""

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> None:
        """See `Engine.load_adapter`."""

    async def unload_adapter(self, name: str) -> None:
        """See `Engine.unload_adapter`."""

    async def manage_faults(self, action: FaultAction, plan: str = "") -> FaultReport:
        """See `Engine.manage_faults`."""


Shutdown = Callable[[float | None, str], object]
"""Begins the stop of the engine, given the seconds until all is gone, and who asks for it."""


class Calls:
    """Carries out calls on an engine.

    Args:
        shutdown: begins the stop of the engine's process.
    """

    def __init__(self, engine: Operable, shutdown: Shutdown) -> None:
        self._engine = engine
        self._shutdown = shutdown

    async def carry_out(self, method: str, arguments: dict[str, Any]) -> Any:
        """Do it, and return a result that a message can carry.

        Raises:
            RequestError: the engine refuses it.
            LookupError: there is no such method.
        """
        return await self._methods[method](**arguments)

    @property
    def _methods(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {
            "sleep": self._engine.sleep,
            "wake": self._engine.wake,
            "reload": self._engine.reload,
            "request_reload": self._request_reload,
            "manage_faults": self._engine.manage_faults,
            "load_adapter": self._load_adapter,
            "unload_adapter": self._unload_adapter,
            "shutdown": self._request_shutdown,
        }

    async def _load_adapter(self, name: str, path: str, replace: bool) -> list[Adapter]:
        await self._engine.load_adapter(name, path, replace=replace)
        return list(self._engine.adapters)

    async def _unload_adapter(self, name: str) -> list[Adapter]:
        await self._engine.unload_adapter(name)
        return list(self._engine.adapters)

    async def _request_reload(self) -> None:
        self._engine.request_reload()

    async def _request_shutdown(self, timeout: float | None, by: str) -> None:  # noqa: ASYNC109  # a promise
        self._shutdown(timeout, by)
