"""Any mixture of requests, departures, losses, sleeps, reloads and stops: nothing is lost. By Hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from ullm.engine import Engine, EngineState
from ullm.errors import EngineBusy, EngineDraining, EngineNotReady, ReloadFailed
from ullm.protocol.messages import StepResult
from ullm.sampling import SamplingParams
from ullm.testing import (
    FakeBehaviour,
    FakeWorkers,
    ScriptedSettings,
    assert_no_token_lost,
    open_scripted_engine,
    run_virtually,
    scripted_tokens,
    write_scripted_model,
)

HOURS = 3600.0
MOST_LOSSES = 2
"""Of workers: at the third one, whoever ran alone would rightly be taken for the cause."""
OVERTAKEN = (EngineBusy, EngineDraining, EngineNotReady, ReloadFailed)

Deed = tuple[Any, ...]

asks = st.tuples(st.just("ask"), st.integers(0, 9), st.integers(1, 40))
deeds = st.one_of(
    asks,
    asks,
    st.tuples(st.just("wait"), st.sampled_from([0.3, 1.0, 2.5, 8.0, 40.0])),
    st.tuples(st.just("leave"), st.integers(0, 5)),
    st.sampled_from([("kill",), ("hang",), ("lose_a_frame",), ("double",), ("wake",)]),
    st.sampled_from([("break", "router.tokens:raise"), ("break", "scheduler.step:raise")]),
    st.tuples(st.just("sleep"), st.integers(0, 3), st.sampled_from(["wait", "abort", "keep"])),
)
endings = st.sampled_from(["quiet", "drain", "abort"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"))


@dataclass
class ReadRequest:
    """What one reader got."""

    number: int
    count: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    tokens: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class Life:
    """An engine's, and of those around it."""

    def __init__(self, model: Path, engine: Engine, workers: FakeWorkers, nursery: trio.Nursery) -> None:
        self.requests: list[ReadRequest] = []
        self.may_abort = False
        self._script = ScriptedSettings.read(str(model))
        self._engine, self._workers, self._nursery = engine, workers, nursery
        self._losses = 0

    async def do(self, deed: Deed) -> None:
        """One deed; what takes its time goes on in the background."""
        name, *arguments = deed
        await getattr(self, name)(*arguments)
        await trio.sleep(0.1)

    async def ask(self, number: int, count: int) -> None:
        request = ReadRequest(number, count)
        self.requests.append(request)
        await self._nursery.start(self._read, request)

    async def _read(self, request: ReadRequest, *, task_status: trio.TaskStatus[None]) -> None:
        params = SamplingParams(temperature=0, max_tokens=request.count, ignore_eos=True)
        with request.scope:
            async with self._engine.generate([300 + request.number, 5], params) as generation:
                task_status.started()
                async for output in generation:
                    request.tokens += output.token_ids
                    request.reasons += [output.finish_reason] if output.finish_reason else []

    async def wait(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def leave(self, number: int) -> None:
        if number < len(self.requests):
            self.requests[number].scope.cancel()

    async def kill(self) -> None:
        if self._may_lose():
            self._workers.started[-1].die("was killed by SIGKILL")

    async def hang(self) -> None:
        if self._may_lose():
            self._workers.started[-1].hang()

    async def lose_a_frame(self) -> None:
        if self._may_lose():
            self._engine.faults.arm("frame.from_worker:drop@message=StepResult")

    def _may_lose(self) -> bool:
        self._losses += 1
        return self._losses <= MOST_LOSSES

    async def double(self) -> None:
        worker = self._workers.started[-1]
        for sent in [sent for sent in worker.sent if isinstance(sent, StepResult)][-1:]:
            worker.emit(sent)

    async def sleep(self, level: int, mode: Any) -> None:
        self.may_abort |= mode == "abort"
        self._begin(lambda: self._engine.sleep(level, mode))

    async def wake(self) -> None:
        self._begin(self._engine.wake)

    async def reload(self) -> None:
        self._begin(self._engine.reload)

    def _begin(self, change: Callable[[], Any]) -> None:
        async def see_it_through() -> None:
            with suppress(*OVERTAKEN):
                await change()

        self._nursery.start_soon(see_it_through)

    async def break_(self, plan: str) -> None:
        self._engine.faults.arm(plan)

    async def end(self, ending: str) -> None:
        """Stop in one way or another, or see that all comes to rest."""
        if ending == "quiet":
            await self._come_to_rest()
        self.may_abort |= ending == "abort"
        self._engine.request_shutdown(0.0 if ending == "abort" else HOURS)

    async def _come_to_rest(self) -> None:
        with suppress(*OVERTAKEN):
            await self._engine.wake()
        while (found := self._engine.statistics()).running or found.waiting:
            await trio.sleep(1.0)
            with suppress(*OVERTAKEN):
                await self._engine.wake()
        await trio.sleep(2.0)  # the last step tells the workers to forget
        assert self._engine.statistics().kv_blocks_used == 0
        assert self._engine.statistics().admitted_tokens == 0

    def check(self) -> None:
        """Each request that was not withdrawn has ended once, with the tokens that it should have."""
        for request in self.requests:
            expected = scripted_tokens(
                [300 + request.number, 5], SamplingParams(ignore_eos=True, temperature=0), 40, self._script
            )[: request.count]
            if not request.scope.cancel_called:
                assert len(request.reasons) == 1
                assert request.reasons[0] == "length" or self.may_abort
            whole = request.reasons == ["length"]
            assert_no_token_lost(expected if whole else expected[: len(request.tokens)], request.tokens)


async def live(model: Path, course: list[Deed], ending: str) -> None:
    workers = FakeWorkers(FakeBehaviour(step_seconds=1.0, load_seconds=3.0, wake_seconds=2.0))
    options: dict[str, Any] = {
        "max_restarts": 1000,
        "step_timeout": 20.0,
        "max_bs": 4,
        "shutdown_timeout": 60.0,
    }
    async with open_scripted_engine(model, workers=workers, **options) as engine:
        with trio.fail_after(10 * HOURS):
            async with trio.open_nursery() as nursery:
                life = Life(model, engine, workers, nursery)
                for deed in course:
                    await life.do(("break_", *deed[1:]) if deed[0] == "break" else deed)
                await life.end(ending)
    life.check()
    assert engine.state is EngineState.STOPPED
    assert engine.report is not None
    assert engine.report.exit_code == 0
    assert not [worker for worker in workers.started if worker.alive()]


def run(model: Path, course: list[Deed], ending: str) -> None:
    note(f"{course} and then {ending}")
    run_virtually(live, model, course, ending)


given_health = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


courses = given(course=st.lists(deeds, min_size=1, max_size=14), ending=endings)


@settings(given_health, max_examples=12, derandomize=True)
@courses
@example(course=[("sleep", 1, "wait"), ("wake",)], ending="drain")  # the wake was never answered
@example(course=[("sleep", 3, "wait"), ("wake",)], ending="drain")
@example(course=[("wait", 1.0), ("sleep", 3, "wait"), ("double",)], ending="quiet")
def test_whatever_happens_nothing_is_lost(model: Path, course: list[Deed], ending: str) -> None:
    run(model, course, ending)


@pytest.mark.slow
@settings(given_health, max_examples=60, derandomize=True)
@courses
def test_many_courses_lose_nothing(model: Path, course: list[Deed], ending: str) -> None:
    run(model, course, ending)


@pytest.mark.long
@settings(given_health, max_examples=1000)
@courses
def test_a_thousand_random_courses_lose_nothing(model: Path, course: list[Deed], ending: str) -> None:
    run(model, course, ending)


@settings(given_health, max_examples=2, derandomize=True)
@given(before=st.lists(deeds, min_size=1, max_size=4), after=st.lists(deeds, max_size=4))
def test_with_a_reload_in_between(model: Path, before: list[Deed], after: list[Deed]) -> None:
    run(model, [*before, ("reload",), *after], "quiet")
