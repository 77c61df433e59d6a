"""Admission limits: how many choices and tokens may be in the engine at a time."""

from __future__ import annotations

from ullm.config import EngineConfig
from ullm.errors import InvalidParameter, QueueFull, TooManyTokens


class AdmissionLimits:
    """The limits of one engine, and the tokens admitted so far.

    Args:
        config: batch size, replicas, queue limit, token limit.

    Attributes:
        capacity: choices that all replicas together run at once; 0 until the first replica is up, where the
            configuration leaves the batch size open.
        tokens: prompt tokens and possible output tokens of all live choices.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.capacity = config.max_bs * config.replicas
        self.tokens = 0
        self._num_replicas = config.replicas
        self._max_queue = config.max_queue
        self._max_tokens = config.max_admitted_tokens

    def set_batch_size(self, max_bs: int) -> None:
        """Update the capacity to the batch size that a replica has decided on."""
        self.capacity = max_bs * self._num_replicas

    def check(self, live: int, choices: int, tokens: int) -> None:
        """Raise unless ``choices`` more choices with ``tokens`` tokens fit beside ``live`` ones.

        Raises:
            QueueFull, TooManyTokens: there is no room now.
            InvalidParameter: they can never fit.
        """
        limit = self.capacity + self._max_queue
        if choices > limit:
            raise InvalidParameter(f"n is {choices}, but this server runs and queues at most {limit}", "n")
        waiting = live - self.capacity
        if waiting + choices > self._max_queue:
            raise QueueFull(max(0, waiting), self._max_queue)
        self._check_tokens(tokens)

    def _check_tokens(self, tokens: int) -> None:
        if self._max_tokens is None:
            return
        if tokens > self._max_tokens:
            raise InvalidParameter(
                f"this request may need {tokens} tokens, prompt and output, but this server admits "
                f"at most {self._max_tokens} (--max-admitted-tokens)",
                "max_tokens",
            )
        if self.tokens + tokens > self._max_tokens:
            raise TooManyTokens(self.tokens, tokens, self._max_tokens)
