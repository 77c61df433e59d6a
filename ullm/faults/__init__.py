"""Fault injection: plans of faults, and the injector that counts hits and decides which faults happen.

It decides on plain values; the points in actors and transports perform the faults. Imports errors, logs and
protocol. A plan is text, as in ``ULLM_FAULTS``, or JSON; see docs/how-to/fault-injection.md::

    worker.step:crash@nth=3; frame.from_worker:drop@probability=0.01,message=StepResult; seed=7

The `FaultInjector` lives in the engine's process, so "the third step" and "fails to start twice" count over
all incarnations of a worker, and there is one history.
"""

from __future__ import annotations

from ullm.faults.injector import ArmedFault, FaultInjector, FaultReport, FiredFault
from ullm.faults.plan import (
    ACTOR_ACTIONS,
    ALWAYS,
    FRAME_ACTIONS,
    POINTS,
    WORKER_ACTIONS,
    Fault,
    FaultPlan,
)

__all__ = [
    "ACTOR_ACTIONS",
    "ALWAYS",
    "FRAME_ACTIONS",
    "POINTS",
    "WORKER_ACTIONS",
    "ArmedFault",
    "Fault",
    "FaultInjector",
    "FaultPlan",
    "FaultReport",
    "FiredFault",
]
