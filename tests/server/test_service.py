"""Probes, states, keys, CORS, request ids, metrics, timeouts, and the smaller routes."""

from __future__ import annotations

import hmac
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from asgi_call import call
from fake_engine import ANSWER, CONTEXT_LEN, FakeEngine, serving
from prometheus_client.parser import text_string_to_metric_families

from ullm.config import ServerConfig
from ullm.engine import EngineState
from ullm.engine.status import SleepHealth
from ullm.errors import (
    ActorLost,
    AskTimeout,
    EngineSleeping,
    QueueFull,
    RequestError,
    TooManyTokens,
)
from ullm.server import access, create_app
from ullm.server.metrics import Histogram, Metrics, RequestTimer
from ullm.server.metrics_table import METRICS, MetricSpec, MetricType, reference_rows

PROBES = ("/live", "/ready", "/health")


async def codes(client: httpx.AsyncClient) -> list[int]:
    return [(await client.get(path)).status_code for path in PROBES]


async def test_probes_of_a_running_engine(client: httpx.AsyncClient) -> None:
    assert await codes(client) == [200, 200, 200]
    health = (await client.get("/health")).json()
    assert health["state"] == "running"
    (replica,) = health["replicas"]
    assert (replica["replica"], replica["up"], replica["epoch"], replica["state"]) == (0, True, 1, "up")
    assert replica["round_trip_age"] == 0.5
    assert health["sleep"]["state"] == "awake"
    assert re.match(r"\d+\.\d+", (await client.get("/version")).json()["version"])


async def test_an_engine_that_is_starting() -> None:
    engine = FakeEngine(loaded=False)
    async with serving(engine) as url, httpx.AsyncClient(base_url=url) as client:
        assert await codes(client) == [200, 503, 503]
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] is None
        for path, body in (("/v1/completions", {"prompt": "hi"}), ("/tokenize", {"prompt": "hi"})):
            response = await client.post(path, json=body)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "not_ready"
            assert response.headers["retry-after"] == "1"
        engine.state = EngineState.RUNNING
        assert await codes(client) == [200, 200, 200]
        assert (await client.post("/v1/completions", json={"prompt": "hi"})).status_code == 200


