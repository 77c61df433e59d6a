"""What a prompt costs in the front end does not depend on how many choices of it are asked for."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from tests.support.seeded import run_seeded
from ullm.sampling import SamplingParams
from ullm.scheduling import block_pool
from ullm.scheduling.block_pool import BlockPool, PromptHashes, extend_hashes, root_hash
from ullm.testing import FakeBehaviour, FakeWorkers, open_scripted_engine, write_scripted_model

BLOCK = 16
TOKENS = 8000
PROMPT = [300 + number % 50 for number in range(TOKENS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripted")
    return write_scripted_model(folder, context_len=2 * TOKENS, num_blocks=2 * TOKENS // BLOCK)


async def ask(model: Path, n: int, prompt: list[int], scores: int | None = None) -> int:
    """Ask for choices of a prompt; return the bytes of the engine's own objects while they wait or run."""
    workers, most = FakeWorkers(FakeBehaviour(step_seconds=1.0)), 0
    # One sequence at a time: the scripted worker, which is in this process, too, has one copy of the prompt.
    async with open_scripted_engine(model, workers=workers, max_bs=1) as engine:
        params = SamplingParams(n=n, max_tokens=1, temperature=0, prompt_logprobs=scores)
        tracemalloc.start()
        try:
            async with engine.generate(prompt, params) as generation:
                async for output in generation:
                    for worker in workers.started:
                        worker.received.clear()
                    most = max(most, tracemalloc.get_traced_memory()[0])
                    if output.finish_reason:
                        n -= 1
        finally:
            tracemalloc.stop()
    assert n == 0
    return most


@pytest.mark.parametrize("scores", [None, 1])
def test_memory(model: Path, scores: int | None) -> None:
    one = run_seeded(1, ask, model, 1, PROMPT, scores)
    several = run_seeded(1, ask, model, 9, PROMPT, scores)
    # The worker's own copy of one prompt, and one that is on its way to it; lists and hashes for each of
    # eight choices would be 93 bytes per token more.
    assert several - one < 80 * TOKENS


def test_hashes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of the prompt is hashed once, for the router and the scheduler together."""
    hashed = 0
    real = block_pool.block_hash

    def count(parent: bytes, token_ids: list[int]) -> bytes:
        nonlocal hashed
        hashed += 1
        return real(parent, token_ids)

    monkeypatch.setattr(block_pool, "block_hash", count)
    run_seeded(1, ask, model, 5, PROMPT[:1600])
    assert hashed == 1600 // BLOCK


def test_hashes_are_those_of_the_tokens() -> None:
    shared, roots = PromptHashes(PROMPT[:100]), (root_hash(None), root_hash("salt"))
    for count, root in [(3, roots[0]), (6, roots[0]), (2, roots[1]), (9, roots[0])]:
        found: list[bytes] = []
        expected: list[bytes] = []
        shared.extend(found, BLOCK, count, root)
        extend_hashes(expected, PROMPT[:100], BLOCK, min(count, 6), root)
        assert found == expected
    assert BlockPool(4).find(found) == []
