"""An engine without a model: scripted tokens, a tiny real tokenizer, and gates to hold it at a token."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from types import TracebackType
from typing import Any

import tokenizers
import trio
from tokenizers import decoders, models, pre_tokenizers

from ullm.config import EngineConfig, ServerConfig, SleepMode
from ullm.engine import EngineState
from ullm.engine.adapters import Adapters
from ullm.engine.output import Output
from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.engine.status import EngineStatistics, Health, ReloadReport, ReplicaHealth, SleepHealth
from ullm.errors import (
    ConfigError,
    EngineDraining,
    EngineNotReady,
    InvalidParameter,
    PromptTooLong,
    QueueFull,
)
from ullm.parsing.formats import ChatFormat
from ullm.protocol.messages import Adapter, ModelInfo, TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.server import bind, serve_http
from ullm.supervision import ChildInfo, ChildStatus, Kind, Restart
from ullm.tokenization.decoding import ByteLevelDecoder, TokenBytes
from ullm.tokenization.detokenizer import IncrementalDecoder

BOS, EOS = "<s>", "</s>"
ANSWER = "Grüße aus Paris! 🎉 "
CONTEXT_LEN = 512


class ByteTokenizer:
    """One token per byte of UTF-8, behind the special tokens ``<s>`` and ``</s>``."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: number for number, token in enumerate([BOS, EOS, *alphabet])}
        self._tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tokenizer.add_special_tokens([BOS, EOS])
        self.vocab_size = len(vocabulary)
        self.bos_token_id, self.eos_token_ids = 0, (1,)
        self.seen: list[dict[str, Any]] = []
        self.chat_format = ChatFormat(describes_tools=True, reads_calls=True)

    def plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        await trio.lowlevel.checkpoint()
        return ([self.bos_token_id] if add_special_tokens else []) + self.plain(text)

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        self.seen.append({"messages": messages, "tools": tools, "kwargs": kwargs})
        if messages[0]["role"] == "assistant":
            raise InvalidParameter("the template wants a user's turn first", "messages")
        text = "".join(f"[{message['role']}]{message['content']}" for message in messages)
        return await self.encode(text + ("[assistant]" if add_generation_prompt else ""))

    def describe(self) -> dict[str, Any]:
        return {"tokenizer_class": "ByteTokenizer", "vocab_size": self.vocab_size}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(
        self, *, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDecoder:
        skip = frozenset((0, 1)) if skip_special_tokens else frozenset[int]()
        return ByteLevelDecoder(TokenBytes(self._tokenizer), skip, prompt_token_ids)

    def special_tokens_in(self, texts: Sequence[str]) -> dict[int, str]:
        return {
            number: token for number, token in enumerate((BOS, EOS)) if any(token in text for text in texts)
        }

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id % 256])


class FakeFaults:
    """Accepts every plan that does not contain ``nonsense``, and has nothing happen."""

    watching = False

    def __init__(self) -> None:
        self.armed: list[str] = []

    def arm(self, plan: str) -> None:
        if "nonsense" in plan:
            raise ConfigError("--faults: 'nonsense' is no fault")
        self.armed.append(plan)

    def clear(self) -> None:
        self.armed.clear()

    def hits(self, point: str, *, request: str = "", token: int | None = None) -> list[Any]:
        return []

    def describe(self) -> dict[str, list[str]]:
        return {"armed": self.armed, "fired": []}


Script = Callable[[int], list[int]]
"""Choice number → the tokens that it generates."""


