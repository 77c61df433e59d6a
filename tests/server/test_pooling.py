"""``/v1/embeddings``, ``/v1/score`` and ``/v1/rerank`` on a fake engine: formats, limits, refusals."""

from __future__ import annotations

import base64
import math
from array import array
from typing import Any

import httpx
import pytest
from fake_engine import CONTEXT_LEN, FakeEngine, serving

from ullm.config import EngineConfig
from ullm.engine.embedding import AT_ONCE
from ullm.server.api.limits import MOST_INPUTS

pytestmark = pytest.mark.process

URL = "/v1/embeddings"


async def ask(client: httpx.AsyncClient, url: str = URL, **fields: Any) -> dict[str, Any]:
    response = await client.post(url, json=fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def unit(*values: float) -> list[float]:
    return [value / math.hypot(*values) for value in values]


async def test_a_vector_per_prompt(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    found = await ask(client, input=["hi", "hello"], model="fake", user="u")
    first, second = (generation.prompt_token_ids for generation in engine.admitted)
    assert found["object"] == "list"
    assert found["model"] == "fake"
    total = len(first) + len(second)
    assert found["usage"] == {"prompt_tokens": total, "total_tokens": total}
    for index, prompt in enumerate((first, second)):
        each = found["data"][index]
        assert (each["object"], each["index"]) == ("embedding", index)
        assert each["embedding"] == pytest.approx(unit(len(prompt), prompt[-1], prompt[0]))
    assert engine.admitted[0].params.pooling == "last"


@pytest.mark.parametrize("given", ["hi", [5, 6, 7], [[5, 6, 7], [8]], ["hi", [5, 6]]], ids=str)
async def test_forms_of_input(engine: FakeEngine, client: httpx.AsyncClient, given: Any) -> None:
    found = await ask(client, input=given, normalize=False, pooling="mean", add_special_tokens=False)
    one = isinstance(given, str) or isinstance(given[0], int)
    prompts = [
        engine._tokenizer.plain(each) if isinstance(each, str) else each
        for each in ([given] if one else given)
    ]
    assert [each["embedding"] for each in found["data"]] == [[len(p), p[-1], p[0]] for p in prompts]
    assert {generation.params.pooling for generation in engine.admitted} == {"mean"}


async def test_base64_is_float32(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    found = await ask(client, input=[5, 6, 7], encoding_format="base64", normalize=False, dimensions=3)
    numbers = array("f", base64.b64decode(found["data"][0]["embedding"]))
    assert numbers.tolist() == [3, 7, 5]


async def test_many_prompts_are_not_all_in_the_engine_at_once(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    most = 0
    enter = type(engine.generate([1], _params())).__aenter__

    async def counted(self: Any) -> Any:
        nonlocal most
        entered = await enter(self)
        most = max(most, len(engine.active))
        return entered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fake_engine.FakeGeneration.__aenter__", counted)
        found = await ask(client, input=[[index % 200 + 2] for index in range(3 * AT_ONCE)], normalize=False)
    assert [each["embedding"][1] for each in found["data"]] == [i % 200 + 2 for i in range(3 * AT_ONCE)]
    assert most == AT_ONCE


async def test_groups_for_which_there_is_room(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    for config, sizes in (
        (EngineConfig(model="fake", max_bs=1, max_queue=2), [3, 3, 1]),
        (EngineConfig(model="fake", max_admitted_tokens=9), [2, 2, 2, 1]),
        (EngineConfig(model="fake", max_admitted_tokens=2), [1] * 7),
    ):
        engine.config = config
        before = len(engine.admitted)
        await ask(client, input=[[5, 6, 7]] * 7)
        assert len(engine.admitted) == before + 7
        names = [each.request_id.rsplit("-", 1)[0] for each in engine.admitted[before:]]
        assert [names.count(name) for name in dict.fromkeys(names)] == sizes


def _params() -> Any:
    from ullm.sampling import SamplingParams

    return SamplingParams(pooling="last")


async def test_prompts_are_cut(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    prompt = list(range(2, 202))
    for fields, kept in (
        ({"truncate_prompt_tokens": 2}, prompt[-2:]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, prompt[:2]),
        ({"truncate_prompt_tokens": -1}, prompt),
    ):
        await ask(client, input=prompt, **fields)
        assert engine.admitted[-1].prompt_token_ids == kept
    await ask(client, input=[prompt * 4], truncate_prompt_tokens=-1)
    assert len(engine.admitted[-1].prompt_token_ids) == CONTEXT_LEN - 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [[5], 6]}, "input"),
        ({"input": "x" * CONTEXT_LEN}, "input"),
        ({"input": [5] * CONTEXT_LEN}, "input"),
        ({"input": ["x"] * (MOST_INPUTS + 1)}, "input"),
        ({"input": "x", "dimensions": 2}, "dimensions"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "endianness": "big"}, "endianness"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_refusals(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post(URL, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_a_model_without_hidden_states(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.info_pools = False
    response = await client.post(URL, json={"input": "x"})
    assert response.status_code == 400
    assert "no hidden states" in response.json()["error"]["message"]


async def test_a_part_of_an_answer_is_none(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fake_engine._end", lambda number, script, limit: "timeout")
        response = await client.post(URL, json={"input": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "cut_short")


async def test_priority(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    await ask(client, input="x", priority=3)
    assert engine.admitted[-1].params.priority == 3
    async with serving(engine, priority=False) as url, httpx.AsyncClient(base_url=url) as other:
        response = await other.post(URL, json={"input": "x", "priority": 3})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")


async def test_the_option(engine: FakeEngine) -> None:
    async with serving(engine, pooling="mean") as url, httpx.AsyncClient(base_url=url) as client:
        await ask(client, input="x")
        assert engine.admitted[-1].params.pooling == "mean"
        await ask(client, input="x", pooling="last")
        assert engine.admitted[-1].params.pooling == "last"


# --- scores ----------------------------------------------------------------------------------------

LIKELY = math.exp(-0.5)
"""The fake engine's probability of every token."""


@pytest.mark.parametrize(
    ("first", "second", "number"), [("q", "d", 1), ("q", ["d", "e"], 2), (["q", "r"], ["d", "e"], 2)], ids=str
)
async def test_scores_of_pairs(
    engine: FakeEngine, client: httpx.AsyncClient, first: Any, second: Any, number: int
) -> None:
    found = await ask(client, "/v1/score", text_1=first, text_2=second)
    assert [each["index"] for each in found["data"]] == list(range(number))
    assert [each["score"] for each in found["data"]] == pytest.approx([LIKELY] * number)
    texts = [engine._tokenizer.decode(each.prompt_token_ids) for each in engine.admitted]
    assert texts == ["d\nq", "e\nr" if isinstance(first, list) else "e\nq"][:number]
    assert found["usage"]["prompt_tokens"] == sum(len(each.prompt_token_ids) for each in engine.admitted)


async def test_the_best_document_comes_first(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    scores = iter([0.2, 0.9, 0.5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ullm.server.routes.pooling._likelihood", lambda *_: next(scores))
        found = await ask(client, "/v1/rerank", query="q", documents=["a", {"text": "b"}, "c"], top_n=2)
    assert found["results"] == [
        {"index": 1, "relevance_score": 0.9, "document": {"text": "b"}},
        {"index": 2, "relevance_score": 0.5, "document": {"text": "c"}},
    ]
    found = await ask(client, "/v1/rerank", query="q", documents=["a"], return_documents=False)
    assert found["results"] == [{"index": 0, "relevance_score": pytest.approx(LIKELY)}]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2"),
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": "", "text_2": "a"}, "text_1"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "x"}]}, "documents[0].text"),
        ("/v1/rerank", {"query": "a", "documents": ["x"], "top_n": 0}, "top_n"),
    ],
    ids=str,
)
async def test_refusals_of_scores(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_an_adapter_computes_what_names_it(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    await engine.load_adapter("tuned", "/adapters/tuned")
    for path, fields in (
        (URL, {"input": "x"}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}),
    ):
        for model in ("tuned", "fake"):
            found = await ask(client, path, **fields, model=model)
            assert found["model"] == model
            assert engine.admitted[-1].params.lora == (model if model == "tuned" else None)
