"""Stored answers behind several front ends: any of them shows, streams, cancels and forgets all of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_front_ends import part, parts, start_engine
from tests.e2e.test_stored_answers import (
    STREAMS,
    begin,
    chunks,
    events,
    plain_request,
    plain_streams,
    said,
    text_of,
)
from tests.support.server import SCRIPTED, Serve, Server
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

KEYS = ("alice-alice", "bob-bob")


def launch(serve: Serve, model: Path, journal: Path, *options: str) -> Server:
    return serve(
        "--model", str(model), *SCRIPTED, "--api-server-count", "2", "--journal", str(journal), *options
    )


@pytest.fixture
def launched(serve: Serve, scripted_model: Path, tmp_path: Path) -> Server:
    """An engine, two front ends on one port, and the process that keeps their answers."""
    return launch(serve, scripted_model, tmp_path / "answers.sqlite")


def uncounted(found: list[Any]) -> list[Any]:
    """Return what events say, but for the number of cached tokens, of which a second asking has more."""
    usages = [each["usage"] for each in found if each.get("usage")]
    for usage in usages:
        del usage["prompt_tokens_details"]
    return found


def on_each(server: Server, do: Callable[[], Any]) -> list[Any]:
    """Do something by either front end: while one of them is suspended, it accepts nothing."""
    found = []
    for other in parts(server, "front-end"):
        other.suspend()
        try:
            found.append(do())
        finally:
            other.resume()
    return found


def test_a_front_end_is_killed_with_an_answer_in_the_background(launched: Server) -> None:
    """The stream is taken up at any event through another one, and each event comes once."""
    undisturbed = text_of(events(launched, begin(launched, 1)))
    first, second = parts(launched, "front-end")
    second.suspend()
    id = begin(launched, 1)
    seen = events(launched, id, most=20)
    first.kill()
    second.resume()
    rest = events(launched, id, seen[-1]["sequence_number"])
    numbers = [event["sequence_number"] for event in seen + rest]
    assert numbers == sorted(set(numbers))
    assert text_of(seen + rest) == undisturbed
    eventually(lambda: len(parts(launched, "front-end")) == 2)
    place = f"{launched.url}/v1/responses/{id}"
    for shown in on_each(launched, lambda: httpx.get(place).json()):
        assert shown["output"][0]["content"][0]["text"] == undisturbed
        assert shown["status"] == "incomplete"
    assert (
        on_each(launched, lambda: httpx.get(place + "/input_items").json()["data"][0]["role"]) == ["user"] * 2
    )
    assert httpx.delete(place).json()["deleted"]
    assert on_each(launched, lambda: httpx.get(place).status_code) == [404, 404]


def test_an_answer_goes_on_by_another_turn_and_is_cancelled_from_anywhere(launched: Server) -> None:
    """The conversation that a front end has begun is known to the other."""

    def ask(**fields: Any) -> dict[str, Any]:
        body = {"input": "Tell", "max_output_tokens": 8, "temperature": 0} | fields
        response = httpx.post(f"{launched.url}/v1/responses", json=body, timeout=60)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    begun = ask()
    longer = on_each(launched, lambda: ask(previous_response_id=begun["id"], store=False))
    assert [each["usage"]["input_tokens"] > begun["usage"]["input_tokens"] for each in longer] == [True, True]
    assert on_each(
        launched, lambda: httpx.get(f"{launched.url}/v1/responses/{longer[0]['id']}").status_code
    ) == [
        404,
        404,
    ]
    id = ask(background=True, max_output_tokens=900)["id"]
    cancelled = on_each(
        launched, lambda: httpx.post(f"{launched.url}/v1/responses/{id}/cancel").json()["status"]
    )
    assert cancelled == ["cancelled", "cancelled"]


def test_a_plain_answer_ends_with_its_client(serve: Serve, scripted_model: Path) -> None:
    """Without a journal, as on a server of one process; the process that makes it notices that they leave."""
    server = serve("--model", str(scripted_model), *SCRIPTED, "--api-server-count", "2")
    body = {"input": "Tell", "max_output_tokens": 900, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=60) as response:
        line = next(line for line in response.iter_lines() if line.startswith("data: {"))
    place = f"{server.url}/v1/responses/{json.loads(line[6:])['response']['id']}"
    eventually(lambda: httpx.get(place).json()["status"] == "cancelled")


def test_the_engine_is_killed_with_answers_in_the_background(launched: Server) -> None:
    undisturbed = [text_of(events(launched, begin(launched, number))) for number in range(2)]
    ids = [begin(launched, number) for number in range(2)]
    seen = [events(launched, id, most=20) for id in ids]
    part(launched, "engine").kill()
    rest = [events(launched, id, first[-1]["sequence_number"]) for id, first in zip(ids, seen, strict=True)]
    assert [text_of(first + later) for first, later in zip(seen, rest, strict=True)] == undisturbed


def test_the_process_that_keeps_answers_is_killed(launched: Server) -> None:
    """Its streams say so, and go on once it is there again; other streams notice nothing."""
    undisturbed = text_of(events(launched, begin(launched, 1, max_output_tokens=900)))
    id = begin(launched, 1, max_output_tokens=900)
    engine, keeper = part(launched, "engine"), part(launched, "answers")
    with httpx.stream("GET", f"{launched.url}/v1/responses/{id}?stream=true", timeout=60) as response:
        lines = response.iter_lines()
        next(line for line in lines if "output_text.delta" in line)
        engine.suspend()  # so that the answer does not end before
        keeper.kill()
        last = [line for line in lines if line.startswith("data: {")][-1]
    engine.resume()
    assert '"interrupted"' in last
    assert text_of(events(launched, id)) == undisturbed


def test_plain_streams_are_taken_up_from_any_front_end(launched: Server) -> None:
    with plain_streams(launched) as streams:
        whole = [uncounted(said(chunks(stream))) for stream in streams]
    with plain_streams(launched) as streams:
        seen = [chunks(stream, most=10 + 2 * number) for number, stream in enumerate(streams)]
    for number in range(STREAMS):
        path, body = plain_request(number)
        id, _, _ = seen[number][-1][0].rpartition(":")
        headers = {"Last-Event-ID": seen[number][-1][0]}
        with httpx.stream("POST", launched.url + path, json=body, headers=headers, timeout=60) as response:
            rest = chunks(response)
        assert [name for name, _ in seen[number] + rest] == [
            f"{id}:{n}" for n in range(len(seen[number] + rest))
        ]
        assert uncounted(said(seen[number] + rest)) == whole[number]


@pytest.mark.parametrize("by", ["signal", "admin"])
def test_a_stop_interrupts_them_and_they_go_on_after_the_next_start(
    serve: Serve, scripted_model: Path, tmp_path: Path, by: str
) -> None:
    """Whether the launcher is stopped, or its engine."""
    options = ("--shutdown-timeout", "0", "--admin-key", "admin-admin")
    server = launch(serve, scripted_model, tmp_path / "answers.sqlite", *options)
    undisturbed = text_of(events(server, begin(server, 1)))
    id = begin(server, 1)
    events(server, id, most=5)
    if by == "signal":
        server.signal(signal.SIGTERM)
    else:
        keys = {"Authorization": "Bearer admin-admin"}
        httpx.post(f"{server.url}/admin/shutdown", headers=keys, json={"timeout": 0}).raise_for_status()
    assert server.wait() == 0
    again = launch(serve, scripted_model, tmp_path / "answers.sqlite")
    assert text_of(events(again, id)) == undisturbed


def test_a_key_sees_only_what_it_asked_for(serve: Serve, scripted_model: Path, tmp_path: Path) -> None:
    """Whatever headers it sends; by hand, with one front end and who keeps its answers."""
    link, answers = f"unix:{tmp_path}/engine", f"unix:{tmp_path}/answers"
    start_engine(serve, scripted_model, link)
    keys = [option for key in KEYS for option in ("--api-key", key)]
    front_end = serve("--connect", link, "--answers", answers, *keys)
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    body = {"input": "Tell", "max_output_tokens": 4}
    early = httpx.post(f"{front_end.url}/v1/responses", json=body, headers=alice, timeout=60)
    assert (early.status_code, early.json()["error"]["code"]) == (503, "answers_away")
    serve("--connect", link, "--answers-listen", answers, ready=r"^ready: stored answers .* at (\S+),")
    assert (tmp_path / "answers").stat().st_mode & 0o777 == 0o600
    begun = httpx.post(f"{front_end.url}/v1/responses", json=body, headers=alice, timeout=60).json()
    place = f"{front_end.url}/v1/responses/{begun['id']}"
    assert httpx.get(place, headers=alice).json() == begun
    assert httpx.get(place, headers=bob).status_code == 404
    assert httpx.get(place, headers=bob | {"X-Ullm-Owner": "", "X-Ullm-Client": "x"}).status_code == 404
    assert httpx.get(place).status_code == 401
    assert httpx.delete(place, headers=bob).status_code == 404
    assert httpx.get(place, headers=alice).status_code == 200
