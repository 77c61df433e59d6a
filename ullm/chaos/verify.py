"""Verdicts after the faults: nothing in flight, no growth, a clean log, nothing left behind."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from ullm.chaos.catalogue import long_request, unary_of
from ullm.chaos.world import ENGINE, FRONT_END, World, command_of
from ullm.client.http import Connection
from ullm.errors import ServerRefused, ServerUnreachable
from ullm.testing.processes import POLL, at_root, descendants, psutil_module

SETTLE = 20.0
"""Seconds within which an idle server must be as it was at the start."""
GROWTH = 1.2
SLACK = 24 << 20
"""Factor, and bytes beyond it, by which the server's memory may grow after the warm-up."""
GAUGES = ("ullm_num_requests_running", "ullm_num_requests_waiting", "ullm_kv_cache_usage_ratio")
ABORTED = 'ullm_requests_total{finish_reason="abort"}'
"""Choices that have ended because their client has left."""
UNFINISHED = 700
"""Tokens of a request that is not complete when its client leaves."""
LEAVES_AFTER = 0.5
"""Seconds after which a client leaves that waits for an answer in one piece."""
NOTICED_WITHIN = 2.0
"""Seconds within which the request of a client that has left has ended."""
BAD_LINES = re.compile(r"never awaited|unraisable|Exception ignored|Traceback|ResourceWarning|Task exception")
TEMPLATE_MODULE = "ullm.actors.template_child"
"""Module in the command line of a process that renders chat templates."""
PART_LOST = re.compile(rf"part lost; .* part=({ENGINE}|{FRONT_END})\d* exit_status=(-?\d+)")
KILLED = -9
"""Exit status of a process that SIGKILL has ended."""
SHARED_MEMORY = Path("/dev/shm")


class Verdict(msgspec.Struct, frozen=True):
    """A condition that must hold, and whether it does."""

    what: str
    good: bool
    detail: str = ""


@dataclass(frozen=True)
class Footprint:
    """Resources of an idle server.

    Args:
        processes: below it. A front end apart has a process for templates from its first chat on, and nobody
            knows which one has had a chat: those do not count.
        files: that the server has open, or its launcher and engine; of front ends apart their sockets.
        rss: bytes of the server, or of launcher, engine and front ends, but not of workers.
    """

    processes: int
    files: int
    rss: int

    @staticmethod
    def of(world: World) -> Footprint:
        """Measure a server now."""
        server, parts = psutil_module().Process(world.server.pid), world.parts()
        below = descendants(world.server.pid)
        if parts:
            below = [process for process in below if TEMPLATE_MODULE not in command_of(process)]
        files, rss = _files_of(server), server.memory_info().rss
        for name, process in parts.items():
            try:
                is_front_end = name.startswith(FRONT_END)
                files += len(process.net_connections("all")) if is_front_end else _files_of(process)
                rss += process.memory_info().rss
            except psutil_module().Error:
                continue  # it was killed just now
        return Footprint(len(below), files, rss)


def _files_of(process: Any) -> int:
    count: int = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    return count


async def settle(holds: Callable[[], Awaitable[bool]], seconds: float = SETTLE) -> bool:
    """Poll until a condition holds; return False if it does not within ``seconds``."""
    with trio.move_on_after(seconds):
        while True:
            if await holds():
                return True
            await trio.sleep(POLL)
    return await holds()


async def rest(world: World) -> Footprint:
    """Wait until the standby workers are up and connections are closed; return the stable footprint."""
    footprints = [Footprint.of(world)]

    async def stable() -> bool:
        await trio.sleep(0.5)
        footprints.append(Footprint.of(world))
        last, now = footprints[-2:]
        return (last.processes, last.files) == (now.processes, now.files)

    await settle(stable)
    return footprints[-1]


async def gauges(world: World) -> dict[str, float]:
    """Return the gauges of work in flight from ``/metrics``; empty if it does not answer."""
    return {name: value for name, value in (await metrics(world)).items() if name in GAUGES}


