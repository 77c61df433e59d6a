"""``python -m tests.benchmarks events``: what clients of a server get when it is stopped or disturbed.

Each event has a server of its own, with a few streams in flight. Nothing is judged here: the outcomes are put
side by side, and docs/explanation/reliability.md says what they mean.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.client.http import Connection, Endpoint
from ullm.errors import ServerRefused, ServerUnreachable, UsageError
from ullm.testing.processes import MeasuredServer, ServerEnded, free_port, open_server

READY_SECONDS = 240.0
"""Seconds that a server may take until it answers."""
PATIENCE = 45.0
"""Seconds after an event for which streams and processes are watched."""
SETTLE = 5.0
"""Seconds after a start in which a server may prepare things in the background."""
WORDS = ("river", "copper", "lantern", "orchard", "signal", "harbour", "meadow", "thunder")


@dataclass(frozen=True)
class EventCandidate:
    """A server to put through the events.

    Args:
        command: the command, with ``{port}`` in place of its port.
        drain: options that set the seconds for draining, with ``{seconds}`` in their place; empty if the
            server has none.
    """

    name: str
    command: Sequence[str]
    drain: Sequence[str] = ()

    def line(self, port: int, seconds: float | None) -> list[str]:
        """Return the command to run; without options about stopping if ``seconds`` is None."""
        options = [] if seconds is None else [part.format(seconds=f"{seconds:g}") for part in self.drain]
        return [part.replace("{port}", str(port)) for part in [*self.command, *options]]


class EventOutcome(msgspec.Struct, frozen=True):
    """The outcome of one event; seconds count from it."""

    event: str
    values: dict[str, Any]


@dataclass
class EventStream:
    """One stream, and the arrival times of its pieces."""

    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    begun: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)
    ended: float | None = None
    last: float = 0.0
    gap: float = 0.0

    async def run(self, endpoint: Endpoint, model: str, number: int, max_tokens: int) -> None:
        """Read the stream to its end, in whatever way it ends."""
        body = {
            "model": model,
            "prompt": f"Write about the {WORDS[number % len(WORDS)]}.",
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        connection = Connection(endpoint)
        try:
            async with connection.events("/completions", body) as events:
                async for event in events:
                    self._take(msgspec.json.decode(event))
        except (ServerUnreachable, ServerRefused) as error:
            self.error = str(error)
        finally:
            self.ended = trio.current_time()
            self.begun.set()
            self.done.set()
            await connection.aclose()

    def _take(self, chunk: dict[str, Any]) -> None:
        now = trio.current_time()
        if self.begun.is_set():
            self.gap = max(self.gap, now - self.last)
        self.last = now
        if "error" in chunk:
            self.error = str(chunk["error"].get("message", chunk["error"]))
        for choice in chunk.get("choices", []):
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.begun.set()


class Scene:
    """A server with streams in flight, as seen from outside."""

    def __init__(self, server: MeasuredServer, readers: list[EventStream], model: str) -> None:
        self.server = server
        self.readers = readers
        self.model = model
        self.before = server.tree()
        self.began = trio.current_time()

    def worker(self, pids: Sequence[int]) -> Any:
        """Return the worker process: the one that the server names, else its largest descendant."""
        below = [process for process in self.server.tree() if process.pid != self.server.pid]
        named = [process for process in below if process.pid in pids]
        return max(named or below, key=lambda process: process.memory_info().rss)

    async def status(self, path: str) -> str:
        """Return the status that a probe gets."""
        endpoint = Endpoint("http", "127.0.0.1", self.server.endpoint.port, "")
        connection = Connection(endpoint)
        answer = "no answer"
        with trio.move_on_after(2):
            try:
                async with connection.request("GET", path) as pieces:
                    [piece async for piece in pieces]
                answer = "200"
            except ServerRefused as error:
                answer = str(error.status)
            except ServerUnreachable:
                answer = "refused"
        await connection.aclose()
        return answer

    async def late(self) -> str:
        """Return what a request gets that arrives now."""
        reader = EventStream()
        with trio.move_on_after(5):
            await reader.run(self.server.endpoint, self.model, 0, 4)
            return reader.error or f"served ({reader.finish_reason})"
        return "no answer within 5 s"

    async def outcomes(self) -> dict[str, Any]:
        """Wait for the streams; return how they ended, and the longest silence in one of them."""
        with trio.move_on_after(PATIENCE):
            for reader in self.readers:
                await reader.done.wait()
        counts: dict[str, int] = {}
        for reader in self.readers:
            how = "hangs" if reader.ended is None else reader.finish_reason or "broken"
            counts[how] = counts.get(how, 0) + 1
        ends = [reader.ended for reader in self.readers if reader.ended is not None]
        return {
            "streams": counts,
            "longest gap": round(max(reader.gap for reader in self.readers), 2),
            "last stream ended": round(max(ends) - self.began, 2) if ends else None,
            "error": next((reader.error for reader in self.readers if reader.error), None),
        }

    async def exit(self) -> dict[str, Any]:
        """Wait for the server to exit; return its status, the seconds, and the processes left of its tree."""
        with trio.move_on_after(PATIENCE):
            await self.server.process.wait()
        gone = trio.current_time() - self.began
        status = self.server.process.returncode
        return {"exit": "still there" if status is None else status, "exit after": round(gone, 2)} | (
            await self.left(1.0)
        )

    async def left(self, seconds: float) -> dict[str, Any]:
        """Return the number of the server's processes that still run after ``seconds`` more seconds."""
        await trio.sleep(seconds)
        return {f"processes left {seconds:g} s later": len(self.server.leftovers())}


