"""``GET /backend``: what serves here, and on what."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

from quart import Response

from ullm.server.api.responses import BackendInfo, json_response
from ullm.server.routes.service import Service

PACKAGES = ("ullm", "torch", "transformers", "trio", "hypercorn", "quart")


async def backend(service: Service) -> Response:
    """Describe the model, its workers, and the versions of the packages."""
    engine = service.engine
    return json_response(
        BackendInfo(
            model=engine.model_name,
            state=engine.health().state,
            transport=engine.config.worker_transport,
            replicas=engine.config.replicas,
            tp_size=engine.config.tp_size,
            pp_size=engine.config.pp_size,
            info=engine.info,
            versions=_versions(),
        )
    )


@cache
def _versions() -> dict[str, str]:
    """Read the versions from the packages' metadata: torch is not imported in this process."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # as in a bundle without metadata
    return versions
