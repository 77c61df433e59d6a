"""`LLM`: an engine for programs on asyncio, on trio, or on no event loop at all.

The engine runs on a trio loop in a thread of its own. So it works the same way under each of them, can be
built before a loop runs, and survives the end of the loop that uses it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import inspect
import weakref
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NoReturn

import trio

from ullm.config import DEFAULT_MODEL, EngineConfig, SleepMode
from ullm.engine.shutdown_report import ShutdownReport
from ullm.engine.status import Health, ReloadReport, SleepHealth
from ullm.errors import ConfigError
from ullm.hosting.bridge import Stream, TrioThread
from ullm.llm_host import ChatTurn, Completion, FunctionCall, GenerateOutput, LLMHost, Prompt
from ullm.parsing.tool_use import use_of
from ullm.sampling import SamplingParams
from ullm.sampling import token_ids as plain_token_ids

__all__ = ["LLM", "ChatTurn", "Completion", "FunctionCall", "GenerateOutput", "Prompt", "SamplingParams"]


class LLM:
    """An engine in a thread of its own.

    Building it starts the engine and returns at once. `generate` waits until it is ready.

    Args:
        model: hub id, local folder, .gguf file, or an `EngineConfig`, beside which other arguments are
            refused; the default is a small model that is fetched from a package index.
        max_bs: maximum number of sequences that run at once; 0: 64 on a CPU, 256 on a GPU.
        context_len: maximum number of tokens of prompt and output together, up to the model's own limit;
            None: the model's own limit.
        use_threading: run the worker as a thread of this process; saves a process, but a thread that hangs
            cannot be killed.
        options: further fields of `EngineConfig`, where the other arguments are documented, too. ``lora`` may
            also be a dict of names and folders.

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
        given: dict[str, Any] = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_bs": max_bs,
            "tp_size": tp_size,
            "pp_size": pp_size,
            "nccl_port": nccl_port,
            "device_ids": None if device_ids is None else tuple(device_ids),
            "enforce_eager": enforce_eager,
            "context_len": context_len,
            **options,
        }
        if isinstance(model, EngineConfig):
            _check_only_config(model, given, use_threading)
            config = model
        else:
            if isinstance(lora := given.get("lora"), Mapping):
                given["lora"] = tuple(f"{name}={path}" for name, path in lora.items())
            if use_threading:
                given.setdefault("transport", "thread")
            config = _make_config(model, given)
        self.config = config
        self._thread = TrioThread("ullm-engine").start()
        self._host: LLMHost = self._thread.start_task(LLMHost(config).run).value
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
            params: default: the model's own, as far as its generation_config.json names them.
            sequence_id: the name to pass to `abort`.
        """
        return TokenStream(self, prompts, params, sequence_id)

    def generate_sync(
        self, prompts: Sequence[Prompt] | str, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """Generate for all prompts at once, and block until all are done; for scripts.

        Args:
            params: for all prompts, or one for each; default as for `generate`.

        Returns:
            For each prompt, in order, its ``n`` choices.

        Raises:
            RequestError: a prompt or a parameter is invalid.
            ValueError: there are not as many parameters as prompts.
        """
        batch: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        each = [params] * len(batch) if params is None or isinstance(params, SamplingParams) else params
        if len(each) != len(batch):
            raise ValueError(f"{len(batch)} prompts need as many parameters, or one for all; got {len(each)}")
        return self._thread.call(self._host.generate_all, batch, each)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        **template_kwargs: Any,
    ) -> list[ChatTurn]:
        """Answer a conversation, and block until the answer is complete.

        Args:
            tools: functions that the model may call, in OpenAI's form.
            tool_choice: OpenAI's: ``none``, ``auto``, ``required``, a function, or ``allowed_tools``.
            template_kwargs: further variables of the chat template, such as ``enable_thinking``.

        Returns:
            The ``n`` choices, their calls of tools and their reasoning told from the text.

        Raises:
            RequestError: a message, a tool or a parameter is invalid.
        """
        use = use_of(tools, tool_choice, parallel=parallel_tool_calls)
        turns = [dict(message) for message in messages]
        return self._thread.call(self._host.chat, turns, params or SamplingParams(), use, template_kwargs)

    def embed(
        self, prompts: Sequence[Prompt] | str, *, pooling: str = "last", normalize: bool = True
    ) -> list[list[float]]:
        """Return one vector per prompt, and block until all are computed.

        Args:
            pooling: ``last`` or ``mean`` of the hidden states after the final norm.
            normalize: make each of length 1.

        Raises:
            RequestError: a prompt is invalid, or the model has no hidden states.
        """
        batch: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        return self._thread.call(self._host.embed, batch, pooling, normalize)

    def abort(self, sequence_id: str) -> None:
        """End a request with what it has; its last output says ``finish_reason="abort"``."""
        self._thread.post(self._host.abort, sequence_id)

    async def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return await self._thread.call_async(self._host.encode, text)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return await self._thread.call_async(self._host.decode, plain_token_ids("token_ids", token_ids))

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

    async def load_lora(self, name: str, path: str, *, replace: bool = False) -> None:
        """Load a LoRA adapter; ``SamplingParams(lora=name)`` computes with it. See `Engine.load_adapter`."""
        await self._thread.call_async(self._host.load_lora, name, path, replace)

    async def unload_lora(self, name: str) -> None:
        """Unload a LoRA adapter; requests in flight end with it."""
        await self._thread.call_async(self._host.unload_lora, name)

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


def _check_only_config(config: EngineConfig, given: Mapping[str, Any], use_threading: bool) -> None:
    """Refuse arguments beside a configuration that say something else than it does."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(LLM).parameters.items()}
    ignored = [
        name
        for name, value in given.items()
        if value != defaults.get(name, inspect.Parameter.empty) and value != getattr(config, name, None)
    ]
    if use_threading and config.transport != "thread":
        ignored.append("use_threading")
    if ignored:
        raise ConfigError(
            f"LLM(config, {ignored[0]}=…): an EngineConfig has all options; set {ignored[0]} there"
        )


def _make_config(model: str, given: Mapping[str, Any]) -> EngineConfig:
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"LLM has no option {unknown}{hint}")
    return EngineConfig(model=model, **given)


class PendingShutdown:
    """A stop in progress: await it in asyncio or trio, or call `wait`. The result is the report."""

    def __init__(self, thread: TrioThread, host: LLMHost) -> None:
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

    def __init__(
        self, llm: LLM, prompt: Prompt, params: SamplingParams | None, sequence_id: str | None
    ) -> None:
        self._llm = llm  # lives as long as somebody iterates
        host = llm._host
        self._stream: Stream[GenerateOutput] = llm._thread.stream(
            lambda: host.open_stream(prompt, params, sequence_id)
        )

    def __iter__(self) -> NoReturn:
        """Tell what to do instead: programs for other engines iterate over what ``generate`` returns.

        Raises:
            TypeError: always.
        """
        raise TypeError("LLM.generate streams: iterate with `async for`, or call `generate_sync` in a script")

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> GenerateOutput:
        return await self._stream.__anext__()

    async def aclose(self) -> None:
        """Abort the request, unless it has ended, and wait for its end."""
        await self._stream.aclose()


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return trio.lowlevel.in_trio_run()
    return True


def _stop_now(thread: TrioThread, host: LLMHost) -> None:
    """Stop at once: the object is gone, or the interpreter ends, so nobody waits for answers."""
    if thread.alive:
        thread.post(host.request_shutdown, 0.0)
        PendingShutdown(thread, host).wait()
