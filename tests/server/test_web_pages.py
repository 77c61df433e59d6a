"""Strange web pages, which have the browsers of this machine call a server that no key protects."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import trio
from asgi_call import call
from fake_engine import FakeEngine, serving

from ullm.config import ServerConfig
from ullm.errors import ConfigError
from ullm.server import create_app

ASK = {"prompt": "hi", "max_tokens": 3}
REBOUND = {"Host": "rebound.example:8000"}
STRANGE = {"Origin": "https://strange.example"}


async def status(url: str, headers: dict[str, str], path: str = "/v1/completions") -> tuple[int, str | None]:
    """Return the status of an answer, and the code of an error."""
    async with httpx.AsyncClient() as client:
        if path == "/v1/completions":
            answer = await client.post(f"{url}{path}", json=ASK, headers=headers)
        else:
            answer = await client.get(f"{url}{path}", headers=headers)
    return answer.status_code, answer.json()["error"]["code"] if answer.is_error else None


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (REBOUND, "foreign_host"),
        ({"Host": "localhost.strange.example"}, "foreign_host"),
        ({"Host": "127.0.0.1.strange.example"}, "foreign_host"),
        (STRANGE, "foreign_origin"),
        ({"Origin": "null"}, "foreign_origin"),
        ({"Origin": "http://localhost:9"}, "foreign_origin"),
        ({"Origin": "app://somewhere"}, "foreign_origin"),
        ({"Host": "localhost", "Origin": "http://localhost.strange.example"}, "foreign_origin"),
        ({}, None),
        ({"Host": "localhost"}, None),
        ({"Host": "LOCALHOST.:1"}, None),
        ({"Host": "my.localhost:8000"}, None),
        ({"Host": "[::1]:8000"}, None),
        ({"Host": "10.0.0.1"}, None),  # only names can be rebound
        ({"Host": "localhost:5", "Origin": "http://localhost:5"}, None),
        ({"Host": "localhost:5", "Origin": "https://localhost:5"}, None),  # TLS ends at a proxy
    ],
)
async def test_who_is_let_in_on_loopback_without_a_key(
    engine: FakeEngine, url: str, headers: dict[str, str], expected: str | None
) -> None:
    assert await status(url, headers) == (403 if expected else 200, expected)
    assert (await status(url, headers, "/live"))[1] == expected
    assert len(engine.admitted) == (expected is None)


async def test_a_preflight_of_a_strange_page_is_refused(url: str) -> None:
    async with httpx.AsyncClient() as client:
        asked = {**STRANGE, "Access-Control-Request-Method": "POST"}
        answer = await client.options(f"{url}/v1/completions", headers=asked)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert "--cors-origins" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "headers", "expected"),
    [
        ({"cors_origins": ("https://strange.example",)}, STRANGE, None),
        ({"cors_origins": ("https://strange.example",)}, {"Origin": "https://b.example"}, "foreign_origin"),
        ({"cors_origins": ("*",)}, STRANGE, None),
        ({"cors_origins": ("*",)}, REBOUND, "foreign_host"),
        ({"allowed_hosts": ("rebound.example",)}, REBOUND, None),
        ({"allowed_hosts": ("Rebound.example",)}, {"Host": "REBOUND.example."}, None),
        ({"allowed_hosts": ("*.example",)}, REBOUND, None),
        ({"allowed_hosts": ("*.example",)}, {"Host": "example"}, "foreign_host"),
        ({"allowed_hosts": ("*",)}, REBOUND, None),
        ({"allowed_hosts": ("other.example",)}, REBOUND, "foreign_host"),
        ({"allowed_hosts": ("other.example",)}, {"Host": "localhost"}, None),
        ({"allowed_hosts": ("rebound.example",)}, {**REBOUND, **STRANGE}, "foreign_origin"),
    ],
)
async def test_options_let_more_in(
    engine: FakeEngine, options: dict[str, Any], headers: dict[str, str], expected: str | None
) -> None:
    async with serving(engine, **options) as url:
        assert (await status(url, headers))[1] == expected


async def test_a_key_is_enough(engine: FakeEngine) -> None:
    """No page knows it. Hosts are checked all the same if they are given."""
    key = {"Authorization": "Bearer k"}
    async with serving(engine, api_key="k") as url:
        assert await status(url, {**REBOUND, **STRANGE, **key}) == (200, None)
    async with serving(engine, api_key="k", allowed_hosts=("a.example",)) as url:
        assert await status(url, {**REBOUND, **key}) == (403, "foreign_host")


async def test_a_server_that_other_machines_reach_is_called_as_they_call_it(engine: FakeEngine) -> None:
    async with serving(engine, host="0.0.0.0") as url:
        assert await status(url.replace("0.0.0.0", "127.0.0.1"), {**REBOUND, **STRANGE}) == (200, None)
    async with serving(engine, host="0.0.0.0", allowed_hosts=("a.example",)) as url:
        assert (await status(url.replace("0.0.0.0", "127.0.0.1"), REBOUND))[1] == "foreign_host"


@pytest.mark.parametrize(
    ("server", "root", "expected"),
    [
        (("127.0.0.1", 8000), "", 403),
        (("::1", 8000), "", 403),
        (("10.0.0.5", 8000), "", 200),
        (("testserver", 80), "", 200),
        (None, "", 200),  # a unix socket
        (("127.0.0.1", 8000), "/llm", 200),  # an application around it decides
    ],
)
async def test_under_other_servers_the_address_of_the_connection_decides(
    engine: FakeEngine, server: tuple[str, int] | None, root: str, expected: int
) -> None:
    app = create_app(engine, ServerConfig())
    answer = await call(app, f"{root}/v1/completions", ASK, "rebound.example", server=server, root_path=root)
    assert answer.status == expected


@pytest.mark.parametrize("name", ["https://a.example", "a.example:8000", "a.example/x", "", "a.*"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-hosts"):
        ServerConfig(allowed_hosts=(name,))


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON;charset=UTF-8", 200),
        ("application/vnd.api+json", 200),
        (None, 415),
        ("", 415),
        ("text/plain", 415),
        ("text/plain; application/json", 415),
        ("application/x-www-form-urlencoded", 415),
    ],
)
async def test_what_pages_may_send_without_leave_is_no_json(
    url: str, content_type: str | None, expected: int
) -> None:
    """Browsers send these three types, or none, to any server without asking it (Fetch standard, CORS)."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{url}/v1/completions", content=json.dumps(ASK), headers=headers)
    assert answer.status_code == expected
    if expected == 415:
        assert answer.json()["error"]["code"] == "unsupported_media_type"
        assert "application/json" in answer.json()["error"]["message"]


async def test_an_empty_body_needs_no_type(engine: FakeEngine) -> None:
    async with serving(engine, admin_key="k") as url, httpx.AsyncClient() as client:
        with trio.fail_after(60):
            answer = await client.post(f"{url}/wake", headers={"Authorization": "Bearer k"})
    assert answer.status_code == 200