Event = Callable[[Scene], Awaitable[dict[str, Any]]]


async def leave_alone(scene: Scene) -> dict[str, Any]:
    """Do nothing; the silences of other events are compared with this one's."""
    return await scene.outcomes()


async def drain(scene: Scene) -> dict[str, Any]:
    """Send SIGTERM, with enough time to drain."""
    scene.server.process.send_signal(signal.SIGTERM)
    await trio.sleep(0.3)
    seen = {path: await scene.status(path) for path in ("/live", "/ready", "/health")}
    late = await scene.late()
    return {"probes": seen, "late request": late} | await scene.outcomes() | await scene.exit()


async def stop(scene: Scene) -> dict[str, Any]:
    """Send SIGTERM, with too little time to drain, or with the server's default."""
    scene.server.process.send_signal(signal.SIGTERM)
    return await scene.outcomes() | await scene.exit()


async def stop_twice(scene: Scene) -> dict[str, Any]:
    """Send a second SIGTERM half a second after the first."""
    scene.server.process.send_signal(signal.SIGTERM)
    await trio.sleep(0.5)
    if scene.server.process.poll() is None:
        scene.server.process.send_signal(signal.SIGTERM)
    return await scene.outcomes() | await scene.exit()


async def kill_worker(scene: Scene) -> dict[str, Any]:
    """Send SIGKILL to the worker."""
    return await _hurt(scene, _posix_signal("SIGKILL"))


async def suspend_worker(scene: Scene) -> dict[str, Any]:
    """Send SIGSTOP to the worker."""
    return await _hurt(scene, _posix_signal("SIGSTOP"))


def _posix_signal(name: str) -> signal.Signals:
    """Return a signal by its name, which the system may not have."""
    try:
        return signal.Signals[name]
    except KeyError:
        raise UsageError(f"{name} is not a signal of this system; choose other events") from None


async def _hurt(scene: Scene, number: signal.Signals) -> dict[str, Any]:
    worker = scene.worker(await _named_workers(scene.server))
    worker.send_signal(number)
    await trio.sleep(3.0)
    health = await scene.status("/health")
    outcomes = await scene.outcomes()
    late = await scene.late()
    status = scene.server.process.poll()
    return (
        {"/health 3 s later": health}
        | outcomes
        | {
            "late request": late,
            "server": "runs" if status is None else f"exited with {status}",
        }
    )


async def kill_server(scene: Scene) -> dict[str, Any]:
    """Send SIGKILL to the server itself."""
    scene.server.process.kill()
    await scene.server.process.wait()
    first = await scene.left(1.0)
    return {"processes before": len(scene.before)} | first | await scene.left(19.0)


async def _named_workers(server: MeasuredServer) -> list[int]:
    """Return the workers' pids from ``/health``; none for servers that do not tell."""
    endpoint = Endpoint("http", "127.0.0.1", server.endpoint.port, "")
    connection = Connection(endpoint)
    try:
        answer = await connection.json("GET", "/health")
        return [pid for replica in answer["replicas"] for pid in replica["worker_pids"]]
    except (ServerUnreachable, ServerRefused, KeyError, TypeError):
        return []
    finally:
        await connection.aclose()


PROGRAM: dict[str, tuple[Event, float | None, int]] = {
    "undisturbed": (leave_alone, None, 256),
    "SIGTERM, 30 s to drain": (drain, 30.0, 256),
    "SIGTERM, 4 s to drain": (stop, 4.0, 1900),
    "SIGTERM, as by default": (stop, None, 1900),
    "second SIGTERM after 0.5 s": (stop_twice, 30.0, 1900),
    "worker SIGKILL": (kill_worker, None, 256),
    "worker SIGSTOP": (suspend_worker, None, 256),
    "server SIGKILL": (kill_server, None, 1900),
}
"""Event → what is done, the seconds that the server gets to drain, and the tokens of each stream."""

START_UP = "SIGTERM while starting"


