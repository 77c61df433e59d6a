"""Answers of a prescribed form, from a real (tiny, random) model on a real server."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema_rs
import openai
import pydantic
import pytest

from tests.support.random_schemas import random_schema
from tests.support.server import Serve, Server, starting_servers
from tests.support.streams import Stream, texts, wait_begun

pytestmark = pytest.mark.process

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LONG = {"type": "array", "items": PERSON, "minItems": 50}
TINY = ("--dtype", "float32", "--standby-workers", "0", "--context-len", "1024")


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with starting_servers() as start:
        yield start("--model", str(tiny_model), *TINY)


def complete(server: Server, **fields: Any) -> httpx.Response:
    body = {"prompt": "Say:", "max_tokens": 480, "temperature": 1, "seed": 7, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def is_person(text: str) -> bool:
    return jsonschema_rs.is_valid(PERSON, json.loads(text))


FORMS: list[tuple[dict[str, Any], Callable[[str], object]]] = [
    ({"structured_outputs": {"json": PERSON}}, is_person),
    ({"structured_outputs": {"json": json.dumps(PERSON), "disable_any_whitespace": True}}, is_person),
    ({"guided_json": PERSON}, is_person),
    ({"json_schema": PERSON}, is_person),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}, is_person),
    ({"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}}, re.compile("[a-f]{3}-[0-9]{2}").fullmatch),
    ({"guided_regex": "[a-f]{3}"}, re.compile("[a-f]{3}").fullmatch),
    ({"guided_choice": ["yes", "no", "žádný 😀"]}, {"yes", "no", "žádný 😀"}.__contains__),
    ({"structured_outputs": {"choice": ["one", "two"]}}, {"one", "two"}.__contains__),
    ({"grammar": 'root ::= "a" [0-9] "z"'}, re.compile("a[0-9]z").fullmatch),
    ({"guided_grammar": "start: /[x-z]{2}/"}, re.compile("[x-z]{2}").fullmatch),
]


@pytest.mark.parametrize(("fields", "fits"), FORMS, ids=map(str, range(len(FORMS))))
def test_every_field_that_says_a_form(
    server: Server, fields: dict[str, Any], fits: Callable[[str], object]
) -> None:
    for temperature in (0, 1):
        answer = complete(server, temperature=temperature, **fields)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == "stop"
        assert fits(choice["text"]), choice["text"]


def test_an_object_of_any_kind(server: Server) -> None:
    answer = complete(server, response_format={"type": "json_object"}, n=8, max_tokens=400)
    ended = [each["text"] for each in answer.json()["choices"] if each["finish_reason"] == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_a_schema_that_cannot_be_used_is_told_with_its_place(server: Server) -> None:
    wrong = {"type": "object", "properties": {"a": {"items": {"type": "strng"}}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": wrong}}
    for stream in (False, True):
        answer = complete(server, response_format=form, stream=stream)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "response_format"
        assert error["message"] == (
            "response_format.json_schema.schema cannot be used: at /properties/a/items: Invalid type: strng"
        )


class Person(pydantic.BaseModel):
    """What OpenAI's client parses an answer into."""

    name: str = pydantic.Field(max_length=12)
    kind: Literal["cat", "dog"]
    lives: list[bool] = pydantic.Field(max_length=3)


def test_openais_client_parses_the_answer(server: Server, tiny_model: Path) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model=tiny_model.name,
            messages=[{"role": "user", "content": "Who?"}],
            response_format=Person,
            max_tokens=200,
            temperature=1,
            seed=3,
        )
    assert isinstance(answer.choices[0].message.parsed, Person)


def constrained_streams(server: Server) -> list[Stream]:
    return [
        Stream(server, 150, [300 + n, 301], structured_outputs={"json": LONG}, temperature=n % 2, seed=n)
        for n in range(6)
    ]


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[str]:
    return texts(constrained_streams(server))


def test_texts_do_not_depend_on_the_batch(server: Server, undisturbed: list[str]) -> None:
    alone = [
        Stream(server, 150, [300 + n, 301], structured_outputs={"json": LONG}, temperature=n % 2, seed=n)
        for n in (2, 3)
    ]
    assert texts(alone[:1]) + texts(alone[1:]) == undisturbed[2:4]
    assert all(text.startswith("[") for text in undisturbed)


