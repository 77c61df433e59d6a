"""Fields of other APIs than the route's own that would change the answer, were they not ignored: refused.

Clients that are pointed at another route keep the fields of the one before. A constraint, a limit or a part
of the conversation that is left out gives another answer than they have asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from ullm.server.api import schemas
from ullm.server.api.field_rules import FieldRule, refused
from ullm.server.api.message_requests import CountTokensRequest, MessagesRequest
from ullm.server.api.response_requests import ResponsesRequest

_FORMS = (
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
    *("guided_grammar", "structural_tag", "json_schema", "grammar"),
)
_LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens")
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("n", "best_of", "repetition_penalty"), (1, 1.0)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p", "min_tokens", "priority"), (0, 0.0)),
    **dict.fromkeys(("ignore_eos", "echo", "logprobs", "continue_final_message"), (False,)),
    **dict.fromkeys(("use_beam_search", "return_token_ids"), (False,)),
    **dict.fromkeys(("add_generation_prompt", "skip_special_tokens"), (True,)),
    "function_call": ("none", "auto"),
    "tool_choice": ("none", "auto"),
    "truncate_prompt_tokens": (-1,),
    "top_k": (-1, 0),
    "text": ({"format": {"type": "text"}},),
}
"""Values that ask for nothing."""

_OF_CHATS = {
    **dict.fromkeys(
        (
            *(
                "n",
                "best_of",
                "logit_bias",
                "allowed_token_ids",
                "bad_words",
                "min_tokens",
                "prompt_logprobs",
            ),
            *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "ignore_eos", "echo"),
            *("truncate_prompt_tokens", "documents", "chat_template", "add_generation_prompt", "priority"),
            *("continue_final_message", "stop_token_ids", "skip_special_tokens", "return_token_ids"),
            *("use_beam_search", "cache_salt", "logits_processors"),
        ),
        "see `/v1/chat/completions`",
    ),
    **dict.fromkeys(("functions", "function_call"), "see `tools`"),
    "timeout": "see the header `X-Request-Timeout`",
}


def _rules(*given: Mapping[str, str]) -> tuple[FieldRule, ...]:
    notes = {name: note for each in given for name, note in each.items()}
    return tuple(refused(name, note, *_NEUTRAL.get(name, ())) for name, note in notes.items())


def _all(names: tuple[str, ...], note: str, but: tuple[str, ...] = ()) -> dict[str, str]:
    return {name: note for name in names if name not in but}


_OF_MESSAGES = {
    **_OF_CHATS,
    **_all(_FORMS, "see `output_config.format`"),
    **_all(("text",), "see `output_config.format`"),
    **_all(_LIMITS, "see `max_tokens`", ("max_tokens",)),
    **_all(("instructions",), "see `system`"),
    **_all(("prompt", "input", "previous_response_id", "conversation"), "see `messages`"),
    "stop": "see `stop_sequences`",
    "logprobs": "see `/v1/chat/completions`",
    "reasoning_effort": "see `output_config.effort`",
}

ELSEWHERE: dict[type[msgspec.Struct], tuple[FieldRule, ...]] = {
    schemas.ChatCompletionRequest: _rules(
        _all(("text", "output_config", "output_format"), "see `response_format`"),
        _all(("instructions", "system", "input", "prompt"), "see `messages`"),
        _all(("previous_response_id", "conversation"), "see `/v1/responses`, or send all messages"),
        {"stop_sequences": "see `stop`", "max_output_tokens": "see `max_completion_tokens`"},
    ),
    schemas.CompletionRequest: _rules(
        _all(("text", "output_config", "output_format"), "see `response_format`"),
        _all(("instructions", "system", "input", "messages"), "see `prompt`, or `/v1/chat/completions`"),
        _all(("tools", "functions", "function_call", "tool_choice"), "see `/v1/chat/completions`"),
        _all(("documents", "chat_template", "continue_final_message"), "see `/v1/chat/completions`"),
        {"stop_sequences": "see `stop`", "max_output_tokens": "see `max_tokens`"},
    ),
    ResponsesRequest: _rules(
        _OF_CHATS,
        _all(_FORMS, "see `text.format`"),
        _all(("output_config", "output_format"), "see `text.format`"),
        _all(_LIMITS, "see `max_output_tokens`", ("max_output_tokens",)),
        _all(("messages", "system"), "see `input` and `instructions`"),
        _all(("stop", "stop_sequences"), "see `/v1/chat/completions`"),
        {"logprobs": "see `top_logprobs`", "reasoning_effort": "see `reasoning.effort`"},
    ),
    MessagesRequest: _rules(_OF_MESSAGES),
    CountTokensRequest: _rules(
        _all(("instructions",), "see `system`"),
        _all(("prompt", "input", "previous_response_id", "conversation"), "see `messages`"),
    ),
}
"""Schema → the rules of such fields."""


def advice(schema: type[msgspec.Struct]) -> Iterator[tuple[str, list[str]]]:
    """Yield each piece of advice with the fields that it is for, in Markdown."""
    notes: dict[str, list[str]] = {}
    for rule in ELSEWHERE.get(schema, ()):
        notes.setdefault(rule.note, []).append(f"`{rule.name}`")
    yield from notes.items()
