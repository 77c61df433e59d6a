"""The points of ullm at which faults can happen, what can happen there, and points of other programs."""

from __future__ import annotations

import re

WORKER_ACTIONS = ("crash", "exit", "raise", "oom", "hang", "slow", "stop")
"""Actions that a worker carries out on itself just before it handles a message."""

FRAME_ACTIONS = ("drop", "duplicate", "delay", "corrupt")
"""Actions on a message on its way."""

HANDOVER_ACTIONS = ("drop", "delay", "corrupt")
"""Actions on a piece of the KV that is handed over from one replica to another."""

ACTOR_ACTIONS = ("raise", "slow", "hang", "block")
"""Actions on an actor; ``block`` blocks its whole thread, and so everything else in it."""

REQUEST_ACTIONS = ("refuse", "slow", "reset")
"""Actions on an HTTP request before its answer begins."""

CHUNK_ACTIONS = ("reset", "half", "end", "error", "slow")
"""Actions on a piece of an HTTP answer on its way to the client."""

OWN_ACTIONS = (*ACTOR_ACTIONS, "disk_full", "jump")
"""Actions at points of programs that are not ullm, see `ullm.faults.point`."""

POINTS: dict[str, tuple[str, ...]] = {
    "worker.start": WORKER_ACTIONS,
    "worker.prepare": WORKER_ACTIONS,
    "worker.step": WORKER_ACTIONS,
    "worker.ping": WORKER_ACTIONS,
    "worker.sleep": WORKER_ACTIONS,
    "worker.wake": WORKER_ACTIONS,
    "worker.export": WORKER_ACTIONS,
    "worker.import": WORKER_ACTIONS,
    "worker.stop": WORKER_ACTIONS,
    "frame.to_worker": FRAME_ACTIONS,
    "frame.from_worker": FRAME_ACTIONS,
    "scheduler.step": ACTOR_ACTIONS,
    "router.tokens": ACTOR_ACTIONS,
    "tokenizer.encode": ACTOR_ACTIONS,
    "engine.reload": ACTOR_ACTIONS,
    "handover.chunk": HANDOVER_ACTIONS,
    "http.request": REQUEST_ACTIONS,
    "http.chunk": CHUNK_ACTIONS,
}
"""Point of ullm → actions that are possible there."""

OF_REQUESTS = ("worker.step", "router.tokens", "http.request", "http.chunk")
"""Points of ullm whose hits concern requests, so that they can be filtered by ``request``."""

OF_TOKENS = ("worker.step", "router.tokens", "http.chunk")
"""Points of ullm whose hits concern tokens of requests (``http.chunk``: pieces of an answer)."""

_FAMILIES = frozenset(point.split(".")[0] for point in POINTS)
_OWN_NAME = re.compile(r"[a-z_][\w-]*(\.[\w-]+)+", re.IGNORECASE)


def is_own(point: str) -> bool:
    """Return True if a point may be another program's: its name has a dot, and none of ullm's first words."""
    return bool(_OWN_NAME.fullmatch(point)) and point.split(".")[0] not in _FAMILIES


def actions_at(point: str) -> tuple[str, ...]:
    """Return what can happen at a point; nothing where there can be no such point."""
    return OWN_ACTIONS if is_own(point) else POINTS.get(point, ())
