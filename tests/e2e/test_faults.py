"""Workers that die and hang under a real server: what its clients get."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import SCRIPTED, Server, Stream, eventually, is_gone, streams

from ullm.model.cpu.build import find_compiler

pytestmark = pytest.mark.process

Serve = Callable[..., Server]


def texts(found: list[Stream]) -> list[str]:
    for stream in found:
        stream.join()
        assert stream.error is None
        assert (stream.finish_reason, stream.done) == ("length", True)
    return [stream.text for stream in found]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_streams_go_on_where_they_were(serve: Serve, scripted_model: Path, number: int) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--step-timeout", "1")
    undisturbed = texts(streams(server, 8, 200))
    running = streams(server, 8, 200)
    first = server.worker()
    first.send_signal(number)
    assert texts(running) == undisturbed
    assert is_gone(first)
    with server.client() as client:
        metrics = client.get("/metrics").text
        assert "ullm_worker_restarts_total 1.0" in metrics
        eventually(lambda: client.get("/ready").status_code == 200)


def test_a_worker_lost_again_and_again_ends_the_server_with_one_cause(
    serve: Serve, scripted_model: Path
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-restarts", "1")
    (stream,) = streams(server, 1, 3000)
    first = server.worker()
    first.kill()
    eventually(lambda: any(p.pid != first.pid for p in server.children()))
    with server.client() as client:
        eventually(lambda: client.get("/ready").status_code == 200)
    server.worker().kill()
    assert server.wait() == 70
    stream.join()
    assert stream.finish_reason is None
    assert stream.failure is not None
    assert stream.failure["code"] == "engine_dead"
    assert "was killed by SIGKILL" in stream.failure["message"]
    assert server.errors().count("Traceback") == 0
    assert "was killed by SIGKILL" in server.errors()


@pytest.mark.e2e
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_model_says_the_same_after_a_kill(serve: Serve, real_model: Path, dtype: str) -> None:
    if dtype == "bfloat16" and find_compiler() is None:
        pytest.skip("without the CPU's kernels, bfloat16 depends on the batch")
    server = serve("--dtype", dtype)
    prompts = [[504, 3575, 282, 4649 + number] for number in range(4)]

    def run(fault: Callable[[], None]) -> list[str]:
        running = [Stream(server, 48, prompt) for prompt in prompts]
        for stream in running:
            assert stream.begun.wait(30)
        fault()
        return texts(running)

    undisturbed = run(lambda: None)
    assert run(lambda: server.worker().kill()) == undisturbed
