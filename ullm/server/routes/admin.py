"""What only administrators may do: sleep, wake, reload, shut down, look inside, inject faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quart import Response

from ullm.errors import ConfigError, InvalidParameter
from ullm.server.api.responses import AdapterList, Stopping, Tree, TreeNode, json_response
from ullm.server.api.schemas import (
    FaultsRequest,
    LoadAdapterRequest,
    ReloadRequest,
    ShutdownRequest,
    SleepRequest,
    UnloadAdapterRequest,
    WakeRequest,
)
from ullm.server.routes.service import Service

if TYPE_CHECKING:
    from ullm.supervision import ChildInfo


async def sleep(service: Service, request: SleepRequest) -> Response:
    """Put the engine to sleep; answer when it is asleep."""
    return json_response(await service.engine.sleep(request.level, request.mode or "wait"))


async def wake(service: Service, request: WakeRequest) -> Response:
    """Wake the engine; answer when it is awake."""
    return json_response(await service.engine.wake())


async def reload(service: Service, request: ReloadRequest) -> Response:
    """Have new workers take over; answer when they have, or could not."""
    return json_response(await service.engine.reload(request.model, request.revision))


async def load_adapter(service: Service, request: LoadAdapterRequest) -> Response:
    """Load a LoRA adapter and serve it; answer when it is."""
    await service.engine.load_adapter(request.lora_name, request.lora_path, replace=request.load_inplace)
    return _adapters(service)


async def unload_adapter(service: Service, request: UnloadAdapterRequest) -> Response:
    """Serve a LoRA adapter no more."""
    await service.engine.unload_adapter(request.lora_name)
    return _adapters(service)


def _adapters(service: Service) -> Response:
    return json_response(AdapterList(adapters={each.name: each.path for each in service.engine.adapters}))


async def shutdown(service: Service, request: ShutdownRequest) -> Response:
    """Begin the stop and answer at once; admitted requests run on within the timeout.

    Further calls can only shorten it.
    """
    service.shutdown(request.timeout)
    timeout = request.timeout
    seconds = service.engine.config.shutdown_timeout if timeout is None else timeout
    return json_response(Stopping("draining", seconds))


async def show_tree(service: Service) -> Response:
    """Show the supervision tree."""
    engine = service.engine
    return json_response(Tree(engine.health().state, [_child(info) for info in engine.children()]))


async def show_faults(service: Service) -> Response:
    """Show the faults that are armed and those that have happened."""
    return json_response(await service.engine.manage_faults("show"))


async def arm_faults(service: Service, request: FaultsRequest) -> Response:
    """Add a plan to what is armed; answer with all of it."""
    try:
        report = await service.engine.manage_faults("arm", request.plan)
    except ConfigError as error:
        raise InvalidParameter(f"plan: {error}", "plan") from None
    return json_response(report)


async def clear_faults(service: Service) -> Response:
    """Disarm all faults."""
    return json_response(await service.engine.manage_faults("clear"))


def _child(info: ChildInfo) -> TreeNode:
    children = [_child(child) for child in info.children]
    return TreeNode(
        info.child_id, info.status.value, info.kind.value, info.restart.value, info.restarts, children
    )
