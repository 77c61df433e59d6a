"""A Starlette application around ``ullm.app``, with settings of its own; served by `test_outer_programs`."""

from __future__ import annotations

import gc
import logging
import sys

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import ullm.app

logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="OUTER %(name)s %(message)s")
gc.set_threshold(5000, 7, 7)


async def threshold(request: Request) -> PlainTextResponse:
    """Say what the threshold of garbage collection is."""
    return PlainTextResponse(str(gc.get_threshold()))


app = Starlette(
    routes=[
        Route("/threshold", threshold),
        Mount("/forgotten", app=ullm.app.App()),
        Mount("/", app=ullm.app.app),
    ],
    lifespan=ullm.app.app.lifespan,
)
