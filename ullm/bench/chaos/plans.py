"""Faults by the server's own fault injection, armed over the admin listener."""

from __future__ import annotations

from ullm.bench.chaos.world import Kind

KINDS: tuple[Kind, ...] = ()
