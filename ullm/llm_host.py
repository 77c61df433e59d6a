"""The engine's side of `LLM`: what runs in its thread's trio loop, and the values that it answers with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from ullm.config import EngineConfig, SleepMode
from ullm.engine import Engine, open_engine
from ullm.engine.embedding import embed_all
from ullm.engine.output import Output
from ullm.engine.shutdown_report import ShutdownReport
from ullm.engine.status import Health, ReloadReport, SleepHealth
from ullm.errors import EngineStopped, InvalidParameter, first_cause
from ullm.parsing.parts import CallArguments, CallBegin, Part, Reasoning, Text
from ullm.parsing.tool_use import Reading, ToolUse, constrained, read_as
from ullm.sampling import SamplingParams
from ullm.sampling import token_ids as plain_token_ids
from ullm.tokenization.described_tools import fit_to_template

PUBLIC = "ullm.llm"
"""Where programs import the values from, and what `help` and pickles name."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages, which the model's chat template turns into a prompt."""


class GenerateOutput(msgspec.Struct, frozen=True):
    """New text and tokens of one choice since its last output.

    Args:
        token_str: new text; may be empty while a character is incomplete.
        is_finished: whether this is the choice's last output.
        finish_reason: ``stop``, ``length``, ``abort`` or ``timeout``; None before the end.
        index: which of the ``n`` choices.
    """

    __module__ = PUBLIC

    token_str: str
    is_finished: bool
    finish_reason: str | None
    num_prompt_tokens: int
    num_generated_tokens: int
    index: int = 0
    token_ids: list[int] = []


class Completion(msgspec.Struct, frozen=True):
    """One choice of one prompt, complete, as `LLM.generate_sync` returns it."""

    __module__ = PUBLIC

    text: str
    token_ids: list[int]
    finish_reason: str
    num_prompt_tokens: int


class FunctionCall(msgspec.Struct, frozen=True):
    """A call of a tool.

    Args:
        arguments: JSON text; valid by the tool's schema if the call was constrained.
    """

    __module__ = PUBLIC

    id: str
    name: str
    arguments: str


class ChatTurn(msgspec.Struct, frozen=True):
    """The answer to a conversation.

    Args:
        content: text beside calls and reasoning.
        reasoning: what the model thought before, if its chat template tells that from the answer.
        finish_reason: ``stop``, ``tool_calls``, ``length``, ``abort`` or ``timeout``.
    """

    __module__ = PUBLIC

    content: str
    reasoning: str
    tool_calls: list[FunctionCall]
    finish_reason: str
    token_ids: list[int]
    num_prompt_tokens: int