class FakeEngine:
    """Implements `EngineInterface`.

    Args:
        hold_after: tokens of each choice after which it waits for `release`.
        fail_after: tokens of each choice after which `failure` is raised.
        busy: what sleep, wake and reload raise.
        asked: calls that concern the whole engine; a shutdown has no other effect.
    """

    def __init__(self, *, loaded: bool = True) -> None:
        self.model_name = "fake"
        self.config = EngineConfig(model="fake")
        self.sampling_defaults = SamplingDefaults()
        self.faults = FakeFaults()
        self.asleep = SleepHealth()
        self.restarting = False
        self.busy: Exception | None = None
        self.asked: list[tuple[Any, ...]] = []
        self.adapters = Adapters()
        self.params: list[SamplingParams] = []
        self.state = EngineState.RUNNING if loaded else EngineState.STARTING
        self._tokenizer = ByteTokenizer()
        self._info = ModelInfo(
            architecture="Fake",
            num_parameters=1,
            vocab_size=self._tokenizer.vocab_size,
            eos_token_ids=self._tokenizer.eos_token_ids,
            context_len=CONTEXT_LEN,
            num_blocks=64,
            block_size=16,
            dtype="float32",
            device="cpu",
            pools=True,
        )
        self.script: Script = lambda index: self._tokenizer.plain(ANSWER)
        self.hold_after: int | None = None
        self.fail_after: int | None = None
        self.failure: BaseException = RuntimeError("boom")
        self.refuse: BaseException | None = None
        self.refuse_generation: BaseException | None = None
        self.release = trio.Event()
        self.held = trio.Event()
        self.active: dict[str, FakeGeneration] = {}
        self.all_gone = trio.Event()
        self.admitted: list[FakeGeneration] = []
        self.aborted = 0
        self.clients: list[str] = []
        self.sessions: list[str] = []
        self.nursery: trio.Nursery | None = None
        self.info_pools = True
        self.logprob, self.num_cached_tokens = -0.5, 2

    @property
    def tokenizer(self) -> ByteTokenizer | None:
        return None if self.state is EngineState.STARTING else self._tokenizer

    @property
    def info(self) -> ModelInfo | None:
        return None if self.state is EngineState.STARTING else self._info

    def check_admission(self) -> None:
        if self.refuse is not None:
            raise self.refuse
        if self.state is EngineState.STARTING:
            raise EngineNotReady(self.state.value)
        if self.state is not EngineState.RUNNING:
            raise EngineDraining(self.state.value)

    def fill_queue(self) -> None:
        self.refuse = QueueFull(8, 8, retry_after=1.2)

    def generate(
        self,
        prompt: Sequence[int] | str,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        pace: Callable[[], float] | None = None,
        client: str = "",
        emitted: Sequence[int] = (),
        session: str = "",
    ) -> FakeGeneration:
        assert not isinstance(prompt, str)
        self.clients.append(client)
        self.params.append(params)
        self.sessions.append(session)
        if self.refuse_generation is not None:
            raise self.refuse_generation
        return FakeGeneration(self, list(prompt), params, request_id or "req")

    @property
    def http_faults(self) -> FakeFaults:
        return self.faults

    async def manage_faults(self, action: str, plan: str = "") -> dict[str, list[str]]:
        await trio.lowlevel.checkpoint()
        if action == "arm":
            self.faults.arm(plan)
        elif action == "clear":
            self.faults.clear()
        return self.faults.describe()

    def start_soon(self, task: Callable[[], Awaitable[object]]) -> None:
        if self.nursery is not None:
            self.nursery.start_soon(task)

    def answering(self) -> AbstractContextManager[None]:
        return nullcontext()

    def health(self) -> Health:
        state = self.state.value
        if self.state is EngineState.RUNNING and self.asleep.level is not None:
            state = "sleeping"
        elif self.state is EngineState.RUNNING and self.restarting:
            state = "restarting"
        ready = state == "running" or (state == "sleeping" and self.asleep.registered)
        return Health(
            state=state,
            live=self.state is not EngineState.FAILED,
            ready=ready,
            detail="" if ready else state,
            replicas=[ReplicaHealth(0, ready, 1, [], round_trip_age=0.5, round_trip_seconds=0.01)],
            sleep=self.asleep,
        )

    async def sleep(self, level: int | None = None, mode: SleepMode = "wait") -> SleepHealth:
        await self._change("sleep", level, mode)
        self.asleep = SleepHealth("asleep", self.config.sleep_level if level is None else level)
        return self.asleep

    async def wake(self) -> SleepHealth:
        await self._change("wake")
        self.asleep = SleepHealth()
        return self.asleep

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> None:
        await self._change("load_adapter", name, path, replace)
        self.adapters.put(Adapter(name, path, "digest", 1))

    async def unload_adapter(self, name: str) -> None:
        await self._change("unload_adapter", name)
        self.adapters.find(name)
        self.adapters.remove(name)

    async def reload(self, model: str | None = None, revision: str | None = None) -> ReloadReport:
        await self._change("reload", model, revision)
        return ReloadReport(model or "/models/fake", revision, [0], 0.25, 0)

    async def _change(self, *asked: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.asked.append(asked)
        if self.busy is not None:
            raise self.busy

    def request_shutdown(self, timeout: float | None = None, *, by: str = "shutdown()") -> None:
        self.asked.append(("shutdown", timeout, by))

    def children(self) -> tuple[ChildInfo, ...]:
        worker = ChildInfo("workers", ChildStatus.RUNNING, Kind.WORKER, Restart.PERMANENT, False, 2)
        replica = ChildInfo(
            "replica0", ChildStatus.RUNNING, Kind.SUPERVISOR, Restart.TEMPORARY, False, 0, None, (worker,)
        )
        http = ChildInfo("http", ChildStatus.STARTING, Kind.WORKER, Restart.PERMANENT, False, 0)
        return (http, replica)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            running=len(self.active),
            waiting=0,
            kv_blocks_used=16,
            kv_blocks_total=64,
            prefix_cache_hit_tokens=3,
            prefix_cache_query_tokens=10,
            prompt_tokens_total=20,
            generation_tokens_total=30,
            preemptions_total=1,
            requests_total={"stop": 2, "length": 1},
            worker_restarts_total=0,
            requests_resumed_total=0,
            tokens_resubmitted_total=0,
            sleeps_total={1: 2, 3: 1},
            wakes_total=3,
            last_sleep_seconds=0.5,
            last_wake_seconds=None,
            bytes_given_back=1024,
            reloads_total={"succeeded": 1, "failed": 2},
            admitted_tokens=77,
            draft_tokens_total=40,
            accepted_tokens_total=25,
            steps_total=12,
        )


