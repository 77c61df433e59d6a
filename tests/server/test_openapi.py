"""The OpenAPI document is complete and true: a fuzzer that relies on it finds no contradiction."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import requests
import trio
from fake_engine import FakeEngine, serving

from ullm.config import ServerConfig
from ullm.server import create_app
from ullm.server.api.openapi import openapi_document
from ullm.server.api.route import Access
from ullm.server.routes.table import ROUTES, access_of

ADMIN_KEY = "secret"
EXAMPLES = [10, pytest.param(100, marks=pytest.mark.long)]
EXPECTED = {
    ("/", "get"),
    ("/docs", "get"),
    ("/load", "get"),
    ("/ping", "get"),
    ("/ping", "post"),
    ("/tokenizer_info", "get"),
    ("/v1", "get"),
    ("/admin/faults", "delete"),
    ("/admin/faults", "get"),
    ("/admin/faults", "post"),
    ("/admin/reload", "post"),
    ("/admin/shutdown", "post"),
    ("/admin/tree", "get"),
    ("/backend", "get"),
    ("/detokenize", "post"),
    ("/health", "get"),
    ("/inference", "post"),
    ("/is_sleeping", "get"),
    ("/live", "get"),
    ("/metrics", "get"),
    ("/openapi.json", "get"),
    ("/ready", "get"),
    ("/sleep", "post"),
    ("/tokenize", "post"),
    ("/v1/chat/completions", "post"),
    ("/v1/chat/completions/{id}", "delete"),
    ("/v1/chat/completions/{id}", "get"),
    ("/v1/completions", "post"),
    ("/v1/load_lora_adapter", "post"),
    ("/v1/embeddings", "post"),
    ("/v1/messages", "post"),
    ("/v1/messages/count_tokens", "post"),
    ("/v1/completions/{id}", "delete"),
    ("/v1/messages/{id}", "delete"),
    ("/v1/completions/{id}", "get"),
    ("/v1/messages/{id}", "get"),
    ("/v1/models", "get"),
    ("/v1/models/{model}", "get"),
    ("/v1/rerank", "post"),
    ("/v1/responses", "post"),
    ("/v1/responses/{id}", "delete"),
    ("/v1/responses/{id}", "get"),
    ("/v1/responses/{id}/cancel", "post"),
    ("/v1/responses/{id}/input_items", "get"),
    ("/v1/unload_lora_adapter", "post"),
    ("/v1/score", "post"),
    ("/version", "get"),
    ("/wake", "post"),
    ("/wake_up", "post"),
}
BODIES = sorted(
    path for path, method in EXPECTED if method == "post" and not path.endswith(("/cancel", "/ping"))
)
"""Paths of operations that take a body, in which something can be wrong."""
HEALTH = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in a thread of its own, because the fuzzer is synchronous."""
    addresses: list[str] = []
    ready = threading.Event()
    stop: list[Any] = []

    async def main() -> None:
        token, event = trio.lowlevel.current_trio_token(), trio.Event()
        async with serving(FakeEngine(), admin_key=ADMIN_KEY) as address:
            addresses.append(address)
            stop.append(lambda: token.run_sync_soon(event.set))
            ready.set()
            await event.wait()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert ready.wait(60)
    yield addresses[0]
    stop[0]()
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def operations() -> dict[tuple[str, str], Any]:
    """The document's operations, as the fuzzer reads them."""
    import schemathesis  # takes seconds, which those that only collect tests need not spend

    schema = schemathesis.openapi.from_dict(openapi_document(ROUTES))
    found = [result.ok() for result in schema.get_all_operations()]
    return {(operation.path, operation.method): operation for operation in found}


def test_the_fuzzer_finds_all_operations(operations: dict[tuple[str, str], Any]) -> None:
    assert set(operations) == EXPECTED


@pytest.mark.process
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize(("path", "method"), sorted(EXPECTED))
def test_what_the_document_allows(
    url: str, operations: dict[tuple[str, str], Any], path: str, method: str, examples: int
) -> None:
    fuzz(url, operations[path, method], "POSITIVE", examples)


@pytest.mark.process
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("path", BODIES)
def test_what_the_document_forbids(
    url: str, operations: dict[tuple[str, str], Any], path: str, examples: int
) -> None:
    fuzz(url, operations[path, "post"], "NEGATIVE", examples)


def fuzz(url: str, operation: Any, mode: str, examples: int) -> None:
    import schemathesis
    from schemathesis.specs.openapi import checks

    what = [
        schemathesis.checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        checks.response_schema_conformance,
    ]
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {ADMIN_KEY}"

        @hypothesis.given(operation.as_strategy(schemathesis.GenerationMode[mode]))
        @hypothesis.settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=HEALTH,
        )
        def run(case: Any) -> None:
            response = case.call(base_url=url, session=session)
            case.validate_response(response, checks=what)

        run()


async def test_every_route_is_documented(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The app serves what the table says, and the document that it serves names all of it."""
    document = (await client.get("/openapi.json")).json()
    served = {
        (re.sub(r"<path:(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in create_app(engine, ServerConfig()).url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    documented = {(path, method) for path, item in document["paths"].items() for method in item}
    assert served == documented == EXPECTED


def test_a_key_is_documented_where_it_is_needed() -> None:
    document = openapi_document(ROUTES, secured=True)
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    secured = {
        path
        for path, found in document["paths"].items()
        if next(iter(found.values())).get("security") == [{"key": []}, {"key_header": []}]
    }
    assert secured == {
        "/v1/models",
        "/v1/models/{model}",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/rerank",
        "/v1/score",
        "/v1/chat/completions/{id}",
        "/v1/completions/{id}",
        "/v1/messages/{id}",
        "/v1/responses",
        "/v1/responses/{id}",
        "/v1/responses/{id}/cancel",
        "/v1/responses/{id}/input_items",
        "/tokenize",
        "/detokenize",
        "/inference",
        "/backend",
        "/tokenizer_info",
        "/load",
    }
    admin = {path for path in document["paths"] if access_of(path) is Access.ADMIN}
    assert {"/sleep", "/wake", "/wake_up", "/admin/shutdown", "/admin/tree"} <= admin
    for path in admin:
        for operation in document["paths"][path].values():
            assert operation["security"] == [{"admin": []}]
            assert {"401", "403"} <= set(operation["responses"])
    assert "401" in document["paths"]["/tokenize"]["post"]["responses"]
    assert "401" not in document["paths"]["/live"]["get"]["responses"]
