"""Answers with millions of numbers are put into shape piece by piece, so that other tasks go on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest
import trio
from fake_engine import ByteTokenizer

from ullm.protocol.messages import TokenLogprobs
from ullm.server.api.logprobs import SLICE, Offsets, prompt_logprobs, scored_prompt

TOKENIZER = ByteTokenizer()
PIECES = 10
TOKENS = [2 + number % 200 for number in range(PIECES * SLICE)]
SCORES = [TokenLogprobs(token, -0.5, 1, [(token, -0.5), (3, float("-inf"))]) for token in TOKENS]


async def as_prompt_logprobs() -> object:
    return await prompt_logprobs([None, *SCORES[1:]], TOKENIZER)


async def as_completion_logprobs() -> object:
    return await scored_prompt(TOKENS, [None, *SCORES[1:]], TOKENIZER, Offsets(TOKENIZER))


@pytest.mark.parametrize("shape", [as_prompt_logprobs, as_completion_logprobs])
async def test_other_tasks_run_between_the_pieces(shape: Callable[[], Awaitable[object]]) -> None:
    turns = 0

    async def neighbour() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbour)
        answer = await shape()
        nursery.cancel_scope.cancel()
    assert turns >= PIECES - 1
    decoded = msgspec.json.decode(msgspec.json.encode(answer))
    entries = decoded if isinstance(decoded, list) else decoded["top_logprobs"]
    assert len(entries) == len(TOKENS)
    assert entries[0] is None
    assert all(entries[1:])


async def test_an_aborted_prompt_has_fewer_scores() -> None:
    answer = await scored_prompt(TOKENS[:5], [None, *SCORES[1:3]], TOKENIZER, Offsets(TOKENIZER))
    assert answer.token_logprobs == [None, -0.5, -0.5, None, None]