async def metrics(world: World) -> dict[str, float]:
    """Return the samples of ``/metrics``, by name and labels; empty if it does not answer."""
    connection = Connection(world.admin)
    try:
        async with connection.request("GET", "/metrics") as pieces:
            text = b"".join([piece async for piece in pieces]).decode()
    except (ServerRefused, ServerUnreachable):
        return {}
    finally:
        await connection.aclose()
    samples = re.findall(r"^(\w+(?:{[^}]*})?) ([-+.\w]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


async def leaving_is_noticed(world: World) -> Verdict:
    """Judge what becomes of requests whose clients leave: they end then, and not when they are complete."""
    what = "a client that leaves is noticed"
    if world.server.process.poll() is not None:
        return Verdict(what, False, "the server has ended")
    before = (await metrics(world)).get(ABORTED, 0.0)
    for request in (stream := long_request(world.model, UNFINISHED)), unary_of(stream):
        leave = {"leave_after": 3} if request.stream else {}
        with trio.move_on_after(LEAVES_AFTER):
            await world.send(request, **leave)

    async def noticed() -> bool:
        return (await metrics(world)).get(ABORTED, 0.0) >= before + 2

    if await settle(noticed, NOTICED_WITHIN):
        return Verdict(what, True)
    ended = (await metrics(world)).get(ABORTED, 0.0) - before
    return Verdict(what, False, f"{ended:g} of 2 requests have ended within {NOTICED_WITHIN:g} s")


async def at_rest(world: World, before: Footprint, warm: Footprint) -> list[Verdict]:
    """Judge a server whose clients have all left.

    Args:
        before: before the first fault.
        warm: after the caches and arenas were filled that a server fills once.
    """

    async def nothing_in_flight() -> bool:
        values = await gauges(world)
        return len(values) == len(GAUGES) and not any(values.values())

    async def as_before() -> bool:
        now = Footprint.of(world)
        return now.processes == before.processes and now.files <= before.files

    async def is_ready() -> bool:
        return (await world.call(at_root(world.endpoint), "GET", "/ready"))[0] == 200

    status = world.server.process.poll()
    if status is not None:
        return [Verdict("the server lives", False, f"it ended with status {status}")]
    idle = await settle(nothing_in_flight)
    ready = await settle(is_ready)
    await settle(as_before)
    now = Footprint.of(world)
    # Parts may have been killed just before they were measured as warm.
    flat = now.rss <= max(before.rss, warm.rss) * GROWTH + SLACK
    return [
        Verdict("nothing in flight, no KV block in use", idle, "" if idle else str(await gauges(world))),
        Verdict("ready", ready),
        Verdict(
            "processes as at the start",
            now.processes == before.processes,
            f"{before.processes} → {now.processes}",
        ),
        Verdict("no more open files", now.files <= before.files, f"{before.files} → {now.files}"),
        Verdict("memory flat", flat, f"{_mib(before.rss)}, warm {_mib(warm.rss)} → {_mib(now.rss)}"),
    ]


def parts_verdict(world: World, log: Path) -> Verdict:
    """Judge whether the parts that the launcher had to start again are those that faults have killed.

    An engine that loses a worker before it has run ends, as one that cannot start does.
    """
    lost: Counter[str] = Counter()
    has_run = False
    for line in log.read_text("utf-8", "replace").splitlines():
        if "part started  part=engine" in line:
            has_run = False
        has_run |= "engine running" in line
        if match := PART_LOST.search(line):
            part, status = match[1], int(match[2])
            lost[part] += status == KILLED or part != ENGINE or has_run
    killed = {part: world.killed[part] for part in (ENGINE, FRONT_END)}
    detail = ", ".join(f"{part}: {lost[part]} of {killed[part]} killed" for part in killed)
    return Verdict(
        "no other part ended than those that were killed", all(lost[p] == killed[p] for p in killed), detail
    )


def log_verdict(log: Path) -> Verdict:
    """Judge the server's log: no line that no fault explains."""
    bad = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if BAD_LINES.search(line)]
    return Verdict("clean log", not bad, "; ".join(bad[:3]))


async def after_stop(world: World, temporary: Path, shared_before: set[str]) -> list[Verdict]:
    """Send SIGTERM, and judge what is left."""
    status, seconds = await world.server.stop()

    async def gone() -> bool:
        return not world.server.leftovers()

    none_left = await settle(gone, 2.0)
    left = [str(process) for process in world.server.leftovers()]
    files = await trio.to_thread.run_sync(_files_below, temporary)
    shared = sorted(name for name in shared_memory() - shared_before if _ours(name, world))
    return [
        Verdict("SIGTERM ends it with status 0", status == 0, f"status {status} after {seconds:.2f} s"),
        Verdict("no process left", none_left, "; ".join(left)),
        Verdict("no temporary file left", not files, ", ".join(files[:5])),
        Verdict("no shared memory left", not shared, ", ".join(shared[:5])),
    ]


def _files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def shared_memory() -> set[str]:
    """Return the names of all shared memory segments of the machine."""
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def _ours(name: str, world: World) -> bool:
    # Other programs use the same folder; the names of ours have a pid of ours, or the program's name.
    pids = {str(process.pid) for process in world.server.tree()}
    return "ullm" in name or any(part in pids for part in re.split(r"\D+", name))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
