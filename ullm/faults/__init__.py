"""Fault injection: plans of faults, and the injector that counts hits and decides which faults happen.

It decides on plain values; the points in actors and transports perform the faults. Imports errors, logs and
protocol. A plan is text, as in ``ULLM_FAULTS``, or JSON; see docs/how-to/fault-injection.md::

    worker.step:crash@nth=3; frame.from_worker:drop@probability=0.01,message=StepResult; seed=7

The `FaultInjector` lives in the engine's process, so "the third step" and "fails to start twice" count over
all incarnations of a worker, and there is one history.
"""

from __future__ import annotations

from typing import Literal

from ullm.faults.history import ArmedFault, FaultReport, FiredFault
from ullm.faults.injector import FaultInjector
from ullm.faults.own import injected, point, point_now
from ullm.faults.plan import ALWAYS, Fault, FaultPlan
from ullm.faults.points import (
    ACTOR_ACTIONS,
    CHUNK_ACTIONS,
    FRAME_ACTIONS,
    HANDOVER_ACTIONS,
    OWN_ACTIONS,
    POINTS,
    REQUEST_ACTIONS,
    WORKER_ACTIONS,
)

FaultAction = Literal["show", "arm", "clear"]
"""What can be done with an engine's plan of faults."""

__all__ = [
    "ACTOR_ACTIONS",
    "ALWAYS",
    "CHUNK_ACTIONS",
    "FRAME_ACTIONS",
    "HANDOVER_ACTIONS",
    "OWN_ACTIONS",
    "POINTS",
    "REQUEST_ACTIONS",
    "WORKER_ACTIONS",
    "ArmedFault",
    "Fault",
    "FaultAction",
    "FaultInjector",
    "FaultPlan",
    "FaultReport",
    "FiredFault",
    "injected",
    "point",
    "point_now",
]
