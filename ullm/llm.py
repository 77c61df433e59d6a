"""`LLM`: an engine for programs on asyncio, on trio, or on no event loop at all.

The engine runs on a trio loop in a thread of its own. So it works the same way under each of them, can be
built before a loop runs, and survives the end of the loop that uses it.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from ullm.config import DEFAULT_MODEL, EngineConfig, SleepMode
from ullm.engine import Engine, open_engine
from ullm.engine.output import Output
from ullm.engine.shutdown_report import ShutdownReport
from ullm.engine.status import Health, ReloadReport, SleepHealth
from ullm.errors import EngineStopped, first_cause
from ullm.hosting.bridge import Stream, TrioThread
from ullm.sampling import SamplingParams

__all__ = ["LLM", "Completion", "GenerateOutput", "SamplingParams"]

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

    token_str: str
    is_finished: bool
    finish_reason: str | None
    num_prompt_tokens: int
    num_generated_tokens: int
    index: int = 0
    token_ids: list[int] = []


class Completion(msgspec.Struct, frozen=True):
    """One choice of one prompt, complete, as `LLM.generate_sync` returns it."""

    text: str
    token_ids: list[int]
    finish_reason: str
    num_prompt_tokens: int


class LLM:
    """An engine in a thread of its own.

    Building it starts the engine and returns at once. `generate` waits until it is ready.

    Args:
        model: hub id, local folder, .gguf file, or an `EngineConfig`, which replaces all other arguments;
            the default is a small model that is fetched from a package index.
        max_bs: maximum number of sequences that run at once; 0: 64 on a CPU, 256 on a GPU.
        context_len: maximum number of tokens of prompt and output together, up to the model's own limit;
            None: the model's own limit.
        use_threading: run the worker as a thread of this process; saves a process, but a thread that hangs
            cannot be killed.
        options: further fields of `EngineConfig`, where the other arguments are documented, too.

    Raises:
        ConfigError: an option that cannot work.
    """

    def __init__(
        self,
        model: str | EngineConfig = DEFAULT_MODEL,
        gpu_memory_utilization: float = EngineConfig.gpu_memory_utilization,
        max_bs: int = 50,
        tp_size: int = EngineConfig.tp_size,
        pp_size: int = EngineConfig.pp_size,
        nccl_port: int = EngineConfig.nccl_port,
        device_ids: Sequence[int] | None = EngineConfig.device_ids,
        enforce_eager: bool = EngineConfig.enforce_eager,
        context_len: int | None = 2048,
        use_threading: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(model, EngineConfig):
            config = model
        else:
            if use_threading:
                options.setdefault("transport", "thread")
            config = EngineConfig(
                model=model,
                gpu_memory_utilization=gpu_memory_utilization,
                max_bs=max_bs,
                tp_size=tp_size,
                pp_size=pp_size,
                nccl_port=nccl_port,
                device_ids=None if device_ids is None else tuple(device_ids),
                enforce_eager=enforce_eager,
                context_len=context_len,
                **options,
            )
        self.config = config
        self._thread = TrioThread("ullm-engine").start()
        self._host: _Host = self._thread.start_task(_Host(config).run).value
        # Also at the exit of the interpreter. The thread must not refer to this object.
        self._finalizer = weakref.finalize(self, _stop_now, self._thread, self._host)

    # --- generating ------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until the engine takes requests.

        Raises:
            UllmError: it could not start; one line that names the cause and the remedy.
        """
        await self._thread.call_async(self._host.wait_ready)

    def generate(
        self, prompts: Prompt, params: SamplingParams | None = None, sequence_id: str | None = None
    ) -> TokenStream:
        """Start to generate; iterate over the result with ``async for``. Dropping the result aborts.

        Args:
            prompts: text, token ids, or chat messages.
            sequence_id: the name to pass to `abort`.
        """
        return TokenStream(self, prompts, params or SamplingParams(), sequence_id)

    def generate_sync(
        self, prompts: Sequence[Prompt] | str, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """Generate for all prompts at once, and block until all are done; for scripts.

        Args:
            params: for all prompts, or one for each.

        Returns:
            For each prompt, in order, its ``n`` choices.

        Raises:
            RequestError: a prompt or a parameter is invalid.
            ValueError: there are not as many parameters as prompts.
        """
        batch: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(batch)
        if len(params) != len(batch):
            raise ValueError(
                f"{len(batch)} prompts need as many parameters, or one for all; got {len(params)}"
            )
        return self._thread.call(self._host.generate_all, batch, params)

    def abort(self, sequence_id: str) -> None:
        """End a request with what it has; its last output says ``finish_reason="abort"``."""
        self._thread.post(self._host.abort, sequence_id)

    async def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return await self._thread.call_async(self._host.encode, text)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return await self._thread.call_async(self._host.decode, list(token_ids))

    # --- sleeping and reloading ----------------------------------------------------------------------

    async def sleep(self, level: int = 1, mode: SleepMode = "wait") -> SleepHealth:
        """Give memory back until `wake`, or until the next request; see `Engine.sleep`."""
        return await self._thread.call_async(self._host.sleep, level, mode)

    async def wake(self) -> SleepHealth:
        """Wake the engine; return when requests run again."""
        return await self._thread.call_async(self._host.wake)

    async def reload(self, model: str | None = None, revision: str | None = None) -> ReloadReport:
        """Load the model again in new workers, while requests go on; see `Engine.reload`."""
        return await self._thread.call_async(self._host.reload, model, revision)

    async def health(self) -> Health:
        """Return what an HTTP server would answer to ``/health``."""
        return await self._thread.call_async(self._host.health)

    # --- stopping --------------------------------------------------------------------------------------

    def shutdown(self, timeout: float | None = None) -> PendingShutdown:
        """Stop in order: drain for ``timeout`` seconds, abort the rest, stop the workers.

        Outside of an event loop it blocks until the engine is gone. Inside one it returns at once, because
        the readers in that loop must go on for the drain; await the result to wait for the end. A second
        call does no harm.
        """
        if self._thread.alive:
            self._thread.post(self._host.request_shutdown, timeout)
        ending = PendingShutdown(self._thread, self._host)
        if not _in_event_loop():
            ending.wait()
        return ending

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    async def __aenter__(self) -> LLM:
        await self.ready()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()


class PendingShutdown:
    """A stop in progress: await it in asyncio or trio, or call `wait`. The result is the report."""

    def __init__(self, thread: TrioThread, host: _Host) -> None:
        self._thread = thread
        self._host = host

    def wait(self) -> ShutdownReport | None:
        """Block until the engine is gone; return the report, or None if it never started."""
        if self._thread.alive:
            self._thread.call(self._host.ended.wait)
        self._thread.stop()
        return self._host.report

    def __await__(self) -> Generator[Any, Any, ShutdownReport | None]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> ShutdownReport | None:
        if self._thread.alive:
            await self._thread.call_async(self._host.ended.wait)
        await self._thread.stop_async()
        return self._host.report


class TokenStream:
    """An async iterator of `GenerateOutput`, under asyncio and trio; returned by `LLM.generate`."""

    def __init__(self, llm: LLM, prompt: Prompt, params: SamplingParams, sequence_id: str | None) -> None:
        self._llm = llm  # lives as long as somebody iterates
        host = llm._host
        self._stream: Stream[GenerateOutput] = llm._thread.stream(
            lambda: host.open_stream(prompt, params, sequence_id)
        )

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> GenerateOutput:
        return await self._stream.__anext__()

    async def aclose(self) -> None:
        """Abort the request, unless it has ended, and wait for its end."""
        await self._stream.aclose()


class _Host:
    """The engine's side, inside the thread's trio loop."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._scope = trio.CancelScope()
        self._ready = trio.Event()
        self.ended = trio.Event()
        self.report: ShutdownReport | None = None

    async def run(self, *, task_status: trio.TaskStatus[_Host]) -> None:
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
        self, prompt: Prompt, params: SamplingParams, sequence_id: str | None
    ) -> AsyncIterator[AsyncIterator[GenerateOutput]]:
        """Open an iterator of the outputs of one request."""
        engine = await self.wait_ready()
        ready_prompt = await _encode(engine, prompt)
        async with engine.generate(ready_prompt, params, request_id=sequence_id) as generation:
            yield (_to_generate_output(output) async for output in generation)

    async def generate_all(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
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
    items: list[Any] = list(prompt)
    if items and isinstance(items[0], Mapping):
        assert engine.tokenizer is not None, "a running engine has a tokenizer"
        return await engine.tokenizer.encode_chat([dict(message) for message in items])
    return items


async def _complete(engine: Engine, prompt: Prompt, params: SamplingParams, into: list[Completion]) -> None:
    """Append the choices of one prompt to ``into``."""
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


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return trio.lowlevel.in_trio_run()
    return True


def _stop_now(thread: TrioThread, host: _Host) -> None:
    """Stop at once: the object is gone, or the interpreter ends, so nobody waits for answers."""
    if thread.alive:
        thread.post(host.request_shutdown, 0.0)
        PendingShutdown(thread, host).wait()
