"""``ullm generate``: one prompt, one answer on stdout."""

from __future__ import annotations

import sys

import trio

from ullm.cli.backend import ChatBackend, open_backend
from ullm.cli.interrupts import run_interruptibly
from ullm.cli.prompt import Question
from ullm.cli.terminal import fetch_model, stderr
from ullm.config import EngineConfig
from ullm.sampling import SamplingParams


def generate(
    config: EngineConfig,
    prompt: Question,
    params: SamplingParams,
    *,
    url: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
) -> int:
    """Stream the answer to stdout; return 0, or 128 + N if signal N stopped it.

    Raises:
        UllmError: the model, the prompt or the server is at fault.
    """
    if url is None:
        fetch_model(config, stderr())

    async def main() -> int:
        async with open_backend(config, url, model, api_key) as backend:
            await print_answer(backend, prompt, params)
        return 0

    return run_interruptibly(main)


async def print_answer(backend: ChatBackend, prompt: Question, params: SamplingParams) -> None:
    """Write an answer to stdout while it is generated."""
    async with backend.ask(prompt, params) as answer:
        async for text in answer.text:
            await trio.to_thread.run_sync(_write, text)
    await trio.to_thread.run_sync(_write, "\n")


def _write(text: str) -> None:
    # In a thread, because a pipe's reader may be slow and the engine must keep running.
    sys.stdout.write(text)
    sys.stdout.flush()
