"""Private names of Hypercorn, Quart and Quart-Trio that ullm depends on.

A new release that moves one of them fails here first, and the message says which module to look at.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import hypercorn.trio.task_group
import hypercorn.trio.tcp_server
import hypercorn.utils
import pytest
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers.request import TrioBody

import ullm.server

HYPERCORN = "ullm/server/http/hypercorn_connection.py and its neighbours build on it"
QUART = "ullm/server/http/quart_connection.py builds on it"
FOLDER = Path(ullm.server.__file__).parent


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]  # whatever it is


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("__init__", ["self", "app", "config", "context", "state", "stream"]),
        ("run", ["self"]),
        ("protocol_send", ["self", "event"]),
        ("_read_data", ["self"]),
        ("_idle_timeout", ["self"]),
        ("_initiate_server_close", ["self"]),
        ("_close", ["self"]),
    ],
)
def test_methods_of_hypercorns_connection(name: str, expected: list[str]) -> None:
    assert hasattr(TCPServer, name), f"Hypercorn's TCPServer.{name} is gone; {HYPERCORN}"
    assert parameters(getattr(TCPServer, name)) == expected, f"TCPServer.{name} has changed; {HYPERCORN}"


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("__await__", "self.run()"),
        ("protocol_send", "self.idle_task.restart(self._task_group, self._idle_timeout)"),
        ("protocol_send", "self.idle_task.stop()"),
        ("_read_data", "self.protocol.handle(Closed())"),
        ("_idle_timeout", "self._initiate_server_close()"),
    ],
)
def test_calls_within_hypercorns_connection(method: str, call: str) -> None:
    """Hypercorn still calls the methods that ullm overrides."""
    source = "".join(inspect.getsource(getattr(TCPServer, method)).split())
    assert "".join(call.split()) in source, f"TCPServer.{method} no longer does {call}; {HYPERCORN}"


async def test_attributes_of_hypercorns_connection() -> None:
    context = WorkerContext(None)
    connection = TCPServer(None, Config(), context, {}, None)  # type: ignore[arg-type]  # only looked at
    assert isinstance(connection.send_lock, trio.Lock), f"TCPServer.send_lock has changed; {HYPERCORN}"
    assert hasattr(connection.idle_task, "stop"), f"TCPServer.idle_task has changed; {HYPERCORN}"
    assert not context.terminated.is_set(), f"WorkerContext.terminated has changed; {HYPERCORN}"
    assert Config().keep_alive_max_requests, f"Config.keep_alive_max_requests is gone; {HYPERCORN}"
    assert Config().wsgi_max_body_size, f"Config.wsgi_max_body_size is gone; {HYPERCORN}"
    assert parameters(hypercorn.utils.wrap_app)[:3] == ["app", "wsgi_max_body_size", "mode"], HYPERCORN
    assert (RawData(b"x").data, Updated(idle=True).idle, Closed()) == (b"x", True, Closed()), HYPERCORN
    assert parameters(TaskGroup.spawn_app) == ["self", "app", "config", "scope", "send"], HYPERCORN
    expected = ["app", "config", "scope", "receive", "send", "sync_spawn", "call_soon"]
    assert parameters(hypercorn.trio.task_group._handle) == expected, HYPERCORN
    assert Config().max_app_queue_size, f"Config.max_app_queue_size is gone; {HYPERCORN}"
    assert Config().response_headers("h2"), f"Config.response_headers has changed; {HYPERCORN}"


_SHARED = ["self", "app", "config", "context", "task_group"]
_ENDS = ["ssl", "client", "server", "send"]


def test_protocols_of_hypercorn() -> None:
    assert parameters(H11Protocol.__init__) == [*_SHARED, "connection_state", *_ENDS], HYPERCORN
    assert parameters(HTTPStream.__init__) == [*_SHARED, *_ENDS, "stream_id"], HYPERCORN
    for name, expected in (
        ("stream_send", ["self", "event"]),
        ("_check_protocol", ["self", "event"]),
        ("_create_stream", ["self", "request"]),
        ("_send_h11_event", ["self", "event"]),
        ("_maybe_recycle", ["self"]),
        ("_close_stream", ["self"]),
    ):
        assert parameters(getattr(H11Protocol, name)) == expected, f"H11Protocol.{name}; {HYPERCORN}"
    source = inspect.getsource(H11Protocol._handle_events)
    assert "await self.can_read.wait()" in source, f"requests wait for their turn another way; {HYPERCORN}"
    assert source.index("self._check_protocol(event)") < source.index("self._create_stream(event)"), HYPERCORN
    assert parameters(ProtocolWrapper.handle) == ["self", "event"], HYPERCORN


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("__call__", ["self", "receive", "send"]),
        ("_create_request_from_scope", ["self", "send"]),
        ("_send_response", ["self", "send", "response"]),
    ],
)
def test_methods_of_quarts_connection(name: str, expected: list[str]) -> None:
    assert hasattr(TrioASGIHTTPConnection, name), f"TrioASGIHTTPConnection.{name} is gone; {QUART}"
    found = parameters(getattr(TrioASGIHTTPConnection, name))
    assert found == expected, f"TrioASGIHTTPConnection.{name} has changed; {QUART}"


def test_calls_within_quarts_connection() -> None:
    source = inspect.getsource(TrioASGIHTTPConnection)
    for call in ("self._create_request_from_scope(send)", "self._send_response(send, response)"):
        assert call in source, f"TrioASGIHTTPConnection no longer calls {call}; {QUART}"
    assert "nursery.cancel_scope.cancel()" in source, f"a disconnect no longer cancels the request; {QUART}"


async def test_quarts_body() -> None:
    body = TrioBody(5, 3)
    assert body._must_raise is not None, f"TrioBody._must_raise has changed; {QUART}"
    body = TrioBody(None, 3)
    body.append(b"1234")
    assert body._must_raise is not None, f"TrioBody.append no longer notes a body that is too large; {QUART}"
    body.clear()
    assert parameters(TrioBody.__init__) == ["self", "expected_content_length", "max_content_length"], QUART


def test_quart_takes_classes_of_ours() -> None:
    for name in ("asgi_http_class", "request_class"):
        assert hasattr(QuartTrio, name), f"QuartTrio.{name} is gone; ullm/server/app.py sets it"


@pytest.mark.parametrize(
    ("packages", "only"),
    [
        (
            ("hypercorn",),
            {
                "http/hypercorn_connection.py",
                "http/hypercorn_http1.py",
                "http/hypercorn_http2.py",
            },
        ),
        (
            ("quart_trio.asgi", "quart_trio.wrappers", "quart.asgi", "quart.wrappers"),
            {"http/quart_connection.py"},
        ),
    ],
)
def test_few_modules_depend_on_private_names(packages: tuple[str, ...], only: set[str]) -> None:
    importing = {
        str(path.relative_to(FOLDER))
        for path in FOLDER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom | ast.Import)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
        if name.startswith(packages)
    }
    assert importing == only
