"""The effect of each request field of OpenAI's API and of vLLM's: honoured, refused, or without effect.

Includes the fields that the schemas do not have. Fields that are neither here nor there are ignored, whatever
their value.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any

import msgspec

from ullm.server.api import schemas


class Effect(enum.Enum):
    """The effect of a field."""

    HONOURED = "honoured"
    REFUSED = "refused"
    """Status 400, except for neutral values: null, what is empty, and what the rule accepts."""
    IGNORED = "without effect"


class Origin(enum.Enum):
    """The API that a field comes from."""

    OPENAI = "OpenAI"
    VLLM = "vLLM"
    """A field of vLLM's that ullm does not have."""
    OWN = "ullm"
    """A field of ullm's that OpenAI's API does not have; most are vLLM's, too."""


@dataclass(frozen=True)
class FieldRule:
    """One request field.

    Args:
        note: values, defaults, reasons, alternatives.
        accepted: values of a refused field that ask for what happens anyway. An object stands for all that
            have its entries.
        unless: name and value of another field that makes a refused one harmless.
    """

    name: str
    effect: Effect
    note: str = ""
    origin: Origin = Origin.OPENAI
    accepted: tuple[Any, ...] = ()
    unless: tuple[str, Any] | None = None

    @property
    def meaning(self) -> str:
        """The exceptions of a refusal, and the note, in Markdown."""
        return "; ".join(part for part in (self._exceptions(), self.note) if part)

    @property
    def refusal(self) -> str:
        """The message of the refusal."""
        exceptions = self._exceptions()
        text = f"{self.name} is not supported" + (f", {exceptions}" if exceptions else "")
        return (text + (f"; {self.note}" if self.note else "")).replace("`", "")

    def _exceptions(self) -> str:
        if self.unless is not None:
            name, value = self.unless
            return f"except with `{name}` {_code(value)}"
        return f"except for {' and '.join(map(_code, self.accepted))}" if self.accepted else ""


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _honoured(name: str, note: str = "") -> FieldRule:
    return FieldRule(name, Effect.HONOURED, note)


def _own(name: str, note: str) -> FieldRule:
    return FieldRule(name, Effect.HONOURED, note, Origin.OWN)


def _refused(name: str, note: str, *accepted: Any, unless: tuple[str, Any] | None = None) -> FieldRule:
    return FieldRule(name, Effect.REFUSED, note, accepted=accepted, unless=unless)


def _ignored(name: str, note: str = "") -> FieldRule:
    return FieldRule(name, Effect.IGNORED, note)


def _vllm_refused(name: str, note: str, *accepted: Any) -> FieldRule:
    return FieldRule(name, Effect.REFUSED, note, Origin.VLLM, accepted)


def _vllm_ignored(name: str, note: str) -> FieldRule:
    return FieldRule(name, Effect.IGNORED, note, Origin.VLLM)


_SHAPE = "the shape of an answer cannot be prescribed"
_TOKENS = "see `logit_bias`"
_CALLS = "calls are not parsed out of the text"

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
    _honoured(
        "stream_options",
        "`include_usage`; `continuous_usage_stats` is refused, other options are ignored; needs `stream`",
    ),
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
    _vllm_refused("structured_outputs", _SHAPE),
    _vllm_refused("guided_json", _SHAPE),
    _vllm_refused("guided_regex", _SHAPE),
    _vllm_refused("guided_choice", _SHAPE),
    _vllm_refused("guided_grammar", _SHAPE),
    _vllm_refused("structural_tag", _SHAPE),
    _vllm_refused("logits_processors", _TOKENS),
    _vllm_refused("allowed_token_ids", _TOKENS),
    _vllm_refused("bad_words", _TOKENS),
    _vllm_refused("logprob_token_ids", "see `logprobs`"),
    _vllm_refused("use_beam_search", "there is no beam search", False),
    _vllm_refused("truncate_prompt_tokens", "shorten the prompt"),
    _vllm_refused("spaces_between_special_tokens", "special tokens are decoded with their spaces", True),
    _vllm_refused("return_tokens_as_token_ids", "see `/tokenize`", False),
    _vllm_refused("return_token_ids", "see `/tokenize`", False),
    _vllm_refused("repetition_detection", "see `repetition_penalty`"),
    _vllm_refused("thinking_token_budget", "reasoning is not told from the rest of the text", -1),
    _vllm_refused(
        "cache_salt", "requests share the prefix cache; the server's `--no-prefix-cache` turns it off"
    ),
    _vllm_refused("kv_transfer_params", "prefill and decode run in the same workers"),
    _vllm_refused("ec_transfer_params", "prefill and decode run in the same workers"),
    _vllm_refused("vllm_xargs", "there are no extensions that could read it"),
    _vllm_ignored("guided_decoding_backend", "has no effect without `guided_json` and its like"),
    _vllm_ignored("guided_whitespace_pattern", "has no effect without `guided_json` and its like"),
    _vllm_ignored("length_penalty", "has no effect without `use_beam_search`"),
    _vllm_ignored("early_stopping", "has no effect without `use_beam_search`"),
    _vllm_ignored("truncation_side", "has no effect without `truncate_prompt_tokens`"),
    _vllm_ignored("return_token_offsets", "ignored on this route by vLLM, too"),
    _vllm_ignored("routed_experts_prompt_start", "routed experts are not returned"),
    _vllm_ignored("request_id", "see the header `X-Request-Id`"),
    _vllm_ignored("session_id", "the prefix cache finds equal prefixes by itself"),
    _vllm_ignored("stream_interval", "events carry several tokens where there are many streams"),
    _vllm_ignored("watermarking", "nothing is watermarked"),
)
"""Fields of both routes."""

