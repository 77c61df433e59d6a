"""A whole engine in which several faults happen in the same moment, or a few steps apart; by seed.

Everything is in memory and on a virtual clock, with trio's choices made by the case's own seed, so that a
case that fails fails again: ``run_case(Case(...), model)``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.support.seeded import run_seeded
from ullm.engine import Engine, EngineState
from ullm.engine.output import Output
from ullm.errors import EngineBusy, EngineDead, EngineDraining, EngineNotReady, ReloadFailed, UllmError
from ullm.faults import POINTS
from ullm.protocol.exit_codes import EXIT_FAILED, EXIT_OK
from ullm.sampling import SamplingParams
from ullm.testing import FakeBehaviour, FakeWorkers, assert_finished_once, open_scripted_engine

HOUR = 3600.0
STEP = 4
"""The hit at which faults of a running engine happen: all requests run."""

NOT_HERE = ("worker.prepare", "http.")
"""Points without hits here: workers in memory have no standbys, and nothing goes over HTTP."""
PHASES = ("run", "start", "sleep", "wake", "reload", "drain", "abort", "drain asleep", "drain reloading")

Member = tuple[str, str]
MEMBERS: list[Member] = [
    (point, action) for point in POINTS for action in POINTS[point] if not point.startswith(NOT_HERE)
]
"""Every point with every action that is possible there."""

OVERTAKEN = (EngineBusy, EngineDraining, EngineNotReady, ReloadFailed)
"""How changes of the whole engine may fail, by their documentation."""

BLOCKING = ("tokenizer.encode", "block")
"""These faults really take their time, all others take virtual time."""

PROMPTS = {"The supervisor": 10, "starts the": 13, "workers again": 16, "and again": 9}
"""Prompt → tokens to generate; the last one is asked for after everything."""
*EARLY, LATE, AFTER = PROMPTS

_FRAMES = {"frame.to_worker": "Step", "frame.from_worker": "StepResult"}
_RARE = ("worker.start", "worker.ping", "worker.sleep", "worker.wake", "worker.stop", "engine.reload")


@dataclass(frozen=True)
class Case:
    """Faults, their distances from the first one in hits, and what the engine does meanwhile."""

    faults: tuple[Member, ...]
    offsets: tuple[int, ...] = ()
    phase: str = "run"
    replicas: int = 1
    ranks: int = 1

    @property
    def seed(self) -> int:
        """Another run for each case, and the same one each time."""
        return zlib.crc32(repr(self).encode())

    @property
    def plan(self) -> str:
        """The plan of faults."""
        offsets = (0, *(self.offsets or (0,) * (len(self.faults) - 1)))
        return "; ".join(map(self._part, self.faults, offsets))

    def _part(self, member: Member, offset: int) -> str:
        point, action = member
        running = self.phase == "run" and point not in _RARE
        nth = max(1, offset + (STEP if running and point != "tokenizer.encode" else 1))
        options = [f"nth={nth}"]
        if point in _FRAMES and self.phase != "start":
            options.append(f"message={_FRAMES[point]}")
        if point.startswith(BLOCKING[0]) or action == BLOCKING[1]:
            options += ["seconds=0.001"] if action != "raise" else []
        elif action in ("slow", "delay") or (action == "hang" and not point.startswith("worker")):
            options.append("seconds=3")
        return f"{point}:{action}@{','.join(options)}"


@dataclass
class Run:
    """What happened in one case."""

    texts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    fired: int = 0
    exit_code: int | None = None
    failure: BaseException | None = None
    may_abort: bool = False


def run_case(case: Case, model: Path) -> Run:
    """Run one case; `Run.problems` says what was wrong.

    Whatever was wrong with how the engine ended comes out as it is.
    """
    run = Run(may_abort=case.phase == "abort")
    run_seeded(case.seed, partial(_live, case, model, run))
    return run


async def _live(case: Case, model: Path, run: Run) -> None:
    workers = FakeWorkers(
        FakeBehaviour(step_seconds=1.0, load_seconds=3.0, sleep_seconds=0.5, wake_seconds=2.0)
    )
    options: dict[str, Any] = {
        "replicas": case.replicas,
        "tp_size": case.ranks,
        "max_restarts": 6,
        "shutdown_timeout": HOUR,
        "step_timeout": 20.0,
    }
    if case.phase == "start":
        options["faults"] = case.plan
    engines: list[Engine] = []
    try:
        with trio.fail_after(5 * HOUR):
            async with open_scripted_engine(model, workers=workers, **options) as engine:
                engines.append(engine)
                await _use(case, engine, run)
    except trio.TooSlowError:
        run.problems.append("the engine does not end")
    except UllmError as error:  # it failed as documented: at its start, or beyond its limits
        run.failure = error
        if engines and not isinstance(error, EngineDead):
            run.problems.append(f"the engine that ran ended with {error!r}")
    if any(worker.alive() for worker in workers.started):
        run.problems.append("a worker was left behind")
    for engine in engines:
        judge_end(engine, run)


def judge_end(engine: Engine, run: Run) -> None:
    run.fired = len(engine.faults.history)
    if engine.report is None:
        run.problems.append("there is no report of the stop")
        return
    run.exit_code = engine.report.exit_code
    if run.exit_code != (EXIT_FAILED if isinstance(run.failure, EngineDead) else EXIT_OK):
        run.problems.append(f"exit code {run.exit_code} after {run.failure!r}")


async def _use(case: Case, engine: Engine, run: Run) -> None:
    """Have requests run through the phase, and another one after it."""
    rare = any(point in _RARE for point, _ in case.faults) and case.phase == "run"
    async with trio.open_nursery() as nursery:
        if case.phase == "wake":
            await engine.sleep(_level(case))
        elif case.phase == "run":
            engine.faults.arm(case.plan)
        for prompt in EARLY:
            nursery.start_soon(ask, engine, prompt, run)
        if case.phase == "wake":
            engine.faults.arm(case.plan)
            await change(engine, run, "wake")
        await trio.sleep(STEP - 0.5)
        nursery.start_soon(ask, engine, LATE, run)
        if case.phase in ("sleep", "reload", "drain", "abort"):
            engine.faults.arm(case.plan)
            await change(engine, run, case.phase, _level(case))
        if case.phase == "sleep":
            await trio.sleep(8.0)
            await change(engine, run, "wake")
        if case.phase == "drain asleep":
            await change(engine, run, "sleep", _level(case))
        if case.phase == "drain reloading":
            nursery.start_soon(change, engine, run, "reload")
            await trio.sleep(_level(case))
        if case.phase.startswith("drain "):
            engine.faults.arm(case.plan)
            await change(engine, run, "drain")
    if engine.state is EngineState.RUNNING:
        if rare:
            await _visit_all(engine, run)
        await ask(engine, AFTER, run)
        await come_to_rest(engine, run)


def _level(case: Case) -> int:
    return (1, 3)[case.seed % 2]


async def _visit_all(engine: Engine, run: Run) -> None:
    """Come through the points that a running engine does not hit."""
    await trio.sleep(12.0)  # two health checks
    await change(engine, run, "sleep", 1)
    await change(engine, run, "wake")
    await change(engine, run, "reload")


async def change(engine: Engine, run: Run, what: str, level: int = 1) -> None:
    """Change the whole engine, and be overtaken at most a few times."""
    for _ in range(5):
        try:
            with trio.fail_after(HOUR):
                if what == "sleep":
                    await engine.sleep(level, "keep")
                elif what == "wake":
                    await engine.wake()
                elif what == "reload":
                    await engine.reload()
                else:
                    engine.request_shutdown(HOUR if what == "drain" else 0.0)
            return
        except trio.TooSlowError:
            run.problems.append(f"{what}: no answer")
            return
        except OVERTAKEN:
            if what != "wake" or engine.state is not EngineState.RUNNING:
                return
            await trio.sleep(1.0)
    run.problems.append(f"{what}: refused again and again")


async def ask(engine: Engine, prompt: str, run: Run) -> None:
    """Ask for one answer, and see that it ends once."""
    outputs: list[Output] = []
    params = SamplingParams(temperature=0, max_tokens=PROMPTS[prompt], ignore_eos=True)
    try:
        with trio.fail_after(HOUR):
            async with engine.generate(prompt, params) as generation:
                async for output in generation:
                    outputs.append(output)
        assert_finished_once(outputs, None if run.may_abort else "length")
    except trio.TooSlowError:
        health = engine.health()
        run.problems.append(f"{prompt!r} does not end: {health.state}, {health.replicas}")
    except AssertionError as error:
        run.problems.append(f"{prompt!r}: {error}")
    except (EngineDead, *OVERTAKEN) as error:
        if engine.state is EngineState.RUNNING:
            run.problems.append(f"{prompt!r}: {error!r}")
    else:
        if outputs[-1].finish_reason == "length":
            run.texts[prompt] = "".join(output.text for output in outputs)


async def come_to_rest(engine: Engine, run: Run) -> None:
    await trio.sleep(2.5)  # the last step tells the workers to forget
    statistics = engine.statistics()
    left = (statistics.running, statistics.waiting, statistics.kv_blocks_used, statistics.admitted_tokens)
    if any(left):
        run.problems.append(f"left (running, waiting, blocks, tokens): {left}")


class Sweep:
    """Many cases, compared with the undisturbed run; collects what is wrong with them."""

    def __init__(self, model: Path) -> None:
        self._model = model
        undisturbed = run_case(Case(()), model)
        assert not undisturbed.problems
        assert set(undisturbed.texts) == set(PROMPTS)
        self._texts = undisturbed.texts
        self.found: list[str] = []
        self.count = self.fired = self.failed = 0

    def run(self, case: Case) -> None:
        """Run a case, and remember its problems."""
        try:
            run = run_case(case, self._model)
        except Exception as error:  # reported with the case that it belongs to
            self.found.append(f"{case}\n    {case.plan}\n    {error!r}")
            return
        self.count += 1
        self.fired += run.fired == len(case.faults)
        self.failed += run.failure is not None
        problems = run.problems + self.differences(run)
        if problems:
            self.found.append("\n    ".join([repr(case), case.plan, *problems]))

    def differences(self, run: Run) -> list[str]:
        return [
            f"{prompt!r}: {text!r}, not {self._texts[prompt]!r}"
            for prompt, text in run.texts.items()
            if text != self._texts[prompt]
        ]

    def check(self) -> None:
        """Fail with all that was found."""
        assert not self.found, f"{len(self.found)} of {self.count} cases:\n" + "\n".join(self.found)


def pairs(first: Member, members: Sequence[Member] = MEMBERS) -> list[tuple[Member, Member]]:
    """Return the pairs of one member with itself and with those after it, so that each pair comes once."""
    return [(first, second) for second in members[members.index(first) :]]