class LLMHost:
    """The engine's side, inside the thread's trio loop."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._scope = trio.CancelScope()
        self._ready = trio.Event()
        self.ended = trio.Event()
        self.report: ShutdownReport | None = None

    async def run(self, *, task_status: trio.TaskStatus[LLMHost]) -> None:
        """Keep the engine open until it stops; callers get the error if it fails."""
        task_status.started(self)
        try:
            with self._scope:
                async with open_engine(self._config) as self._engine:
                    self._ready.set()
                    self.report = await self._engine.wait_stopped()
        except Exception as error:
            self._error = error
        finally:
            self._error = self._error or EngineStopped()
            self._ready.set()
            self.ended.set()

    async def wait_ready(self) -> Engine:
        """Wait until the engine runs, and return it."""
        await self._ready.wait()
        if self._error is not None:
            raise self._error
        assert self._engine is not None, "ready without an error means that there is one"
        return self._engine

    @asynccontextmanager
    async def open_stream(
        self, prompt: Prompt, params: SamplingParams | None, sequence_id: str | None
    ) -> AsyncIterator[AsyncIterator[GenerateOutput]]:
        """Open an iterator of the outputs of one request."""
        engine = await self.wait_ready()
        ready_prompt = await _encode(engine, prompt)
        params = params or engine.sampling_defaults.params()
        async with engine.generate(ready_prompt, params, request_id=sequence_id) as generation:
            yield (_to_generate_output(output) async for output in generation)

    async def generate_all(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | None]
    ) -> list[list[Completion]]:
        """Return the complete answers to all prompts."""
        results: list[list[Completion]] = [[] for _ in prompts]
        engine = await self.wait_ready()
        try:
            async with trio.open_nursery() as nursery:
                for prompt, own, into in zip(prompts, params, results, strict=True):
                    nursery.start_soon(_complete, engine, prompt, own, into)
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        return results

    async def chat(
        self, turns: list[dict[str, Any]], params: SamplingParams, use: ToolUse, kwargs: dict[str, Any]
    ) -> list[ChatTurn]:
        """Return the complete answer to a conversation."""
        engine = await self.wait_ready()
        tokenizer = engine.tokenizer
        assert tokenizer is not None, "a running engine has a tokenizer"
        turns, tools = fit_to_template(tokenizer.chat_format, turns, use.tools)
        prompt = await tokenizer.encode_chat(turns, tools=tools, **kwargs)
        how = read_as(use, tokenizer.chat_format, tokenizer, prompt)
        params = constrained(params, use.structured_outputs(tokenizer.chat_format.calls), how)
        completions: list[Completion] = []
        await _complete(engine, prompt, params, completions)
        return [_to_turn(completion, how) for completion in completions]

    async def embed(self, prompts: Sequence[Prompt], pooling: str, normalize: bool) -> list[list[float]]:
        """Return one vector per prompt."""
        engine = await self.wait_ready()
        ready = [await _encode(engine, prompt) for prompt in prompts]
        try:
            return await embed_all(engine, ready, pooling, normalize=normalize)
        except BaseExceptionGroup as group:
            raise first_cause(group) from None

    async def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        engine = await self.wait_ready()
        assert engine.tokenizer is not None, "a running engine has a tokenizer"
        return await engine.tokenizer.encode(text)

    async def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids."""
        engine = await self.wait_ready()
        assert engine.tokenizer is not None, "a running engine has a tokenizer"
        return engine.tokenizer.decode(token_ids)

    async def sleep(self, level: int, mode: SleepMode) -> SleepHealth:
        """See `Engine.sleep`."""
        return await (await self.wait_ready()).sleep(level, mode)

    async def wake(self) -> SleepHealth:
        """See `Engine.wake`."""
        return await (await self.wait_ready()).wake()

    async def reload(self, model: str | None, revision: str | None) -> ReloadReport:
        """See `Engine.reload`."""
        return await (await self.wait_ready()).reload(model, revision)

    async def load_lora(self, name: str, path: str, replace: bool) -> None:
        """See `Engine.load_adapter`."""
        await (await self.wait_ready()).load_adapter(name, path, replace=replace)

    async def unload_lora(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        await (await self.wait_ready()).unload_adapter(name)

    async def health(self) -> Health:
        """See `Engine.health`."""
        return (await self.wait_ready()).health()

    def abort(self, request_id: str) -> None:
        """End a request, if there is one of that name."""
        if self._engine is not None:
            self._engine.abort(request_id)

    def request_shutdown(self, timeout: float | None = None) -> None:
        """Begin to stop, in any state."""
        if self._engine is not None:
            self._engine.request_shutdown(timeout)
        else:
            self._scope.cancel()


async def _encode(engine: Engine, prompt: Prompt) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping):
        if not all(isinstance(message, Mapping) for message in prompt):
            raise InvalidParameter("prompt must be a text, token ids, or messages, not a mixture", "prompt")
        assert engine.tokenizer is not None, "a running engine has a tokenizer"
        return await engine.tokenizer.encode_chat([dict(message) for message in prompt])
    return plain_token_ids("prompt", prompt)


async def _complete(
    engine: Engine, prompt: Prompt, params: SamplingParams | None, into: list[Completion]
) -> None:
    """Append the choices of one prompt to ``into``."""
    params = params or engine.sampling_defaults.params()
    parts: list[list[Output]] = [[] for _ in range(params.n)]
    async with engine.generate(await _encode(engine, prompt), params) as generation:
        async for output in generation:
            parts[output.index].append(output)
    into += [
        Completion(
            text="".join(output.text for output in choice),
            token_ids=[token_id for output in choice for token_id in output.token_ids],
            finish_reason=choice[-1].finish_reason or "abort",
            num_prompt_tokens=choice[-1].num_prompt_tokens,
        )
        for choice in parts
    ]


def _to_turn(completion: Completion, how: Reading) -> ChatTurn:
    parts: list[Part] = [Text(completion.text)]
    if how.parser is not None:
        parser = how.parser()
        parts = [*parser.push(completion.text), *parser.finish()]
    arguments: dict[int, str] = {}
    for part in parts:
        if isinstance(part, CallArguments):
            arguments[part.index] = arguments.get(part.index, "") + part.text
    begun = [part for part in parts if isinstance(part, CallBegin)]
    calls = [FunctionCall(part.id, part.name, arguments.get(part.index, "")) for part in begun]
    reason = completion.finish_reason
    return ChatTurn(
        content="".join(part.text for part in parts if isinstance(part, Text)),
        reasoning="".join(part.text for part in parts if isinstance(part, Reasoning)),
        tool_calls=calls,
        finish_reason="tool_calls" if calls and reason == "stop" else reason,
        token_ids=completion.token_ids,
        num_prompt_tokens=completion.num_prompt_tokens,
    )


def _to_generate_output(output: Output) -> GenerateOutput:
    return GenerateOutput(
        token_str=output.text,
        is_finished=output.finish_reason is not None,
        finish_reason=output.finish_reason,
        num_prompt_tokens=output.num_prompt_tokens,
        num_generated_tokens=output.num_generated_tokens,
        index=output.index,
        token_ids=output.token_ids,
    )
