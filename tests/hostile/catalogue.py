"""The catalogue: what clients send that costs much or means nothing, and the right answer to it.

Sizes are such that a body is just within the limit for the model of these tests, whose context has 4,096
tokens; what is larger is refused by its size alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
CONTEXT_LEN = 4096
ROOM = 1 << 20
"""Bytes of the largest body that is read."""
SLOW_WORD = "take your time"
"""A message that the chat template of these tests never gets done with."""
TEMPLATE_LOOPS = (
    "{% if messages[0].content == '" + SLOW_WORD + "' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
)
TEMPLATE_DOUBLES = (
    "{% if messages[0].content == '" + SLOW_WORD + "!' %}{% set n = namespace(s='xxxxxxxx') %}"
    "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{% endif %}"
)


@dataclass(frozen=True)
class Hostile:
    """One request.

    Args:
        name: for people.
        body: makes what is sent.
        statuses: of the right answer.
        says: part of the answer's text.
        seconds: within which it is answered; for those that are refused at once generous, since tests run
            beside others.
        most_bytes: that the answer may have.
    """

    name: str
    path: str
    body: Callable[[], bytes]
    statuses: tuple[int, ...] = (400,)
    says: str = ""
    seconds: float = 5.0
    most_bytes: int = 1000
    method: str = "POST"
    content_type: str | None = "application/json"


def _json(**fields: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(fields).encode()


def _filled(head: bytes, item: bytes, tail: bytes, size: int = ROOM) -> Callable[[], bytes]:
    """Return a function that makes a body of at most ``size`` bytes, mostly of repetitions of ``item``."""
    return lambda: head + item * ((size - len(head) - len(tail)) // len(item)) + tail


_text = partial(_json, prompt="hi", max_tokens=1)
_TURN = b'{"role":"user","content":"a"},'
_LAST = b'{"role":"user","content":"a"}]}'
_CALL = b'{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"['

COSTLY = [
    Hostile("16 M token ids", TEXT, _filled(b'{"prompt":[', b"1,", b"1]}", 32 << 20), (413,), "--max-body"),
    Hostile("a body of token ids", TEXT, _filled(b'{"prompt":[', b"1,", b"1]}"), says="context length is"),
    Hostile("a body of empty prompts", TEXT, _filled(b'{"prompt":[', b"[],", b"[]]}"), says="--max-entries"),
    Hostile("a body of short prompts", TEXT, _filled(b'{"prompt":[', b'"a",', b'""]}'), says="--max-choices"),
    Hostile(
        "a body of stop token ids",
        TEXT,
        _filled(b'{"prompt":"a","stop_token_ids":[', b"1,", b"1]}"),
        says="--max-entries",
    ),
    Hostile(
        "a body of biases",
        TEXT,
        _text(logit_bias={str(number): 1 for number in range(70_000)}),
        says="--max-entries",
    ),
    Hostile("a body of one stop string", TEXT, _text(stop="x" * 1_000_000), says="--max-stop-chars"),
    Hostile("128 choices of that", TEXT, _text(stop="x" * 1_000_000, n=128), says="--max-stop-chars"),
    Hostile(
        "16 long stop strings", TEXT, _text(stop=["x" * 60_000] * 15 + ["y"], n=64), says="--max-stop-chars"
    ),
    Hostile("128 choices of 8 prompts", TEXT, _json(prompt=["a"] * 8, n=128), says="--max-choices"),
    Hostile("10**30 choices", TEXT, _text(n=10**30)),
    Hostile(
        "a body to detokenize", "/detokenize", _filled(b'{"tokens":[', b"1,", b"1]}"), says="--context-len"
    ),
    Hostile("a body of turns", CHAT, _filled(b'{"messages":[', _TURN, _LAST), says="--max-entries"),
    Hostile(
        "a body of parts of a message",
        CHAT,
        _filled(
            b'{"messages":[{"role":"user","content":[', b'{"type":"text","text":""},', b'{"type":"text"}]}]}'
        ),
        says="--max-entries",
    ),
    Hostile(
        "a body of variables of the template",
        CHAT,
        _filled(b'{"chat_template_kwargs":{"a":[', b"[],", b'0]},"messages":[' + _LAST),
        says="--max-entries",
    ),
    Hostile("lists within the text of a call", CHAT, _filled(_CALL, b"[],", b'[]]"}}]}]}'), says="arguments"),
    Hostile("a body of items", RESPONSES, _filled(b'{"input":[', _TURN, _LAST), says="--max-entries"),
    Hostile(
        "lists within the text of a call that is an item",
        RESPONSES,
        _filled(b'{"input":[{"type":"function_call","arguments":"[', b"[],", b'[]]"}]}'),
        says="arguments",
    ),
    Hostile("a long text", TEXT, _filled(b'{"prompt":"', b"word ", b'"}'), says="shorten the prompt"),
    Hostile("a long text to tokenize", "/tokenize", _filled(b'{"prompt":"', b"word ", b'"}')),
    Hostile(
        "a chat that the template loops for",
        CHAT,
        _json(messages=[{"role": "user", "content": SLOW_WORD}]),
        says="more processor time",
        seconds=20.0,
    ),
    Hostile(
        "a chat that the template doubles a string for",
        CHAT,
        _json(messages=[{"role": "user", "content": SLOW_WORD + "!"}]),
        says="more ",
        seconds=20.0,
    ),
    Hostile(
        "scores of a long prompt for 64 choices",
        TEXT,
        _json(prompt=[300] * (CONTEXT_LEN - 100), n=64, max_tokens=1, prompt_logprobs=20),
        (200,),
        seconds=60.0,
        most_bytes=12 << 20,
    ),
    Hostile(
        "the echo of a long prompt with scores for 64 choices",
        TEXT,
        _json(prompt=[300] * (CONTEXT_LEN - 100), n=64, max_tokens=1, echo=True, logprobs=20),
        (200,),
        seconds=60.0,
        most_bytes=12 << 20,
    ),
    Hostile(
        "15 stop strings as long as is allowed",
        TEXT,
        _text(stop=["a" * 270 + str(number) for number in range(15)], n=16),
        (200,),
        seconds=60.0,
        most_bytes=10_000,
    ),
]
"""Requests that would cost much if they were served, or do."""

MALFORMED = [
    Hostile("nothing", TEXT, lambda: b""),
    Hostile("no JSON", TEXT, lambda: b"{"),
    Hostile("two values", TEXT, lambda: b'{"prompt":"a"} {}'),
    Hostile("brackets without end", TEXT, lambda: b'{"prompt":' + b"[" * 1_000_000),
    Hostile("objects without end", TEXT, lambda: b'{"a":' * 200_000),
    Hostile("not UTF-8", TEXT, lambda: b'{"prompt":"\xff\xfe"}'),
    Hostile("half a surrogate pair", TEXT, lambda: b'{"prompt":"\\ud800"}'),
    Hostile("half a surrogate pair in a stop string", TEXT, lambda: b'{"prompt":"a","stop":"\\ud800"}'),
    Hostile("not a number", TEXT, lambda: b'{"prompt":"a","temperature":NaN}'),
    Hostile("a number of 5,000 digits", TEXT, lambda: b'{"prompt":"a","seed":' + b"9" * 5000 + b"}"),
    Hostile("an exponent without end", TEXT, lambda: b'{"prompt":"a","top_p":1e999999999}'),
    Hostile("a list for an object", TEXT, lambda: b"[]"),
    Hostile("a text for a list", CHAT, _json(messages="hi")),
    Hostile("no turns", CHAT, _json(messages=[])),
    Hostile("a role of its own", CHAT, _json(messages=[{"role": "root", "content": "a"}])),
    Hostile("null characters", TEXT, _json(prompt="\0" * 10, stop="\0\0", max_tokens=-1)),
    Hostile("negative token ids", TEXT, _json(prompt=[-1, -(2**62)])),
    Hostile("token ids beyond the vocabulary", "/detokenize", _json(tokens=[2**62])),
    Hostile("another content type", TEXT, _text(), (415,), content_type="text/plain"),
    Hostile("another method", TEXT, _text(), (405,), method="DELETE"),
    Hostile("no such route", "/v1/" + "a" * 2000, _text(), (404,)),
]
"""Requests that mean nothing."""
