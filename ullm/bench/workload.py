"""Workloads: deterministic prompts of chosen lengths.

Prompts are common English words, which nearly every tokenizer keeps whole, so that the same text goes
to every server and lengths in words are close to lengths in tokens; reports show the tokens that the
servers counted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ullm.errors import UsageError

WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work number night point home water "
    "room mother area money story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power hour game line end member law car city community name president team "
    "minute idea body information back parent face others level office door health person art war history "
    "party result change morning reason research girl guy moment air teacher force education"
).split()


@dataclass(frozen=True)
class Length:
    """A number of tokens, or a range drawn from uniformly; written ``128`` or ``100-1024``."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, flag: str) -> Length:
        """Parse ``128`` or ``100-1024``.

        Raises:
            UsageError: anything else; names the flag.
        """
        low, _, high = text.partition("-")
        try:
            length = cls(int(low), int(high or low))
        except ValueError:
            raise UsageError(
                f"{flag} {text}: expected a number such as 128 or a range such as 100-1024"
            ) from None
        if not 1 <= length.low <= length.high:
            raise UsageError(f"{flag} {text}: expected at least 1, and the smaller number first")
        return length

    def draw(self, source: random.Random) -> int:
        """Draw one length."""
        return source.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class BenchRequest:
    """One request of a workload; exactly ``max_tokens`` are generated, the end of sequence is ignored."""

    prompt: str
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Workload:
    """A reproducible stream of requests.

    Args:
        prompt_words: words per prompt, the shared prefix not counted.
        output_tokens: tokens to generate per request.
        shared_prefix: words that all prompts begin with, for measuring the prefix cache.
        seed: the same seed gives the same requests, whatever the target.
        temperature, top_p: sampling parameters of each request.
    """

    prompt_words: Length = Length(32, 32)
    output_tokens: Length = Length(128, 128)
    shared_prefix: int = 0
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0

    def requests(self, stream: int = 0) -> Iterator[BenchRequest]:
        """Yield requests without end; each ``stream`` has others, so that no run profits from the cache."""
        prefix = _words(random.Random(f"prefix {self.seed}"), self.shared_prefix)
        source = random.Random(f"requests {self.seed} {stream}")
        while True:
            words = prefix + _words(source, self.prompt_words.draw(source))
            tokens = self.output_tokens.draw(source)
            yield BenchRequest(" ".join(words), tokens, self.temperature, self.top_p)


def _words(source: random.Random, count: int) -> list[str]:
    return source.choices(WORDS, k=count)
