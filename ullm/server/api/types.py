"""The interfaces that the HTTP surface uses; implemented by `ullm.engine.Engine`, and by fakes in tests."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ullm.config import EngineConfig, SleepMode
from ullm.parsing.formats import ChatFormat
from ullm.protocol.messages import ModelInfo, TokenLogprobs
from ullm.sampling import SamplingParams

if TYPE_CHECKING:
    from ullm.engine.adapters import Adapters
    from ullm.engine.output import Output
    from ullm.engine.sampling_defaults import SamplingDefaults
    from ullm.engine.status import EngineStatistics, Health, ReloadReport, SleepHealth
    from ullm.faults import Fault
    from ullm.supervision import ChildInfo
    from ullm.tokenization.detokenizer import IncrementalDecoder


class TokenizerInterface(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def chat_format(self) -> ChatFormat:
        """How the answers are read that the chat template leads to."""

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

    def describe(self) -> dict[str, Any]:
        """Return the tokenizer's configuration, its special tokens, and its chat template."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""

    def detokenizer(
        self, *, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDecoder:
        """Return a decoder for a sequence that continues ``prompt_token_ids``."""

    def special_tokens_in(self, texts: Sequence[str]) -> dict[int, str]:
        """Return the special tokens that are part of texts, as they are written there."""

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

    @property
    def embedding(self) -> array[float]:
        """The pooled prompt, once the only output has come, if requested; empty otherwise."""

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


class FiringInterface(Protocol):
    """A fault to be carried out; see `ullm.faults.injector.Firing`."""

    @property
    def action(self) -> str:
        """What is to happen."""

    @property
    def fault(self) -> Fault:
        """The fault, with its options."""

    def note(self, effect: str) -> None:
        """Record what has been done."""


class FaultsInterface(Protocol):
    """Faults that are to happen in this process; see `ullm.faults.FaultInjector`."""

    @property
    def watching(self) -> bool:
        """Whether points have to ask."""

    def hits(self, point: str, *, request: str = "", token: int | None = None) -> Sequence[FiringInterface]:
        """Count a hit of a point, and return the faults to carry out there."""


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
    def sampling_defaults(self) -> SamplingDefaults:
        """What the model recommends for requests that name no sampling parameters."""

    @property
    def config(self) -> EngineConfig:
        """The current configuration."""

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters that are served beside the model."""

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> None:
        """Load an adapter and serve it; return when it is.

        Raises:
            AdapterUnusable, InvalidParameter, EngineNotReady, EngineDraining, EngineDead, EngineBusy
        """

    async def unload_adapter(self, name: str) -> None:
        """Serve an adapter no more.

        Raises:
            ModelUnknown, EngineNotReady, EngineDraining, EngineDead, EngineBusy
        """

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
        client: str = "",
        emitted: Sequence[int] = (),
        session: str = "",
    ) -> GenerationInterface:
        """Make a request, which is admitted when the result is entered.

        Args:
            emitted: tokens that the answer has already; it goes on after them.
            pace: returns the seconds for which further tokens are held back after outputs were read.
            client: who sends it; waiting requests of several clients run in turn.
            session: of several replicas, requests of one session go to the same one.
        """

    @property
    def http_faults(self) -> FaultsInterface | None:
        """Faults between this process and its clients; None where the engine, and its plan, is in another."""

    async def manage_faults(self, action: Literal["show", "arm", "clear"], plan: str = "") -> object:
        """Show the plan of faults, add to it, or disarm it; return what is armed and has happened.

        Raises:
            ConfigError: the plan cannot be parsed.
        """

    def start_soon(self, task: Callable[[], Awaitable[object]]) -> None:
        """Run a task from when the engine runs until it has stopped."""

    def answering(self) -> AbstractContextManager[None]:
        """Have the drain of a stop wait for this block: an answer that is made elsewhere."""

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
