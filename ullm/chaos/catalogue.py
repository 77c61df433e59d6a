"""The requests of a chaos run: a few of every form, drawn from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from ullm.bench.workload import WORDS

FORMS = (
    ("/completions", True),
    ("/chat/completions", True),
    ("/completions", False),
    ("/chat/completions", False),
)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "minItems": 2, "maxItems": 6},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOLS = (
    {"type": "function", "function": {"name": "file_person", "parameters": PERSON}},
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {"type": "object", "properties": {"names": {"type": "array", "minItems": 3}}},
        },
    },
)
CHAT_CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"tools": list(TOOLS), "tool_choice": "required"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
    {"response_format": {"type": "json_object"}},
    {"tools": list(TOOLS), "tool_choice": {"type": "function", "function": {"name": "file_person"}}},
)
COMPLETION_CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"structured_outputs": {"regex": "([a-z]{3,9} ){20,60}end"}},
    {"structured_outputs": {"json": {"type": "array", "items": PERSON, "minItems": 3, "maxItems": 5}}},
    {"stop": ["e", "the time"], "include_stop_str_in_output": True, "min_tokens": 10},
    {"structured_outputs": {"choice": ["the time of the year " * 5, "the people of the world " * 5]}},
)
"""What half of the requests add: a form that is prescribed, calls of tools, strings that stop."""


@dataclass(frozen=True)
class ChaosRequest:
    """One request.

    Args:
        path: below the API's prefix.
        body: JSON body, for a stream with usage or for an answer in one piece.
        choices: number of answers that it requests.
    """

    number: int
    path: str
    body: dict[str, Any]
    choices: int

    @property
    def stream(self) -> bool:
        """True if the answer is streamed."""
        return bool(self.body.get("stream"))


def catalogue(model: str, seed: int, size: int, max_tokens: tuple[int, int]) -> list[ChaosRequest]:
    """Return ``size`` requests: chat and plain, streamed and unary, greedy and seeded, one or two choices.

    Every other four of them are constrained, call tools, or have strings that stop them.

    Args:
        max_tokens: minimum and maximum per request.
    """
    source = random.Random(f"catalogue {seed}")
    return [_draw(source, model, number, max_tokens) for number in range(size)]


def long_request(model: str, max_tokens: int) -> ChaosRequest:
    """Return a request whose stream, with log probabilities, is too long for the kernel's buffers."""
    body = {"prompt": "time year people", "logprobs": 5, "max_tokens": max_tokens}
    return ChaosRequest(-1, "/completions", {"model": model, "stream": True, "ignore_eos": True, **body}, 1)


def unary_of(request: ChaosRequest) -> ChaosRequest:
    """Return the same request for an answer in one piece."""
    body = {name: value for name, value in request.body.items() if name != "stream"}
    return ChaosRequest(request.number, request.path, body, request.choices)


def _draw(source: random.Random, model: str, number: int, max_tokens: tuple[int, int]) -> ChaosRequest:
    path, stream = FORMS[number % len(FORMS)]
    text = " ".join(source.choices(WORDS, k=source.randint(3, 40)))
    prompt_is_text = path == "/completions"
    prompt = {"prompt": text} if prompt_is_text else {"messages": [{"role": "user", "content": text}]}
    greedy = {"temperature": 0}
    drawn = {"temperature": 0.9, "top_p": 0.95, "seed": source.randrange(1 << 30)}
    choices = 2 if source.random() < 0.25 else 1
    scored: dict[str, Any] = {"logprobs": 2} if prompt_is_text else {"logprobs": True, "top_logprobs": 2}
    body = {
        "model": model,
        "max_tokens": source.randint(*max_tokens),
        "ignore_eos": True,
        "n": choices,
        **(greedy if source.random() < 0.5 else drawn),
        **(scored if source.random() < 0.4 else {}),
        **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
        **prompt,
        **_constraint(path, number),
    }
    return ChaosRequest(number, path, body, choices)


def _constraint(path: str, number: int) -> dict[str, Any]:
    """Return what a request adds: nothing, or a form that ends by itself."""
    group, place = divmod(number, len(FORMS))
    if group % 2 == 0:
        return {}
    of_path = COMPLETION_CONSTRAINTS if path == "/completions" else CHAT_CONSTRAINTS
    return {"ignore_eos": False, **of_path[(place // 2 + group - 1) % len(of_path)]}
