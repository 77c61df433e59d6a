"""``ullm generate``: one prompt, one answer on stdout."""

from __future__ import annotations

import sys

import trio

from ullm.cli.backend import ChatBackend, Message, open_backend
from ullm.cli.interrupts import run_interruptibly
from ullm.cli.terminal import fetch_model, stderr
from ullm.config import EngineConfig
from ullm.errors import UsageError
from ullm.sampling import SamplingParams


def read_prompt(prompt: str | None) -> str:
    """Return the prompt, or all of stdin for ``-``.

    Raises:
        UsageError: there is no prompt, it is empty, or it is not text.
    """
    if prompt is None:
        raise UsageError('generate needs a prompt: ullm generate "Why is the sky blue?", or - to read stdin')
    if prompt.startswith("--"):
        raise UsageError(f"unknown option: {prompt}; see ullm generate --help")
    text = _read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not {error.encoding} text; convert it, or set PYTHONIOENCODING to its encoding"
        ) from None


def compose(prompt: str, system: str | None, *, raw: bool) -> str | list[Message]:
    """Return a conversation of one question, or the text itself if ``raw``."""
    if raw:
        return prompt
    question = {"role": "user", "content": prompt}
    return [question] if system is None else [{"role": "system", "content": system}, question]


def generate(
    config: EngineConfig,
    prompt: str | list[Message],
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


async def print_answer(backend: ChatBackend, prompt: str | list[Message], params: SamplingParams) -> None:
    """Write an answer to stdout while it is generated."""
    async with backend.ask(prompt, params) as answer:
        async for text in answer.text:
            await trio.to_thread.run_sync(_write, text)
    await trio.to_thread.run_sync(_write, "\n")


def _write(text: str) -> None:
    # In a thread, because a pipe's reader may be slow and the engine must keep running.
    sys.stdout.write(text)
    sys.stdout.flush()
