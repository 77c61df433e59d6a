"""The tools of a request of chats, the older fields included."""

from __future__ import annotations

from typing import Any

import msgspec

from ullm.parsing.tool_use import ToolUse, use_of
from ullm.server.api import schemas


def tool_use(request: schemas.ChatCompletionRequest) -> ToolUse:
    """Return what a request says of tools.

    Raises:
        InvalidParameter: its fields contradict each other; names the field.
    """
    legacy = not request.tools and (bool(request.functions) or request.function_call is not None)
    if legacy:
        functions = [schemas.Tool(function=function) for function in request.functions or ()]
        return use_of(as_dicts(functions), request.function_call, parallel=False, legacy=True)
    parallel = request.parallel_tool_calls is not False
    return use_of(as_dicts(request.tools), request.tool_choice, parallel=parallel)


def as_dicts(tools: list[schemas.Tool] | None) -> list[dict[str, Any]]:
    """Return tools as chat templates take them."""
    found: list[dict[str, Any]] = [msgspec.to_builtins(tool) for tool in tools or ()]
    for tool in found:
        tool["function"] = {name: value for name, value in tool["function"].items() if value is not None}
    return found
