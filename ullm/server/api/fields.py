"""The effect of each request field of OpenAI's API and of vLLM's: honoured, refused, or without effect.

Includes the fields that the schemas do not have. Fields that are neither here nor there are ignored, whatever
their value, and the log and a header say so; or refused, with ``--strict-fields``.
"""

from __future__ import annotations

import msgspec

from ullm.server.api import schemas
from ullm.server.api.field_rules import Effect as Effect
from ullm.server.api.field_rules import FieldRule as FieldRule
from ullm.server.api.field_rules import Origin as Origin
from ullm.server.api.field_rules import honoured as _honoured
from ullm.server.api.field_rules import ignored as _ignored
from ullm.server.api.field_rules import own as _own
from ullm.server.api.field_rules import refused as _refused
from ullm.server.api.field_rules import vllm_ignored as _vllm_ignored
from ullm.server.api.field_rules import vllm_refused as _vllm_refused
from ullm.server.api.message_fields import COUNT_FIELDS, MESSAGE_FIELDS
from ullm.server.api.message_requests import CountTokensRequest, MessagesRequest
from ullm.server.api.pooling_schemas import (
    EMBEDDING_FIELDS,
    RERANK_FIELDS,
    SCORE_FIELDS,
    EmbeddingsRequest,
    RerankRequest,
    ScoreRequest,
)
from ullm.server.api.response_requests import ResponsesRequest

_TOKENS = "see `logit_bias`"

_SHARED = (
    _honoured("model", "must be the served name, if given"),
    _honoured("n"),
    _honoured("temperature", "0 is greedy"),
    _honoured("top_p"),
    _honoured("stop", "a string or a list of strings"),
    _honoured("presence_penalty"),
    _honoured("frequency_penalty"),
    _honoured("logit_bias"),
    _honoured("seed", "sampling is a pure function of (seed, index of the token); -1: a random seed"),
    _honoured("stream"),
    _honoured(
        "stream_options",
        "`include_usage`, `continuous_usage_stats`; needs `stream`",
    ),
    _own("max_new_tokens", "another name of `max_tokens`"),
    _own("top_k", "sample from the k most likely tokens"),
    _own("min_p", "least probability of a token, relative to the most likely one"),
    _own("min_tokens", "tokens before which nothing ends the text"),
    _own("stop_token_ids", "tokens that end the text"),
    _own("ignore_eos", "go on after an end-of-sequence token"),
    _own("include_stop_str_in_output", "keep the stop string in the text"),
    _own("repetition_penalty", "1 is none"),
    _own("prompt_logprobs", "alternatives per prompt token"),
    _own("skip_special_tokens", "leave special tokens out of the text; true by default"),
    _own("timeout", "seconds after which the text ends with `finish_reason: timeout`"),
    _own("priority", "lower values run first"),
    _ignored("user"),
    _own(
        "structured_outputs",
        "the form of the text: one of `json` (a schema), `json_object`, `regex`, `choice`, `grammar`, "
        "`structural_tag`; also `whitespace_pattern`, `disable_any_whitespace`",
    ),
    _own("guided_json", "vLLM's older name of `structured_outputs.json`"),
    _own("guided_regex", "vLLM's older name of `structured_outputs.regex`"),
    _own("guided_choice", "vLLM's older name of `structured_outputs.choice`"),
    _own("guided_grammar", "vLLM's older name of `structured_outputs.grammar`"),
    _own("guided_whitespace_pattern", "vLLM's older name of `structured_outputs.whitespace_pattern`"),
    _own("structural_tag", "the same as `structured_outputs.structural_tag`"),
    _own("json_schema", "llama.cpp's name of `structured_outputs.json`"),
    _own("grammar", "llama.cpp's name of `structured_outputs.grammar`, which may be in GBNF"),
    _vllm_refused("logits_processors", _TOKENS),
    _own("allowed_token_ids", "the only tokens that are possible"),
    _own("bad_words", "texts that the answer must not have"),
    _vllm_refused("logprob_token_ids", "see `logprobs`"),
    _vllm_refused("use_beam_search", "there is no beam search", False),
    _own("truncate_prompt_tokens", "keep the last tokens of the prompt; -1: as many as fit"),
    _own("truncation_side", "`left` drops the first tokens, `right` the last ones"),
    _vllm_refused("spaces_between_special_tokens", "special tokens are decoded with their spaces", True),
    _own("return_tokens_as_token_ids", "name tokens in log probabilities `token_id:17`"),
    _own("return_token_ids", "also answer `token_ids` and `prompt_token_ids`"),
    _vllm_refused("repetition_detection", "see `repetition_penalty`"),
    _own(
        "thinking_token_budget",
        "tokens of reasoning after which its end is forced; -1: no limit. Refused where the model has no "
        "token `</think>`",
    ),
    _own("cache_salt", "only requests of the same salt share the prefix cache"),
    _vllm_refused("kv_transfer_params", "prefill and decode run in the same workers"),
    _vllm_refused("ec_transfer_params", "prefill and decode run in the same workers"),
    _vllm_refused("vllm_xargs", "there are no extensions that could read it"),
    _vllm_ignored("guided_decoding_backend", "there is one backend"),
    _vllm_ignored("length_penalty", "has no effect without `use_beam_search`"),
    _vllm_ignored("early_stopping", "has no effect without `use_beam_search`"),
    _vllm_ignored("return_token_offsets", "ignored on this route by vLLM, too"),
    _vllm_ignored("routed_experts_prompt_start", "routed experts are not returned"),
    _vllm_ignored("request_id", "see the header `X-Request-Id`"),
    _vllm_ignored("session_id", "the prefix cache finds equal prefixes by itself"),
    _vllm_ignored("stream_interval", "events carry several tokens where there are many streams"),
    _vllm_ignored("watermarking", "nothing is watermarked"),
)
"""Fields of both routes."""

