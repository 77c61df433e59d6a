"""TLS: who is served, whose handshake fails, who does not read; and files that cannot be used.

The files in ``certificates`` are of these tests only; everybody has their keys.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import trio
from fake_engine import FakeEngine, serving
from test_connection import connected, request

from ullm.errors import ConfigError
from ullm.server import tls_context
from ullm.server.http import hypercorn_connection

FILES = Path(__file__).with_name("certificates")
CERTIFICATE = str(FILES / "cert.pem")
TLS = {"ssl_certfile": CERTIFICATE, "ssl_keyfile": str(FILES / "key.pem")}
ENDLESS = 20_000


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=CERTIFICATE)


async def secure(stream: trio.SocketStream) -> trio.SSLStream[trio.SocketStream]:
    tls = trio.SSLStream(stream, trusting(), server_hostname="127.0.0.1")
    await tls.do_handshake()
    return tls


async def test_answers_and_streams_over_tls(engine: FakeEngine) -> None:
    engine.script = lambda index: [70] * 300
    async with serving(engine, **TLS) as url, httpx.AsyncClient(base_url=url, verify=trusting()) as client:
        assert url.startswith("https://127.0.0.1:")
        for stream in (False, True):
            answer = await client.post(
                "/v1/completions", json={"prompt": "hi", "stream": stream, "max_tokens": 300}
            )
            assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.text.count('"text":"') == 300


@pytest.mark.process
async def test_only_http_1_1_is_negotiated_and_the_end_is_said(engine: FakeEngine) -> None:
    async with serving(engine, **TLS) as url, connected(url) as connection:
        context = trusting()
        context.set_alpn_protocols(["h2", "http/1.1"])
        tls = trio.SSLStream(connection, context, server_hostname="127.0.0.1")
        await tls.send_all(request("GET", "/live", headers="Connection: close\r\n"))
        with trio.fail_after(60):  # without close_notify this raises BrokenResourceError
            answer = b"".join([data async for data in tls])
        assert answer.startswith(b"HTTP/1.1 200")
        assert tls.selected_alpn_protocol() == "http/1.1"


@pytest.mark.process
async def test_a_failed_handshake_costs_its_client_only(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hypercorn_connection, "REQUEST_WITHIN", 0.2)
    async with serving(engine, **TLS) as url:
        for greeting in (request("GET", "/live"), b"", b"\x16\x03\x01"):
            async with connected(url) as connection:
                if greeting:
                    await connection.send_all(greeting)
                with trio.fail_after(60):
                    try:
                        while await connection.receive_some():  # at most an alert
                            pass
                    except trio.BrokenResourceError:
                        pass  # a reset is an end, too
        async with httpx.AsyncClient(base_url=url, verify=trusting()) as client:
            assert (await client.get("/live")).status_code == 200
    assert not [record for record in caplog.records if record.name.startswith("ullm")]


@pytest.mark.process
@pytest.mark.parametrize("leaves", [False, True])
async def test_who_does_not_read_or_leaves_is_cut(
    engine: FakeEngine, leaves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda index: [70] * ENDLESS
    async with serving(engine, stall_timeout=60 if leaves else 0.3, **TLS) as url:
        async with connected(url, receive_buffer=4096) as connection:
            tls = await secure(connection)
            await tls.send_all(request(prompt="hi", stream=True, max_tokens=ENDLESS))
            await tls.receive_some()
            if leaves:
                connection.socket.close()
            with trio.fail_after(60):
                await engine.all_gone.wait()
        assert engine.aborted == 1
    assert "connection failed" not in caplog.text
    assert ("client does not read" in caplog.text) is not leaves


def test_both_files_make_a_context() -> None:
    assert tls_context(None, None) is None
    context = tls_context(*TLS.values())
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("cert.pem", "other_key.pem", "--ssl-keyfile .*other_key.pem does not belong to --ssl-certfile"),
        ("cert.pem", "encrypted_key.pem", "--ssl-keyfile .*: the key is encrypted"),
        ("cert.pem", "nothing.pem", "--ssl-keyfile .*nothing.pem: No such file"),
        ("nothing.pem", "key.pem", "--ssl-certfile .*nothing.pem: No such file"),
        (".", "key.pem", "--ssl-certfile .*: Is a directory"),
        ("key.pem", "key.pem", "--ssl-certfile .*key.pem: no certificate in PEM format"),
        ("cert.pem", "cert.pem", "--ssl-keyfile .*cert.pem: no private key in PEM format"),
    ],
)
def test_files_that_cannot_be_used_are_named(certificate: str, key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        tls_context(str(FILES / certificate), str(FILES / key))
    assert "\n" not in str(caught.value)
