"""A chat template that fails for every conversation is the server's fault, and costs only chats."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.hostile.catalogue import CHAT, TEXT
from tests.support.server import SCRIPTED, Server, starting_servers
from ullm.testing import write_scripted_model

pytestmark = pytest.mark.process


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_scripted_model(tmp_path_factory.mktemp("template") / "scripted")
    (model / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}", encoding="utf-8")
    with starting_servers() as start:
        yield start("--model", str(model), *SCRIPTED, "--standby-workers", "0")


def test_chats_get_500_and_everything_else_works(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(2):
            answer = client.post(CHAT, json=chat)
            assert answer.status_code == 500
            error = answer.json()["error"]
            assert error["code"] == "template_failed"
            assert "--chat-template FILE" in error["message"]
        assert client.post(TEXT, json={"prompt": "hi", "max_tokens": 1}).status_code == 200
        assert client.get("/ready").status_code == 200
    assert "fails for every conversation" in server.errors()
