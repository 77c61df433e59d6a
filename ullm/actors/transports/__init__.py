"""Ways to run a worker, behind the protocol of `base`: one module per kind, imported when it is chosen.

Imports errors, logs, faults, protocol and worker, but no actor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullm.actors.transports.base import OpenTransport, StopReport, Transport, WorkerSpec
from ullm.errors import ConfigError, ResourceUnavailable

if TYPE_CHECKING:
    from ullm.actors.transports.ray import RayWorkers

__all__ = ["OpenTransport", "StopReport", "Transport", "WorkerSpec", "open_transport", "ray_workers"]


def open_transport(kind: str) -> OpenTransport:
    """Return the function that starts workers of one kind: ``process``, ``thread``, ``ray`` or ``fake``.

    Raises:
        ConfigError: there is no such kind, or its library is not installed.
    """
    match kind:
        case "process":
            from ullm.actors.transports.process import open_process

            return open_process
        case "thread":
            from ullm.actors.transports.thread import open_thread

            return open_thread
        case "fake":
            from ullm.actors.transports.fake import FakeWorkers

            return FakeWorkers().open
        case "ray":
            return ray_workers().open
    raise ConfigError(f"--transport {kind!r} is not one of process, thread, ray, fake")


def ray_workers() -> RayWorkers:
    """Return what starts workers as Ray actors.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        from ullm.actors.transports.ray import RayWorkers
    except ModuleNotFoundError as error:
        raise ResourceUnavailable(
            f"--transport ray needs Ray ({error}): pip install 'ullm-engine[ray]'"
        ) from None
    return RayWorkers()