async def run_event(
    candidate: EventCandidate, name: str, streams: int, settle: float = SETTLE
) -> EventOutcome:
    """Start a server and its streams, and run one event of `PROGRAM`.

    Args:
        settle: seconds from the server's first answer to the first stream.

    Raises:
        ServerEnded: it did not come up.
    """
    event, seconds, max_tokens = PROGRAM[name]
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        endpoint = Endpoint("http", "127.0.0.1", port, "/v1")
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(
                open_server(candidate.name, candidate.line(port, seconds), endpoint, Path(folder) / "log")
            )
            await server.wait_answer("/health", READY_SECONDS)
            await trio.sleep(settle)
            model = await _model(endpoint)
            nursery = await stack.enter_async_context(trio.open_nursery())
            readers = [EventStream() for _ in range(streams)]
            for number, reader in enumerate(readers):
                nursery.start_soon(reader.run, endpoint, model, number, max_tokens)
            for reader in readers:
                await reader.begun.wait()
            outcome = EventOutcome(name, await event(Scene(server, readers, model)))
            nursery.cancel_scope.cancel()
    return outcome


async def run_start_up(candidate: EventCandidate, after: float) -> EventOutcome:
    """Send SIGTERM ``after`` seconds into the start."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        endpoint = Endpoint("http", "127.0.0.1", port, "/v1")
        async with open_server(
            candidate.name, candidate.line(port, None), endpoint, Path(folder) / "log"
        ) as server:
            await trio.sleep(after)
            if server.process.poll() is not None:
                raise ServerEnded(candidate.name, f"ended with {server.process.returncode}", server.log)
            scene = Scene(server, [], "")
            server.process.send_signal(signal.SIGTERM)
            return EventOutcome(START_UP, {"signal after": after} | await scene.exit())


async def _model(endpoint: Endpoint) -> str:
    connection = Connection(endpoint)
    try:
        answer = await connection.json("GET", "/models")
        return str(answer["data"][0]["id"])
    finally:
        await connection.aclose()


OWN = EventCandidate(
    "ullm", [sys.executable, "-m", "ullm", "serve", "--port", "{port}"], ["--shutdown-timeout", "{seconds}"]
)


def parse_candidate(text: str) -> EventCandidate:
    """Parse ``NAME=COMMAND``, with ``{port}`` in it; options to drain come after `` -- ``.

    Raises:
        UsageError: not such a text.
    """
    name, equals, line = text.partition("=")
    command, _, drain = line.partition(" -- ")
    if not equals or not name or "{port}" not in command:
        raise UsageError(f"--server {text!r}: expected NAME=COMMAND with {{port}} in it")
    return EventCandidate(name, shlex.split(command), shlex.split(drain))


def events(
    *,
    server: Annotated[
        list[str] | None,
        Parameter(
            help="NAME=COMMAND with {port}; after ' -- ', options to drain with {seconds}; may be repeated. "
            "Default: this ullm.",
            negative="",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        Parameter(help="Run only this event; may be repeated. Default: all.", negative=""),
    ] = None,
    streams: Annotated[int, Parameter(help="Streams in flight at each event.")] = 8,
    start_up: Annotated[
        float, Parameter(help="Seconds into its start at which a server gets SIGTERM.")
    ] = 1.0,
    output: Annotated[Path | None, Parameter(help="File for the outcomes as JSON.")] = None,
) -> int:
    """Show what clients get when servers are stopped, or lose a worker."""
    candidates = [parse_candidate(text) for text in server or ()] or [OWN]
    names = [*PROGRAM, START_UP]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise UsageError(f"--only {unknown[0]!r}: the events are {', '.join(map(repr, names))}")
    outcomes = run_to_end(run_all, candidates, only or names, streams, start_up)
    if output is not None:
        listed = {
            name: [{"event": outcome.event, **outcome.values} for outcome in each]
            for name, each in outcomes.items()
        }
        output.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    Console().print(as_table(outcomes))
    return 0


async def run_all(
    candidates: Sequence[EventCandidate], names: Sequence[str], streams: int, start_up: float
) -> dict[str, list[EventOutcome]]:
    """Run the events of one server after the other; return the outcomes by server."""
    outcomes: dict[str, list[EventOutcome]] = {}
    for candidate in candidates:
        for name in names:
            stderr().print(f"{candidate.name}: {name}", markup=False)
            if name == START_UP:
                outcome = await run_start_up(candidate, start_up)
            else:
                outcome = await run_event(candidate, name, streams)
            outcomes.setdefault(candidate.name, []).append(outcome)
    return outcomes


def as_table(outcomes: dict[str, list[EventOutcome]]) -> Table:
    """Return a table: a row per event, a column per server."""
    table = Table("event", *outcomes, show_lines=True)
    for rows in zip(*outcomes.values(), strict=True):
        cells = ["\n".join(f"{key}: {value}" for key, value in row.values.items()) for row in rows]
        table.add_row(rows[0].event, *cells)
    return table
