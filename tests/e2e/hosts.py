"""Programs with an engine inside: ``python hosts.py KIND MODEL TRANSPORT TOKENS``.

Each runs four requests and answers SIGTERM by asking for the stop, SIGINT by the rudest way out that it has
(cancelling the scope around the engine; a stop without a drain), and SIGUSR1 by a sleep and a wake. What
came of it is on stdout, a line each; the exit status is that of the stop's report.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any

import trio

from ullm import LLM, EngineConfig, SamplingParams
from ullm.engine import Engine, open_engine
from ullm.logs import configure

REQUESTS = 4
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def say(*words: object) -> None:
    """One line on stdout."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


class StreamReaders:
    """Counts readers, and says when all have begun."""

    def __init__(self, tokens: int) -> None:
        self.params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        self._begun = 0

    def prompt(self, number: int) -> list[int]:
        """Of a reader."""
        return [300 + number]

    def begin(self) -> None:
        """A reader has its first token."""
        self._begun += 1
        if self._begun == REQUESTS:
            say("begun")

    def end(self, number: int, tokens: list[int], reason: str | None) -> None:
        """A reader has its last one."""
        say("end", number, reason, len(tokens), hash(tuple(tokens)))


# --- an engine in a trio program ---------------------------------------------------------------------


async def embed(config: EngineConfig, reading: StreamReaders) -> int:
    async def read(number: int) -> None:
        tokens: list[int] = []
        with trio.CancelScope(shield=True):  # it wants its answer whatever becomes of the others
            async with engine.generate(reading.prompt(number), reading.params) as generation:
                async for output in generation:
                    if not tokens:
                        reading.begin()
                    tokens += output.token_ids
            reading.end(number, tokens, output.finish_reason)

    async def answer_signals(engine: Engine, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*SIGNALS) as received:
            task_status.started()
            async for number in received:
                if number == signal.SIGUSR1:
                    say("slept", (await engine.sleep(1, "keep")).state)
                    say("woken", (await engine.wake()).state)
                elif number == signal.SIGTERM:
                    engine.request_shutdown(by="the program")
                else:
                    outer.cancel()

    with trio.CancelScope() as outer:
        async with open_engine(config) as engine, trio.open_nursery() as nursery:
            await nursery.start(answer_signals, engine)
            async with trio.open_nursery() as readers:
                for number in range(REQUESTS):
                    readers.start_soon(read, number)
            nursery.cancel_scope.cancel()
    say("cancelled", outer.cancelled_caught)
    assert engine.report is not None
    say("state", engine.state.value)
    say("report", engine.report)
    return engine.report.exit_code


# --- LLM under either loop ---------------------------------------------------------------------------


async def read_llm(llm: LLM, reading: StreamReaders, number: int) -> None:
    tokens: list[int] = []
    async for output in llm.generate(reading.prompt(number), reading.params):
        if not tokens:
            reading.begin()
        tokens += output.token_ids
    reading.end(number, tokens, output.finish_reason)


async def sleep_and_wake(llm: LLM) -> None:
    say("slept", (await llm.sleep(1, "keep")).state)
    say("woken", (await llm.wake()).state)


def on_signal(llm: LLM, number: int) -> None:
    llm.shutdown(0 if number == signal.SIGINT else None)


async def finish(llm: LLM) -> int:
    report = await llm.shutdown()
    say("report", report)
    return report.exit_code if report is not None else -1


async def under_asyncio(config: EngineConfig, reading: StreamReaders) -> int:
    llm = LLM(config)
    await llm.ready()
    loop, tasks = asyncio.get_running_loop(), set()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, llm, number)
    loop.add_signal_handler(signal.SIGUSR1, lambda: tasks.add(loop.create_task(sleep_and_wake(llm))))
    await asyncio.gather(*(read_llm(llm, reading, number) for number in range(REQUESTS)))
    return await finish(llm)


async def under_trio(config: EngineConfig, reading: StreamReaders) -> int:
    async def answer_signals(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*SIGNALS) as received:
            task_status.started()
            async for number in received:
                await sleep_and_wake(llm) if number == signal.SIGUSR1 else on_signal(llm, number)

    llm = LLM(config)
    await llm.ready()
    async with trio.open_nursery() as nursery:
        await nursery.start(answer_signals)
        async with trio.open_nursery() as readers:
            for number in range(REQUESTS):
                readers.start_soon(read_llm, llm, reading, number)
        nursery.cancel_scope.cancel()
    return await finish(llm)


KINDS: dict[str, Callable[[EngineConfig, StreamReaders], Any]] = {
    "engine": lambda config, reading: trio.run(embed, config, reading),
    "llm-asyncio": lambda config, reading: asyncio.run(under_asyncio(config, reading)),
    "llm-trio": lambda config, reading: trio.run(under_trio, config, reading),
}


def main(kind: str, model: str, transport: Any, tokens: str) -> int:
    configure("info")
    config = EngineConfig(
        model=model, runner="ullm.testing:ScriptedRunner", load_format="dummy", transport=transport
    )
    status: int = KINDS[kind](config, StreamReaders(int(tokens)))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
