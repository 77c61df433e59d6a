"""What the HTTP surface needs of an engine; `ullm.engine.Engine` has it, and so do fakes in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ullm.config import EngineConfig, SleepMode
from ullm.protocol.messages import ModelInfo, TokenLogprobs
from ullm.sampling import SamplingParams

if TYPE_CHECKING:
    from ullm.engine.output import Output
    from ullm.engine.status import EngineStatistics, Health, ReloadReport, SleepHealth
    from ullm.supervision import ChildInfo
    from ullm.tokenization.detokenizer import IncrementalDecoder


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The tokens of a conversation in the model's chat template.

        Raises:
            InvalidParameter: the template refuses the messages.
        """

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens."""

    def detokenizer(
        self, *, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDecoder:
        """A decoder for a sequence that continues ``prompt_token_ids``."""

    def token_text(self, token_id: int) -> str:
        """One token as text, for log probabilities."""

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes, which may be part of a character."""


class Generation(Protocol):
    """One admitted request; see `ullm.engine.generation.Generation`."""

    pace: Callable[[], float] | None

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt, once entered."""

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs | None] | None:
        """One per prompt token once the first output is there, if asked for."""

    async def __aenter__(self) -> Generation:
        """Admit the request."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort what has not finished."""

    def __aiter__(self) -> AsyncIterator[Output]:
        """What is new, as it comes."""

    async def next(self, deadline: float) -> Output | None:
        """What is new, or None if nothing is before ``deadline``.

        Raises:
            StopAsyncIteration: nothing more will be.
        """


class Faults(Protocol):
    """Plans of faults; see `ullm.faults`."""

    def arm(self, plan: str) -> object:
        """Add a plan to what is armed.

        Raises:
            ConfigError: it cannot be read.
        """

    def clear(self) -> object:
        """Disarm everything."""

    def describe(self) -> object:
        """What is armed, and what has happened; encodes to JSON."""


class Engine(Protocol):
    """An engine in any state; before it is ready, ``info`` and ``tokenizer`` may be None."""

    @property
    def model_name(self) -> str:
        """The name that the API shows."""

    @property
    def info(self) -> ModelInfo | None:
        """What the loaded model is."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The loaded model's tokenizer."""

    @property
    def config(self) -> EngineConfig:
        """As it serves now."""

    @property
    def faults(self) -> Faults:
        """What is made to go wrong."""

    @property
    def state(self) -> str:
        """One of `ullm.engine.state.EngineState`."""

    def check_admission(self) -> None:
        """Raise what a new request would get.

        Raises:
            EngineDraining, EngineNotReady, EngineSleeping, QueueFull, EngineDead
        """

    def generate(
        self, prompt: Sequence[int] | str, params: SamplingParams, *, request_id: str | None = None
    ) -> Generation:
        """A request that is admitted when the result is entered."""

    def health(self) -> Health:
        """For probes."""

    def statistics(self) -> EngineStatistics:
        """For metrics."""

    def children(self) -> tuple[ChildInfo, ...]:
        """The supervision tree."""

    def request_shutdown(self, timeout: float | None = None, *, by: str = "shutdown()") -> None:
        """Begin the orderly stop; returns at once."""

    async def sleep(self, level: int | None = None, mode: SleepMode = "wait") -> SleepHealth:
        """Give memory back.

        Raises:
            InvalidParameter, EngineNotReady, EngineDraining, EngineDead, EngineBusy
        """

    async def wake(self) -> SleepHealth:
        """Be awake.

        Raises:
            EngineNotReady, EngineDraining, EngineDead, EngineBusy
        """

    async def reload(self, model: str | None = None, revision: str | None = None) -> ReloadReport:
        """Load the model again in new workers, which take over.

        Raises:
            ReloadFailed, EngineNotReady, EngineDraining, EngineDead, EngineBusy
        """
