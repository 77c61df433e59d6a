"""New workers take over under load: no request fails, none says anything else."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import SCRIPTED, Serve, Server, is_gone, starting_servers
from tests.support.streams import Stream, texts
from tests.support.waiting import SECONDS, eventually
from ullm.testing import write_scripted_model

pytestmark = pytest.mark.process


class Load:
    """Requests without a pause, each as the one before has ended."""

    def __init__(self, server: Server, clients: int = 6) -> None:
        self.ended: list[Stream] = []
        self._server, self._leaving = server, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=[number]) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        while not self._leaving.is_set():
            self.ended.append(Stream(self._server, 60, [300 + number], stream=number % 2 == 0).join())

    def wait_for(self, more: int) -> None:
        """Wait until ``more`` further requests have ended."""
        wanted = len(self.ended) + more
        eventually(lambda: len(self.ended) >= wanted, SECONDS)

    def stop(self) -> None:
        """Wait for the last ones."""
        self._leaving.set()
        for thread in self._threads:
            thread.join(30)


@contextmanager
def load(server: Server) -> Iterator[Load]:
    """Afterwards: each request was served, and the same prompt has always got the same text."""
    running = Load(server)
    try:
        running.wait_for(6)
        yield running
        running.wait_for(12)
    finally:
        running.stop()
    texts(running.ended)
    assert len({(stream.prompt[0], stream.text) for stream in running.ended}) == 6


def reloads(server: Server, outcome: str = "succeeded") -> float:
    return server.metric(f'ullm_reloads_total{{outcome="{outcome}"}}')


def has_reloaded(server: Server, times: float) -> bool:
    return reloads(server) == times


def pids(server: Server) -> set[int]:
    return {pid for replica in server.replicas() for pid in replica["worker_pids"]}


@pytest.fixture(scope="module")
def server(scripted_model: Path) -> Iterator[Server]:
    """A server that all reloads leave as it was."""
    with starting_servers() as start:
        yield start("--model", str(scripted_model), *SCRIPTED, "--standby-workers", "0")


@pytest.mark.parametrize(
    ("replicas", "how"),
    [
        (1, "SIGHUP"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [(2, "admin"), (1, "admin"), (2, "SIGHUP")]
        ),
    ],
)
def test_under_load_no_request_fails(serve: Serve, scripted_model: Path, how: str, replicas: int) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--replicas", str(replicas))
    first, workers = pids(server), server.workers()
    with load(server):
        for number in (1, 2):
            if how == "SIGHUP":
                server.signal(signal.SIGHUP)
            else:
                answer = server.admin("POST", "/admin/reload")
                assert (answer.status_code, len(answer.json()["replicas"])) == (200, replicas)
            eventually(partial(has_reloaded, server, number))
            assert server.get("/ready").status_code == 200
    assert not pids(server) & first
    assert server.metric("ullm_worker_restarts_total") == 0
    eventually(lambda: all(is_gone(process) for process in workers if process.pid in first))


def test_threads_are_replaced_too(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--transport", "thread")
    with load(server):
        assert server.admin("POST", "/admin/reload").status_code == 200


def test_the_old_workers_serve_on_if_the_new_ones_do_not_come_up(
    server: Server, scripted_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(scripted_model, broken)
    (broken / "config.json").write_text("{")
    first, failed = pids(server), reloads(server, "failed")
    with load(server):
        refused = server.admin("POST", "/admin/reload", {"model": str(broken)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "reload_failed")
        assert "config.json" in refused.json()["error"]["message"]
        missing = server.admin("POST", "/admin/reload", {"model": str(tmp_path / "nothing")})
        assert missing.json()["error"]["code"] == "reload_failed"
        (broken / "config.json").unlink()
        os.mkfifo(broken / "config.json")
        endless = server.admin("POST", "/admin/reload", {"model": str(broken)})
        assert endless.json()["error"]["code"] == "reload_failed"
        assert "config.json: is a named pipe" in endless.json()["error"]["message"]
    assert pids(server) == first
    assert reloads(server, "failed") == failed + 3


HELLO = [{"role": "user", "content": "Hello"}]


def post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request that succeeds."""
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60, verify=False)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def chat(server: Server) -> dict[str, Any]:
    """Return the only choice of a chat that is greedy."""
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 12}
    choice: dict[str, Any] = post(server, "/v1/chat/completions", body)["choices"][0]
    return choice


def prompt_text(server: Server) -> str:
    """Return the text that the chat template makes of a conversation."""
    tokens = post(server, "/tokenize", {"messages": HELLO})["tokens"]
    text: str = post(server, "/detokenize", {"tokens": tokens})["prompt"]
    return text


def test_the_new_chat_template_and_end_of_text_are_taken_or_the_reload_is_refused(
    serve: Serve, scripted_model: Path, tmp_path: Path
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    chat_before, prompt_before = chat(server), prompt_text(server)
    assert chat_before["finish_reason"] == "length"
    broken = tmp_path / "broken"
    shutil.copytree(scripted_model, broken)
    (broken / "chat_template.jinja").write_text("fine\n{% if %}")
    workers = pids(server)
    refused = server.admin("POST", "/admin/reload", {"model": str(broken)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "reload_failed")
    message = refused.json()["error"]["message"]
    assert "the model's chat template cannot be used (line 2: " in message
    assert "\n" not in message
    assert (chat(server), prompt_text(server), pids(server)) == (chat_before, prompt_before, workers)
    other = write_scripted_model(tmp_path / "other", eos_after=4, eos_token_id=5)
    (other / "chat_template.jinja").write_text("NEW {{ messages[0]['content'] }}")
    assert server.admin("POST", "/admin/reload", {"model": str(other)}).status_code == 200
    assert prompt_text(server) == "NEW Hello"
    assert chat(server)["finish_reason"] == "stop"
    assert not pids(server) & workers


@pytest.mark.parametrize(
    "plan",
    [
        "worker.start:crash",
        *(pytest.param(plan, marks=pytest.mark.slow) for plan in ("worker.start:oom", "engine.reload:raise")),
    ],
)
def test_new_workers_that_fail_change_nothing(server: Server, plan: str) -> None:
    first = pids(server)
    with load(server):
        server.admin("POST", "/admin/faults", {"plan": plan})
        refused = server.admin("POST", "/admin/reload")
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "reload_failed")
        assert pids(server) == first
        assert server.admin("POST", "/admin/reload").status_code == 200
    assert not pids(server) & first


def test_a_model_that_was_broken_on_disk_is_noticed_at_sighup(
    serve: Serve, scripted_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(scripted_model, model)
    server = serve("--model", str(model), *SCRIPTED)
    with load(server):
        (model / "config.json").rename(tmp_path / "config.json")
        server.signal(signal.SIGHUP)
        server.hear("reload failed; the old workers serve on")
        (tmp_path / "config.json").rename(model / "config.json")
        server.signal(signal.SIGHUP)
        server.hear("reloaded")


def test_asleep_it_wakes_for_it(server: Server) -> None:
    server.admin("POST", "/sleep", {"level": 2})
    assert server.admin("POST", "/admin/reload").status_code == 200
    assert server.state() == "running"
    texts([Stream(server, 20)])
