"""``/live``, ``/ready``, ``/health``, ``/is_sleeping``, ``/version`` and ``/metrics``.

They are open to everyone, and cheap. The first three also say in which state the engine is: starting,
running, restarting, sleeping, draining, …
"""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

import ullm
from ullm.engine.status import Health
from ullm.server.api.responses import Liveness, Sleeping, Version, json_response
from ullm.server.api.types import Engine
from ullm.server.metrics import Metrics


def install(app: QuartTrio, engine: Engine, metrics: Metrics) -> None:
    """Add the routes to ``app``."""

    async def live() -> Response:
        """200 while the process is worth keeping: starting and draining count, a failed engine does not."""
        found = engine.health()
        return _verdict(found, "live" if found.live else "dead", found.live)

    async def ready() -> Response:
        """200 while new requests are taken; asleep too, where they wake the engine."""
        found = engine.health()
        return _verdict(found, "ready" if found.ready else "not ready", found.ready)

    async def health() -> Response:
        """As `ready`, with everything that is known."""
        found = engine.health()
        return json_response(found, 200 if found.ready else 503)

    async def is_sleeping() -> Response:
        """Also while it falls asleep or wakes up: whether the engine is anything but awake."""
        sleep = engine.health().sleep
        return json_response(Sleeping(sleep.state != "awake", sleep.level))

    async def version() -> Response:
        return json_response(Version(ullm.__version__))

    async def scrape() -> Response:
        text, content_type = metrics.render()
        return Response(text, content_type=content_type)

    for path, view in (
        ("/live", live),
        ("/ready", ready),
        ("/health", health),
        ("/is_sleeping", is_sleeping),
        ("/version", version),
        ("/metrics", scrape),
    ):
        app.get(path)(view)


def _verdict(found: Health, status: str, good: bool) -> Response:
    return json_response(Liveness(status, found.state), 200 if good else 503)
