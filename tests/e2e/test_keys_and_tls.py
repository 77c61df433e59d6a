"""Keys and certificates of a real server: what its ready line, its log and its workers' environments say."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.server import SCRIPTED, Serve

pytestmark = [pytest.mark.process, pytest.mark.slow]

CERTIFICATES = Path(__file__).parents[1] / "server" / "certificates"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_child_has_the_keys_and_no_log_line_shows_them(serve: Serve, scripted_model: Path) -> None:
    keys = {"ULLM_API_KEY": "sesame-1", "ULLM_ADMIN_KEY": "sesame-2"}
    options = ("--standby-workers", "1", "--log-level", "debug", "--host", "0.0.0.0")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options, environ=keys)
    assert server.get("/v1/models").status_code == 401
    with server.client(headers={"X-Api-Key": "sesame-1"}) as client:
        assert "sesame" not in client.get("/backend").raise_for_status().text
    children = server.children()
    assert children
    for child in children:
        assert b"sesame" not in Path(f"/proc/{child.pid}/environ").read_bytes()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "sesame" not in server.log.read_text() + server.output
    assert "no key is asked for" not in server.log.read_text()


def test_an_open_server_warns_once(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--host", "0.0.0.0")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert len(re.findall("no key is asked for", server.log.read_text())) == 1


def test_the_ready_line_says_https_and_the_api_is_served_there(serve: Serve, scripted_model: Path) -> None:
    files = ("--ssl-certfile", str(CERTIFICATES / "cert.pem"), "--ssl-keyfile", str(CERTIFICATES / "key.pem"))
    server = serve("--model", str(scripted_model), *SCRIPTED, *files)
    assert server.url.startswith("https://127.0.0.1:")
    assert server.complete(max_tokens=3).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https:", "http:") + "/live", timeout=60)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