class FakeGeneration:
    """One request; its outputs are made on demand."""

    def __init__(
        self, engine: FakeEngine, prompt: list[int], params: SamplingParams, request_id: str
    ) -> None:
        self._engine = engine
        self.prompt_token_ids = prompt
        self.params = params
        self.request_id = request_id
        self._finished = False

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        if self.params.prompt_logprobs is None:
            return None
        return [
            None,
            *(self._score(token, self.params.prompt_logprobs) for token in self.prompt_token_ids[1:]),
        ]

    @property
    def embedding(self) -> array[float]:
        """Number of tokens, the last one, and the first: nothing that depends on other prompts."""
        prompt = self.prompt_token_ids
        return array("f", [len(prompt), prompt[-1], prompt[0]] if self.params.pooling else [])

    async def __aenter__(self) -> FakeGeneration:
        await trio.lowlevel.checkpoint()
        if self.params.pooling and not self._engine.info_pools:
            raise InvalidParameter("Fake has no hidden states that could be pooled", "pooling")
        if not self.prompt_token_ids:
            raise InvalidParameter("the prompt is empty; it must have at least one token", "prompt")
        if not all(0 <= token_id < self._engine._info.vocab_size for token_id in self.prompt_token_ids):
            raise InvalidParameter("prompt: a token id is not in the model's vocabulary", "prompt")
        if len(self.prompt_token_ids) >= CONTEXT_LEN:
            raise PromptTooLong(len(self.prompt_token_ids), CONTEXT_LEN)
        assert self.request_id not in self._engine.active
        self._engine.active[self.request_id] = self
        self._engine.admitted.append(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.aborted += not self._finished
        del self._engine.active[self.request_id]
        if not self._engine.active:
            self._engine.all_gone.set()

    def __aiter__(self) -> FakeGeneration:
        scripts = [self._engine.script(index) for index in range(self.params.n)]
        self._texts = [_Text(self._engine._tokenizer) for _ in scripts]
        limit = self.params.max_tokens or CONTEXT_LEN
        self._steps = deque(
            (number, index, script[number], _end(number, script, limit))
            for number in range(limit)
            for index, script in enumerate(scripts)
            if number < min(len(script), limit)
        )
        return self

    async def __anext__(self) -> Output:
        if not self._steps:
            self._finished = True
            raise StopAsyncIteration
        number, index, token, reason = self._steps[0]
        if index == 0:
            await self._pause(number)
        self._steps.popleft()  # not before: a cancelled wait loses nothing
        return self._output(index, number, token, reason)

    async def next(self, deadline: float) -> Output | None:
        if not hasattr(self, "_steps"):
            aiter(self)
        with trio.move_on_at(deadline):
            return await self.__anext__()
        return None

    async def _pause(self, number: int) -> None:
        await trio.lowlevel.checkpoint()
        if number == self._engine.fail_after:
            raise self._engine.failure
        if number == self._engine.hold_after:
            self._engine.held.set()
            await self._engine.release.wait()

    def _output(self, index: int, number: int, token: int, reason: str | None) -> Output:
        logprobs = None if self.params.logprobs is None else [self._score(token, self.params.logprobs)]
        return Output(
            index=index,
            text=self._texts[index].push(token, flush=reason is not None),
            token_ids=[token],
            logprobs=logprobs,
            finish_reason=reason,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_generated_tokens=number + 1,
            num_cached_tokens=self._engine.num_cached_tokens,
        )

    def _score(self, token: int, count: int) -> TokenLogprobs:
        score = self._engine.logprob
        top = [(token, score), *((other, float("-inf")) for other in range(2, 1 + count))]
        return TokenLogprobs(token, score, 1, top[:count])


def _end(number: int, script: list[int], limit: int) -> str | None:
    if number + 1 == limit:
        return "length"
    return "stop" if number + 1 == len(script) else None


class _Text:
    """Assembles text of whole characters."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def push(self, token: int, *, flush: bool) -> str:
        self._held.append(token)
        text = self._tokenizer.decode(self._held)
        if text.endswith("\ufffd") and not flush:
            return ""
        self._held.clear()
        return text


@asynccontextmanager
async def serving(engine: FakeEngine, **server_options: Any) -> AsyncIterator[str]:
    """Serve the app on a real server on loopback; yield its URL."""
    config = ServerConfig(port=0, **server_options)
    async with trio.open_nursery() as nursery:

        async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
            await serve_http(engine, config, sockets=[bind(config)], task_status=task_status)

        engine.nursery = nursery
        urls = await nursery.start(run)
        yield urls[0]
        nursery.cancel_scope.cancel()
