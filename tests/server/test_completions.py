"""``/v1/completions`` over a real connection."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fake_engine import ANSWER, CONTEXT_LEN, FakeEngine

from ullm.errors import MigrationLimitReached, RequestPoisoned


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json=body)


async def events(client: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> list[Any]:
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream"
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_unary(client: httpx.AsyncClient) -> None:
    response = await complete(client, prompt="hi", max_tokens=100, model="fake")
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert [choice["text"] for choice in body["choices"]] == [ANSWER]
    assert body["choices"][0]["finish_reason"] == "stop"
    tokens = len(ANSWER.encode())
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": tokens,
        "total_tokens": 3 + tokens,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_sixteen_tokens_by_default_and_fewer_near_the_context_end(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await complete(client, prompt="hi")
    await complete(client, prompt=[5] * (CONTEXT_LEN - 4))
    assert [generation.params.max_tokens for generation in engine.admitted] == [16, 4]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[0, 66, 67]]),
        (["a", "b"], [[0, 66], [0, 67]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
async def test_forms_of_prompts(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: Any, expected: list[list[int]]
) -> None:
    response = await complete(client, prompt=prompt)
    assert response.status_code == 200
    assert sorted(generation.prompt_token_ids for generation in engine.admitted) == expected
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(expected)))
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_choices_are_numbered_per_prompt(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda index: engine._tokenizer.plain(f"choice {index}")
    body = (await complete(client, prompt=["a", "b"], n=2)).json()
    assert [choice["text"] for choice in body["choices"]] == ["choice 0", "choice 1"] * 2
    streamed: dict[int, str] = {}
    for event in await events(client, prompt=["a", "b"], n=2):
        for choice in event["choices"]:
            streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert [streamed[index] for index in range(4)] == ["choice 0", "choice 1"] * 2


async def test_stream(client: httpx.AsyncClient) -> None:
    found = await events(client, prompt="hi", max_tokens=100)
    assert "".join(event["choices"][0]["text"] for event in found) == ANSWER
    assert [event["choices"][0]["finish_reason"] for event in found] == [None] * (len(found) - 1) + ["stop"]
    assert all("usage" not in event for event in found)
    assert len({(event["id"], event["created"], event["model"]) for event in found}) == 1


async def test_stream_with_usage(client: httpx.AsyncClient) -> None:
    *chunks, last = await events(client, prompt="hi", max_tokens=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 5


async def test_logprobs(client: httpx.AsyncClient) -> None:
    body = (await complete(client, prompt="hi", max_tokens=2, logprobs=2)).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["G", "r"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"G": -0.5, "!": -9999.0}, {"r": -0.5, "!": -9999.0}],
        "text_offset": [0, 1],
    }


async def test_streamed_logprobs_are_the_same(client: httpx.AsyncClient) -> None:
    whole = (await complete(client, prompt="hi", max_tokens=20, logprobs=1)).json()["choices"][0]["logprobs"]
    parts: dict[str, list[Any]] = {name: [] for name in whole}
    for event in await events(client, prompt="hi", max_tokens=20, logprobs=1):
        for name, values in event["choices"][0]["logprobs"].items():
            parts[name] += values
    assert parts == whole


async def test_echo_scores_the_prompt(client: httpx.AsyncClient) -> None:
    body = (await complete(client, prompt=[66, 67], max_tokens=1, logprobs=0, echo=True)).json()
    choice = body["choices"][0]
    assert choice["text"] == "abG"
    assert choice["logprobs"]["tokens"] == ["a", "b", "G"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


async def test_echo_alone(client: httpx.AsyncClient) -> None:
    body = (await complete(client, prompt="ab", max_tokens=0, logprobs=0, echo=True)).json()
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["logprobs"]["tokens"] == ["<s>", "a", "b"]
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    streamed = await events(client, prompt="ab", max_tokens=0, echo=True)
    assert "".join(event["choices"][0]["text"] for event in streamed) == "ab"


async def test_prompt_logprobs(client: httpx.AsyncClient) -> None:
    body = (await complete(client, prompt=[66, 67], max_tokens=1, prompt_logprobs=1)).json()
    first, second = body["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second == {"67": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}


async def test_sampling_parameters_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(
        client,
        prompt="hi",
        temperature=0.5,
        top_k=7,
        min_p=0.1,
        seed=3,
        stop=["a", "b"],
        logit_bias={"5": 2},
        ignore_eos=True,
        stop_token_ids=[9],
        timeout=3,
        priority=-1,
        skip_special_tokens=False,
        repetition_penalty=1.1,
        min_tokens=2,
        frequency_penalty=None,
        user="somebody",
    )
    params = engine.admitted[0].params
    assert (params.temperature, params.top_k, params.min_p, params.seed) == (0.5, 7, 0.1, 3)
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (("a", "b"), {5: 2.0}, (9,))
    assert (params.priority, params.skip_special_tokens) == (-1, False)
    assert params.timeout == pytest.approx(3, abs=0.5)
    assert (params.ignore_eos, params.repetition_penalty, params.min_tokens) == (True, 1.1, 2)


async def test_error_before_the_first_byte_has_its_status(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.fail_after, engine.failure = 0, RequestPoisoned("req", 3)
    for stream in (False, True):
        response = await complete(client, prompt="hi", stream=stream)
        assert response.status_code == 500
        assert response.headers["content-type"] == "application/json"
        assert response.json()["error"]["code"] == "poisoned"
    assert not engine.active


async def test_beyond_the_limit_of_migrations(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Before the first byte it is a status, and says when to come back; after it an event."""
    engine.fail_after, engine.failure = 0, MigrationLimitReached(2, 1)
    for stream in (False, True):
        response = await complete(client, prompt="hi", stream=stream)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "migration_limit"
        assert response.headers["Retry-After"] == "1"
    engine.fail_after = 3
    *chunks, last = await events(client, prompt="hi")
    assert len(chunks) > 0
    assert last["error"]["code"] == "migration_limit"


