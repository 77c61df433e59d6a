"""``/live``, ``/ready``, ``/health``, ``/version`` and ``/metrics``: open to everyone, and cheap."""

from __future__ import annotations

import msgspec
from quart import Response
from quart_trio import QuartTrio

import ullm
from ullm.server.metrics import Metrics
from ullm.server.responses import Liveness, Version
from ullm.server.types import Engine


def install(app: QuartTrio, engine: Engine, metrics: Metrics) -> None:
    """Add the routes to ``app``."""

    async def live() -> Response:
        """200 while the process is worth keeping: starting and draining count, a failed engine does not."""
        good = engine.health().live
        return _json(Liveness("live" if good else "dead", str(engine.state)), 200 if good else 503)

    async def ready() -> Response:
        """200 while new requests are served."""
        good = engine.health().ready
        return _json(Liveness("ready" if good else "not ready", str(engine.state)), 200 if good else 503)

    async def health() -> Response:
        """As `ready`, with everything that is known."""
        found = engine.health()
        return _json(found, 200 if found.ready else 503)

    async def version() -> Response:
        return _json(Version(ullm.__version__), 200)

    async def scrape() -> Response:
        text, content_type = metrics.render()
        return Response(text, content_type=content_type)

    for path, view in (("/live", live), ("/ready", ready), ("/health", health), ("/version", version)):
        app.get(path)(view)
    app.get("/metrics")(scrape)


def _json(answer: object, status: int) -> Response:
    return Response(msgspec.json.encode(answer), status=status, content_type="application/json")