async def test_an_engine_that_is_draining(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.state = EngineState.DRAINING
    assert await codes(client) == [200, 503, 503]
    assert (await client.get("/health")).json()["state"] == "draining"
    response = await client.post("/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert response.headers["connection"] == "close"
    assert int(response.headers["retry-after"]) >= 1


async def test_probes_answer_head_as_get(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for state, expected in ((EngineState.RUNNING, 200), (EngineState.DRAINING, 503)):
        engine.state = state
        for path in ("/ready", "/health"):
            head = await client.head(path)
            assert head.status_code == expected
            assert head.content == b""
            length = len((await client.get(path)).content)
            assert abs(int(head.headers["content-length"]) - length) < 20, "seconds change"
        assert (await client.head("/live")).status_code == 200


async def test_states_are_told_apart(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    async def states() -> set[str]:
        return {(await client.get(path)).json()["state"] for path in PROBES}

    assert await states() == {"running"}
    engine.restarting = True
    assert await states() == {"restarting"}
    assert await codes(client) == [200, 503, 503]
    engine.restarting = False
    engine.asleep = SleepHealth("asleep", 2)
    assert await states() == {"sleeping"}
    assert await codes(client) == [200, 200, 200], "a request would wake it"
    engine.asleep = SleepHealth("asleep", 2, registered=False)
    assert await codes(client) == [200, 503, 503]
    for state in (EngineState.STARTING, EngineState.DRAINING, EngineState.FAILED):
        engine.state = state
        assert await states() == {state.value}


async def test_is_sleeping(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/is_sleeping")).json() == {"is_sleeping": False, "level": None}
    engine.asleep = SleepHealth("asleep", 2)
    assert (await client.get("/is_sleeping")).json() == {"is_sleeping": True, "level": 2}


async def test_an_engine_that_has_failed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.state = EngineState.FAILED
    assert await codes(client) == [503, 503, 503]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull(8, 8, retry_after=1.2), 429, "queue_full"),
        (TooManyTokens(90, 20, 100, retry_after=1.2), 429, "too_many_tokens"),
        (EngineSleeping(), 503, "sleeping"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals(
    client: httpx.AsyncClient, engine: FakeEngine, error: RequestError, status: int, code: str, stream: bool
) -> None:
    engine.refuse = error
    response = await client.post("/v1/completions", json={"prompt": "hi", "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert int(response.headers["retry-after"]) == (2 if status == 429 else 1)
    assert int(response.headers["retry-after-ms"]) == (1200 if status == 429 else 1000)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_on_admission(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    """The number of tokens is known only when the prompt is encoded."""
    engine.refuse_generation = TooManyTokens(90, 20, 100)
    response = await client.post("/v1/completions", json={"prompt": "hi", "stream": stream})
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "too_many_tokens"


@pytest.mark.parametrize("error", [ActorLost("the tokenizer ended"), AskTimeout("no answer")])
async def test_a_part_that_is_being_restarted(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def encode(*args: object, **kwargs: object) -> list[int]:
        raise error

    monkeypatch.setattr(engine._tokenizer, "encode", encode)
    response = await client.post("/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"
    assert response.headers["retry-after"] == "1"


async def test_the_key_guards_the_api_and_not_the_probes(engine: FakeEngine) -> None:
    async with serving(engine, api_key="sésame") as url, httpx.AsyncClient(base_url=url) as client:
        for path in (*PROBES, "/version", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        for key in (None, b"Bearer wrong", b"sesame", b"Bearer s\xe9same", b"Basic c2VzYW1l"):
            headers = {} if key is None else {b"Authorization": key}
            for path in ("/v1/models", "/tokenize", "/v1/nope"):
                response = await client.get(path, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        right = {b"Authorization": "Bearer sésame".encode()}
        assert (await client.get("/v1/models", headers=right)).status_code == 200


async def test_each_of_several_keys_opens_the_api_in_either_header(
    engine: FakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys\nthird\n")
    keys = {"api_key": ("first", "second,half"), "api_key_file": str(file), "admin_key": "admin"}
    caplog.set_level(0)
    async with serving(engine, **keys) as url, httpx.AsyncClient(base_url=url) as client:

        async def status(path: str, **headers: str) -> int:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return (await client.get(path, headers=named)).status_code

        for key in ("first", "second,half", "third"):
            assert await status("/v1/models", Authorization=f"Bearer {key}") == 200
            assert await status("/v1/models", Authorization=f"bearer {key}") == 200
            assert await status("/v1/models", X_Api_Key=key) == 200
            assert await status("/v1/models", X_Api_Key=key, Authorization="Basic eA==") == 200
            assert await status("/admin/tree", Authorization=f"Bearer {key}") == 401
            assert await status("/admin/tree", X_Api_Key=key) == 401
        for key in ("", "firs", "first2", "second", "half", "first,second,half", "# keys", "admin"):
            assert await status("/v1/models", X_Api_Key=key) == 401
            assert await status("/v1/models", Authorization=f"Bearer {key}x") == 401
        assert await status("/admin/tree", Authorization="Bearer admin") == 200
        backend = await client.get("/backend", headers={"X-Api-Key": "first"})
        assert backend.status_code == 200
        tree = await client.get("/admin/tree", headers={"Authorization": "Bearer admin"})
        for key in ("second,half", "third"):
            assert key not in backend.text + tree.text + caplog.text


def test_a_key_is_compared_with_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    digests = access._digests(["a", "longer", "c"])
    assert access._is_among(b"a", digests)
    assert len(compared) == 3
    assert {len(each) for pair in compared for each in pair} == {32}, "their lengths tell nothing"


async def test_request_ids_come_back(client: httpx.AsyncClient) -> None:
    given = await client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    assert given.json()["id"] == "cmpl-mine-1"
    streamed = await client.post(
        "/v1/completions", json={"prompt": "a", "stream": True}, headers={"X-Request-Id": "mine-2"}
    )
    assert streamed.headers["x-request-id"] == "mine-2"
    made = [(await client.get("/live")).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    odd = await client.get("/nope", headers={"X-Request-Id": "a b" * 100})
    assert re.fullmatch("[0-9a-f]{32}", odd.headers["x-request-id"])


async def test_two_requests_may_have_the_same_id(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for _ in range(2):
        response = await client.post(
            "/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "same"}
        )
        assert response.json()["id"] == "cmpl-same"
    first, second = (generation.request_id for generation in engine.admitted)
    assert first != second


@pytest.mark.parametrize("origins", [("https://a.example",), ("*",)])
async def test_cors(engine: FakeEngine, origins: tuple[str, ...]) -> None:
    async with (
        serving(engine, cors_origins=origins, api_key="k") as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        origin = {"Origin": "https://a.example"}
        preflight = await client.options(
            "/v1/completions",
            headers={
                **origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            },
        )
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
        refused = await client.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        other = await client.get("/live", headers={"Origin": "https://b.example"})
        assert ("access-control-allow-origin" in other.headers) is (origins == ("*",))


async def test_no_cors_by_default(engine: FakeEngine) -> None:
    async with serving(engine, api_key="k") as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.get("/live", headers={"Origin": "https://a.example"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


async def test_tokenize_and_back(client: httpx.AsyncClient) -> None:
    body = (await client.post("/tokenize", json={"prompt": "Grüße", "return_token_strs": True})).json()
    assert body["count"] == len(body["tokens"]) == 8
    assert body["max_model_len"] == 512
    assert body["token_strs"][:2] == ["<s>", "G"]
    bare = await client.post("/tokenize", json={"prompt": "Grüße", "add_special_tokens": False})
    assert bare.json()["tokens"] == body["tokens"][1:]
    back = await client.post("/detokenize", json={"tokens": bare.json()["tokens"]})
    assert back.json() == {"prompt": "Grüße"}
    chat = await client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]})
    assert chat.json()["count"] == 1 + len("[user]hi[assistant]")


async def test_metrics(client: httpx.AsyncClient) -> None:
    for _ in range(2):
        await client.post("/v1/completions", json={"prompt": "hi", "stream": True, "max_tokens": 5})
    await client.get("/nope")
    await client.post("/v1/completions", json={"prompt": 5})
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples[("ullm_time_to_first_token_seconds_count",)] == 2
    assert samples[("ullm_inter_token_latency_seconds_count",)] == 8
    assert samples[("ullm_e2e_request_latency_seconds_count",)] == 2
    assert samples[("ullm_request_generation_tokens_sum",)] == 10
    assert samples[("ullm_engine_state", ("state", "running"))] == 1
    assert samples[("ullm_engine_state", ("state", "draining"))] == 0
    assert samples[("ullm_engine_state", ("state", "sleeping"))] == 0
    assert samples[("ullm_sleep_state", ("state", "awake"))] == 1
    assert samples[("ullm_round_trip_age_seconds", ("replica", "0"))] == 0.5
    assert samples[("ullm_replica_up", ("replica", "0"))] == 1
    assert samples[("ullm_sleeps_total", ("level", "1"))] == 2
    assert samples[("ullm_sleeps_total", ("level", "2"))] == 0
    assert samples[("ullm_wakes_total",)] == 3
    assert samples[("ullm_last_sleep_seconds",)] == 0.5
    assert ("ullm_last_wake_seconds",) not in samples
    assert samples[("ullm_bytes_given_back",)] == 1024
    assert samples[("ullm_reloads_total", ("outcome", "failed"))] == 2
    assert samples[("ullm_admitted_tokens",)] == 77
    assert samples[("ullm_draft_tokens_total",)] == 40
    assert samples[("ullm_accepted_tokens_total",)] == 25
    assert samples[("ullm_steps_total",)] == 12
    assert samples[("ullm_kv_cache_usage_ratio",)] == 0.25
    assert samples[("ullm_requests_total", ("finish_reason", "stop"))] == 2
    assert samples[("ullm_generation_tokens_total",)] == 30
    completions = ("method", "POST"), ("route", "/v1/completions")
    assert samples[("ullm_http_responses_total", *completions, ("status", "200"))] == 2
    assert samples[("ullm_http_responses_total", *completions, ("status", "400"))] == 1
    other = ("method", "other"), ("route", "other")
    assert samples[("ullm_http_responses_total", *other, ("status", "404"))] == 1


async def test_every_metric_of_the_table_is_exposed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """With its type, help and labels; and no other metric is."""
    await client.post("/v1/completions", json={"prompt": "hi"})
    families = {
        family.name: family for family in text_string_to_metric_families((await client.get("/metrics")).text)
    }
    without_sample = {"ullm_last_wake_seconds"}
    assert set(families) == {spec.name for spec in METRICS} - without_sample
    for spec in METRICS:
        if spec.name not in without_sample:
            family = families[spec.name]
            assert (family.type, family.documentation) == (spec.type.value, spec.help)
            assert {*family.samples[0].labels} - {"le"} == set(spec.labels)
    assert [row.name for row in reference_rows()] == [spec.exposed_name for spec in METRICS]


async def test_two_apps_have_metrics_of_their_own(client: httpx.AsyncClient) -> None:
    async with serving(FakeEngine()) as url, httpx.AsyncClient(base_url=url) as other:
        await other.post("/v1/completions", json={"prompt": "hi"})
        assert "ullm_time_to_first_token_seconds_count 1.0" in (await other.get("/metrics")).text
        assert "ullm_time_to_first_token_seconds_count 0.0" in (await client.get("/metrics")).text


def test_histogram_buckets_are_cumulative_and_include_their_bound() -> None:
    histogram = Histogram(MetricSpec("h", MetricType.HISTOGRAM, "help", bounds=(1, 2)))
    for value in (0.5, 1, 1.5, 99):
        histogram.observe(value)
    samples = {sample.labels.get("le", sample.name): sample.value for sample in histogram.collect().samples}
    assert samples == {"1.0": 2, "2.0": 3, "+Inf": 4, "h_count": 4, "h_sum": 102}


async def test_latencies_per_token_of_a_chunk(engine: FakeEngine) -> None:
    now = [0.0]
    metrics = Metrics(engine)
    timer = RequestTimer(metrics, clock=lambda: now[0])
    for at, tokens in ((2.0, 1), (3.0, 4), (3.5, 0)):
        now[0] = at
        timer.note((0, 0), tokens)
    timer.end(7, 5)
    assert metrics.first_token._sum == 2
    assert metrics.inter_token._sum == 1
    assert sum(metrics.inter_token._counts) == 4
    assert metrics.end_to_end._sum == 3.5


# --- the deadline of a request -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "header", "expected"),
    [(None, None, None), (None, "2.5", 2.5), (7, "2.5", 7), (7, None, 7), (7, "nonsense", 7)],
)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
async def test_the_timeout_of_field_and_header(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    body: dict[str, Any],
    field: float | None,
    header: str | None,
    expected: float | None,
) -> None:
    headers = {} if header is None else {"X-Request-Timeout": header}
    response = await client.post(path, json={**body, "timeout": field}, headers=headers)
    assert response.status_code == 200
    timeout = engine.admitted[0].params.timeout
    assert timeout is None if expected is None else timeout == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "", "1e999", "1,5"])
async def test_a_wrong_timeout_header(client: httpx.AsyncClient, value: str) -> None:
    for path in ("/v1/completions", "/inference"):
        response = await client.post(path, json={"prompt": "hi"}, headers={"X-Request-Timeout": value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "X-Request-Timeout"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/inference"])
async def test_the_session_header(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    for headers in ({"X-Session-Id": "chat-7"}, {}):
        assert (await client.post(path, json=body, headers=headers)).status_code == 200
    assert engine.sessions == ["chat-7", ""]
    for wrong in ("a b", "x" * 129):
        refused = await client.post(path, json=body, headers={"X-Session-Id": wrong})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "X-Session-Id"


async def test_the_timeout_counts_from_the_arrival(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Encoding counts; a request whose time is over is admitted and ends at once."""
    seconds = [3.0]

    async def slowly(text: str, *, add_special_tokens: bool = True) -> list[int]:
        await trio.sleep(seconds[0])
        return [5, 6]

    monkeypatch.setattr(engine._tokenizer, "encode", slowly)
    app, body = create_app(engine, ServerConfig()), {"prompt": "hi", "timeout": 5}
    await call(app, "/v1/completions", body)
    seconds[0] = 9.0
    await call(app, "/v1/completions", body)
    assert [generation.params.timeout for generation in engine.admitted] == [2.0, 0.0]


# --- /inference and /backend -----------------------------------------------------------------------


async def test_inference(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await client.post("/inference", json={"prompt": "hi", "max_new_tokens": 2})
    assert answer.json() == {
        "text": "Gr",
        "finish_reason": "length",
        "num_prompt_tokens": 3,
        "num_generated_tokens": 2,
    }
    whole = (await client.post("/inference", json={"prompt": "hi"})).json()
    assert (whole["text"], whole["finish_reason"]) == (ANSWER, "stop")
    await client.post("/inference", json={"prompt": "x" * 500, "max_new_tokens": 400})
    assert engine.admitted[-1].params.max_tokens == CONTEXT_LEN - 501
    for body, param in (
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "x" * 600}, "prompt"),
    ):
        refused = await client.post("/inference", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param


async def test_backend() -> None:
    engine = FakeEngine(loaded=False)
    async with serving(engine, api_key="k") as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/backend")).status_code == 401
        assert (await client.post("/inference", json={"prompt": "x"})).status_code == 401
        client.headers["Authorization"] = "Bearer k"
        found = (await client.get("/backend")).json()
        assert (found["model"], found["state"], found["info"]) == ("fake", "starting", None)
        engine.state = EngineState.RUNNING
        found = (await client.get("/backend")).json()
        assert found["info"]["architecture"] == "Fake"
        assert found["info"]["block_size"] == 16
        assert found["info"]["context_len"] == CONTEXT_LEN
        assert (found["transport"], found["replicas"]) == ("process", 1)
        assert (found["tp_size"], found["pp_size"]) == (1, 1)
        assert found["versions"]["trio"] == trio.__version__


async def test_a_client_is_its_key_or_else_its_address() -> None:
    engine, body = FakeEngine(), {"prompt": "hi", "max_tokens": 1}
    async with serving(engine, api_key=("one", "two")) as url, httpx.AsyncClient(base_url=url) as client:
        for key in ("one", "two", "one"):
            sent = await client.post("/v1/completions", json=body, headers={"X-Api-Key": key})
            assert sent.status_code == 200
    first, second, third = engine.clients
    assert first == third != second
    assert "one" not in first
    engine.clients.clear()
    async with serving(engine) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/v1/completions", json=body, headers={"X-Api-Key": "made up"})
    assert engine.clients == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("<local>", "<local>"),
    ],
)
def test_an_ipv6_network_is_one_client(address: str, network: str) -> None:
    assert access._network(address) == network