_RENDERING = (
    _vllm_refused("chat_template", "the server's `--chat-template` replaces the model's own"),
    _vllm_refused("continue_final_message", "see `add_generation_prompt`", False),
    _vllm_refused("documents", "pass them in `chat_template_kwargs`"),
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
    _refused("tools", _CALLS, unless=("tool_choice", "none")),
    _refused("tool_choice", "calls cannot be forced", "none", "auto"),
    _refused("functions", f"deprecated by OpenAI; {_CALLS}", unless=("function_call", "none")),
    _refused("function_call", "deprecated by OpenAI; calls cannot be forced", "none", "auto"),
    _refused("response_format", _SHAPE, {"type": "text"}),
    _refused("modalities", "the answer is always text", ["text"]),
    _refused("audio", "the answer is always text"),
    _refused("web_search_options", "there is no web search"),
    _refused("moderation", "nothing is moderated"),
    _refused("store", "nothing is stored", False),
    _refused("service_tier", "see `priority`", "auto", "default"),
    _own(
        "add_generation_prompt", "end the prompt with the beginning of the assistant's turn; true by default"
    ),
    _own("chat_template_kwargs", "further arguments of the chat template"),
    *_RENDERING,
    _vllm_refused("echo", "the answer never begins with the last message", False),
    _vllm_refused("add_special_tokens", "the chat template writes special tokens", False),
    _vllm_refused("include_reasoning", "reasoning is not told from the rest of the text", True),
    _vllm_refused("return_prompt_text", "see `/tokenize`", False),
    _ignored("metadata"),
    _ignored("parallel_tool_calls", "has no effect without `tools`"),
    _ignored("prediction", "a hint for speed; drafts come from repetitions"),
    _ignored("prompt_cache_key", "the prefix cache finds equal prefixes by itself"),
    _ignored("prompt_cache_options", "the prefix cache finds equal prefixes by itself"),
    _ignored("prompt_cache_retention", "the prefix cache keeps what there is room for"),
    _ignored("reasoning_effort", "a hint; see `chat_template_kwargs`"),
    _ignored("safety_identifier"),
    _ignored("verbosity", "a hint"),
)
"""Every request field of chat completions."""

COMPLETION_FIELDS: tuple[FieldRule, ...] = (
    _honoured("prompt", "a text, token ids, or a list of either"),
    *_SHARED,
    _honoured("max_tokens", "16 by default; 0 with `echo` scores the prompt"),
    _honoured("echo"),
    _honoured("logprobs", "alternatives per token"),
    _honoured("best_of", "must equal `n`; other values are refused"),
    _refused("suffix", "there is no infilling"),
    _own("add_special_tokens", "put the tokenizer's special tokens around a text; true by default"),
    _vllm_refused("response_format", _SHAPE, {"type": "text"}),
    _vllm_refused("prompt_embeds", "see `prompt`"),
)
"""Every request field of completions."""

FIELDS: dict[type[msgspec.Struct], tuple[FieldRule, ...]] = {
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
