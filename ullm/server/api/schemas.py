"""Schemas of requests: OpenAI's fields and ullm's own. Wrong types are errors.

Unknown fields are ignored with a warning, but for those that `ullm.server.api.fields` refuses.

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


class ResponseFormat(msgspec.Struct, kw_only=True):
    """The form of the answer, as OpenAI says it.

    Args:
        type: ``text``, ``json_object``, ``json_schema``, or vLLM's ``structural_tag``.
        json_schema: has the ``schema``; its other entries change nothing.
        schema: of a ``json_object``, as llama.cpp has it.
        structures: of a structural tag, with ``triggers``.
    """

    type: str
    json_schema: dict[str, Any] | None = None
    schema: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that completions and chat completions share; see `ullm.sampling.SamplingParams`.

    Args:
        max_new_tokens: another name of ``max_tokens``.
        max_completion_tokens: newer name of ``max_tokens``, over which it has precedence.
        structured_outputs: arguments of `ullm.grammars.structured_outputs.StructuredOutputs`.
        guided_json: and the other ``guided_`` fields: vLLM's older names of the same.
        json_schema: llama.cpp's name; so is ``grammar``.
        return_token_ids: show the tokens of the prompt and of the text.
        return_tokens_as_token_ids: name tokens in log probabilities ``token_id:17``.
        truncate_prompt_tokens: keep this many tokens of the prompt; -1: as many as fit.
        truncation_side: ``left`` (the default) drops the first ones, ``right`` the last ones.
    """

    model: str | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    max_tokens: Int | None = None
    max_new_tokens: Int | None = None
    max_completion_tokens: Int | None = None
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
    thinking_token_budget: Int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    json_schema: str | dict[str, Any] | None = None
    grammar: str | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """``POST /v1/completions``.

    Args:
        prompt: a text, token ids, or a list of either for several prompts.
        echo: begin the text with the prompt; its log probabilities come with the first choice.
        logprobs: report this many alternatives per token.
        best_of: must equal ``n``.
        store: as in `ChatCompletionRequest`.
    """

    prompt: str | list[str | Int | list[Int]]
    best_of: Int | None = None
    echo: bool | None = None
    logprobs: Int | None = None
    suffix: str | None = None
    store: bool | None = None
    add_special_tokens: bool | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """Which function the assistant called, with its arguments as JSON text, or as an object."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, kw_only=True):
    """A call that the assistant made in an earlier turn."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, kw_only=True):
    """One turn of a conversation.

    Args:
        function_call: older form of `tool_calls`; the role ``function`` of ``tool``.
        refusal: why the assistant refused, in place of the content.
        reasoning_content: what the assistant thought; also called ``reasoning``.
        audio: refused, unless it is null.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    audio: Any = None


class Function(msgspec.Struct, kw_only=True):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool that the chat template describes to the model."""

    function: Function
    type: Literal["function"] = "function"


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """``POST /v1/chat/completions``.

    Args:
        logprobs: report the log probability of each token, with ``top_logprobs`` alternatives.
        tool_choice: ``none``, ``auto``, ``required``, a function, or ``allowed_tools``.
        functions: older form of ``tools``; ``function_call`` of ``tool_choice``.
        continue_final_message: leave the last message open, and go on in it.
        documents: for the chat template.
        chat_template: replaces the model's; needs ``--trust-request-chat-template``.
        echo: begin the text with the last message, if that is the assistant's.
        store: keep the answer, with ``--journal``; true by default there.
        include_reasoning: send what the model thinks before it answers; true by default.
    """

    messages: list[Message]
    store: bool | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    echo: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """``POST /tokenize``: either a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
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
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None


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


class LoadAdapterRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/load_lora_adapter``: a folder on the server, and the name to serve it by."""

    lora_name: Annotated[str, Meta(min_length=1)]
    lora_path: Annotated[str, Meta(min_length=1)]
    load_inplace: bool = False


class UnloadAdapterRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/unload_lora_adapter``; ``lora_int_id``, which vLLM's clients may send, has no effect."""

    lora_name: Annotated[str, Meta(min_length=1)]
    lora_int_id: int | None = None


class FaultsRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /admin/faults``: a plan as in docs/how-to/fault-injection.md."""

    plan: str
