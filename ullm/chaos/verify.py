"""Verdicts after the faults: nothing in flight, no growth, a clean log, nothing left behind."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from ullm.chaos.world import World
from ullm.client.http import Connection
from ullm.errors import ServerRefused, ServerUnreachable
from ullm.testing.processes import POLL, at_root, descendants, psutil_module

SETTLE = 20.0
"""Seconds within which an idle server must be as it was at the start."""
GROWTH = 1.2
SLACK = 24 << 20
"""Factor, and bytes beyond it, by which the server's memory may grow after the warm-up."""
GAUGES = ("ullm_num_requests_running", "ullm_num_requests_waiting", "ullm_kv_cache_usage_ratio")
BAD_LINES = re.compile(r"never awaited|unraisable|Exception ignored|Traceback|ResourceWarning|Task exception")
SHARED_MEMORY = Path("/dev/shm")


class Verdict(msgspec.Struct, frozen=True):
    """A condition that must hold, and whether it does."""

    what: str
    good: bool
    detail: str = ""


@dataclass(frozen=True)
class Footprint:
    """Resources of an idle server; ``rss``: bytes of the server process alone."""

    processes: int
    files: int
    rss: int

    @staticmethod
    def of(pid: int) -> Footprint:
        """Measure a server now."""
        process = psutil_module().Process(pid)
        files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        return Footprint(len(descendants(pid)), files, process.memory_info().rss)


async def settle(holds: Callable[[], Awaitable[bool]], seconds: float = SETTLE) -> bool:
    """Poll until a condition holds; return False if it does not within ``seconds``."""
    with trio.move_on_after(seconds):
        while True:
            if await holds():
                return True
            await trio.sleep(POLL)
    return await holds()


async def gauges(world: World) -> dict[str, float]:
    """Return the gauges of work in flight from ``/metrics``; empty if it does not answer."""
    connection = Connection(at_root(world.endpoint))
    try:
        async with connection.request("GET", "/metrics") as pieces:
            text = b"".join([piece async for piece in pieces]).decode()
    except (ServerRefused, ServerUnreachable):
        return {}
    finally:
        await connection.aclose()
    samples = re.findall(r"^(\w+)(?:{[^}]*})? ([-+.\w]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in samples if name in GAUGES}


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
        now = Footprint.of(world.server.pid)
        return now.processes == before.processes and now.files <= before.files

    async def is_ready() -> bool:
        return (await world.call(at_root(world.endpoint), "GET", "/ready"))[0] == 200

    status = world.server.process.poll()
    if status is not None:
        return [Verdict("the server lives", False, f"it ended with status {status}")]
    idle = await settle(nothing_in_flight)
    ready = await settle(is_ready)
    await settle(as_before)
    now = Footprint.of(world.server.pid)
    flat = now.rss <= warm.rss * GROWTH + SLACK
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
