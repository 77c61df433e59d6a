"""A program that forks beside its engine: ``python forking.py MODEL``; what it finds is on stdout."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from ullm import LLM, SamplingParams
from ullm.errors import EngineDead
from ullm.hosting.bridge import Stream

PARAMS = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def uses(llm: LLM, stream: Stream[Any]) -> dict[str, Callable[[], object]]:
    """What a child may try with the engine of its parent."""
    return {
        "generate_sync": lambda: llm.generate_sync("x", PARAMS),
        "generate": lambda: asyncio.run(collect(llm)),
        "ready": lambda: asyncio.run(llm.ready()),
        "abort": lambda: llm.abort("x"),
        "stream": lambda: list(stream),
    }


async def collect(llm: LLM) -> None:
    async for _ in llm.generate("x", PARAMS):
        pass


def main() -> None:
    """Begin a stream, fork, and wait."""
    with LLM(
        sys.argv[1], load_format="dummy", runner="ullm.testing:ScriptedRunner", standby_workers=1
    ) as llm:
        llm.generate_sync([[300]], SamplingParams(max_tokens=3))
        host = llm._host
        stream = llm._thread.stream(lambda: host.open_stream([300], PARAMS, None))
        next(stream)
        if os.fork() == 0:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            for name, use in uses(llm, stream).items():
                try:
                    use()
                except EngineDead as error:
                    say("child", name, error.code, error)
            llm.shutdown()
            say("child lives", os.getpid())
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
            os._exit(0)
        next(stream)  # the parent's engine is as it was
        say("parent goes on")
        signal.pause()


if __name__ == "__main__":
    main()
