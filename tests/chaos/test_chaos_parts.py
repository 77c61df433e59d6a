"""The parts of a chaos run: its requests, its verdicts, and which requests it spares."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from ullm.chaos import planned_faults
from ullm.chaos.catalogue import FORMS, ChaosRequest, catalogue
from ullm.chaos.chaos_client import AnswerOutcome, ChaosAnswer, send_request
from ullm.chaos.chaos_plan import ChaosPlan, check, chosen_kinds
from ullm.chaos.chaos_report import ChaosReport
from ullm.chaos.chaos_run import some_faults
from ullm.chaos.load_verdicts import load_verdicts
from ullm.chaos.schedule import Draw, Moment, moments
from ullm.chaos.verify import Verdict, log_verdict
from ullm.chaos.world import LINGERS, MAX_CRASHES, NOTHING, InjectedFault, World
from ullm.client.http import Endpoint
from ullm.errors import ResourceUnavailable, UsageError
from ullm.faults import FaultReport, FiredFault

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
        (answer(prompt_tokens=9), "9 prompt tokens, not None"),
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


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("So \n<tool_", True),
        ('So <tool_call>\n{"name": "f', True),
        ("So <call f>{", True),
        ("So <call g>{", False),
        ("Se \n<tool_", False),
        ("So <call f>{} and <tool", True),
        ("So <call f>{} und", False),
    ],
)
def test_a_call_that_was_cut_is_the_model_s_text(text: str, good: bool) -> None:
    expected = AnswerOutcome(("So <call f>{} and <call g>{}",), ("tool_calls",), 3)
    early = answer(text, finishes=["abort"], completion_tokens=2, excused="put to sleep")
    assert (early.violations(expected) == []) is good
    assert answer(text, finishes=["tool_calls"]).violations(expected) != []


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


def test_half_of_a_catalogue_is_constrained_whole_and_streamed() -> None:
    forms = set()
    for request in catalogue("m", 5, 16, (3, 9)):
        for field in ("tools", "response_format", "structured_outputs", "stop"):
            if field in request.body:
                forms.add((field, request.stream))
    assert forms == {
        *(
            (field, stream)
            for field in ("tools", "response_format", "structured_outputs")
            for stream in (0, 1)
        ),
        ("stop", True),
    }


CALLS = (
    b'data: {"choices":[{"index":0,"delta":{"content":"So "}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"id":"1","function":{"name":"f"}}]}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"function":{"arguments":"{}"}}]}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n',
)


@pytest.mark.process
async def test_calls_of_tools_are_compared_without_their_ids(nursery: trio.Nursery) -> None:
    found = await asked(nursery, *CALLS)
    assert found.outcome == AnswerOutcome(("So <call f>{}",), ("tool_calls",), None)


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

    async def inject(self, world: World, source: random.Random) -> str:
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
        seed=0,
        nursery=nursery,
        model="m",
        step_timeout=1.0,
        stall_timeout=1.0,
        room=4,
    )


def moment(kind: Counted, count: int = 1) -> Moment:
    return Moment(1, [Draw(kind.name, str(place)) for place in range(count)], 0.0)


async def inject(world: World, kind: Counted, count: int = 1, most: int = 9) -> None:
    world.kinds = {kind.name: kind}
    await some_faults(world, moment(kind, count), most)


async def test_a_request_is_spared_that_one_more_crash_would_convict(
    autojump_clock: trio.testing.MockClock, world: World
) -> None:
    world.answers, world.live = [ChaosAnswer(STREAM, 0.0)], {0}
    crash, other = Counted(), Counted(crashes=False)
    for _ in range(MAX_CRASHES + 3):
        await inject(world, crash)
    assert (crash.injected, world.answers[0].crashes) == (MAX_CRASHES, MAX_CRASHES)
    await inject(world, other)
    assert other.injected == 1
    world.live.clear()
    await inject(world, crash)
    assert crash.injected == MAX_CRASHES + 1
    assert len(world.faults) == MAX_CRASHES + 2


async def test_a_burst_comes_in_one_moment_and_spares_requests_as_well(
    autojump_clock: trio.testing.MockClock, world: World
) -> None:
    world.answers, world.live = [ChaosAnswer(STREAM, 0.0)], {0}
    crash, other = Counted(), Counted(crashes=False)
    await inject(world, crash, 3)
    assert (crash.injected, world.answers[0].crashes) == (MAX_CRASHES, MAX_CRASHES)
    assert [(fault.at, fault.burst) for fault in world.faults] == [(world.faults[0].at, MAX_CRASHES)] * 2
    await inject(world, other, 3)
    assert (other.injected, [fault.burst for fault in world.faults]) == (3, [2, 2, 3, 3, 3])
    world.live = {0}
    world.answers[0].crashes = 1
    await inject(world, crash, 2)
    assert crash.injected == MAX_CRASHES  # one more would have been too many


async def test_there_are_no_more_faults_than_asked_for(world: World) -> None:
    await inject(world, Counted(crashes=False), 3, most=2)
    assert [fault.burst for fault in world.faults] == [2, 2]


@pytest.mark.parametrize(("bursts", "sizes"), [(0.0, {1}), (1.0, {2, 3}), (0.25, {1, 2, 3})])
def test_bursts_come_as_often_as_asked_for(bursts: float, sizes: set[int]) -> None:
    drawn = list(islice(moments(7, [Counted()], bursts, 0.5), 100))
    assert {len(each.faults) for each in drawn} == sizes


def test_a_seed_is_one_plan_and_no_fault_moves_another() -> None:
    kinds = [type("K", (Counted,), {"name": name})() for name in "abc"]
    drawn = list(islice(moments(7, kinds, 0.25, 0.5), 40))
    assert drawn == list(islice(moments(7, kinds, 0.25, 0.5), 40))
    assert drawn[30:] == list(islice(moments(7, kinds, 0.25, 0.5, first=31), 10)), "each is drawn for itself"
    assert drawn != list(islice(moments(8, kinds, 0.25, 0.5), 40))
    assert len({draw.key for each in drawn for draw in each.faults}) == sum(len(e.faults) for e in drawn)
    first, second = drawn[0].faults[0], drawn[1].faults[0]
    assert first.source().random() == first.source().random() != second.source().random()
    assert all(0 <= each.pause <= 0.5 for each in drawn)


OF_A_SEED = """
import hashlib
from itertools import islice
from ullm.chaos.catalogue import catalogue
from ullm.chaos.chaos_plan import ChaosPlan, chosen_kinds
from ullm.chaos.schedule import moments

