"""Large bodies, parsed in a process of their own.

A parser keeps the interpreter's lock, so no thread would help: a body of 64 MiB would hold the event loop for
seconds. Such bodies are read only where ``--max-body`` allows them. Each one gets a process that lives no
longer than its request, so none is left over, and a client that leaves ends it. Bounded are its memory, its
processor time, how long it may take, the size of what it makes of the body, and how many there are at a time.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any, TypeVar

import msgspec
import trio

from ullm.config import ServerConfig
from ullm.errors import EngineNotReady, InvalidParameter
from ullm.hub.guarded import working_folder
from ullm.logs import get_logger
from ullm.server.api.errors import InvalidJSON
from ullm.server.api.large_body_child import TOO_MUCH, Parsed
from ullm.server.api.nested_fields import Unknown
from ullm.system.interpreter import python_command, python_environment
from ullm.system.lifeline import Lifeline

R = TypeVar("R", bound=msgspec.Struct)

WALL_SECONDS = 60.0
"""Seconds for one body, the wait for others and the start of the process included."""

log = get_logger(__name__)


class LargeBodies:
    """Parses the large bodies of one app, one at a time."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._place = trio.CapacityLimiter(1)

    async def parse(self, body: bytes, schema: type[R]) -> tuple[R, list[Unknown]]:
        """Return what `BodyParser` makes of a body, without holding the event loop.

        Raises:
            InvalidParameter, InvalidJSON: as from `BodyParser.parse`; or the body takes too much.
            EngineNotReady: no process can be started, it was lost, or others take all the time.
        """
        try:
            with trio.fail_after(WALL_SECONDS):
                async with self._place:
                    answer = await _parsed(body, schema, self._config)
        except trio.TooSlowError:
            raise EngineNotReady("too busy to parse a large body in time") from None
        if answer.error is not None:
            if answer.is_json:
                raise InvalidParameter(answer.error, answer.param)
            raise InvalidJSON(answer.error)
        return msgspec.msgpack.decode(answer.fields, type=schema), answer.unknown


async def _parsed(body: bytes, schema: type[R], config: ServerConfig) -> Parsed:
    command = python_command(
        "-m",
        "ullm.server.api.large_body_child",
        f"{schema.__module__}:{schema.__qualname__}",
        str(config.max_entries),
        str(len(body)),
    )
    try:
        with Lifeline() as lifeline:
            process = await trio.run_process(
                command,
                stdin=body,
                capture_stdout=True,
                check=False,
                deliver_cancel=_kill,
                stderr=subprocess.DEVNULL,
                cwd=working_folder(),
                env=python_environment(),
                pass_fds=lifeline.pass_fds,
                task_status=lifeline,
                **_apart(),
            )
    except OSError as error:
        raise EngineNotReady(
            f"without a process for large bodies, since none can be started: {error}"
        ) from None
    status = process.returncode
    if status == 0:
        return msgspec.msgpack.decode(process.stdout, type=Parsed)
    if status in TOO_MUCH:
        return Parsed(error="the body takes more processor time or memory than a body may", is_json=True)
    log.warning("the process that parses large bodies was lost", status=status)
    raise EngineNotReady("without the process that parses large bodies, which was lost")


async def _kill(process: trio.Process) -> None:
    process.kill()


def _apart() -> dict[str, Any]:
    """Return the options that keep a terminal's Ctrl-C from the process."""
    if os.name == "posix":
        return {"start_new_session": True}
    return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
