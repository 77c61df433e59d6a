"""HTTP/2, which an option switches on: clients that do not read, leave, withdraw and send odd requests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import httpx
import pytest
import trio
import trio.testing
from fake_engine import FakeEngine, serving
from h2.errors import ErrorCodes
from test_connection import RunningServer, connected, read_until, request, start
from test_tls import TLS, trusting

from ullm.server import serve as server_module
from ullm.server.http import hypercorn_connection, hypercorn_http2, quart_connection

pytestmark = pytest.mark.process

ENDLESS = 20_000
LIVE = [(":method", "GET"), (":path", "/live"), (":scheme", "http"), (":authority", "localhost")]


class Client:
    """One connection of a client of which every frame is chosen by the test."""

    def __init__(self, stream: trio.abc.Stream, window: int | None = None) -> None:
        self.stream = stream
        self.http = h2.connection.H2Connection(
            h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        )
        if window is not None:
            self.http.local_settings.update({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
            self.http.local_settings.acknowledge()
        self.http.initiate_connection()
        self.body: dict[int, bytes] = {}

    async def flush(self) -> None:
        await self.stream.send_all(self.http.data_to_send())

    async def ask(self, *, ends: bool = True, pseudo: Iterable[tuple[str, Any]] = (), **body: Any) -> int:
        """Send a request; return the number of its stream."""
        number = self.http.get_next_available_stream_id()
        content = json.dumps(body).encode()
        head: dict[Any, Any] = {
            ":method": "POST" if body else "GET",
            ":path": "/v1/completions" if body else "/live",
            ":scheme": "http",
            ":authority": "localhost",
            **dict(pseudo),
        }
        headers = [(name, value) for name, value in head.items() if value is not None]
        if body:
            headers.append(("content-type", "application/json"))
        self.http.send_headers(number, headers, end_stream=ends and not body)
        if body:
            self.http.send_data(number, content, end_stream=ends)
        await self.flush()
        return number

    async def wait_for(self, *kinds: type[h2.events.Event], stream: int | None = None) -> Any:
        """Read until such an event comes; None at the end of the connection."""
        with trio.fail_after(60):
            while data := await self._receive():
                found = None
                for event in self.http.receive_data(data):
                    if isinstance(event, h2.events.DataReceived):
                        self.body[event.stream_id] = self.body.get(event.stream_id, b"") + event.data
                    if isinstance(event, kinds) and stream in (None, getattr(event, "stream_id", None)):
                        found = found or event
                await self.flush()
                if found is not None:
                    return found
        return None

    async def status(self, number: int) -> int:
        event = await self.wait_for(h2.events.ResponseReceived, stream=number)
        return int(dict(event.headers)[b":status"])

    async def _receive(self) -> bytes:
        try:
            return bytes(await self.stream.receive_some())
        except trio.BrokenResourceError:
            return b""


@asynccontextmanager
async def client(url: str, window: int | None = None) -> AsyncIterator[Client]:
    async with connected(url) as stream:
        yield Client(stream, window)


@pytest.fixture
async def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.script = lambda index: [70] * ENDLESS
    return engine


# --- off and on --------------------------------------------------------------------------------------


async def test_it_is_off_by_default(engine: FakeEngine) -> None:
    async with serving(engine) as url:
        async with connected(url) as connection:
            await connection.send_all(hypercorn_http2.PREFACE)
            answer = b"".join([data async for data in connection])
        assert answer.startswith(b"HTTP/1.1 505")
        assert b"--http2" in answer
        async with connected(url) as connection:
            upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: %%\r\n"
            await connection.send_all(request("GET", "/live", headers=upgrade))
            assert (await read_until(connection, b"}")).startswith(b"HTTP/1.1 200")


async def test_both_versions_on_one_port(engine: FakeEngine) -> None:
    engine.script = lambda index: [70] * 5
    async with serving(engine, http2=True) as url:
        for http1 in (True, False):
            async with httpx.AsyncClient(http1=http1, http2=not http1) as each:
                answer = await each.post(f"{url}/v1/completions", json={"prompt": "hi", "max_tokens": 5})
                assert (answer.status_code, answer.http_version) == (200, "HTTP/1.1" if http1 else "HTTP/2")


async def test_it_is_agreed_on_over_tls(engine: FakeEngine) -> None:
    async with (
        serving(engine, http2=True, **TLS) as url,
        httpx.AsyncClient(http2=True, verify=trusting()) as each,
    ):
        assert (await each.get(f"{url}/live")).http_version == "HTTP/2"


async def test_the_preface_may_come_in_pieces(engine: FakeEngine) -> None:
    async with serving(engine, http2=True) as url, client(url) as asking:
        number = asking.http.get_next_available_stream_id()
        asking.http.send_headers(number, LIVE, end_stream=True)
        for byte in asking.http.data_to_send():
            await asking.stream.send_all(bytes([byte]))
        assert await asking.status(number) == 200


# --- clients that do not read ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_whoever_grants_no_window_and_leaves_gives_its_slot_back(
    engine: FakeEngine, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "connection_limit", lambda: 3)
    async with serving(engine, http2=True) as url:
        for _ in range(12):
            async with client(url, window=0) as asking:
                number = await asking.ask(prompt="hi", stream=stream, max_tokens=200)
                await asking.status(number)
        with trio.fail_after(60):
            await engine.all_gone.wait()
            async with httpx.AsyncClient() as other:
                assert (await other.get(f"{url}/live")).status_code == 200


async def test_a_stall_ends_its_stream_only(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(engine, http2=True, stall_timeout=0.3) as url, client(url, window=0) as asking:
        for _ in range(20):
            await asking.ask(prompt="hi", stream=True, max_tokens=ENDLESS)
        event = await asking.wait_for(h2.events.StreamReset)
        assert event.error_code == ErrorCodes.CANCEL
        with trio.fail_after(60):
            await engine.all_gone.wait()
        assert engine.aborted == 20
        assert await asking.status(await asking.ask()) == 200  # the connection goes on
    assert {record.getMessage() for record in caplog.records if record.name.startswith("ullm")} == {
        "client does not read; its stream is reset"
    }


async def test_little_is_produced_for_whom_does_not_read(engine: FakeEngine) -> None:
    async with serving(engine, http2=True) as url, client(url, window=0) as asking:
        await asking.status(await asking.ask(prompt="hi", stream=True, max_tokens=ENDLESS))
        generation = next(iter(engine.active.values()))
        await trio.testing.wait_all_tasks_blocked(0.3)
        assert 0 < ENDLESS - len(generation._steps) < 500


async def test_a_connection_that_is_not_read_is_cut(engine: FakeEngine) -> None:
    async with serving(engine, http2=True, stall_timeout=0.3) as url:
        async with connected(url, receive_buffer=4096) as stream:
            asking = Client(stream, window=1 << 30)
            asking.http.increment_flow_control_window(1 << 30)
            await asking.ask(prompt="hi", stream=True, max_tokens=ENDLESS)
            with trio.fail_after(60):
                await engine.all_gone.wait()
        assert engine.aborted == 1


async def test_a_slow_reader_is_no_stalled_one(engine: FakeEngine) -> None:
    """Its window grows a little now and then, and shrinks below zero once."""
    engine.script = lambda index: [70] * 20
    async with serving(engine, http2=True, stall_timeout=0.5) as url, client(url, window=200) as asking:
        number = await asking.ask(prompt="hi", stream=True, max_tokens=20)
        await asking.wait_for(h2.events.DataReceived)
        asking.http.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        await asking.flush()
        async with trio.open_nursery() as nursery:

            async def grow() -> None:
                while True:
                    await trio.sleep(0.1)
                    asking.http.increment_flow_control_window(400, number)
                    await asking.flush()

            nursery.start_soon(grow)
            await asking.wait_for(h2.events.StreamEnded)
            nursery.cancel_scope.cancel()
    assert asking.body[number].count(b'"text":"') == 20
    assert asking.body[number].endswith(b"data: [DONE]\n\n")


async def test_streams_take_turns(engine: FakeEngine) -> None:
    """A long answer does not hold up a short one of the same connection."""
    async with serving(engine, http2=True) as url, client(url) as asking:
        long = await asking.ask(prompt="hi", stream=True, max_tokens=ENDLESS)
        await asking.wait_for(h2.events.DataReceived, stream=long)
        short = await asking.ask()
        await asking.wait_for(h2.events.StreamEnded, stream=short)
        assert json.loads(asking.body[short])["status"] == "live"


# --- requests that are withdrawn ---------------------------------------------------------------------


async def test_a_withdrawn_request_is_aborted_and_the_connection_gets_idle(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hypercorn_connection, "KEEP_ALIVE", 0.2)
    async with serving(engine, http2=True) as url, client(url) as asking:
        number = await asking.ask(prompt="hi", stream=True, max_tokens=ENDLESS)
        await asking.wait_for(h2.events.DataReceived)
        asking.http.reset_stream(number, ErrorCodes.CANCEL)
        await asking.flush()
        with trio.fail_after(60):
            await engine.all_gone.wait()
        farewell = await asking.wait_for(h2.events.ConnectionTerminated)
        assert farewell.error_code == ErrorCodes.NO_ERROR
    assert engine.aborted == 1


async def test_resets_are_bounded(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(engine, http2=True) as url:
        async with client(url) as asking:
            for _ in range(hypercorn_http2.RESETS + 50):
                number = asking.http.get_next_available_stream_id()
                asking.http.send_headers(
                    number,
                    LIVE,
                    end_stream=True,
                )
                asking.http.reset_stream(number)
            await asking.flush()
            farewell = await asking.wait_for(h2.events.ConnectionTerminated)
            assert farewell.error_code == ErrorCodes.ENHANCE_YOUR_CALM
            assert await asking.wait_for(h2.events.ResponseReceived) is None  # and it is closed
        async with client(url) as other:
            assert await other.status(await other.ask()) == 200
    said = [record for record in caplog.records if "resets too many" in record.getMessage()]
    assert len(said) == 1
    assert not any(record.exc_info for record in caplog.records)


async def test_the_allowance_comes_back(autojump_clock: trio.testing.MockClock) -> None:
    allowance = hypercorn_http2.ResetAllowance()
    assert all(allowance.take() for _ in range(hypercorn_http2.RESETS))
    assert not allowance.take()
    await trio.sleep(2 / hypercorn_http2.RESETS_PER_SECOND)
    assert allowance.take()
    assert not allowance.take()


# --- odd requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pseudo",
    [
        {":method": b"G\xc3\x89T"},
        {":method": ""},
        {":method": "GET /x"},
        {":path": b"/caf\xe9"},
        {":path": "/a b"},
    ],
)
async def test_what_http_does_not_allow_costs_a_stream_and_a_line(
    engine: FakeEngine, pseudo: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(engine, http2=True) as url, client(url) as asking:
        for _ in range(3):
            number = await asking.ask(pseudo=pseudo.items())
            event = await asking.wait_for(h2.events.StreamReset, stream=number)
            assert event.error_code == ErrorCodes.PROTOCOL_ERROR
        assert await asking.status(await asking.ask()) == 200
    assert len([record for record in caplog.records if "malformed" in record.getMessage()]) == 1
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    "pseudo",
    [
        {":path": ""},
        {":path": None},
        {":method": None},
        {":scheme": None},
        {":authority": None},
        {":status": "200"},
        {":nonsense": "x"},
        {"Upper": "x"},
        {"connection": "close"},
        {"x": "a\r\nb: c"},
    ],
)
async def test_what_http2_does_not_allow_costs_the_connection_and_a_line(
    engine: FakeEngine, pseudo: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(engine, http2=True) as url:
        async with client(url) as asking:
            await asking.ask(pseudo=pseudo.items())
            farewell = await asking.wait_for(h2.events.ConnectionTerminated)
            assert farewell.error_code == ErrorCodes.PROTOCOL_ERROR
        assert len([record for record in caplog.records if "malformed" in record.getMessage()]) == 1
        async with client(url) as other:
            assert await other.status(await other.ask()) == 200
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("pseudo", "status"),
    [
        ({":method": "CONNECT", ":path": None, ":scheme": None}, 404),
        ({":method": "get"}, 200),
        ({":path": "*"}, 404),
        ({":path": "live"}, 200),
        ({":path": "/%ff%00"}, 404),
        ({":authority": None, "host": "localhost"}, 200),
    ],
)
async def test_odd_but_allowed_requests_are_answered(
    engine: FakeEngine, pseudo: dict[str, Any], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(engine, http2=True) as url, client(url) as asking:
        assert await asking.status(await asking.ask(pseudo=pseudo.items())) == status
    assert not [record for record in caplog.records if record.name.startswith("ullm.server.http")]


async def test_frames_out_of_place_have_no_traceback(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Priorities of a thousand streams, data after the answer, garbage, and the end within a frame."""
    monkeypatch.setattr(quart_connection, "LINGER_SECONDS", 0.1)
    async with serving(engine, http2=True, max_body=1000) as url:
        async with client(url) as asking:
            for number in range(1, 4001, 2):
                asking.http.prioritize(number, depends_on=number + 2)
            await asking.flush()
            number = await asking.ask(ends=False, prompt="x" * 10_000)
            assert await asking.status(number) == 413
            asking.http.send_data(number, b"more", end_stream=False)
            await asking.flush()
            assert await asking.status(await asking.ask()) == 200
        for garbage in (b"\x00" * 100, b"\xff" * 100, b"\x00\x40\x00\x01\x05\x00\x00\x00\x01half"):
            async with client(url) as asking:
                await asking.flush()
                await asking.stream.send_all(garbage)
        async with client(url) as other:
            assert await other.status(await other.ask()) == 200
    assert not any(record.exc_info for record in caplog.records)


