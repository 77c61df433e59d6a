"""Chosen tokens on their way to all ranks and to the host, and the steps that still wait for theirs."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from ullm.model.execution.last_tokens import LastTokens
from ullm.model.memory.fetch import Fetched


class ChosenTokens:
    """The tokens of one step.

    Args:
        tokens: filled when ``sharing`` is done.
        sharing: the operation that sends them to the other ranks; None if they are here already.
    """

    def __init__(self, tokens: Tensor, sharing: Any = None) -> None:
        self._tokens, self._sharing = tokens, sharing
        self._fetched = Fetched(tokens) if sharing is None else None

    def arrived(self) -> bool:
        """Return True if `arrive` would not wait for another rank."""
        return self._sharing is None or bool(self._sharing.is_completed())

    def arrive(self) -> Tensor:
        """Return the tokens for use on the device; on a CPU, wait until they are here."""
        self.fetch()
        return self._tokens

    def done(self) -> bool:
        """Return True if `wait` would return at once."""
        return self.arrived() and self.fetch().done()

    def wait(self) -> list[int]:
        """Wait until the tokens are on the host and return them."""
        found: list[int] = self.fetch().wait()[0].tolist()
        return found

    def fetch(self) -> Fetched:
        """Return the copies on the host; wait until another rank's tokens are here."""
        if self._fetched is None:
            self._sharing.wait()
            self._sharing = None
            self._fetched = Fetched(self._tokens)
        return self._fetched


class ArrivingTokens:
    """Tokens that another rank chooses, in the order of their steps, until they are in `LastTokens`.

    A stage computes further steps while the last one chooses, and waits only for tokens that it needs.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[list[int], ChosenTokens]] = deque()

    def add(self, slots: list[int], chosen: ChosenTokens) -> None:
        """Expect tokens for these slots."""
        self._steps.append((slots, chosen))

    def settle(self, needed: Iterable[int], last_tokens: LastTokens) -> None:
        """Put all tokens that are here into their slots; wait for those of the ``needed`` slots."""
        wanted = set(needed)
        waits = [index for index, (slots, _) in enumerate(self._steps) if wanted.intersection(slots)]
        least = waits[-1] + 1 if waits else 0
        while self._steps and (least > 0 or self._steps[0][1].arrived()):
            slots, chosen = self._steps.popleft()
            last_tokens.put(slots, chosen.arrive())
            least -= 1


def digest(step_id: int, tokens: list[int]) -> int:
    """Return a checksum of a step's tokens: ranks that have others are noticed by it."""
    return zlib.crc32(np.array([step_id, *tokens], dtype=np.int64).tobytes())