_RENDERING = (
    _own(
        "chat_template",
        "replaces the model's own; refused unless the server has `--trust-request-chat-template`",
    ),
    _own("continue_final_message", "leave the last message open, and go on in it"),
    _own("documents", "for the chat template; a system message where that has no place for them"),
    _vllm_ignored("media_io_kwargs", "images and sounds are refused anyway"),
    _vllm_ignored("mm_processor_kwargs", "images and sounds are refused anyway"),
)
"""Fields that say how a conversation becomes a prompt."""

CHAT_FIELDS: tuple[FieldRule, ...] = (
    _honoured("messages", "parts of type `text` only; others are refused"),
    *_SHARED,
    _honoured("max_tokens", "deprecated by OpenAI; `max_completion_tokens` wins"),
    _honoured("max_completion_tokens"),
    _honoured("logprobs", "true or false"),
    _honoured("top_logprobs", "needs `logprobs`"),
    _honoured("tools", "functions; other kinds are refused. With `strict`, calls are always valid"),
    _honoured("tool_choice", "`none`, `auto`, `required`, a function, or `allowed_tools`"),
    _honoured("parallel_tool_calls", "true by default"),
    _honoured("functions", "deprecated by OpenAI; see `tools`"),
    _honoured("function_call", "deprecated by OpenAI; see `tool_choice`"),
    _honoured("reasoning_effort", "handed to the chat template"),
    _honoured(
        "response_format",
        "`text`, `json_object`, `json_schema` (strict, whatever `strict` says), and vLLM's `structural_tag`",
    ),
    _refused("modalities", "the answer is always text", ["text"]),
    _refused("audio", "the answer is always text"),
    _refused("web_search_options", "there is no web search", empty_asks=True),
    _refused("moderation", "nothing is moderated"),
    _honoured("store", "with `--journal` true by default; without it, true is refused"),
    _refused("service_tier", "see `priority`", "auto", "default"),
    _own(
        "add_generation_prompt", "end the prompt with the beginning of the assistant's turn; true by default"
    ),
    _own("chat_template_kwargs", "further arguments of the chat template"),
    _own(
        "include_reasoning",
        "false: the reasoning is not sent, though its tokens count; log probabilities and token ids, where "
        "they are asked for, are still those of all tokens",
    ),
    *_RENDERING,
    _own("echo", "begin the text with the last message, if that is the assistant's"),
    _vllm_refused("add_special_tokens", "the chat template writes special tokens", False),
    _vllm_refused("return_prompt_text", "see `/tokenize`", False),
    _ignored("metadata"),
    _ignored("prediction", "a hint for speed; drafts come from repetitions"),
    _ignored("prompt_cache_key", "the prefix cache finds equal prefixes by itself"),
    _ignored("prompt_cache_options", "the prefix cache finds equal prefixes by itself"),
    _ignored("prompt_cache_retention", "the prefix cache keeps what there is room for"),
    _ignored("safety_identifier"),
    _ignored("verbosity", "a hint"),
)
"""Every request field of chat completions."""