async def test_error_in_a_stream_is_an_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 3, RequestPoisoned("req", 3)
    *chunks, last = await events(client, prompt="hi")
    assert len(chunks) > 0
    assert last["error"]["code"] == "poisoned"


async def test_error_of_one_of_several_prompts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 3, RequestPoisoned("req", 3)
    response = await complete(client, prompt=["a", "b"])
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "poisoned"
    assert (await events(client, prompt=["a", "b"]))[-1]["error"]["code"] == "poisoned"
    assert not engine.active


async def test_a_bug_is_a_500_that_hides_its_details(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_after = 0
    for stream in (False, True):
        response = await complete(client, prompt="hi", stream=stream)
        assert response.status_code == 500
        assert "boom" not in response.text
        assert response.json()["error"]["code"] == "internal_error"


async def test_scores_of_a_prompt_come_with_its_first_choice_only(client: httpx.AsyncClient) -> None:
    """Whatever ``n`` is: they would multiply the answer."""
    body = {"prompt": [[66, 67], [68, 69, 70]], "n": 3, "max_tokens": 2, "prompt_logprobs": 2}
    choices = (await complete(client, **body)).json()["choices"]
    assert [len(choice["prompt_logprobs"] or ()) for choice in choices] == [2, 0, 0, 3, 0, 0]
    body = {"prompt": [66, 67], "n": 3, "max_tokens": 2, "echo": True, "logprobs": 1}
    whole = (await complete(client, **body)).json()["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in whole] == [4, 2, 2]
    assert [choice["logprobs"]["text_offset"] for choice in whole] == [[0, 1, 2, 3], [2, 3], [2, 3]]
    assert len({choice["text"][:2] for choice in whole}) == 1
    streamed = [event["choices"][0] for event in await events(client, **body)]
    first = [choice for choice in streamed if choice["index"] == 0]
    assert len(first[0]["logprobs"]["tokens"]) == 3


async def test_scores_come_although_the_first_text_is_empty(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda index: engine._tokenizer.plain("é")
    body = {"prompt": [66, 67], "max_tokens": 2, "prompt_logprobs": 1}
    streamed = [event["choices"][0] for event in await events(client, **body)]
    assert [len(choice["prompt_logprobs"]) for choice in streamed if choice.get("prompt_logprobs")] == [2]
