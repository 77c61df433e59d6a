"""Pages for people, wrong paths, and routes under the names of other servers."""

from __future__ import annotations

import httpx
import pytest
from fake_engine import FakeEngine, serving

pytestmark = pytest.mark.process


async def test_pages(engine: FakeEngine) -> None:
    async with serving(engine, api_key="k") as url, httpx.AsyncClient(base_url=url) as client:
        for path in ("/", "/v1", "/docs"):
            page = await client.get(path)
            assert page.status_code == 200
            assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "<code>fake</code>" in (await client.get("/")).text
        assert "/v1/chat/completions" in (await client.get("/docs")).text


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/helth", "/health"),
    ],
)
async def test_a_wrong_path_is_named_with_the_nearest_route(
    client: httpx.AsyncClient, path: str, nearest: str
) -> None:
    answer = await client.post(path, json={})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == f"there is no route {path!r}; did you mean {nearest}?"


async def test_a_path_near_to_nothing(client: httpx.AsyncClient) -> None:
    message = (await client.get("/" + "%0A" * 300)).json()["error"]["message"]
    assert message.startswith("there is no route '/\\n")
    assert message.endswith("GET /docs lists all")
    assert len(message) < 300


async def test_load_ping_and_tokenizer(client: httpx.AsyncClient) -> None:
    assert (await client.get("/load")).json() == {"server_load": 0, "running": 0, "waiting": 0}
    for method in ("GET", "POST"):
        assert (await client.request(method, "/ping")).json()["status"] == "ready"
    assert (await client.get("/tokenizer_info")).json()["tokenizer_class"] == "ByteTokenizer"
