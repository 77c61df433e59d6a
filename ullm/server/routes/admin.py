"""What only those who run the server may do: sleep, wake, reload, shut down, look inside, break things."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quart import Response
from quart_trio import QuartTrio

from ullm.errors import ConfigError, InvalidParameter
from ullm.server.api import requests
from ullm.server.api.responses import Child, Stopping, Tree, json_response
from ullm.server.api.schemas import FaultsRequest, ReloadRequest, ShutdownRequest, SleepRequest
from ullm.server.api.types import Engine

if TYPE_CHECKING:
    from ullm.supervision import ChildInfo


def install(app: QuartTrio, engine: Engine, shutdown: Callable[[float | None], object] | None) -> None:
    """Add the routes to ``app``, which is to say who may call them.

    Args:
        shutdown: see `ullm.server.app.create_app`.
    """
    _install_sleep(app, engine)
    _install_shutdown(app, engine, shutdown or (lambda timeout: engine.request_shutdown(timeout, by="admin")))
    _install_faults(app, engine)
    read_reload = requests.json_reader(ReloadRequest, optional=True)

    async def reload() -> Response:
        """New workers take over; answers when they have, or could not."""
        request: ReloadRequest = await read_reload()
        return json_response(await engine.reload(request.model, request.revision))

    async def tree() -> Response:
        return json_response(Tree(engine.health().state, [_child(info) for info in engine.children()]))

    app.post("/admin/reload")(reload)
    app.get("/admin/tree")(tree)


def _install_sleep(app: QuartTrio, engine: Engine) -> None:
    read = requests.json_reader(SleepRequest, optional=True)

    async def sleep() -> Response:
        """The fields may also come in the query, as vLLM has it; the body wins."""
        query = requests.query(SleepRequest)
        body: SleepRequest = await read()
        level = query.level if body.level is None else body.level
        return json_response(await engine.sleep(level, body.mode or query.mode or "wait"))

    async def wake() -> Response:
        return json_response(await engine.wake())

    app.post("/sleep")(sleep)
    for path in ("/wake", "/wake_up"):
        app.post(path, endpoint=path)(wake)


def _install_shutdown(app: QuartTrio, engine: Engine, shutdown: Callable[[float | None], object]) -> None:
    read = requests.json_reader(ShutdownRequest, optional=True)

    async def stop() -> Response:
        """Answers at once; what was admitted runs on within the timeout. Further calls make it sooner."""
        request: ShutdownRequest = await read()
        shutdown(request.timeout)
        seconds = engine.config.shutdown_timeout if request.timeout is None else request.timeout
        return json_response(Stopping("draining", seconds))

    app.post("/admin/shutdown")(stop)


def _install_faults(app: QuartTrio, engine: Engine) -> None:
    read = requests.json_reader(FaultsRequest)

    async def show() -> Response:
        return json_response(engine.faults.describe())

    async def arm() -> Response:
        """Adds to what is armed; answers with all of it."""
        request: FaultsRequest = await read()
        try:
            engine.faults.arm(request.plan)
        except ConfigError as error:
            raise InvalidParameter(f"plan: {error}", "plan") from None
        return json_response(engine.faults.describe())

    async def clear() -> Response:
        engine.faults.clear()
        return json_response(engine.faults.describe())

    app.get("/admin/faults")(show)
    app.post("/admin/faults")(arm)
    app.delete("/admin/faults")(clear)


def _child(info: ChildInfo) -> Child:
    children = [_child(child) for child in info.children]
    return Child(
        info.child_id, info.status.value, info.kind.value, info.restart.value, info.restarts, children
    )
