"""The admin endpoints: closed by default, opened by a key of their own, or on a listener of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, serving

from ullm.config import ServerConfig
from ullm.errors import ConfigError, EngineBusy, EngineDead, EngineDraining, ReloadFailed
from ullm.server.api.errors import as_request_error

ENDPOINTS = (
    ("POST", "/sleep"),
    ("POST", "/wake"),
    ("POST", "/wake_up"),
    ("POST", "/admin/shutdown"),
    ("POST", "/admin/reload"),
    ("GET", "/admin/tree"),
    ("GET", "/admin/faults"),
    ("POST", "/admin/faults"),
    ("DELETE", "/admin/faults"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
)


@pytest.fixture
async def admin(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": "Bearer secret"}
    async with (
        serving(engine, admin_key="secret") as url,
        httpx.AsyncClient(base_url=url, headers=headers) as client,
    ):
        yield client


async def refusals(client: httpx.AsyncClient, **headers: str) -> set[tuple[int, str]]:
    found = [await client.request(method, path, headers=headers) for method, path in ENDPOINTS]
    return {(response.status_code, response.json()["error"]["code"]) for response in found}


async def test_closed_by_default(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert await refusals(client) == {(403, "admin_disabled")}
    assert await refusals(client, Authorization="Bearer None") == {(403, "admin_disabled")}
    assert (await client.get("/admin/nope")).status_code == 403
    message = (await client.post("/sleep")).json()["error"]["message"]
    assert "--admin-key" in message
    assert "--admin-listen" in message
    assert engine.asked == []


async def test_each_key_opens_its_own(engine: FakeEngine) -> None:
    async with (
        serving(engine, api_key="api", admin_key="admin") as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        wrong = (None, "api", "admi", "admin ", "Admin")
        for key in wrong:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            if key != "admin ":  # h11 takes white space off the ends of headers
                assert await refusals(client, **headers) == {(401, "invalid_admin_key")}
        refused = await client.post("/wake")
        assert refused.headers["www-authenticate"] == "Bearer"
        admin, api = {"Authorization": "Bearer admin"}, {"Authorization": "Bearer api"}
        assert (await client.get("/admin/tree", headers=admin)).status_code == 200
        assert (await client.get("/admin/nope", headers=admin)).status_code == 404
        assert (await client.get("/v1/models", headers=admin)).status_code == 401
        assert (await client.get("/v1/models", headers=api)).status_code == 200
        assert (await client.get("/is_sleeping")).status_code == 200
    assert engine.asked == []


def test_equal_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="--admin-key"):
        ServerConfig(api_key="same", admin_key="same")


@pytest.mark.parametrize(
    ("query", "body", "asked"),
    [
        ("", None, ("sleep", None, "wait")),
        ("", {}, ("sleep", None, "wait")),
        ("?level=1&mode=abort", None, ("sleep", 1, "abort")),
        ("?level=2", {"mode": "keep"}, ("sleep", 2, "keep")),
        ("?level=1&mode=wait", {"level": 3, "mode": "abort"}, ("sleep", 3, "abort")),
    ],
)
async def test_sleep(
    admin: httpx.AsyncClient, engine: FakeEngine, query: str, body: Any, asked: tuple[Any, ...]
) -> None:
    response = await admin.post(f"/sleep{query}", json=body)
    assert response.status_code == 200
    assert response.json()["state"] == "asleep"
    assert response.json()["level"] == (1 if asked[1] is None else asked[1])
    assert engine.asked == [asked]
    assert (await admin.get("/is_sleeping")).json()["is_sleeping"] is True
    for path in ("/wake", "/wake_up"):
        assert (await admin.post(path)).json()["state"] == "awake"
    assert (await admin.get("/is_sleeping")).json() == {"is_sleeping": False, "level": None}


@pytest.mark.parametrize(
    ("query", "body", "param"),
    [
        ("?level=4", None, "level"),
        ("?level=deep", None, "level"),
        ("?mode=now", None, "mode"),
        ("?tags=weights", {"level": 0}, "tags"),
        ("?level=1&level=2", None, "level"),
        ("", {"level": -1}, "level"),
        ("", {"level": "1"}, "level"),
        ("", {"mode": "now"}, "mode"),
    ],
)
async def test_a_sleep_that_makes_no_sense(
    admin: httpx.AsyncClient, engine: FakeEngine, query: str, body: Any, param: str
) -> None:
    response = await admin.post(f"/sleep{query}", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.asked == []


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
async def test_a_query_that_is_not_acted_on_is_refused(
    admin: httpx.AsyncClient, engine: FakeEngine, method: str, path: str
) -> None:
    response = await admin.request(method, f"{path}?tags=weights&tags=kv_cache")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "tags"
    assert f"{path} does not take tags=weights,kv_cache; " in error["message"]
    assert engine.asked == []


async def test_shutdown(admin: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await admin.post("/admin/shutdown")).json() == {"state": "draining", "timeout": 25.0}
    assert (await admin.post("/admin/shutdown", json={"timeout": 1.5})).json()["timeout"] == 1.5
    assert engine.asked == [("shutdown", None, "admin"), ("shutdown", 1.5, "admin")]
    for timeout in (-1, "soon"):
        refused = await admin.post("/admin/shutdown", json={"timeout": timeout})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "timeout"


async def test_reload(admin: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await admin.post("/admin/reload")).json()["model"] == "/models/fake"
    report = (await admin.post("/admin/reload", json={"model": "/m", "revision": "v2"})).json()
    assert (report["model"], report["revision"], report["replicas"]) == ("/m", "v2", [0])
    assert engine.asked == [("reload", None, None), ("reload", "/m", "v2")]
    assert (await admin.post("/admin/reload", json={"model": ""})).json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ReloadFailed("the new workers did not come up"), 500, "reload_failed"),
        (EngineBusy("overtaken"), 409, "engine_busy"),
        (EngineDraining(), 503, "draining"),
    ],
)
async def test_changes_that_fail(
    admin: httpx.AsyncClient, engine: FakeEngine, error: Exception, status: int, code: str
) -> None:
    engine.busy = error
    for path in ("/sleep", "/wake", "/admin/reload"):
        response = await admin.post(path)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code


async def test_tree(admin: httpx.AsyncClient) -> None:
    tree = (await admin.get("/admin/tree")).json()
    assert tree["state"] == "running"
    assert [(child["name"], child["status"]) for child in tree["children"]] == [
        ("http", "starting"),
        ("replica0", "running"),
    ]
    assert tree["children"][1]["children"] == [
        {
            "name": "workers",
            "status": "running",
            "kind": "worker",
            "restart": "permanent",
            "restarts": 2,
            "children": [],
        }
    ]


async def test_faults(admin: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await admin.get("/admin/faults")).json() == {"armed": [], "fired": []}
    armed = await admin.post("/admin/faults", json={"plan": "worker.step:crash"})
    assert armed.json()["armed"] == ["worker.step:crash"]
    refused = await admin.post("/admin/faults", json={"plan": "nonsense"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "plan"
    assert (await admin.post("/admin/faults")).json()["error"]["code"] == "invalid_json"
    assert (await admin.delete("/admin/faults")).json()["armed"] == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/sleep", {"levl": 3}),
        ("/admin/reload", {"modell": "/x"}),
        ("/wake", {"tags": ["weights"]}),
        ("/wake_up", {"tags": ["weights"]}),
        ("/admin/shutdown", {"seconds": 3}),
        ("/admin/faults", {"plan": "", "seeds": 1}),
    ],
)
async def test_a_field_that_is_not_known_is_an_error(
    admin: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, object]
) -> None:
    response = await admin.post(path, json=body)
    assert response.status_code == 400
    assert list(body)[-1] in response.json()["error"]["message"]
    assert engine.asked == []


def test_several_errors_of_one_request_are_told_as_one() -> None:
    dead = EngineDead("the engine has failed: x")
    group = BaseExceptionGroup("", [BaseExceptionGroup("", [dead]), EngineDead("the engine has failed: x")])
    assert as_request_error(group) is dead


async def test_adapters_are_loaded_served_and_unloaded(admin: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    answer = await admin.post("/v1/load_lora_adapter", json=body)
    assert answer.json() == {"adapters": {"sql": "/adapters/sql"}}
    card = (await admin.get("/v1/models")).json()["data"][-1]
    assert (card["id"], card["root"], card["parent"]) == ("sql", "/adapters/sql", engine.model_name)
    assert (await admin.get("/v1/models/sql")).json() == card
    for path, ask in (
        ("/v1/completions", {"prompt": [5, 6]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
    ):
        answered = await admin.post(path, json={"model": "sql", **ask})
        assert answered.json()["model"] == "sql", answered.text
        assert engine.params[-1].lora == "sql"
        assert (await admin.post(path, json=ask)).json()["model"] == engine.model_name
        assert engine.params[-1].lora is None
    gone = await admin.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert gone.json() == {"adapters": {}}
    refused = await admin.post("/v1/completions", json={"model": "sql", "prompt": [5]})
    assert refused.status_code == 404
    assert (await admin.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})).status_code == 404
    assert (await admin.post("/v1/load_lora_adapter", json={"lora_name": "sql"})).status_code == 400
