"""The effect of each request field of Anthropic's Messages API."""

from __future__ import annotations

from ullm.server.api.field_rules import Effect as _Effect
from ullm.server.api.field_rules import FieldRule, Origin, own


def _honoured(name: str, note: str = "") -> FieldRule:
    return FieldRule(name, _Effect.HONOURED, note, Origin.ANTHROPIC)


def _refused(name: str, note: str, *accepted: object) -> FieldRule:
    return FieldRule(name, _Effect.REFUSED, note, Origin.ANTHROPIC, accepted)


def _ignored(name: str, note: str = "") -> FieldRule:
    return FieldRule(name, _Effect.IGNORED, note, Origin.ANTHROPIC)


COUNT_FIELDS: tuple[FieldRule, ...] = (
    _honoured(
        "messages",
        "blocks of type `text`, `tool_use`, `tool_result` and `thinking`; `redacted_thinking` is left out, "
        "others are refused. An answer goes on in a last message of the assistant's",
    ),
    _honoured("model", "must be the served name, if given"),
    _honoured("system", "a text, or blocks of type `text`"),
    _honoured(
        "tools",
        "tools of the client's own; others are refused. With `strict`, calls are always valid",
    ),
    _honoured("tool_choice", "`auto`, `any`, `tool` or `none`, with `disable_parallel_tool_use`"),
    _honoured(
        "thinking",
        "handed to the chat template as `enable_thinking`; `budget_tokens` (any number from 0 on) as "
        "`thinking_token_budget` of chats; without effect for models that do not reason",
    ),
    _honoured(
        "output_config",
        "`format`: a JSON schema; `effort`: handed to the chat template as `reasoning_effort`",
    ),
    _honoured("output_format", "older name of `output_config.format`"),
    own("chat_template_kwargs", "further arguments of the chat template"),
    _refused("mcp_servers", "the server calls no tools"),
    _refused("thread", "no threads are kept; send all messages"),
    _ignored("context_management", "nothing is cleared: the conversation is used as it is"),
    _ignored("compaction", "nothing is compacted: the conversation is used as it is"),
    _ignored("fallbacks", "one model is served"),
    _ignored("cache_control", "the prefix cache finds equal prefixes by itself"),
    _ignored("diagnostics", "see `usage` for what the prefix cache had"),
    _ignored("speed", "all requests are served alike"),
)
"""Every request field of the counting of tokens."""

MESSAGE_FIELDS: tuple[FieldRule, ...] = (
    *COUNT_FIELDS,
    _honoured("max_tokens", "needed; where the context has less room, it ends the answer"),
    _honoured("stop_sequences"),
    _honoured("temperature", "0 is greedy"),
    _honoured("top_p"),
    _honoured("top_k"),
    own("seed", "-1 is a new one"),
    _honoured("stream", "typed events"),
    own("store", "as in chat completions"),
    _refused("container", "no code is run"),
    _ignored("metadata"),
    _ignored("service_tier", "all requests are served alike"),
    _ignored("inference_geo", "requests are served here"),
    _ignored("billing_policy", "nothing is billed"),
    _ignored("fallback_credit_token", "nothing is billed"),
)
"""Every request field of messages."""
