"""A model served under several names."""

from __future__ import annotations

import httpx
import pytest
from fake_engine import FakeEngine, serving

from ullm.config import EngineConfig

pytestmark = pytest.mark.process


async def test_all_names_are_answered_and_listed() -> None:
    engine = FakeEngine()
    engine.config = EngineConfig(model="fake", served_model_name=("fake", "gpt-4o"))
    async with serving(engine) as url, httpx.AsyncClient(base_url=url) as client:
        listing = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listing] == ["fake", "gpt-4o"]
        for name in ("fake", "gpt-4o"):
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
            body = {"model": name, "prompt": "hi", "max_tokens": 2}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200
            assert answer.json()["model"] == "fake"  # as vLLM does, whatever name was asked for
        refusal = await client.get("/v1/models/other")
        assert refusal.status_code == 404
        assert "serves 'fake', 'gpt-4o'" in refusal.json()["error"]["message"]


@pytest.mark.parametrize("given", ["owner/fake", "/models/fake"])
async def test_the_model_is_served_under_the_name_that_was_given(given: str) -> None:
    engine = FakeEngine()
    engine.config = EngineConfig(model=given)
    async with serving(engine) as url, httpx.AsyncClient(base_url=url) as client:
        listing = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listing] == ["fake", given]
        for name in ("fake", given):
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
            answer = await client.post("/v1/completions", json={"model": name, "prompt": "hi"})
            assert answer.status_code == 200
