"""The effect of each request field of OpenAI's API: honoured, refused, or without effect.

Includes the fields that the schemas do not have: unknown fields are ignored, whatever their value.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec

from ullm.server.api import schemas


class Effect(enum.Enum):
    """The effect of a field."""

    HONOURED = "honoured"
    REFUSED = "refused"
    """Status 400, except for the values that the note names."""
    IGNORED = "without effect"


@dataclass(frozen=True)
class FieldRule:
    """One request field.

    Args:
        note: accepted values, defaults, alternatives.
        is_openai: OpenAI's API has it, too.
    """

    name: str
    effect: Effect
    note: str = ""
    is_openai: bool = True


def _honoured(name: str, note: str = "") -> FieldRule:
    return FieldRule(name, Effect.HONOURED, note)


def _own(name: str, note: str) -> FieldRule:
    return FieldRule(name, Effect.HONOURED, note, is_openai=False)


def _refused(name: str, note: str) -> FieldRule:
    return FieldRule(name, Effect.REFUSED, note)


def _ignored(name: str, note: str = "") -> FieldRule:
    return FieldRule(name, Effect.IGNORED, note)


_SHARED = (
    _honoured("model", "must be the served name, if given"),
    _honoured("n"),
    _honoured("temperature", "0 is greedy"),
    _honoured("top_p"),
    _honoured("stop", "a string or a list of strings"),
    _honoured("presence_penalty"),
    _honoured("frequency_penalty"),
    _honoured("logit_bias"),
    _honoured("seed"),
    _honoured("stream"),
    _honoured("stream_options", "`include_usage`; other options are ignored; needs `stream`"),
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
)
"""Fields of both routes."""

CHAT_FIELDS: tuple[FieldRule, ...] = (
    _honoured("messages", "parts of type `text` only; others are refused"),
    *_SHARED,
    _honoured("max_tokens", "deprecated by OpenAI; `max_completion_tokens` wins"),
    _honoured("max_completion_tokens"),
    _honoured("logprobs", "true or false"),
    _honoured("top_logprobs", "needs `logprobs`"),
    _honoured("tools", "described to the model by its chat template; calls come back as text"),
    _refused("tool_choice", "only `auto` and `none`"),
    _refused("response_format", "only `{'type': 'text'}`"),
    _own(
        "add_generation_prompt", "end the prompt with the beginning of the assistant's turn; true by default"
    ),
    _own("chat_template_kwargs", "further arguments of the chat template"),
    _ignored("audio"),
    _ignored("function_call", "deprecated by OpenAI; see `tool_choice`"),
    _ignored("functions", "deprecated by OpenAI; see `tools`"),
    _ignored("metadata"),
    _ignored("modalities", "the answer is always text"),
    _ignored("parallel_tool_calls"),
    _ignored("prediction"),
    _ignored("prompt_cache_key", "the prefix cache finds equal prefixes by itself"),
    _ignored("prompt_cache_retention"),
    _ignored("reasoning_effort", "see `chat_template_kwargs`"),
    _ignored("safety_identifier"),
    _ignored("service_tier", "see `priority`"),
    _ignored("store", "nothing is stored"),
    _ignored("verbosity"),
    _ignored("web_search_options"),
)
"""Every request field of chat completions."""

COMPLETION_FIELDS: tuple[FieldRule, ...] = (
    _honoured("prompt", "a text, token ids, or a list of either"),
    *_SHARED,
    _honoured("max_tokens", "16 by default; 0 with `echo` scores the prompt"),
    _honoured("echo"),
    _honoured("logprobs", "alternatives per token"),
    _refused("best_of", "only a value that equals `n`"),
    _refused("suffix", "only an empty one"),
    _own("add_special_tokens", "put the tokenizer's special tokens around a text; true by default"),
)
"""Every request field of completions."""

FIELDS: dict[type[msgspec.Struct], tuple[FieldRule, ...]] = {
    schemas.ChatCompletionRequest: CHAT_FIELDS,
    schemas.CompletionRequest: COMPLETION_FIELDS,
}
"""Schema → its fields, and those that only OpenAI's API has."""
