"""OpenAI's own client, sync and async, against the real model on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.support.server import SCRIPTED, Serve, Server

pytestmark = [pytest.mark.e2e, pytest.mark.process]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture
def client(real_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_capital_of_france_is_paris(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "The capital of France is Paris."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_the_async_client_runs_many_at_once(real_server: Server) -> None:
    async def main() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{real_server.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
                    for _ in range(8)
                )
            )
            return [answer.choices[0].message.content for answer in answers]

    assert set(asyncio.run(main())) == {"The capital of France is Paris."}


def test_three_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt="My favourite animal is", n=3, seed=11, max_tokens=12, temperature=1
        )
        return [choice.text for choice in answer.choices]

    first = ask()
    assert len(set(first)) == 3
    assert ask() == first


def test_a_stop_string_across_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=60, stop=["9, 1"]
    )
    assert answer.choices[0].text.endswith("8, ")
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_multi_byte_characters_never_break(client: openai.OpenAI, stream: bool) -> None:
    # Forced, one byte-level token after the other: the model would rather write English.
    prompt = "日本語: 東京 大阪 京都 日本語: 東京 大阪 京都 日本語:"
    if stream:
        chunks = client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=24, stream=True
        )
        pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    else:
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=24)
        pieces = [answer.choices[0].text]
    assert "\ufffd" not in "".join(pieces)[:-1], "only an end in the middle of a character may be cut"
    assert any(ord(character) > 0x3000 for character in "".join(pieces))


def test_logprobs_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", echo=True, logprobs=2, max_tokens=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert answer.choices[0].text.startswith("The capital of France is")
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])


def test_errors_are_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="8192"):
        client.completions.create(model=MODEL, prompt="word " * 9000, max_tokens=1)


def test_only_who_has_the_key_is_served(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--api-key", "secret")
    clients = [
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in ("secret", "wrong")
    ]
    with clients[0] as friend, clients[1] as stranger:
        assert "scripted" in {model.id for model in friend.models.list()}
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