def test_a_killed_worker_costs_a_pause_within_the_grammar(
    serve: Serve, tiny_model: Path, undisturbed: list[str]
) -> None:
    server = serve("--model", str(tiny_model), *TINY)
    running = constrained_streams(server)
    wait_begun(running)
    server.worker().kill()
    assert texts(running) == undisturbed


def test_drafts_change_no_text(serve: Serve, tiny_model: Path, undisturbed: list[str]) -> None:
    server = serve("--model", str(tiny_model), *TINY, "--speculate", "6")
    assert texts(constrained_streams(server)) == undisturbed
    assert server.metric("ullm_draft_tokens_total") > 0
    assert server.metric("ullm_accepted_tokens_total") > 0


def test_when_no_token_is_left_that_is_said(server: Server) -> None:
    answer = complete(server, allowed_token_ids=[100], bad_words=["a"], logit_bias={})
    assert answer.status_code == 200, "others are left"
    token = server_token(server, "a")
    answer = complete(server, allowed_token_ids=[token], bad_words=["a"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_token_allowed")


def server_token(server: Server, text: str) -> int:
    body = {"prompt": text, "add_special_tokens": False}
    (token,) = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
    return int(token)


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_that_has_a_special_token_and_text(server: Server, included: bool) -> None:
    letter, special = server_token(server, "a"), 1
    stop = "a<|im_start|>aa"
    answer = complete(
        server,
        allowed_token_ids=[letter, special],
        ignore_eos=True,
        stop=[stop],
        include_stop_str_in_output=included,
        return_token_ids=True,
    )
    (choice,) = answer.json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["token_ids"][-4:] == [letter, special, letter, letter]
    before = "a" * choice["token_ids"][:-4].count(letter)
    assert choice["text"] == before + (stop if included else "")


def parse(text: str) -> Any:
    """Return JSON; numbers beyond those of Python become large ones."""
    return json.loads(text, parse_float=lambda number: max(-1e300, min(1e300, float(number))))


@pytest.mark.slow
def test_random_schemas(server: Server) -> None:
    """Every answer that ends is valid; one that is cut is the beginning of JSON, and counted."""
    draw, cut = random.Random(1), 0
    for number in range(100):
        schema = random_schema(draw)
        answer = complete(server, structured_outputs={"json": schema}, max_tokens=400, seed=number)
        assert answer.status_code == 200, (schema, answer.text)
        (choice,) = answer.json()["choices"]
        if choice["finish_reason"] == "stop":
            assert jsonschema_rs.is_valid(schema, parse(choice["text"])), (schema, choice["text"])
        else:
            cut += 1
    assert cut < 50


TOOLS = [
    {"type": "function", "function": {"name": "person", "parameters": PERSON}},
    {
        "type": "function",
        "function": {
            "name": "pick",
            "parameters": {
                "type": "object",
                "properties": {"one": {"enum": ["é", 'q"', 3]}},
                "required": ["one"],
                "additionalProperties": False,
            },
        },
    },
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["person", "pick", None])
def test_openais_client_forces_calls_that_are_valid(
    server: Server, tiny_model: Path, name: str | None, stream: bool
) -> None:
    """Whatever the model is: this one's weights are random."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}  # type: ignore[index]
    choice: Any = "required" if name is None else {"type": "function", "function": {"name": name}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for seed in range(4):
            fields: Any = {
                "model": tiny_model.name,
                "messages": [{"role": "user", "content": "Hi"}],
                "tools": TOOLS,
                "tool_choice": choice,
                "parallel_tool_calls": False,
                "max_tokens": 360,
                "seed": seed,
            }
            if stream:
                with client.chat.completions.stream(**fields) as events:
                    answer: Any = events.get_final_completion()
            else:
                answer = client.chat.completions.create(**fields)
            assert answer.choices[0].finish_reason == "tool_calls"
            (call,) = answer.choices[0].message.tool_calls
            assert call.function.name == (name or call.function.name)
            arguments = json.loads(call.function.arguments)
            assert jsonschema_rs.is_valid(schemas[call.function.name], arguments), arguments
