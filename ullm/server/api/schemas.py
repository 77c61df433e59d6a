"""Schemas of requests: OpenAI's fields and ullm's own. Wrong types are errors.

Unknown fields are ignored, but for those that `ullm.server.api.fields` refuses.

``null`` means a field's default; some clients send it for options that were not set.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ullm.config import MAX_SLEEP_LEVEL, SleepMode

Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer that can be sent to the workers; `ullm.sampling.SamplingParams` checks tighter limits."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """Options of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that completions and chat completions share; see `ullm.sampling.SamplingParams`."""

    model: str | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Int, float] | None = None
    seed: Int | None = None
    prompt_logprobs: Int | None = None
    skip_special_tokens: bool | None = None
    timeout: float | None = None
    priority: Int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        """True if a stream is to end with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest, kw_only=True):
    """``POST /v1/completions``.

    Args:
        prompt: a text, token ids, or a list of either for several prompts.
        echo: begin the text with the prompt.
        logprobs: report this many alternatives per token.
        best_of: must equal ``n``.
    """

    prompt: str | list[str | Int | list[Int]]
    best_of: Int | None = None
    echo: bool | None = None
    logprobs: Int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """Which function the assistant called, with its arguments as JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, kw_only=True):
    """A call that the assistant made in an earlier turn."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, kw_only=True):
    """One turn of a conversation.

    Args:
        function_call: refused, unless it is null; `tool_calls` is the newer form.
        audio: refused, unless it is null.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Any = None
    audio: Any = None


class Function(msgspec.Struct, kw_only=True):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool that the chat template describes to the model."""

    function: Function
    type: Literal["function"] = "function"


class ResponseFormat(msgspec.Struct, kw_only=True):
    """The shape of the answer; only ``text``."""

    type: str


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """``POST /v1/chat/completions``.

    Args:
        max_completion_tokens: newer name of ``max_tokens``, over which it has precedence.
        logprobs: report the log probability of each token, with ``top_logprobs`` alternatives.
        tools: with the ``tool_choice`` ``none`` only, which keeps them from the template.
        tool_choice: ``auto`` or ``none``.
    """

    messages: list[Message]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """``POST /tokenize``: either a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """``POST /detokenize``."""

    tokens: list[Int]
    model: str | None = None
    skip_special_tokens: bool | None = None


class InferenceRequest(msgspec.Struct, kw_only=True):
    """``POST /inference``: one prompt, one text, the model's defaults for everything else."""

    prompt: str
    max_new_tokens: Int | None = None


class WakeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /wake`` and ``POST /wake_up``: all of the engine wakes."""


class SleepRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /sleep``.

    Args:
        level: 0 to 3; default: ``--sleep-level``.
        mode: what happens to admitted requests: they end first, are aborted, or go on after the wake.
    """

    level: Annotated[int, Meta(ge=0, le=MAX_SLEEP_LEVEL)] | None = None
    mode: SleepMode | None = None


class ShutdownRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /admin/shutdown``.

    Args:
        timeout: seconds until everything has ended; default: ``--shutdown-timeout``.
    """

    timeout: Annotated[float, Meta(ge=0)] | None = None


class ReloadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /admin/reload``: the same model again, or another, or another revision."""

    model: Annotated[str, Meta(min_length=1)] | None = None
    revision: Annotated[str, Meta(min_length=1)] | None = None


class FaultsRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /admin/faults``: a plan as in docs/how-to/fault-injection.md."""

    plan: str
