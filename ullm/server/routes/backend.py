"""``GET /backend``: what serves here, and on what."""

from __future__ import annotations

import platform
from importlib import metadata

from quart import Response
from quart_trio import QuartTrio

from ullm.server.api.responses import Backend, json_response
from ullm.server.api.types import Engine

PACKAGES = ("ullm", "torch", "transformers", "trio", "hypercorn", "quart")


def install(app: QuartTrio, engine: Engine) -> None:
    """Add the route to ``app``."""
    versions = {"python": platform.python_version(), **_versions()}

    async def backend() -> Response:
        config = engine.config
        return json_response(
            Backend(
                model=engine.model_name,
                state=engine.health().state,
                transport=config.worker_transport,
                replicas=config.replicas,
                tp_size=config.tp_size,
                info=engine.info,
                versions=versions,
            )
        )

    app.get("/backend")(backend)


def _versions() -> dict[str, str]:
    """From the packages' metadata: torch is not imported in this process."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # as in a bundle without metadata
    return found
