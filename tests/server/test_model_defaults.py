"""A model's sampling defaults, as every route applies them and ``/v1/models`` shows them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine

from ullm.engine.sampling_defaults import SamplingDefaults

OWN = SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.05, max_tokens=9)
HELLO = [{"role": "user", "content": "hello"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/inference": {"prompt": "hello"},
}


@pytest.mark.parametrize("route", ROUTES)
async def test_a_request_that_names_none_gets_them(
    client: httpx.AsyncClient, engine: FakeEngine, route: str
) -> None:
    engine.sampling_defaults = OWN
    assert (await client.post(route, json=ROUTES[route])).status_code == 200
    params = engine.admitted[-1].params
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.6, 20, 1.05)
    assert params.max_tokens == {"/v1/completions": 16, "/inference": 128}.get(route)


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "/inference"])
async def test_what_a_request_names_counts(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    engine.sampling_defaults = OWN
    await client.post(route, json={**ROUTES[route], "temperature": 0, "top_k": 0})
    params = engine.admitted[-1].params
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0, 0, 1.05)


async def test_models_shows_them(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/v1/models")).json()["data"][0]["sampling_defaults"] == {}
    engine.sampling_defaults = OWN
    assert (await client.get("/v1/models/fake")).json()["sampling_defaults"] == {
        "temperature": 0.6,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_tokens": 9,
    }
