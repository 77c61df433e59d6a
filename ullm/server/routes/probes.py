"""``/live``, ``/ready``, ``/health``, ``/is_sleeping``, ``/version``, ``/metrics`` and ``/openapi.json``.

They are open to everyone, and cheap. The first three also name the engine's state: starting, running,
restarting, sleeping, draining, …
"""

from __future__ import annotations

from quart import Response

import ullm
from ullm.engine.status import Health
from ullm.server.api.responses import Liveness, Load, Sleeping, Version, json_response
from ullm.server.routes.service import Service


async def live(service: Service) -> Response:
    """Answer 200 while the process is worth keeping: unless the engine has failed."""
    health = service.engine.health()
    return _verdict(health, "live" if health.live else "dead", health.live)


async def ready(service: Service) -> Response:
    """Answer 200 while new requests are taken; also asleep, where they wake the engine."""
    health = service.engine.health()
    return _verdict(health, "ready" if health.ready else "not ready", health.ready)


async def show_health(service: Service) -> Response:
    """Answer as `ready` does, with everything that is known."""
    health = service.engine.health()
    return json_response(health, 200 if health.ready else 503)


async def is_sleeping(service: Service) -> Response:
    """Tell whether the engine is anything but awake, falling asleep and waking up included."""
    sleep = service.engine.health().sleep
    return json_response(Sleeping(sleep.state != "awake", sleep.level))


async def ping(service: Service) -> Response:
    """Answer as `ready` does, under the name that SageMaker asks for."""
    return await ready(service)


async def load(service: Service) -> Response:
    """Tell how many requests run and wait."""
    counts = service.engine.statistics()
    return json_response(Load(counts.running + counts.waiting, counts.running, counts.waiting))


async def version(service: Service) -> Response:
    """Tell the server's version."""
    return json_response(Version(ullm.__version__))


async def scrape(service: Service) -> Response:
    """Show the metrics in the text format of Prometheus."""
    text, content_type = service.metrics.render()
    return Response(text, content_type=content_type)


async def openapi(service: Service) -> Response:
    """Show the OpenAPI document of the app's routes."""
    return Response(service.document, content_type="application/json")


def _verdict(health: Health, status: str, good: bool) -> Response:
    return json_response(Liveness(status, health.state), 200 if good else 503)
