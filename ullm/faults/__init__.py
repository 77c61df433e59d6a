"""Fault injection: plans of what shall go wrong, where and when, and the one place that counts.

A plan is text, as in ``ULLM_FAULTS``, or JSON; see docs/fault-injection.md::

    worker.step:crash@nth=3; frame.from_worker:drop@probability=0.01,message=StepResult; seed=7

The `FaultInjector` lives in the engine's process, so "the third step" and "fails to start twice" count
over all incarnations of a worker, and its history is one list. It decides; who asks carries out.
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
