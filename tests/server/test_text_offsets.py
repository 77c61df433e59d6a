"""``text_offset`` is where a token's text begins, however tokens are grouped into events."""

from __future__ import annotations

import httpx
import pytest
from fake_engine import ByteTokenizer, FakeEngine

from ullm.protocol.messages import TokenLogprobs
from ullm.server.api.logprobs import Offsets, completion_logprobs

TEXT = "Grüße 🎉 !"
OFFSETS = [0, 1, 2, 2, 3, 3, 4, 5, 6, 6, 6, 6, 7, 8]


def offsets(tokenizer: ByteTokenizer, token_ids: list[int], portion: int) -> list[int]:
    where, found = Offsets(tokenizer), list[int]()
    for begin in range(0, len(token_ids), portion):
        some = token_ids[begin : begin + portion]
        scores = [TokenLogprobs(token_id, -0.5) for token_id in some]
        found += completion_logprobs(some, scores, tokenizer, where).text_offset
    return found


@pytest.mark.parametrize("portion", [1, 2, 3, 4, 5, 100])
def test_portions_change_nothing(portion: int) -> None:
    tokenizer = ByteTokenizer()
    assert offsets(tokenizer, tokenizer.plain(TEXT), portion) == OFFSETS
    broken = [*tokenizer.plain("ü")[:1], *tokenizer.plain("ab")]
    assert offsets(tokenizer, broken, portion) == offsets(tokenizer, broken, 1)


def test_special_tokens_have_no_place_in_a_text_without_them() -> None:
    tokenizer = ByteTokenizer()
    where = Offsets(tokenizer)
    assert [where.next(token) for token in (0, 66, 67)] == [0, 0, 1]
    where = Offsets(tokenizer, 5, skip_special_tokens=False)
    assert [where.next(token) for token in (0, 66, 67)] == [5, 8, 9]


@pytest.fixture
def asked(client: httpx.AsyncClient, engine: FakeEngine) -> httpx.AsyncClient:
    engine.script = lambda index: ByteTokenizer().plain(TEXT)
    return client


async def test_of_an_answer(asked: httpx.AsyncClient) -> None:
    body = {"prompt": "hi", "max_tokens": len(OFFSETS), "logprobs": 0, "ignore_eos": True}
    choice = (await asked.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["text"] == TEXT
    assert choice["logprobs"]["text_offset"] == OFFSETS
    echoed = (await asked.post("/v1/completions", json={**body, "prompt": "ö", "echo": True})).json()
    assert echoed["choices"][0]["text"] == "ö" + TEXT
    assert echoed["choices"][0]["logprobs"]["text_offset"] == [0, 0, 0, *(1 + at for at in OFFSETS)]
