"""One message about KV blocks to each rank of a worker group, and the ranks' answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import trio

from ullm.protocol.messages import BlocksExported, BlocksImported, ExportBlocks, ImportBlocks

M = TypeVar("M", bound=ExportBlocks | ImportBlocks)


class BlockTransfer(Generic[M]):
    """A transfer that a scheduler sends to its workers between two steps.

    Whoever has asked for it waits for `done`, and no longer than the scheduler lives; if he stops waiting, he
    withdraws it. One that is sent stays in order with the steps, so its blocks may be used again at once.

    Args:
        messages: one for each rank.

    Attributes:
        answers: rank → its answer.
        done: set once every rank has answered.
        sent: whether the workers may have got it.
        withdrawn: whether it must not be sent any more.
    """

    def __init__(self, messages: Sequence[M]) -> None:
        self.messages: Sequence[M] = messages
        self.answers: dict[int, BlocksExported | BlocksImported] = {}
        self.done = trio.Event()
        self.sent = self.withdrawn = False

    @property
    def number(self) -> int:
        """The number of its messages."""
        return self.messages[0].number

    def take(self, rank: int, answer: BlocksExported | BlocksImported) -> None:
        """Take the answer of a rank."""
        self.answers[rank] = answer
        if len(self.answers) == len(self.messages):
            self.done.set()

    @property
    def error(self) -> str:
        """Why a rank has not done it; an empty text if all have."""
        return next((answer.error for answer in self.answers.values() if answer.error), "")

    @property
    def lacks_memory(self) -> bool:
        """Whether a rank could not use the shared memory."""
        return any(answer.no_memory for answer in self.answers.values())


AnyTransfer = BlockTransfer[ExportBlocks] | BlockTransfer[ImportBlocks]
