"""Sampling parameters of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ullm.errors import InvalidParameter

MAX_LOGPROBS = 20
"""Maximum number of alternatives reported per token, as in OpenAI's API for ``top_logprobs``."""
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of a request; immutable, validated when built.

    Args:
        n: number of independent continuations; each is sampled with its own random numbers.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this.
        top_k: keep this many of the most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this fraction of the most likely one's probability.
        max_tokens: maximum number of generated tokens; None: up to the end of the model's context.
        max_new_tokens: another name for ``max_tokens``.
        stop: a string or strings that end the text and are not part of it.
        ignore_eos: continue past the model's end-of-sequence tokens.
        min_tokens: number of generated tokens before which end-of-sequence and stop tokens are impossible.
        stop_token_ids: further token ids that end the text.
        include_stop_str_in_output: keep the stop string in the text.
        repetition_penalty: above 1, tokens of the prompt and the output become less likely (CTRL,
            arXiv:1909.05858, section 4.1).
        presence_penalty: subtracted once from the logit of each token already generated.
        frequency_penalty: subtracted once per occurrence in the output.
        logit_bias: token id → value added to its logit, -100 to 100.
        seed: sampling is a pure function of (seed, index of the token); None: a random seed.
        logprobs: report each token's log probability and this many alternatives; 0: only the token's own.
        prompt_logprobs: the same for the tokens of the prompt.
        skip_special_tokens: omit special tokens from the text.
        timeout: seconds after which the request ends with ``finish_reason="timeout"``.
        priority: requests with a lower value run first; equal ones in order of arrival.

    Raises:
        InvalidParameter: a value is out of range; names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] | str = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    timeout: float | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        self._normalise()
        self._check_counts()
        self._check_numbers()
        self._check_stop_and_bias()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen each time."""
        return self.temperature == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return self.stop  # type: ignore[return-value]  # normalised by __post_init__

    def _normalise(self) -> None:
        put = object.__setattr__
        if self.max_tokens is None:
            put(self, "max_tokens", self.max_new_tokens)
        elif self.max_new_tokens not in (None, self.max_tokens):
            raise InvalidParameter(
                "max_tokens and max_new_tokens are two names of one value", "max_new_tokens"
            )
        put(self, "max_new_tokens", self.max_tokens)
        stop: str | Sequence[str] | None = self.stop
        put(self, "stop", () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop))
        put(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        put(self, "logit_bias", dict(self.logit_bias or {}))
        if self.top_k == -1:
            put(self, "top_k", 0)

    def _check_counts(self) -> None:
        _within("n", self.n, 1, MAX_N, whole=True)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, math.inf, whole=True)
        _within("min_tokens", self.min_tokens, 0, math.inf, whole=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}", "min_tokens"
            )
        _within("top_k", self.top_k, 0, math.inf, whole=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 0, MAX_LOGPROBS, whole=True)
        if self.seed is not None:
            _within("seed", self.seed, -MAX_SEED, MAX_SEED - 1, whole=True)

    def _check_numbers(self) -> None:
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise InvalidParameter("top_p must be above 0; for greedy output set temperature to 0", "top_p")
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.timeout is not None:
            _within("timeout", self.timeout, 0, math.inf)
        _within("priority", self.priority, -(2**31), 2**31 - 1, whole=True)

    def _check_stop_and_bias(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidParameter(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", "stop")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidParameter("every stop string must be a text of at least one character", "stop")
        for token_id in self.stop_token_ids:
            _within("stop_token_ids", token_id, 0, math.inf, whole=True)
        for token_id, bias in self.logit_bias.items():
            _within("logit_bias", token_id, 0, math.inf, whole=True)
            _within("logit_bias", bias, -100, 100)


def _within(name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    kind = "a whole number" if whole else "a number"
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # type: ignore[operator]  # NaN fails the comparison
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise InvalidParameter(f"{name} must be {kind} {bounds}, got {value!r}", name)