COMPLETION_FIELDS: tuple[FieldRule, ...] = (
    _honoured("prompt", "a text, token ids, or a list of either"),
    *_SHARED,
    _honoured("max_tokens", "16 by default; 0 with `echo` scores the prompt"),
    _honoured("echo"),
    _own("max_completion_tokens", "newer name of `max_tokens`, over which it has precedence"),
    _honoured("logprobs", "alternatives per token"),
    _honoured("best_of", "must equal `n`; other values are refused"),
    _refused("suffix", "there is no infilling"),
    _own("store", "as in chat completions"),
    _own("add_special_tokens", "put the tokenizer's special tokens around a text; true by default"),
    _own("response_format", "as in chat completions"),
    _vllm_refused("prompt_embeds", "see `prompt`"),
)
"""Every request field of completions."""

RESPONSES_FIELDS: tuple[FieldRule, ...] = (
    _honoured(
        "input", "a text, or items: messages of text, function calls and their outputs; others are refused"
    ),
    _honoured("model", "must be the served name, if given"),
    _honoured("instructions", "a system message; not taken over from the previous response"),
    _honoured("previous_response_id", "a stored response, whose conversation goes on"),
    _honoured("max_output_tokens"),
    _honoured("temperature", "0 is greedy"),
    _honoured("top_p"),
    _honoured("text", "`format`: `text`, `json_object`, or `json_schema`; `verbosity` is a hint"),
    _honoured("stream", "typed events; each one's number is also its `id`, for `Last-Event-ID`"),
    _honoured("store", "true by default; needed for `background`"),
    _honoured("background", "answer at once, and go on without the client; survives the process"),
    _honoured("metadata", "sent back"),
    _honoured("tools", "functions; others are refused"),
    _honoured("tool_choice", "`none`, `auto`, `required`, a function, or `allowed_tools`"),
    _honoured("parallel_tool_calls", "true by default"),
    _honoured(
        "reasoning",
        "`effort`: handed to the chat template as `reasoning_effort`; `max_tokens` (OpenRouter's): another "
        "name of `thinking_token_budget`; `summary` is a hint: reasoning is shown as it is",
    ),
    _own("top_k", "sample from the k most likely tokens"),
    _own("seed", "-1 is a new one"),
    _own("thinking_token_budget", "as in chat completions"),
    _own("chat_template_kwargs", "further arguments of the chat template"),
    _honoured(
        "include",
        "`message.output_text.logprobs`; `reasoning.encrypted_content` adds nothing: reasoning is shown",
    ),
    _honoured("top_logprobs", "candidates per token, with the log probabilities of `include`"),
    _refused("truncation", "shorten the input", "disabled"),
    _refused("conversation", "see `previous_response_id`"),
    _refused("prompt", "there are no stored prompts; see `input`"),
    _refused("service_tier", "all requests are served alike", "auto", "default"),
    _refused("context_management", "nothing is compacted"),
    _refused("moderation", "nothing is moderated"),
    _ignored("max_tool_calls", "there are no tools of the server's own"),
    _ignored("stream_options", "events are not padded"),
    _ignored("user"),
    _ignored("safety_identifier"),
    _ignored("prompt_cache_key", "the prefix cache finds equal prefixes by itself"),
    _ignored("prompt_cache_retention", "the prefix cache keeps what there is room for"),
    _ignored("prompt_cache_options", "the prefix cache finds equal prefixes by itself"),
    _ignored("background_options", "answers are begun as soon as there is room"),
    _ignored("access_programs"),
    _ignored("image", "there are no images"),
)
"""Every request field of responses."""

FIELDS: dict[type[msgspec.Struct], tuple[FieldRule, ...]] = {
    ResponsesRequest: RESPONSES_FIELDS,
    MessagesRequest: MESSAGE_FIELDS,
    CountTokensRequest: COUNT_FIELDS,
    EmbeddingsRequest: EMBEDDING_FIELDS,
    ScoreRequest: SCORE_FIELDS,
    RerankRequest: RERANK_FIELDS,
    schemas.ChatCompletionRequest: CHAT_FIELDS,
    schemas.CompletionRequest: COMPLETION_FIELDS,
}
"""Schema → its fields, and those that only other APIs have."""

REFUSED: dict[type[msgspec.Struct], tuple[FieldRule, ...]] = {
    **{
        schema: tuple(rule for rule in rules if rule.effect is Effect.REFUSED)
        for schema, rules in FIELDS.items()
    },
    schemas.TokenizeRequest: tuple(rule for rule in _RENDERING if rule.effect is Effect.REFUSED),
}
"""Schema → the fields that are refused."""
