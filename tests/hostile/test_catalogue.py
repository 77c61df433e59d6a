"""Every request of the catalogue is answered as it should be, while the streams of others go on."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.hostile.catalogue import (
    CHAT,
    COSTLY,
    MALFORMED,
    TEMPLATE_DOUBLES,
    TEMPLATE_LOOPS,
    TEXT,
    Hostile,
)
from tests.support.server import SCRIPTED, Server, starting_servers
from ullm.testing import write_scripted_model
from ullm.testing.models import CHAT_TEMPLATE

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("hostile")]

LONGEST_HOLD = 1.0
"""Seconds that any of them may hold the event loop for here, beside other tests; docs/explanation/security.md
says what it takes on a quiet machine."""


class Victim:
    """Reads one long stream in a thread, until it is told to stop; counts what comes."""

    def __init__(self, url: str) -> None:
        self.events: list[str] = []
        self.stopped = False
        self._url = url
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        body = {"prompt": "Hello", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with httpx.Client(timeout=60) as client, client.stream("POST", self._url + TEXT, json=body) as stream:
            for line in stream.iter_lines():
                if self.stopped:
                    break
                if line.startswith("data: "):
                    self.events.append(line)

    def goes_on(self, seconds: float = 10.0) -> bool:
        """Return whether further events come."""
        before, deadline = len(self.events), time.monotonic() + seconds
        while len(self.events) < before + 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        return len(self.events) >= before + 3

    def stop(self) -> None:
        """Have it leave its stream."""
        self.stopped = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_scripted_model(tmp_path_factory.mktemp("hostile") / "scripted", step_seconds=0.005)
    template = TEMPLATE_LOOPS + TEMPLATE_DOUBLES + CHAT_TEMPLATE
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    with starting_servers() as start:
        server = start("--model", str(model), *SCRIPTED, "--standby-workers", "0")
        first = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        httpx.post(server.url + CHAT, json=first).raise_for_status()  # starts what renders chats
        yield server
        metrics = httpx.get(f"{server.url}/metrics").text
    assert sample(metrics, "ullm_event_loop_hold_seconds") < LONGEST_HOLD
    assert sample(metrics, "ullm_worker_restarts_total") == 0


def sample(metrics: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", metrics, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.fixture
def victim(server: Server) -> Iterator[Victim]:
    victim = Victim(server.url)
    assert victim.goes_on()
    yield victim
    victim.stop()
    assert not any('"error"' in event for event in victim.events)


@pytest.mark.parametrize("hostile", [*COSTLY, *MALFORMED], ids=lambda hostile: hostile.name)
def test_the_answer_is_right_and_costs_nobody_else(server: Server, victim: Victim, hostile: Hostile) -> None:
    if "doubles" in hostile.name and sys.platform != "linux":
        pytest.skip("other systems do not limit a process's address space")
    headers = {} if hostile.content_type is None else {"Content-Type": hostile.content_type}
    body = hostile.body()
    with httpx.Client(base_url=server.url, timeout=120) as client:
        began = time.monotonic()
        answer = client.request(hostile.method, hostile.path, content=body, headers=headers)
        seconds = time.monotonic() - began
    assert answer.status_code in hostile.statuses, answer.text[:500]
    assert hostile.says in answer.text
    assert len(answer.content) <= hostile.most_bytes
    assert seconds < hostile.seconds
    assert victim.goes_on()
    assert httpx.get(f"{server.url}/ready").status_code == 200
