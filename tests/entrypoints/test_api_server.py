"""The entry point at vLLM's module path takes the flags that its users know."""

from __future__ import annotations

from typing import Any

import pytest

from ullm.config import EngineConfig, ServerConfig
from ullm.entrypoints.openai import api_server

KNOWN = (
    "--model m --tp-size 2 --pp-size 1 --gpu-memory-utilization 0.5 --max-bs 8 --context-len 512 "
    "--device-ids 0,1 --nccl-port 1234 --enforce-eager --host 0.0.0.0 --port 81 --api-key k --dtype float32"
).split()


def test_translate() -> None:
    assert api_server.translate(["--port", "1"]) == ["serve", "--port", "1"]
    assert api_server.translate(["--use-threading", "--port", "1"]) == [
        "serve", "--port", "1", "--transport", "thread",
    ]  # fmt: skip


def test_known_flags_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    import ullm.cli.serve

    served: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ullm.cli.serve, "serve", lambda *args: served.append(args) or 0)
    assert api_server.main(KNOWN) == 0
    engine = EngineConfig(
        model="m", tp_size=2, gpu_memory_utilization=0.5, max_bs=8, context_len=512, device_ids=(0, 1),
        nccl_port=1234, enforce_eager=True, dtype="float32",
    )  # fmt: skip
    assert served == [(engine, ServerConfig(host="0.0.0.0", port=81, api_key="k"))]


def test_use_threading(monkeypatch: pytest.MonkeyPatch) -> None:
    import ullm.cli.serve

    served: list[Any] = []
    monkeypatch.setattr(ullm.cli.serve, "serve", lambda engine, server: served.append(engine) or 0)
    assert api_server.main(["--use-threading"]) == 0
    assert served[0].transport == "thread"


def test_a_wrong_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert api_server.main(["--use-thread"]) == 2
    assert capsys.readouterr().err.startswith("error: Unknown option: --use-thread")
