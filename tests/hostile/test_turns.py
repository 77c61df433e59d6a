"""A client does not starve beside one that sends much more."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.hostile.catalogue import TEXT
from tests.support.server import SCRIPTED, Server, starting_servers
from tests.support.waiting import eventually
from ullm.testing import write_scripted_model

pytestmark = pytest.mark.process


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_scripted_model(tmp_path_factory.mktemp("turns") / "scripted", step_seconds=0.005)
    keys = ("--api-key", "greedy", "--api-key", "modest", "--max-bs", "1")
    with starting_servers() as start:
        yield start("--model", str(model), *SCRIPTED, "--standby-workers", "0", *keys)


def test_a_client_does_not_starve_beside_one_that_sends_more(server: Server) -> None:
    order: list[str] = []

    def send(key: str, **fields: Any) -> None:
        body = {"prompt": "hi", "max_tokens": 20, "ignore_eos": True, **fields}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(server.url + TEXT, json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        order.append(key)

    def admitted() -> bool:
        metrics = httpx.get(f"{server.url}/metrics").text
        waiting = [line for line in metrics.splitlines() if line.startswith("ullm_num_requests_waiting ")]
        return float(waiting[0].split()[1]) >= 10

    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(send, "greedy", n=4) for _ in range(4)]
        eventually(admitted)
        sent.append(pool.submit(send, "modest"))
        for each in sent:
            each.result()
    assert order.index("modest") <= 1  # and not behind all of them
