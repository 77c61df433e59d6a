"""One run of the simulation: the real engine, scripted workers with realistic durations, seeded faults."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import trio

from tests.benchmarks.simulation.chats import Chat, make_chats
from tests.benchmarks.simulation.front_ends import FrontEnds, open_front_ends
from tests.support.seeded import run_seeded
from ullm.actors.transports.fake import FakeBehaviour, FakeWorkers
from ullm.engine import Engine
from ullm.errors import UllmError
from ullm.link import RemoteEngine
from ullm.protocol.messages import Step, ToWorker
from ullm.sampling import SamplingParams
from ullm.scheduling.routing import RoutingPolicy
from ullm.testing import ScriptedSettings, open_scripted_engine, scripted_tokens, write_scripted_model

STEP_SECONDS = 0.0069
SEQUENCE_SECONDS = 0.0005
PREFILL_SECONDS = 0.00045
"""What a step takes, for each sequence that decodes, and for each token of prompts: SmolLM2-135M in bfloat16
on two cores, by the rates of 1 and 16 streams and of prefill in docs/explanation/performance.md."""
LOAD_SECONDS = 2.0
HANGS = 0.25
"""Share of faults that are hangs; the others are losses."""
CUTS = 0.5
"""Share of faults that cut a front end's connection, where there are front ends."""
MAX_QUEUE = 1 << 20
CHECKED = 10
"""One answer in this many is compared token by token with what the script says; all are counted."""


@dataclass(frozen=True)
class Scenario:
    """What is simulated.

    Args:
        rate: requests per second and replica.
        blocks: KV blocks of each replica, of 16 tokens.
        faults: workers that are lost or hang, or connections that are cut, at random times.
        front_ends: processes that requests come through, each with a connection of its own; 0: the engine is
            asked directly.
    """

    replicas: int
    requests: int
    routing: RoutingPolicy = "prefix"
    faults: int = 0
    rate: float = 15.0
    blocks: int = 1536
    seed: int = 1
    front_ends: int = 0


class SimulatedRun(msgspec.Struct, frozen=True):
    """What a run has shown.

    Args:
        failed: requests that ended with an error, or with other tokens than they should have.
        lost, hung: workers to which that was done.
        cut: connections of front ends.
        hit_rate: share of the prompts' tokens that came from a cache, at the first submission.
        first_token_p50, first_token_p99, longest_gap: virtual seconds.
        resumed: submissions of requests that had been submitted before.
        virtual_seconds: duration of what was simulated.
        cpu_seconds: processor time that it took.
        choice_seconds: median of the real time that the choice of a replica took, hashes included.
        steps: of all workers.
    """

    replicas: int
    requests: int
    front_ends: int
    routing: str
    failed: int
    lost: int
    hung: int
    cut: int
    hit_rate: float
    first_token_p50: float
    first_token_p99: float
    longest_gap: float
    resumed: int
    routed: dict[str, int]
    tokens: int
    steps: int
    virtual_seconds: float
    cpu_seconds: float
    choice_seconds: float

    @property
    def cpu_per_request(self) -> float:
        """Processor time of a request, in seconds."""
        return self.cpu_seconds / self.requests


@dataclass(frozen=True, kw_only=True)
class Timed(FakeBehaviour):
    """A worker whose steps take as long as what they compute."""

    def seconds(self, message: ToWorker) -> float:
        """See `FakeBehaviour`."""
        if not isinstance(message, Step):
            return super().seconds(message)
        decodes = sum(row.count == 1 for row in message.scheduled)
        prefill = sum(row.count for row in message.scheduled if row.count > 1)
        return STEP_SECONDS + decodes * SEQUENCE_SECONDS + prefill * PREFILL_SECONDS


