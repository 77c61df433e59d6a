"""Ways to run a worker, behind the protocol of `base`: one module per kind, imported when it is chosen.

Imports errors, logs, faults, protocol and worker, but no actor.
"""

from __future__ import annotations

from ullm.actors.transports.base import OpenTransport, StopReport, Transport, WorkerSpec
from ullm.errors import ConfigError

__all__ = ["OpenTransport", "StopReport", "Transport", "WorkerSpec", "open_transport"]


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
            try:
                from ullm.actors.transports.ray import open_ray
            except ModuleNotFoundError as error:
                raise ConfigError(f"--transport ray needs Ray ({error}): pip install ray") from None
            return open_ray
    raise ConfigError(f"--transport {kind!r} is not one of process, thread, ray, fake")
