"""Schemas of responses: OpenAI's and ullm's own."""

from __future__ import annotations

from typing import Literal

import msgspec
from quart import Response

from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.protocol.messages import ModelInfo


class PromptTokensDetails(msgspec.Struct):
    """Number of prompt tokens that the prefix cache had."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of one request; a prompt counts once, whatever ``n`` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(msgspec.Struct):
    """A candidate for one position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Per prompt token: token id → log probability; the first has none."""


class CompletionLogprobs(msgspec.Struct):
    """OpenAI's older format: one entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One continuation of one prompt, or a delta of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType | None = msgspec.UNSET
    finish_cause: str | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class TextCompletion(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/completions``."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: Literal["text_completion"] = "text_completion"


class TopLogprob(msgspec.Struct):
    """An alternative to a token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """A token of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry per token of the answer."""

    content: list[TokenLogprob]


class FunctionOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The function that the model calls, with its arguments as JSON text; or a piece of them."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET


class ToolCallOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A call of a tool, or a piece of one, which belongs to the call of its index."""

    function: FunctionOutput
    index: int | msgspec.UnsetType = msgspec.UNSET
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET


class ChatMessage(msgspec.Struct, kw_only=True):
    """The assistant's turn.

    Args:
        content: null beside calls.
        reasoning_content: what the model thought before, if its template tells that from the answer.
        reasoning: the same, by vLLM's newer name.
        function_call: the call, where the request had ``functions``.
    """

    content: str | None
    role: Literal["assistant"] = "assistant"
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallOutput] | msgspec.UnsetType = msgspec.UNSET
    function_call: FunctionOutput | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    finish_cause: str | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class DeletedAnswer(msgspec.Struct, kw_only=True):
    """The answer of ``DELETE /v1/chat/completions/{id}`` and of the same for completions."""

    id: str
    object: Literal["chat.completion.deleted", "text_completion.deleted"]
    deleted: bool = True


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The delta of the assistant's turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallOutput] | None = None
    function_call: FunctionOutput | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """The delta of one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    finish_cause: str | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """One event of a streamed chat completion."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """A model that is served.

    Args:
        sampling_defaults: parameters of requests that name none, from the model's generation_config.json.
        parent: of an adapter, the model that it belongs to.
        root: of an adapter, its folder.
    """

    id: str
    created: int
    max_model_len: int | None
    sampling_defaults: SamplingDefaults
    parent: str | None = None
    root: str | None = None
    object: Literal["model"] = "model"
    owned_by: str = "ullm"


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of ``GET /v1/models``."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class AdapterList(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``: what is loaded then.

    Args:
        adapters: name → folder.
    """

    adapters: dict[str, str]


class Tokenized(msgspec.Struct, kw_only=True):
    """The answer of ``POST /tokenize``."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """The answer of ``POST /detokenize``."""

    prompt: str


class Version(msgspec.Struct):
    """The answer of ``GET /version``."""

    version: str


class Liveness(msgspec.Struct):
    """The answer of ``/live`` and ``/ready``; ``/health`` has more."""

    status: str
    state: str


class Load(msgspec.Struct):
    """The answer of ``GET /load``.

    Args:
        server_load: requests that run or wait; vLLM's name.
        running: requests that run.
        waiting: requests that wait.
    """

    server_load: int
    running: int
    waiting: int


class Sleeping(msgspec.Struct):
    """The answer of ``GET /is_sleeping``; the level is that of the last sleep until the wake is complete."""

    is_sleeping: bool
    level: int | None


class Inference(msgspec.Struct, kw_only=True):
    """The answer of ``POST /inference``."""

    text: str
    finish_reason: str | None
    num_prompt_tokens: int
    num_generated_tokens: int


class BackendInfo(msgspec.Struct, kw_only=True):
    """The answer of ``GET /backend``: what serves here, and on what.

    Args:
        info: description of the model; None while it loads.
        versions: package → version, of the installed packages.
    """

    model: str
    state: str
    transport: str
    replicas: int
    tp_size: int
    pp_size: int
    info: ModelInfo | None
    versions: dict[str, str]


class Stopping(msgspec.Struct):
    """The answer of ``POST /admin/shutdown``.

    Args:
        timeout: seconds within which the process ends.
    """

    state: str
    timeout: float


class TreeNode(msgspec.Struct):
    """A child in the supervision tree.

    Args:
        status: ``starting``, ``running``, ``restarting`` or ``stopped``.
        kind: ``worker`` or ``supervisor``.
        restarts: number of restarts.
    """

    name: str
    status: str
    kind: str
    restart: str
    restarts: int
    children: list[TreeNode]


class Tree(msgspec.Struct):
    """The answer of ``GET /admin/tree``."""

    state: str
    children: list[TreeNode]


class ErrorDetail(msgspec.Struct):
    """Description of an error.

    Args:
        param: the request field that caused it, if any.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """OpenAI's error body."""

    error: ErrorDetail


def json_response(answer: object, status: int = 200) -> Response:
    """Return a response with ``answer`` as its body."""
    return Response(msgspec.json.encode(answer), status=status, content_type="application/json")