class _Simulation:
    """A run while it goes on."""

    def __init__(self, scenario: Scenario, workers: FakeWorkers, settings: ScriptedSettings) -> None:
        self.first: list[float] = []
        self.longest_gap = 0.0
        self.choices: list[float] = []
        self.prompt_tokens = self.cached_tokens = self.tokens = self.failed = self.lost = self.hung = (
            self.cut
        ) = 0
        self._scenario = scenario
        self._workers = workers
        self._settings = settings
        self._asked = 0

    async def live(self, engine: Engine, front_ends: FrontEnds) -> None:
        """Have all chats, with all faults among them."""
        scenario = self._scenario
        doors: list[Engine | RemoteEngine] = [*front_ends.engines] or [engine]
        chats = list(make_chats(scenario.seed, scenario.requests, scenario.rate * scenario.replicas))
        async with trio.open_nursery() as others:
            others.start_soon(self._break, chats[-1].start, front_ends)
            others.start_soon(self._forget_messages)
            async with trio.open_nursery() as nursery:
                began = trio.current_time()
                for chat, asked in zip(chats, cycle(doors)):
                    await trio.sleep_until(began + chat.start)
                    nursery.start_soon(self._chat, asked, chat)
            others.cancel_scope.cancel()

    async def _chat(self, engine: Engine | RemoteEngine, chat: Chat) -> None:
        tokens = list(chat.system)
        for turn in chat.turns:
            await trio.sleep(turn.pause)
            tokens += turn.message
            tokens += await self._ask(engine, list(tokens), turn.max_tokens)

    async def _ask(self, engine: Engine | RemoteEngine, prompt: list[int], count: int) -> list[int]:
        self._asked += 1
        checked = self._asked % CHECKED == 0
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        answer: list[int] = []
        last = trio.current_time()
        try:
            async with engine.generate(prompt, params) as generation:
                async for output in generation:
                    gap, last = trio.current_time() - last, trio.current_time()
                    if answer:
                        self.longest_gap = max(self.longest_gap, gap)
                    elif output.token_ids:
                        self.first.append(gap)
                        self.cached_tokens += output.num_cached_tokens
                    answer += output.token_ids
        except UllmError:
            self.failed += 1
            return answer
        self.prompt_tokens += len(prompt)
        self.tokens += len(answer)
        right = scripted_tokens(prompt, params, count, self._settings) if checked else answer
        self.failed += len(answer) != count or right != answer
        return answer

    async def _break(self, seconds: float, front_ends: FrontEnds) -> None:
        """Lose a worker, have it hang, or cut a connection, at each of some random times."""
        source, began = random.Random(self._scenario.seed + 1), trio.current_time()
        for moment in sorted(source.uniform(0, seconds) for _ in range(self._scenario.faults)):
            await trio.sleep_until(began + moment)
            if front_ends.engines and source.random() < CUTS:
                self.cut += 1
                front_ends.cut(source)
                continue
            alive = [worker for worker in self._workers.started if worker.alive()]
            if not alive:
                continue  # all of them are down already
            victim = source.choice(alive)
            if source.random() < HANGS:
                self.hung += 1
                victim.hang()
            else:
                self.lost += 1
                victim.die("was killed by SIGKILL")

    async def _forget_messages(self) -> None:
        """Drop what workers remember for tests: it would be gigabytes."""
        while True:
            await trio.sleep(10.0)
            self._workers.started[:] = [worker for worker in self._workers.started if worker.alive()]
            for worker in self._workers.started:
                worker.received.clear()
                worker.sent.clear()

    def time_choices(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        """Return a choice of replicas that notes how long it takes."""

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return choose(*arguments)
            finally:
                self.choices.append(time.perf_counter() - began)

        return timed


def run_scenario(scenario: Scenario) -> SimulatedRun:
    """Simulate a scenario; the same seed gives the same run."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        model = write_scripted_model(Path(folder), num_blocks=scenario.blocks)
        return run_seeded(scenario.seed, partial(_run, scenario, model))


async def _run(scenario: Scenario, model: Path) -> SimulatedRun:
    workers = FakeWorkers(Timed(load_seconds=LOAD_SECONDS))
    simulation = _Simulation(scenario, workers, ScriptedSettings.read(str(model)))
    began_cpu, began = time.process_time(), trio.current_time()
    options = {"replicas": scenario.replicas, "routing": scenario.routing, "max_restarts": 1000}
    async with (
        open_scripted_engine(model, workers=workers, max_queue=MAX_QUEUE, **options) as engine,
        open_front_ends(engine, scenario.front_ends, MAX_QUEUE) as front_ends,
    ):
        routing = engine._router._routing
        vars(routing)["choose"] = simulation.time_choices(routing.choose)
        await simulation.live(engine, front_ends)
        seconds, cpu = trio.current_time() - began, time.process_time() - began_cpu
        statistics = engine.statistics()
    first = sorted(simulation.first)
    return SimulatedRun(
        replicas=scenario.replicas,
        requests=scenario.requests,
        front_ends=scenario.front_ends,
        routing=scenario.routing,
        failed=simulation.failed,
        lost=simulation.lost,
        hung=simulation.hung,
        cut=simulation.cut,
        hit_rate=simulation.cached_tokens / max(1, simulation.prompt_tokens),
        first_token_p50=first[len(first) // 2],
        first_token_p99=first[len(first) * 99 // 100],
        longest_gap=simulation.longest_gap,
        resumed=statistics.requests_resumed_total,
        routed=statistics.requests_routed_total,
        tokens=simulation.tokens,
        steps=statistics.steps_total,
        virtual_seconds=seconds,
        cpu_seconds=cpu,
        choice_seconds=median(simulation.choices),
    )
