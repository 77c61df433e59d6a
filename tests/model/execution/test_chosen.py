"""Tokens that another rank chooses: waited for only where they are needed, and kept in order."""

from __future__ import annotations

import torch

from ullm.model.execution.chosen import ArrivingTokens, ChosenTokens, digest
from ullm.model.execution.last_tokens import LastTokens


class Sharing:
    """An operation that is done when it is told to, or when it is waited for."""

    def __init__(self, tokens: torch.Tensor, *values: int) -> None:
        self.tokens, self.values, self.is_done, self.waits = tokens, values, False, 0

    def is_completed(self) -> bool:
        return self.is_done

    def finish(self) -> None:
        self.tokens.copy_(torch.tensor(self.values))
        self.is_done = True

    def wait(self) -> None:
        self.waits += 1
        if not self.is_done:
            self.finish()


def sharing(*values: int) -> tuple[Sharing, ChosenTokens]:
    tokens = torch.zeros(len(values), dtype=torch.int64)
    operation = Sharing(tokens, *values)
    return operation, ChosenTokens(tokens, operation)


def test_tokens_that_are_here_need_no_wait() -> None:
    chosen = ChosenTokens(torch.tensor([3, 4]))
    assert chosen.done()
    assert chosen.wait() == [3, 4]


def test_shared_tokens_are_done_when_they_have_come() -> None:
    operation, chosen = sharing(8, 9)
    assert not chosen.done()
    operation.finish()
    assert chosen.done()
    assert chosen.wait() == [8, 9]
    assert operation.waits == 1


def test_only_needed_tokens_are_waited_for() -> None:
    last, arriving = LastTokens(4, torch.device("cpu")), ArrivingTokens()
    operations = []
    for slots, values in (([0, 1], (10, 11)), ([2], (12,)), ([3], (13,))):
        operation, chosen = sharing(*values)
        arriving.add(slots, chosen)
        operations.append(operation)
    arriving.settle([], last)
    assert not any(operation.waits for operation in operations)
    arriving.settle([2], last)  # and those of the step before it, which must not overwrite later ones
    assert last.tensor.tolist() == [10, 11, 12, 0]
    assert operations[2].waits == 0
    operations[2].finish()
    arriving.settle([], last)
    assert last.tensor.tolist() == [10, 11, 12, 13]


def test_a_slot_used_again_keeps_its_latest_token() -> None:
    last, arriving = LastTokens(1, torch.device("cpu")), ArrivingTokens()
    for value in (5, 6):
        arriving.add([0], sharing(value)[1])
    arriving.settle([0], last)
    assert last.tensor.tolist() == [6]


def test_a_digest_tells_steps_and_tokens_apart() -> None:
    assert digest(1, [2, 3]) == digest(1, [2, 3])
    assert len({digest(1, [2, 3]), digest(2, [2, 3]), digest(1, [3, 2]), digest(1, [2])}) == 4
