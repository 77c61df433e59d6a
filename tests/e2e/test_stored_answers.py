"""Stored answers on a real server: they survive its SIGKILL and its stop, and a full disk is told."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import SCRIPTED, Serve, Server

pytestmark = pytest.mark.process

TOKENS = 400
STREAMS = 8


def begin(server: Server, number: int, **fields: Any) -> str:
    body = {"input": f"Tell {number}", "max_output_tokens": TOKENS, "temperature": number % 2, "seed": number}
    response = httpx.post(f"{server.url}/v1/responses", json=body | {"background": True} | fields, timeout=30)
    assert response.status_code == 200, response.text
    found: str = response.json()["id"]
    return found


def events(server: Server, id: str, after: int = -1, most: int = 10**9) -> list[dict[str, Any]]:
    """Return the events after one of them, or the first of these."""
    place = f"{server.url}/v1/responses/{id}?stream=true&starting_after={after}"
    return list(_first(place, most))


def _first(place: str, most: int) -> Iterator[dict[str, Any]]:
    with httpx.stream("GET", place, timeout=60) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])
                most -= 1
            if not most:
                return


def scores_of(event: dict[str, Any]) -> list[Any]:
    return event["logprobs"] if event["type"] == "response.output_text.delta" else []


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(event.get("delta", "") for event in found)


@pytest.fixture
def undisturbed(scripted_server: Server) -> list[str]:
    ids = [begin(scripted_server, number) for number in range(STREAMS)]
    return [text_of(events(scripted_server, id)) for id in ids]


def test_answers_go_on_after_the_server_was_killed(
    serve: Serve, scripted_model: Path, tmp_path: Path, undisturbed: list[str]
) -> None:
    """Each event comes once, whatever the client had seen, and the texts are the same."""
    options = ("--model", str(scripted_model), *SCRIPTED, "--journal", str(tmp_path / "answers.sqlite"))
    server = serve(*options)
    scored = [{"top_logprobs": 2} if number % 2 else {} for number in range(STREAMS)]
    ids = [begin(server, number, **fields) for number, fields in enumerate(scored)]
    seen = [events(server, id, most=20 + 5 * number) for number, id in enumerate(ids)]
    server.process.kill()
    server.wait()
    again = serve(*options)
    for id, first, whole, fields in zip(ids, seen, undisturbed, scored, strict=True):
        rest = events(again, id, first[-1]["sequence_number"])
        # A client that was slow may have had all of it: then several tokens come as one event.
        assert (first + rest)[-1]["type"] in ("response.completed", "response.incomplete")
        numbers = [event["sequence_number"] for event in first + rest]
        assert numbers == sorted(set(numbers))
        assert text_of(first + rest) == whole
        shown = httpx.get(f"{again.url}/v1/responses/{id}").json()
        (content,) = shown["output"][0]["content"]
        assert content["text"] == whole
        assert content["logprobs"] == [each for event in first + rest for each in scores_of(event)]
        assert len(content["logprobs"]) == (shown["usage"]["output_tokens"] if fields else 0)


def test_a_stop_interrupts_them_and_says_so(
    serve: Serve, scripted_model: Path, tmp_path: Path, undisturbed: list[str]
) -> None:
    options = ("--model", str(scripted_model), *SCRIPTED, "--journal", str(tmp_path / "answers.sqlite"))
    server = serve(*options, "--shutdown-timeout", "0")
    id = begin(server, 1)
    with httpx.stream("GET", f"{server.url}/v1/responses/{id}?stream=true", timeout=60) as response:
        lines = response.iter_lines()
        next(line for line in lines if "output_text.delta" in line)
        server.process.send_signal(signal.SIGTERM)
        last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")][-1]
    assert last["error"]["code"] == "interrupted"
    assert server.wait() == 0
    assert text_of(events(serve(*options), id)) == undisturbed[1]


def test_an_answer_of_another_model_does_not_go_on(
    serve: Serve, scripted_model: Path, tmp_path: Path
) -> None:
    journal = ("--journal", str(tmp_path / "answers.sqlite"))
    server = serve("--model", str(scripted_model), *SCRIPTED, *journal)
    id = begin(server, 0, max_output_tokens=900)
    server.process.kill()
    server.wait()
    other = shutil.copytree(scripted_model, tmp_path / "other")
    last = events(serve("--model", str(other), *SCRIPTED, *journal), id)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "model_changed"


def test_a_damaged_journal_stops_no_start(serve: Serve, scripted_model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "answers.sqlite"
    journal.write_bytes(b"no database " * 1000)
    server = serve("--model", str(scripted_model), *SCRIPTED, "--journal", str(journal))
    assert text_of(events(server, begin(server, 0)))
    assert "it was set aside" in server.errors()
    assert len(list(tmp_path.glob("answers.sqlite.damaged-*"))) == 1


CHATS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1, "n": 2, "stream_options": {"include_usage": True}},
    {"temperature": 1, "stop": ["qqqq"], "return_token_ids": True, "logprobs": 1},
    {"temperature": 1, "response_format": {"type": "json_object"}},
]
"""What a stream is asked with; each one as a chat and, with a prompt, as a completion."""


def chunks(response: httpx.Response, most: int = 10**9) -> list[tuple[str, str]]:
    """Return the id and the data of each event, or of the first ones."""
    found: list[tuple[str, str]] = []
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            found.append((value, ""))
        elif name == "data":
            found[-1] = found[-1][0], value
            if len(found) == most:
                break
    return found


def said(found: list[tuple[str, str]]) -> list[Any]:
    """Return what events say, without the name of the stream and its time."""
    datas = [json.loads(data) for _, data in found[:-1]]
    assert found[-1][1] == "[DONE]"
    return [{k: v for k, v in data.items() if k not in ("id", "created")} for data in datas]


def plain_request(number: int) -> tuple[str, dict[str, Any]]:
    asked = CHATS[number // 2] | {"max_tokens": 100, "seed": number, "stream": True}
    if number % 2:
        return "/v1/completions", asked | {"prompt": f"Tell {number}"}
    asked |= {"logprobs": True, "top_logprobs": 2} if "logprobs" in asked else {}
    return "/v1/chat/completions", asked | {"messages": [{"role": "user", "content": f"Tell {number}"}]}


@contextmanager
def plain_streams(server: Server) -> Iterator[list[httpx.Response]]:
    """Begin all of them."""
    with ExitStack() as stack:
        asked = [plain_request(number) for number in range(STREAMS)]
        yield [
            stack.enter_context(httpx.stream("POST", server.url + path, json=body, timeout=60))
            for path, body in asked
        ]


def test_plain_streams_go_on_after_the_server_was_killed(
    serve: Serve, scripted_model: Path, tmp_path: Path
) -> None:
    """Each event of each stream comes once, and is the one of a server that nobody has killed."""
    options = ("--model", str(scripted_model), *SCRIPTED, "--journal")
    undisturbed = serve(*options, str(tmp_path / "undisturbed.sqlite"))
    with plain_streams(undisturbed) as streams:
        whole = [said(chunks(stream)) for stream in streams]
    server = serve(*options, str(tmp_path / "answers.sqlite"))
    with plain_streams(server) as streams:
        seen = [chunks(stream, most=10 + 2 * number) for number, stream in enumerate(streams)]
        server.process.kill()
        server.wait()
    again = serve(*options, str(tmp_path / "answers.sqlite"))
    for number, first in enumerate(seen):
        path, _ = plain_request(number)
        id, _, last = first[-1][0].rpartition(":")
        place = f"{again.url}{path}/{id}?stream=true"
        with httpx.stream("GET", place, headers={"Last-Event-ID": first[-1][0]}, timeout=60) as response:
            assert response.status_code == 200, response.read()
            rest = chunks(response)
        assert [name for name, _ in first + rest] == [f"{id}:{n}" for n in range(len(first + rest))]
        assert int(last) + 1 == len(first)
        assert said(first + rest) == whole[number]
    assert "going on with the answers of an earlier run" in again.errors()
    assert httpx.delete(f"{again.url}{path}/{id}").json()["deleted"]


MESSAGES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1, "stop_sequences": ["qqqq"]},
    {"temperature": 1, "thinking": {"type": "adaptive"}},
    {"temperature": 0, "system": "Be brief.", "metadata": {"user_id": "u"}},
]
"""What a stream of ``/v1/messages`` is asked with."""


@contextmanager
def message_streams(server: Server) -> Iterator[list[httpx.Response]]:
    """Begin all of them, with names by which the answers are known before anything is received."""
    with ExitStack() as stack:
        streams = []
        for number, fields in enumerate(MESSAGES):
            messages = [{"role": "user", "content": f"Tell {number}"}]
            body = {"model": "scripted", "max_tokens": 100, "stream": True, "seed": number}
            body |= {"messages": messages} | fields
            request = httpx.stream(
                "POST",
                f"{server.url}/v1/messages",
                json=body,
                headers={"X-Request-Id": f"mine-{number}"},
                timeout=60,
            )
            streams.append(stack.enter_context(request))
            assert streams[-1].status_code == 200, streams[-1].read()
        yield streams


def message_events(found: list[tuple[str, str]]) -> list[Any]:
    """Return what the events of a whole message say."""
    datas = [json.loads(data) for _, data in found]
    assert [datas[0]["type"], datas[-1]["type"]] == ["message_start", "message_stop"]
    return datas


def test_messages_go_on_after_the_server_was_killed(
    serve: Serve, scripted_model: Path, tmp_path: Path
) -> None:
    """Each event of each stream comes once, and is the one of a server that nobody has killed."""
    options = ("--model", str(scripted_model), *SCRIPTED, "--served-model-name", "scripted")
    options = (*options, "--reasoning-parser", "think", "--journal")
    undisturbed = serve(*options, str(tmp_path / "undisturbed.sqlite"))
    with message_streams(undisturbed) as streams:
        whole = [message_events(chunks(stream)) for stream in streams]
    server = serve(*options, str(tmp_path / "answers.sqlite"))
    with message_streams(server) as streams:
        seen = [chunks(stream, most=5 + 7 * number) for number, stream in enumerate(streams)]
        server.process.kill()
        server.wait()
    again = serve(*options, str(tmp_path / "answers.sqlite"))
    for number, first in enumerate(seen):
        id, _, last = first[-1][0].rpartition(":")
        assert (id, int(last) + 1) == (f"msg_mine-{number}", len(first))
        place = f"{again.url}/v1/messages/{id}?stream=true"
        with httpx.stream("GET", place, headers={"Last-Event-ID": first[-1][0]}, timeout=60) as response:
            assert response.status_code == 200, response.read()
            rest = chunks(response)
        assert [name for name, _ in first + rest] == [f"{id}:{n}" for n in range(len(first + rest))]
        assert message_events(first + rest) == whole[number]
    assert "going on with the answers of an earlier run" in again.errors()
    (text,) = (each["text"] for each in httpx.get(f"{again.url}/v1/messages/msg_mine-0").json()["content"])
    assert text == "".join(each.get("delta", {}).get("text", "") for each in whole[0])