plan = ChaosPlan("scripted", seed=11)
drawn = list(islice(moments(plan.seed, chosen_kinds(()), plan.bursts, plan.pause), 300))
later = [fault.source().random() for moment in drawn for fault in moment.faults]
requests = catalogue("scripted", plan.seed, 60, plan.max_tokens)
print(hashlib.sha256(repr((drawn, later, requests)).encode()).hexdigest())
"""


@pytest.mark.process
def test_a_seed_is_one_plan_in_every_process() -> None:
    """Whatever the order of sets and the hashes of texts are."""
    printed = [
        subprocess.run(
            [sys.executable, "-c", OF_A_SEED],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for salt in ("1", "2")
    ]
    assert printed[0] == printed[1] != ""


async def test_what_finds_nothing_to_act_on_is_no_fault(world: World) -> None:
    await inject(world, Counted(NOTHING))
    assert world.faults == []
    assert world.skipped == ["0: counted found nothing to act on"]


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"faults": 0},
        {"seconds": 0},
        {"streams": -1},
        {"only": ("nope",)},
        {"bursts": 1.5},
        {"bursts": -0.1},
        {"max_gap": 0},
        {"min_answered": -1},
    ],
)
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


def plan_for(**more: Any) -> ChaosPlan:
    return ChaosPlan("scripted", seed=3, **more)


async def test_a_report_lays_gaps_to_the_faults_around_them(world: World) -> None:
    world.faults = [InjectedFault(1, "a", 10.0), InjectedFault(2, "b", 20.0)]
    first, second = ChaosAnswer(STREAM, 0.0), ChaosAnswer(STREAM, 0.0)
    first.gaps, second.gaps = [(9.9, 10.4), (30.0, 35.0)], [(10.2, 10.9)]
    world.answers = [first, second]
    report = ChaosReport.of(plan_for(), world, [Verdict("fine", True)], [Counted()])
    assert [kind.longest_gap for kind in report.kinds] == [None]
    kinds = [type("K", (Counted,), {"name": name})() for name in "ab"]
    report = ChaosReport.of(plan_for(), world, [Verdict("fine", True)], kinds)
    assert [(kind.count, kind.longest_gap) for kind in report.kinds] == [
        (1, pytest.approx(0.7)),
        (1, None),
    ]
    assert report.good
    assert not ChaosReport.of(plan_for(), world, [Verdict("fine", False)], kinds).good


# --- log probabilities, refusals, effects ------------------------------------------------------------------


SCORED = replace(EXPECTED, logprobs=((("a", -0.5), ("b", -0.25), ("c", -1.0)),))


@pytest.mark.parametrize(
    ("logprobs", "complaint"),
    [
        ([("a", -0.5), ("b", -0.251), ("c", -1.0)], None),
        ([("a", -0.5), ("b", -0.3), ("c", -1.0)], "token 1 is ('b', -0.3), not ('b', -0.25)"),
        ([("b", -0.25), ("c", -1.0), ("c", -1.0)], "token 0 is ('b', -0.25), not ('a', -0.5)"),
        ([("a", -0.5), ("b", -0.25)], "2 log probabilities, not 3"),
        ([], "0 log probabilities, not 3"),
    ],
)
def test_log_probabilities_are_those_of_the_undisturbed_run(logprobs: Any, complaint: str | None) -> None:
    found = answer(logprobs={0: logprobs} if logprobs else {}).violations(SCORED)
    assert [complaint in each for each in found] == ([] if complaint is None else [True])


async def test_log_probabilities_of_both_apis_are_read(nursery: trio.Nursery) -> None:
    chat = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[%s]}}]}\n\n'
    plain = (
        b'data: {"choices":[{"index":0,"text":"b","logprobs":{"tokens":["b"],"token_logprobs":[-2]}}]}\n\n'
    )
    found = await asked(nursery, chat % b'{"token":"a","logprob":-1.5,"bytes":[97]}', plain)
    assert found.logprobs == {0: [("a", -1.5), ("b", -2)]}


def test_log_probabilities_are_those_of_the_text() -> None:
    assert answer(scored={0: b"abc"}).violations(EXPECTED) == []
    (violation,) = answer(scored={0: b"aab"}).violations(EXPECTED)
    assert "are those of another text" in violation


async def test_a_refusal_needs_a_cause(world: World) -> None:
    for busiest, wrong in ((world.room + 1, False), (world.room, True)):
        world.violations.clear()
        refused = answer(error="full", status=429, retry_after="1", busiest=busiest)
        world.judge(refused)
        assert [("refused without cause" in each) for each in world.violations] == [True] * wrong


async def test_what_is_in_flight_counts_and_what_has_just_left(
    autojump_clock: trio.testing.MockClock, world: World
) -> None:
    world.answers, world.live = [ChaosAnswer(STREAM, 0.0), ChaosAnswer(STREAM, 0.0)], {0, 1}
    assert (await world.send(STREAM)).busiest == 3
    assert (await world.send(STREAM)).busiest == 4, "the last one has only just left"
    await trio.sleep(LINGERS + 1)
    assert (await world.send(STREAM)).busiest == 3
    assert world.answers[0].busiest == 4


async def test_what_was_fired_must_have_had_its_effect(
    autojump_clock: trio.testing.MockClock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fired = [
        FiredFault(1, 0.0, "worker.step", "crash", 3, effect="worker lost: killed", recovered=0.2),
        FiredFault(2, 0.0, "worker.step", "crash", 4),
    ]
    world.armed = {1: "worker.step:crash@nth=3", 2: "worker.step:crash@nth=4"}

    async def told(asked: World) -> FaultReport:
        return FaultReport([], fired)

    monkeypatch.setattr(planned_faults, "report_of", told)
    await planned_faults.judge_effects(world)
    assert world.violations == ["worker.step:crash@nth=4 fired at hit 4 of worker.step and had no effect"]
    world.violations.clear()
    fired[1].effect, fired[0].recovered = "worker lost: killed", None
    await planned_faults.judge_effects(world)
    assert world.violations == ["2 faults ended a worker or an actor, and none was seen again"]


async def test_verdicts_about_the_load(world: World) -> None:
    world.answers = [ChaosAnswer(STREAM, 0.0, gaps=[(1.0, 4.0)])]
    world.faults = [InjectedFault(1, "a", 10.0)]
    plan = plan_for(faults=1, max_gap=3.0, min_answered=5)
    assert all(verdict.good for verdict in load_verdicts(world, plan, 5, 0))
    world.violations = ["something"]
    plan = plan_for(faults=2, max_gap=2.9, min_answered=6)
    assert not any(verdict.good for verdict in load_verdicts(world, plan, 5, 0))


# --- the report, which can be run again --------------------------------------------------------------------


async def test_a_report_can_be_read_and_run_again(world: World, tmp_path: Path) -> None:
    world.begun = list(islice(moments(3, [Counted()], 0.25, 0.5), 3))
    world.fired = [FiredFault(1, 0.0, "worker.step", "crash", 3)]
    plan = plan_for(arguments=("--tp-size", "2"), only=("worker",), max_gap=4.0)
    report = ChaosReport.of(plan, world, [Verdict("fine", True)], [])
    file = tmp_path / "report.json"
    file.write_text(report.json())
    read = ChaosReport.read(file)
    assert (read.chaos_plan(), read.plan, read.fired) == (plan, world.begun, world.fired)
    assert read.repeatable == report.repeatable


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "No such file"), ("{}", "not a report of ullm chaos"), ("nonsense", "not a report")],
)
def test_what_cannot_be_run_again(tmp_path: Path, content: str | None, complaint: str) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ResourceUnavailable, match=complaint):
        ChaosReport.read(file)
