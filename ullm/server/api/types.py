"""The interfaces that the HTTP surface uses; implemented by `ullm.engine.Engine`, and by fakes in tests."""

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


class TokenizerInterface(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text."""

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Return the tokens of a conversation in the model's chat template.

        Raises:
            InvalidParameter: the template refuses the messages.
        """

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""

    def detokenizer(
        self, *, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDecoder:
        """Return a decoder for a sequence that continues ``prompt_token_ids``."""

    def token_text(self, token_id: int) -> str:
        """Return one token as text, for log probabilities."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return one token's bytes, which may be part of a character."""


class GenerationInterface(Protocol):
    """One admitted request; see `ullm.engine.generation.Generation`."""

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt, once entered."""

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs | None] | None:
        """One per prompt token once the first output has come, if requested."""

    async def __aenter__(self) -> GenerationInterface:
        """Admit the request."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort what has not finished."""

    def __aiter__(self) -> AsyncIterator[Output]:
        """Iterate over outputs as they come."""

    async def next(self, deadline: float) -> Output | None:
        """Return the next output, or None if none comes before ``deadline``, in trio's time.

        Raises:
            StopAsyncIteration: there are no more.
        """


class FaultsInterface(Protocol):
    """Plans of faults; see `ullm.faults`."""

    def arm(self, plan: str) -> object:
        """Add a plan to what is armed.

        Raises:
            ConfigError: the plan cannot be parsed.
        """

    def clear(self) -> object:
        """Disarm everything."""

    def describe(self) -> object:
        """Return what is armed and what has happened; encodes to JSON."""


class EngineInterface(Protocol):
    """An engine in any state; before it is ready, ``info`` and ``tokenizer`` may be None."""

    @property
    def model_name(self) -> str:
        """The name that the API shows."""

    @property
    def info(self) -> ModelInfo | None:
        """The description of the loaded model."""

    @property
    def tokenizer(self) -> TokenizerInterface | None:
        """The loaded model's tokenizer."""

    @property
    def config(self) -> EngineConfig:
        """The current configuration."""

    @property
    def faults(self) -> FaultsInterface:
        """The fault injector."""

    @property
    def state(self) -> str:
        """One of `ullm.engine.state.EngineState`."""

    def check_admission(self) -> None:
        """Return if a new request would be admitted now; cheap.

        Raises:
            EngineDraining, EngineNotReady, EngineSleeping, QueueFull, EngineDead
        """

    def generate(
        self,
        prompt: Sequence[int] | str,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        pace: Callable[[], float] | None = None,
    ) -> GenerationInterface:
        """Make a request, which is admitted when the result is entered.

        Args:
            pace: returns the seconds for which further tokens are held back after outputs were read.
        """

    def health(self) -> Health:
        """Return the state, for probes."""

    def statistics(self) -> EngineStatistics:
        """Return counts, for metrics."""

    def children(self) -> tuple[ChildInfo, ...]:
        """Return the supervision tree."""

    def request_shutdown(self, timeout: float | None = None, *, by: str = "shutdown()") -> None:
        """Begin the orderly stop; return at once."""

    async def sleep(self, level: int | None = None, mode: SleepMode = "wait") -> SleepHealth:
        """Give memory back; return when it is done.

        Raises:
            InvalidParameter, EngineNotReady, EngineDraining, EngineDead, EngineBusy
        """

    async def wake(self) -> SleepHealth:
        """Wake up; return when it is done.

        Raises:
            EngineNotReady, EngineDraining, EngineDead, EngineBusy
        """

    async def reload(self, model: str | None = None, revision: str | None = None) -> ReloadReport:
        """Load the model again in new workers, which take over.

        Raises:
            ReloadFailed, EngineNotReady, EngineDraining, EngineDead, EngineBusy
        """
