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

    Args:
        max_tokens: minimum and maximum per request.
    """
    source = random.Random(f"catalogue {seed}")
    return [_draw(source, model, number, max_tokens) for number in range(size)]


def long_request(model: str, max_tokens: int) -> ChaosRequest:
    """Return a request whose stream, with log probabilities, is too long for the kernel's buffers."""
    body = {"prompt": "time year people", "logprobs": 5, "max_tokens": max_tokens}
    return ChaosRequest(-1, "/completions", {"model": model, "stream": True, "ignore_eos": True, **body}, 1)


def _draw(source: random.Random, model: str, number: int, max_tokens: tuple[int, int]) -> ChaosRequest:
    path, stream = FORMS[number % len(FORMS)]
    text = " ".join(source.choices(WORDS, k=source.randint(3, 40)))
    prompt = {"prompt": text} if path == "/completions" else {"messages": [{"role": "user", "content": text}]}
    greedy = {"temperature": 0}
    drawn = {"temperature": 0.9, "top_p": 0.95, "seed": source.randrange(1 << 30)}
    choices = 2 if source.random() < 0.25 else 1
    body = {
        "model": model,
        "max_tokens": source.randint(*max_tokens),
        "ignore_eos": True,
        "n": choices,
        **(greedy if source.random() < 0.5 else drawn),
        **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
        **prompt,
    }
    return ChaosRequest(number, path, body, choices)