async def test_an_answer_before_the_end_of_the_body_ends_the_stream(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it does not count as one of the streams that the client may have (RFC 9113, 8.1)."""
    monkeypatch.setattr(quart_connection, "LINGER_SECONDS", 0.1)
    async with serving(engine, http2=True) as url, client(url) as asking:
        for _ in range(3):
            number = await asking.ask(ends=False, pseudo={":path": "/nowhere"}.items(), prompt="x")
            asking.http.send_data(number, b"", end_stream=False)
            await asking.flush()
            event = await asking.wait_for(h2.events.StreamReset, stream=number)
            assert event.error_code == ErrorCodes.NO_ERROR


# --- connections without requests --------------------------------------------------------------------


async def test_a_client_that_asks_for_nothing_is_closed(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hypercorn_connection, "REQUEST_WITHIN", 0.2)
    async with serving(engine, http2=True) as url:
        async with client(url) as asking:
            await asking.flush()
            assert await asking.wait_for(h2.events.ConnectionTerminated) is not None
        async with connected(url) as connection:
            await connection.send_all(b"PRI * HT")
            with trio.fail_after(60):
                assert b"".join([data async for data in connection]) == b""


async def test_a_stop_lets_streams_end_and_refuses_others(engine: FakeEngine) -> None:
    engine.script = lambda index: [70] * 20
    engine.hold_after = 10
    async with trio.open_nursery() as nursery:
        running: RunningServer = await start(nursery, engine, http2=True)
        async with client(running.url) as asking:
            number = await asking.ask(prompt="hi", stream=True, max_tokens=20)
            await asking.wait_for(h2.events.ResponseReceived, stream=number)
            await engine.held.wait()
            running.scope.cancel()
            await trio.testing.wait_all_tasks_blocked(0.05)
            late = await asking.ask()
            refused = await asking.wait_for(h2.events.StreamReset, stream=late)
            assert refused.error_code == ErrorCodes.REFUSED_STREAM
            engine.release.set()
            await asking.wait_for(h2.events.StreamEnded, stream=number)
            assert asking.body[number].endswith(b"data: [DONE]\n\n")
        with trio.fail_after(60):
            await running.ended.wait()
