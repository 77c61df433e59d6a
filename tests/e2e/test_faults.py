"""Workers that die and hang under a real server: what its clients get."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from misbehaving import POISON

from tests.support.server import SCRIPTED, Serve, Server, is_gone
from tests.support.streams import Stream, streams, texts, wait_begun
from tests.support.waiting import eventually
from ullm.model.kernels.cpu.build import find_compiler

pytestmark = pytest.mark.process


TOKENS = 120


@pytest.fixture(scope="session")
def undisturbed(scripted_server: Server) -> list[str]:
    """What eight streams say where nothing goes wrong."""
    return texts(streams(scripted_server, 8, TOKENS))


@pytest.fixture
def server(tough_server: Server) -> Iterator[Server]:
    """Running, before and after, with nothing armed."""
    yield tough_server
    assert tough_server.admin("DELETE", "/admin/faults").status_code == 200
    tough_server.wait_state("running")


def count_restarts(server: Server) -> dict[str, int]:
    """How many times each child of the engine was started again, workers too."""
    tree = server.admin("GET", "/admin/tree").json()
    found = {child["name"]: child["restarts"] for child in tree["children"]}
    return found | {"workers": int(server.metric("ullm_worker_restarts_total"))}


def break_it(server: Server, plan: str) -> None:
    """Arm faults, counted from now on."""
    answer = server.admin("POST", "/admin/faults", {"plan": plan})
    assert answer.status_code == 200, answer.text


def has_broken(server: Server) -> int:
    """How many faults of the present plans have happened."""
    return len(server.admin("GET", "/admin/faults").json()["fired"])


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow), signal.SIGSTOP]
)
def test_streams_go_on_where_they_were(
    serve: Serve, scripted_model: Path, undisturbed: list[str], number: int
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--step-timeout", "1")
    running = streams(server, 8, TOKENS)
    first = server.worker()
    first.send_signal(number)
    assert texts(running) == undisturbed
    assert is_gone(first)
    assert server.metric("ullm_worker_restarts_total") == 1
    server.wait_state("running")


@pytest.mark.parametrize(
    "action",
    [
        "crash",
        "raise",
        pytest.param("oom", marks=pytest.mark.slow),
        pytest.param("exit", marks=pytest.mark.slow),
        "hang",
        pytest.param("stop", marks=pytest.mark.slow),
    ],
)
def test_a_step_that_goes_wrong_costs_a_pause(server: Server, undisturbed: list[str], action: str) -> None:
    if action in ("hang", "stop") and not server.workers():
        pytest.skip("threads cannot be stopped; those that hang have a test of their own")
    before = count_restarts(server)["workers"]
    break_it(server, f"worker.step:{action}@nth=40")
    assert texts(streams(server, 8, TOKENS)) == undisturbed
    assert count_restarts(server)["workers"] == before + 1


def test_a_thread_that_hangs_is_left_behind(
    serve: Serve, scripted_model: Path, undisturbed: list[str]
) -> None:
    """Its answers come late, from an incarnation that has ended: nobody hears them."""
    options = ("--transport", "thread", "--step-timeout", "1")
    plan = ("--faults", "worker.step:hang@nth=40,seconds=2")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options, *plan)
    assert texts(streams(server, 8, TOKENS)) == undisturbed
    server.hear("abandoned")
    assert texts(streams(server, 8, TOKENS)) == undisturbed


@pytest.mark.parametrize(
    "plan",
    [
        "frame.from_worker:duplicate@message=StepResult,nth=20,times=20",
        pytest.param("frame.from_worker:delay@message=StepResult,nth=20,seconds=0.3", marks=pytest.mark.slow),
        "frame.from_worker:delay@message=StepResult,nth=20,seconds=3",
        "frame.from_worker:drop@message=StepResult,nth=20",
        "frame.to_worker:duplicate@message=Step,nth=20",
        "frame.from_worker:corrupt@message=StepResult,nth=20",
    ],
)
def test_late_doubled_and_lost_answers_change_nothing(
    server: Server, undisturbed: list[str], plan: str
) -> None:
    fired = has_broken(server)
    break_it(server, plan)
    assert texts(streams(server, 8, TOKENS)) == undisturbed
    assert has_broken(server) > fired


@pytest.mark.parametrize(
    "plan",
    [
        "scheduler.step:raise@nth=60",
        "router.tokens:raise@nth=60",
        "tokenizer.encode:raise@nth=3",
        "scheduler.step:raise@nth=30; router.tokens:raise@nth=60; worker.step:crash@nth=90",
    ],
)
def test_an_actor_that_raises_is_restarted(server: Server, undisturbed: list[str], plan: str) -> None:
    before = count_restarts(server)
    break_it(server, plan)
    running = streams(server, 8, TOKENS)
    asked = [Stream(server, 5, chat=True) for _ in range(4)]
    assert texts(running) == undisturbed
    assert len(set(texts(asked))) == 1
    for name, point in (("workers", "crash"), ("router", "router"), ("tokenizer", "tokenizer")):
        assert count_restarts(server)[name] == before[name] + plan.count(point)


def test_a_stopped_worker_that_goes_on_is_not_heard(
    serve: Serve, scripted_model: Path, undisturbed: list[str]
) -> None:
    """Resumed before anyone gives it up, it just goes on."""
    server = serve("--model", str(scripted_model), *SCRIPTED)
    running = streams(server, 8, TOKENS)
    worker = server.worker()
    os.kill(worker.pid, signal.SIGSTOP)
    eventually(lambda: worker.status() == "stopped")
    os.kill(worker.pid, signal.SIGCONT)
    assert texts(running) == undisturbed
    assert server.metric("ullm_worker_restarts_total") == 0


@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_poisoned_request_fails_alone(
    serve: Serve, scripted_model: Path, undisturbed: list[str], stream: bool
) -> None:
    environ = {"PYTHONPATH": str(Path(__file__).parent)}
    options = ("--load-format", "dummy", "--runner", "misbehaving:PoisonedRunner")
    server = serve("--model", str(scripted_model), *options, environ=environ)
    running = streams(server, 8, TOKENS)
    poisoned = Stream(server, 20, [300, POISON], stream=stream).join()
    assert poisoned.failure is not None
    assert poisoned.failure["code"] == "poisoned"
    assert poisoned.status == 500, "nothing of it has been said yet"
    assert texts(running) == undisturbed
    assert server.metric("ullm_worker_restarts_total") == 3
    assert server.metric('ullm_requests_total{finish_reason="error"}') == 1
    assert server.get("/ready").status_code == 200


def test_a_worker_lost_again_and_again_ends_the_server_with_one_cause(
    serve: Serve, scripted_model: Path
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-restarts", "1")
    (stream,) = streams(server, 1, 3000)
    unary = Stream(server, 3000, stream=False)
    first = server.worker()
    first.kill()
    eventually(lambda: is_gone(first))
    server.wait_state("running")
    server.worker().kill()
    assert server.wait() == 70
    for failed in (stream, unary):
        failed.join()
        assert failed.finish_reason is None
        assert failed.failure is not None
        assert failed.failure["code"] == "engine_dead"
        assert "was killed by SIGKILL" in failed.failure["message"]
    assert (stream.status, unary.status) == (200, 500)
    assert "was killed by SIGKILL" in server.errors()


def test_the_cause_names_the_child_its_end_and_its_last_words(serve: Serve, scripted_model: Path) -> None:
    options = ("--max-restarts", "0", "--faults", "worker.step:exit@nth=5")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options)
    stream = Stream(server, 100).join()
    assert stream.failure is not None
    assert "replica0.rank0 exited with status 3" in stream.failure["message"]
    assert server.wait() == 70
    causes = [line for line in server.errors().splitlines() if "injected fault: exit" in line]
    assert any("replica0.rank0" in line for line in causes), server.errors()
    assert server.errors().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "plan",
    [
        "scheduler.step:raise@nth=20,times=always",
        pytest.param("router.tokens:raise@times=always", marks=pytest.mark.slow),
    ],
)
def test_an_actor_that_always_fails_ends_the_server(serve: Serve, scripted_model: Path, plan: str) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--faults", plan)
    stream = Stream(server, 100).join()
    assert stream.failure is not None
    assert stream.failure["code"] == "engine_dead"
    assert "injected fault" in stream.failure["message"]
    assert server.wait() == 70
    assert "injected fault" in server.errors().splitlines()[-1]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_model_says_the_same_after_a_kill(serve: Serve, real_model: Path, dtype: str) -> None:
    if dtype == "bfloat16" and find_compiler() is None:
        pytest.skip("without the CPU's kernels, bfloat16 depends on the batch")
    server = serve("--dtype", dtype)
    prompts = [[504, 3575, 282, 4649 + number] for number in range(4)]

    def run(fault: Callable[[], None]) -> list[str]:
        running = [Stream(server, 48, prompt) for prompt in prompts]
        wait_begun(running)
        fault()
        return texts(running)

    undisturbed = run(lambda: None)
    assert run(lambda: server.worker().kill()) == undisturbed
