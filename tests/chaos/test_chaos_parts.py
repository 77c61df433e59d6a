"""The parts of a chaos run: its requests, its verdicts, and which requests it spares."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from ullm.chaos.catalogue import FORMS, ChaosRequest, catalogue
from ullm.chaos.chaos_client import AnswerOutcome, ChaosAnswer, send_request
from ullm.chaos.chaos_report import ChaosReport
from ullm.chaos.chaos_run import ChaosPlan, chosen_kinds, one_fault
from ullm.chaos.verify import Verdict, log_verdict
from ullm.chaos.world import MAX_CRASHES, NOTHING, InjectedFault, World
from ullm.cli.chaos import check
from ullm.client.http import Endpoint
from ullm.errors import UsageError

STREAM = ChaosRequest(7, "/completions", {"stream": True}, 1)
EXPECTED = AnswerOutcome(("abc",), ("length",), 3)


def answer(
    text: str = "abc", *, dones: int = 1, finishes: list[str] | None = None, **more: Any
) -> ChaosAnswer:
    reasons = ["length"] if finishes is None else finishes
    found = ChaosAnswer(STREAM, 0.0, texts={0: text}, finishes={0: reasons}, dones=dones, completion_tokens=3)
    for name, value in more.items():
        setattr(found, name, value)
    return found


def test_an_answer_as_expected_is_no_violation() -> None:
    assert answer().violations(EXPECTED) == []
    assert answer().violations(None) == []


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (answer("abd"), "from character 2 on 'd', not 'c'"),
        (answer("ab"), "2 characters, not 3"),
        (answer("abcc"), "4 characters, not 3"),
        (answer(dones=0), "said 0 times that it was done"),
        (answer(dones=2), "said 2 times"),
        (answer(finishes=[]), "finish reasons []"),
        (answer(finishes=["length", "length"]), "finish reasons ['length', 'length']"),
        (answer(finishes=["abort"]), "finish reasons ('abort',), not ('length',)"),
        (answer(completion_tokens=2), "2 tokens, not 3"),
        (answer(error="it broke"), "failed: it broke"),
        (answer(error="refused", status=429), "failed: refused"),  # without Retry-After
        (answer(error="refused", status=503, retry_after="1"), "failed: refused"),
    ],
)
def test_violations(found: ChaosAnswer, complaint: str) -> None:
    (violation,) = found.violations(EXPECTED)
    assert complaint in violation
    assert "request 7" in violation


def test_a_refusal_that_says_when_to_come_again_is_none() -> None:
    assert answer(error="full", status=429, retry_after="1").violations(EXPECTED) == []


def test_an_excused_answer_may_end_early_but_not_otherwise() -> None:
    early = answer("ab", finishes=["abort"], completion_tokens=2, excused="put to sleep")
    assert early.violations(EXPECTED) == []
    wrong = answer("xb", finishes=["abort"], completion_tokens=2, excused="put to sleep")
    assert len(wrong.violations(EXPECTED)) == 1


def test_gaps_are_of_those_who_read_at_once() -> None:
    found = answer()
    for now in (0.01, 0.03, 0.23):
        found.note_event(now)
    assert found.gaps == [(0.03, 0.23)]
    found.watched = False
    found.note_event(9.0)
    assert len(found.gaps) == 1


def test_a_catalogue_has_every_form_and_depends_on_the_seed_only() -> None:
    requests = catalogue("m", 5, 16, (3, 9))
    assert requests == catalogue("m", 5, 16, (3, 9))
    assert requests != catalogue("m", 6, 16, (3, 9))
    assert {(request.path, request.stream) for request in requests} == set(FORMS)
    assert {request.body["temperature"] == 0 for request in requests} == {True, False}
    assert {request.choices for request in requests} == {1, 2}
    assert all(3 <= request.body["max_tokens"] <= 9 for request in requests)


# --- a request, as its client sees it ------------------------------------------------------------------


async def asked(nursery: trio.Nursery, *parts: bytes, **manner: Any) -> ChaosAnswer:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        for part in (head, *parts):
            await stream.send_all(part)
        await stream.aclose()

    (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
    endpoint = Endpoint("http", "127.0.0.1", listener.socket.getsockname()[1], "/v1")
    found = ChaosAnswer(STREAM, trio.current_time())
    await send_request(endpoint, found, **manner)
    return found


PIECES = (
    b'data: {"choices":[{"index":0,"text":"ab","finish_reason":null}]}\n\n: still here\n\n',
    b'data: {"choices":[{"index":0,"text":"c","finish_reason":"length"}]}\n\n',
    b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n',
)


@pytest.mark.process
async def test_a_stream_is_read_to_its_end(nursery: trio.Nursery) -> None:
    found = await asked(nursery, *PIECES)
    assert (found.outcome, found.dones, found.error) == (EXPECTED, 1, None)
    assert found.violations(EXPECTED) == []


@pytest.mark.process
@pytest.mark.parametrize("manner", [{"slow": 0.001}, {"stall_after": 1, "stall": 0.01}])
async def test_slow_readers_get_the_same(nursery: trio.Nursery, manner: dict[str, Any]) -> None:
    found = await asked(nursery, *PIECES, **manner)
    assert (found.outcome, found.gaps) == (EXPECTED, [])


@pytest.mark.process
@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        (PIECES[:1], "said 0 times"),
        ((*PIECES, PIECES[2]), "said 2 times"),
        ((*PIECES[:2], PIECES[1]), "goes on after its end"),
        ((b'data: {"error": {"message": "gone"}}\n\n',), "gone"),
        ((b"data: {]\n\n",), "not JSON"),
    ],
)
async def test_broken_streams_are_seen(
    nursery: trio.Nursery, pieces: tuple[bytes, ...], complaint: str
) -> None:
    assert complaint in " ".join((await asked(nursery, *pieces)).violations(EXPECTED))


# --- faults ------------------------------------------------------------------------------------------------


class Counted:
    """A kind that does nothing, or finds nothing to do."""

    name = "counted"
    weight = 1.0

    def __init__(self, detail: str = "done", *, crashes: bool = True) -> None:
        self.detail, self.crashes, self.injected = detail, crashes, 0

    async def offered(self, world: World) -> bool:
        return True

    async def inject(self, world: World) -> str:
        self.injected += 1
        world.note_crash()
        return self.detail


@pytest.fixture
def world(nursery: trio.Nursery) -> World:
    endpoint = Endpoint("http", "127.0.0.1", 1, "/v1")
    return World(
        server=cast(Any, None),
        endpoint=endpoint,
        admin=endpoint,
        requests=[STREAM],
        source=random.Random(0),
        nursery=nursery,
        model="m",
        step_timeout=1.0,
        stall_timeout=1.0,
        room=4,
    )


async def test_a_request_is_spared_that_one_more_crash_would_convict(
    autojump_clock: trio.testing.MockClock, world: World
) -> None:
    world.answers, world.live = [ChaosAnswer(STREAM, 0.0)], {0}
    crash, other = Counted(), Counted(crashes=False)
    for _ in range(MAX_CRASHES + 3):
        await one_fault(world, [crash])
    assert (crash.injected, world.answers[0].crashes) == (MAX_CRASHES, MAX_CRASHES)
    await one_fault(world, [other])
    assert other.injected == 1
    world.live.clear()
    await one_fault(world, [crash])
    assert crash.injected == MAX_CRASHES + 1
    assert len(world.faults) == MAX_CRASHES + 2


async def test_what_finds_nothing_to_act_on_is_no_fault(world: World) -> None:
    await one_fault(world, [Counted(NOTHING)])
    assert world.faults == []


async def test_requests_may_end_early_only_while_something_aborts(world: World) -> None:
    world.answers, world.live = [ChaosAnswer(STREAM, 0.0), ChaosAnswer(STREAM, 0.0)], {1}
    with world.may_abort():
        during = await world.send(STREAM)
    after = await world.send(STREAM)
    assert [bool(a.excused) for a in (*world.answers[:2], during, after)] == [False, True, True, False]


def test_kinds_are_chosen_by_name_or_family() -> None:
    assert [kind.name for kind in chosen_kinds(["worker.kill"])] == ["worker.kill"]
    assert {kind.name.split(".")[0] for kind in chosen_kinds(["client", "wake"])} == {"client", "wake"}
    names = [kind.name for kind in chosen_kinds([])]
    assert len(names) == len(set(names))
    with pytest.raises(UsageError, match=r"--kinds nope: expected some of .*worker\.kill"):
        chosen_kinds(["nope"])


@pytest.mark.parametrize("wrong", [{"faults": 0}, {"seconds": 0}, {"streams": -1}, {"only": ("nope",)}])
def test_plans_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        check(ChaosPlan("scripted", **wrong))


# --- verdicts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeWarning: coroutine 'x' was never awaited",
        "Exception ignored in: <function>",
        "Traceback (most recent call last):",
        "an unraisable exception",
    ],
)
def test_lines_that_no_fault_explains_are_found(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log"
    log.write_text("worker ready\nworker was killed by SIGKILL\n")
    assert log_verdict(log).good
    log.write_text(f"worker ready\n{line}\n")
    found = log_verdict(log)
    assert not found.good
    assert line in found.detail


async def test_a_report_lays_gaps_to_the_faults_around_them(world: World) -> None:
    world.faults = [InjectedFault(1, "a", 10.0), InjectedFault(2, "b", 20.0)]
    first, second = ChaosAnswer(STREAM, 0.0), ChaosAnswer(STREAM, 0.0)
    first.gaps, second.gaps = [(9.9, 10.4), (30.0, 35.0)], [(10.2, 10.9)]
    world.answers = [first, second]
    report = ChaosReport.of(3, world, [Verdict("fine", True)], [Counted()])
    assert [kind.longest_gap for kind in report.kinds] == [None]
    kinds = [type("K", (Counted,), {"name": name})() for name in "ab"]
    report = ChaosReport.of(3, world, [Verdict("fine", True)], kinds)
    assert [(kind.count, kind.longest_gap) for kind in report.kinds] == [
        (1, pytest.approx(0.7)),
        (1, None),
    ]
    assert report.good
    assert not ChaosReport.of(3, world, [Verdict("fine", False)], kinds).good
