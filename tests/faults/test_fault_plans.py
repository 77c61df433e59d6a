"""Fault plans: their language, and the counting."""

from __future__ import annotations

import errno
import time
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from ullm.errors import ConfigError, FaultInjected
from ullm.faults import (
    ACTOR_ACTIONS,
    CHUNK_ACTIONS,
    FRAME_ACTIONS,
    HANDOVER_ACTIONS,
    POINTS,
    REQUEST_ACTIONS,
    WORKER_ACTIONS,
    Fault,
    FaultInjector,
    FaultPlan,
    injected,
    point,
    point_now,
)
from ullm.faults.injector import HISTORY, FaultSite

STEP = FaultSite("worker.step", replica=0, rank=0, epoch=1)


def fires(injector: FaultInjector, hits: int, site: FaultSite = STEP) -> list[int]:
    """The hits, counted from 1, at which something happens."""
    return [hit for hit in range(1, hits + 1) if injector.fire(site)]


# --- the language --------------------------------------------------------------------------------


def test_a_plan_in_words() -> None:
    plan = FaultPlan.parse(
        " worker.step:crash@nth=3 , times=2;\n"
        "frame.from_worker:drop@probability=0.01,seed=7,message=StepResult; seed=5;; scheduler.step:raise "
    )
    assert plan == FaultPlan(
        (
            Fault("worker.step", "crash", nth=3, times=2),
            Fault("frame.from_worker", "drop", probability=0.01, seed=7, message="StepResult"),
            Fault("scheduler.step", "raise"),
        ),
        seed=5,
    )


def test_a_plan_in_json_is_the_same() -> None:
    fault = {"point": "worker.step", "action": "slow", "seconds": 2.5, "times": "always"}
    expected = (Fault("worker.step", "slow", seconds=2.5, times="always"),)
    assert FaultPlan.parse(msgspec.json.encode([fault]).decode()) == FaultPlan(expected)
    whole = {"faults": [fault], "seed": 9}
    assert FaultPlan.parse(msgspec.json.encode(whole).decode()) == FaultPlan(expected, 9)


def test_no_text_is_no_plan() -> None:
    assert FaultPlan.parse(" ") == FaultPlan()
    assert not FaultInjector.from_text("").armed


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    point = draw(st.sampled_from(list(POINTS)))
    action = draw(st.sampled_from(POINTS[point]))
    values: dict[str, Any] = {
        "nth": draw(st.integers(1, 10**6)),
        "times": draw(st.none() | st.just("always") | st.integers(1, 10**6)),
        "probability": draw(st.floats(0, 1, exclude_min=True)),
        "seed": draw(st.none() | st.integers(0, 10**6)),
    }
    if action in ("slow", "delay", "hang", "block"):
        values["seconds"] = draw(st.none() | st.floats(1e-3, 1e6))
    if point.startswith(("worker.", "frame.")):
        values |= {name: draw(st.none() | st.integers(0, 99)) for name in ("replica", "rank", "epoch")}
    if POINTS[point] is FRAME_ACTIONS:
        values["message"] = draw(st.none() | st.sampled_from(["Step", "StepResult", "Ready"]))
    return Fault(point, action, **values)


@given(st.lists(faults()), st.integers(0, 10**6))
def test_what_is_written_can_be_read(written: list[Fault], seed: int) -> None:
    plan = FaultPlan(tuple(written), seed)
    assert FaultPlan.parse(str(plan)) == plan
    assert FaultPlan.parse(msgspec.json.encode(plan).decode()) == plan


def test_plans_are_added_with_their_seeds() -> None:
    both = FaultPlan.parse("worker.step:crash; worker.ping:crash@seed=1; seed=5") + FaultPlan.parse(
        "worker.stop:hang; seed=6"
    )
    assert str(both) == "worker.step:crash@seed=5; worker.ping:crash@seed=1; worker.stop:hang@seed=6"
    assert FaultPlan.parse("worker.stop:hang") + FaultPlan() == FaultPlan.parse("worker.stop:hang")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("crash", "'crash': not of the form point:action@option=value"),
        ("worker.stepp:crash", "no point 'worker.stepp'; there are worker.start"),
        ("worker.step:drop", "no action 'drop' at worker.step; there are crash"),
        ("seed=1; worker.step:crash; worker.step:crash@nth=first", "nth=first.*`int`.*`nth`"),
        ("worker.step:crash@nth=0", "nth and times must be at least 1"),
        ("worker.step:crash@times=0", "nth and times must be at least 1"),
        ("worker.step:crash@times=often", "times=often.*'often', in `times`"),
        ("worker.step:crash@probability=0", "above 0 and at most 1, got 0"),
        ("worker.step:crash@probability=nan", "above 0 and at most 1, got nan"),
        ("worker.step:slow@seconds=-1", "above 0 and finite, got -1"),
        ("worker.step:crash@seconds=1", "crash takes no seconds"),
        ("worker.step:crash@nth=1,nth=2", "'nth=2' is not an option, or is given twice"),
        ("worker.step:crash@action=hang", "'action=hang' is not an option"),
        ("worker.step:crash@wehn=3", "'wehn=3' is not an option"),
        ("frame.to_worker:drop@message=Stepp", "no message 'Stepp'; there are AdapterKept, Asleep"),
        ("worker.step:crash@message=Step", "only frames can be filtered by message"),
        ("router.tokens:raise@rank=1", "cannot be filtered by rank"),
        ("seed=x", "'seed=x': Expected `int`"),
        ('[{"point": "worker.step"}]', "missing required field `action`"),
        ('[{"point": "worker.step", "action": "crash", "nth": "3"}]', "Expected `int`, got `str`, in `nth`"),
        ('{"fault": []}', "unknown field `fault`"),
        ('{"faults": 3}', "Expected `array`"),
        ('[{"point"', "not JSON"),
    ],
)
def test_a_bad_plan_is_one_line_that_names_the_part(text: str, detail: str) -> None:
    with pytest.raises(ConfigError, match=detail) as caught:
        FaultInjector.from_text(text)
    assert str(caught.value).startswith("--faults: ")
    assert "\n" not in str(caught.value)


# --- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", [1]),
        ("@nth=3", [3]),
        ("@nth=3,times=2", [3, 4]),
        ("@nth=8,times=always", [8, 9, 10]),
    ],
)
def test_it_happens_at_these_hits(options: str, expected: list[int]) -> None:
    assert fires(FaultInjector.from_text(f"worker.step:crash{options}"), 10) == expected


def test_only_what_is_meant_is_counted() -> None:
    injector = FaultInjector.from_text("worker.step:crash@nth=2,replica=1,rank=0,epoch=2")
    other = [
        FaultSite("worker.step", 0, 0, 2),
        FaultSite("worker.step", 1, 1, 2),
        FaultSite("worker.step", 1, 0, 1),
    ]
    other.append(FaultSite("worker.start", 1, 0, 2))
    for site in other:
        assert fires(injector, 5, site) == []
    assert fires(injector, 3, FaultSite("worker.step", 1, 0, 2)) == [2]


def test_frames_are_counted_by_message() -> None:
    injector = FaultInjector.from_text("frame.from_worker:drop@nth=2,message=StepResult")
    assert fires(injector, 3, FaultSite("frame.from_worker", 0, 0, 1, "Progress")) == []
    assert fires(injector, 3, FaultSite("frame.from_worker", 0, 0, 1, "StepResult")) == [2]


def test_chance_is_seeded_and_independent_of_other_points() -> None:
    plan = "worker.step:crash@probability=0.2; worker.ping:crash@probability=0.2; seed=3"
    alone = fires(FaultInjector.from_text(plan), 1000)
    assert 150 < len(alone) < 250
    mixed = FaultInjector.from_text(plan)
    hits = []
    for hit in range(1, 1001):
        mixed.fire(FaultSite("worker.ping"))
        if mixed.fire(STEP):
            hits.append(hit)
    assert hits == alone
    assert fires(FaultInjector.from_text(plan.replace("seed=3", "seed=4")), 1000) != alone
    assert fires(FaultInjector.from_text("worker.step:crash@probability=0.2,seed=3"), 1000) == alone


def test_chance_with_a_limit() -> None:
    assert len(fires(FaultInjector.from_text("worker.step:crash@probability=0.5,times=3"), 100)) == 3


def test_two_faults_at_one_hit_both_happen() -> None:
    injector = FaultInjector.from_text("worker.step:slow@nth=2; worker.step:crash@nth=2")
    assert injector.fire(STEP) == []
    assert [fault.action for fault in injector.fire(STEP)] == ["slow", "crash"]


def test_arming_counts_from_now_and_clearing_ends_it() -> None:
    injector = FaultInjector()
    assert fires(injector, 5) == []
    (armed,) = injector.arm("worker.step:crash@nth=2")
    assert (armed.number, armed.fault, armed.remaining) == (1, "worker.step:crash@nth=2", 1)
    assert fires(injector, 5) == [2]
    assert not injector.armed
    injector.arm("worker.step:hang@times=always")
    assert [armed.fault for armed in injector.clear()] == [
        "worker.step:crash@nth=2",
        "worker.step:hang@times=always",
    ]
    assert fires(injector, 5) == []
    assert injector.describe().armed == []
    assert len(injector.history) == 1


def test_a_bad_plan_arms_nothing_of_it() -> None:
    injector = FaultInjector(transport="thread")
    with pytest.raises(
        ConfigError, match=r"'worker.step:stop': a thread cannot be stopped by SIGSTOP; use hang"
    ):
        injector.arm("worker.step:crash; worker.step:stop")
    assert injector.describe().armed == []
    assert not injector.armed


def test_windows_has_no_sigstop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ullm.faults.plan.sys.platform", "win32")
    with pytest.raises(ConfigError, match="Windows has no SIGSTOP; use hang"):
        FaultInjector.from_text("worker.step:stop", transport="process")


def test_what_happened_is_remembered_and_can_be_sent() -> None:
    injector = FaultInjector(FaultPlan.parse("frame.to_worker:drop@times=2"), clock=lambda: 12.5)
    injector.fire(FaultSite("frame.to_worker", 1, 0, 3, "Step"))
    report = msgspec.json.decode(msgspec.json.encode(injector.describe()))
    assert report == {
        "armed": [
            {"number": 1, "fault": "frame.to_worker:drop@times=2", "hits": 1, "fired": 1, "remaining": 1}
        ],
        "fired": [
            {
                "number": 1,
                "at": 12.5,
                "point": "frame.to_worker",
                "action": "drop",
                "hit": 1,
                "replica": 1,
                "rank": 0,
                "epoch": 3,
                "message": "Step",
                "request": None,
                "token": None,
                "effect": "",
                "recovered": None,
            }
        ],
    }


def test_memory_of_the_past_is_bounded() -> None:
    injector = FaultInjector.from_text("worker.step:crash@times=always")
    fires(injector, HISTORY + 5)
    assert len(injector.history) == HISTORY
    assert injector.history[-1].hit == HISTORY + 5


# --- actors --------------------------------------------------------------------------------------


async def test_an_actor_is_made_to_raise() -> None:
    injector = FaultInjector.from_text("scheduler.step:raise@nth=2; router.tokens:raise")
    await injector.at("scheduler.step")
    with pytest.raises(FaultInjected, match=r"injected fault: raise at scheduler\.step"):
        await injector.at("scheduler.step")
    with pytest.raises(FaultInjected, match=r"router\.tokens"):
        injector.hit("router.tokens")


async def test_an_actor_is_slow_or_hangs(autojump_clock: MockClock) -> None:
    injector = FaultInjector.from_text(
        "scheduler.step:slow@seconds=7; router.tokens:hang; engine.reload:slow"
    )
    await injector.at("scheduler.step")
    assert trio.current_time() == 7
    await injector.at("engine.reload")
    assert trio.current_time() == 8
    with trio.move_on_after(1e6) as scope:
        await injector.at("router.tokens")
    assert scope.cancelled_caught


async def test_of_faults_at_one_hit_the_one_that_ends_is_the_last_and_only_one(
    autojump_clock: MockClock,
) -> None:
    injector = FaultInjector.from_text(
        "router.tokens:raise; router.tokens:slow@seconds=7; router.tokens:raise@nth=1"
    )
    with pytest.raises(FaultInjected):
        await injector.at("router.tokens")
    assert trio.current_time() == 7, "what takes time comes first, or it would never come"
    with pytest.raises(FaultInjected):
        await injector.at("router.tokens")
    await injector.at("router.tokens")
    assert [(fired.number, fired.hit, fired.effect) for fired in injector.history] == [
        (2, 1, "waits 7 s"),
        (1, 1, "raised"),
        (3, 2, "raised"),
    ]


async def test_faults_that_a_cancel_comes_before_say_so(autojump_clock: MockClock) -> None:
    injector = FaultInjector.from_text("router.tokens:slow@seconds=7; router.tokens:raise")
    with trio.move_on_after(1):
        await injector.at("router.tokens")
    assert [fired.effect for fired in injector.history] == [
        "waits 7 s",
        "overtaken: its task ended first",
    ]


async def test_a_thread_is_blocked(autojump_clock: MockClock) -> None:
    injector = FaultInjector.from_text(
        "scheduler.step:block@seconds=0.05; router.tokens:slow@seconds=0.05; engine.reload:block@seconds=0.05"
    )
    began = time.perf_counter()
    await injector.at("scheduler.step")
    injector.hit("router.tokens")
    injector.hit("engine.reload")
    assert time.perf_counter() - began >= 0.15
    assert trio.current_time() == 0


def test_each_point_has_actions() -> None:
    assert set(POINTS.values()) == {
        *(WORKER_ACTIONS, FRAME_ACTIONS, ACTOR_ACTIONS, HANDOVER_ACTIONS),
        *(REQUEST_ACTIONS, CHUNK_ACTIONS),
    }


# --- tied to a request ---------------------------------------------------------------------------


def test_a_fault_is_tied_to_a_request_and_its_nth_token() -> None:
    injector = FaultInjector.from_text(
        "worker.step:crash@request=a,token=5; worker.step:slow@request=b; worker.step:hang@token=9"
    )

    def hit(*tokens: tuple[str, int, int]) -> list[str]:
        return [firing.action for firing in injector.fire(FaultSite("worker.step", 0, 0, 1, tokens=tokens))]

    assert hit(("a-0", 1, 4), ("c", 5, 5)) == []
    assert hit(("a-0", 5, 5), ("b", 0, 0)) == ["slow", "crash"]
    assert hit(("ab", 8, 10)) == ["hang"]
    assert [(fired.request, fired.token) for fired in injector.history] == [
        ("b", None),
        ("a-0", 5),
        ("ab", 9),
    ]


# --- what came of it -----------------------------------------------------------------------------


def test_what_was_fired_waits_for_its_effect() -> None:
    clock = iter(range(100))
    injector = FaultInjector(FaultPlan.parse("worker.step:crash"), clock=lambda: next(clock))
    injector.fire(FaultSite("worker.step", 0, 1, 3))
    (fired,) = injector.history
    assert (fired.effect, injector.armed, injector.watching) == ("", False, True)
    injector.note_loss(0, 0, 3, "another rank's end")
    injector.note_start(0, 0, 4)
    assert fired.effect == ""
    injector.note_loss(0, 1, 3, "was killed by SIGKILL")
    assert (fired.effect, fired.recovered) == ("worker lost: was killed by SIGKILL", None)
    injector.note_start(0, 1, 4)
    assert fired.recovered is not None
    assert not injector.watching
    assert "worker lost: was killed by SIGKILL, there again after" in str(fired)


def test_a_worker_that_goes_on_has_had_no_effect() -> None:
    injector = FaultInjector.from_text("worker.step:crash")
    injector.fire(FaultSite("worker.step", 0, 0, 3))
    injector.note_start(0, 0, 4)  # the successor of a worker that has ended in order
    (fired,) = injector.history
    assert (fired.effect, fired.recovered) == ("", None)
    assert "no effect seen" in str(fired)


@pytest.mark.parametrize(
    ("later", "effect"), [(9.0, "overtaken: its worker was stopped first"), (11.0, "")], ids=["soon", "late"]
)
def test_a_worker_that_is_stopped_meanwhile_may_not_have_come_to_it(later: float, effect: str) -> None:
    now = 100.0
    injector = FaultInjector(FaultPlan.parse("worker.sleep:crash"), clock=lambda: now)
    injector.fire(FaultSite("worker.sleep", 0, 0, 3))
    now += later
    injector.note_stop(0, 1, 3)  # another rank
    (fired,) = injector.history
    assert fired.effect == ""
    injector.note_stop(0, 0, 3)
    assert (fired.effect, fired.recovered) == (effect, None)


async def test_an_actor_that_was_thrown_out_is_seen_again(autojump_clock: MockClock) -> None:
    injector = FaultInjector.from_text("scheduler.step:raise")
    await trio.sleep(5)
    with pytest.raises(FaultInjected):
        await injector.at("scheduler.step")
    await trio.sleep(3)
    await injector.at("router.tokens")
    (fired,) = injector.history
    assert (fired.at, fired.effect, fired.recovered) == (5.0, "raised", None), "in the test's own time"
    await injector.at("scheduler.step")
    assert fired.recovered == 3.0


# --- points of other programs --------------------------------------------------------------------


async def test_a_program_that_is_no_language_model_has_points_of_its_own(autojump_clock: MockClock) -> None:
    written: list[str] = []

    async def write(entry: str) -> None:
        await point("ledger.write", request=entry)
        point_now("ledger.flush")
        written.append(entry)

    await write("before")
    plan = "ledger.write:raise@request=b; ledger.write:slow@seconds=5,nth=3; ledger.flush:disk_full@nth=2"
    with injected(plan) as faults:
        await write("a")
        with pytest.raises(FaultInjected, match=r"raise at ledger\.write"):
            await write("b")
        with pytest.raises(OSError, match="No space left on device") as caught:
            await write("c")
        await write("d")
    await write("after")
    assert caught.value.errno == errno.ENOSPC
    assert written == ["before", "a", "d", "after"]
    assert trio.current_time() == 5.0
    assert [(fired.point, fired.hit, fired.request) for fired in faults.history] == [
        ("ledger.write", 1, "b"),
        ("ledger.write", 3, "c"),
        ("ledger.flush", 2, None),
    ]
    assert [fired.recovered is not None for fired in faults.history] == [True, False, True]


async def test_the_virtual_clock_jumps(autojump_clock: MockClock) -> None:
    with injected("ledger.write:jump@seconds=3600"):
        await point("ledger.write")
    assert trio.current_time() == 3600.0


def test_a_clock_that_cannot_jump_says_so() -> None:
    async def main() -> None:
        with injected("ledger.write:jump@seconds=3600"):
            await point("ledger.write")

    with pytest.raises(ConfigError, match="only a virtual clock can jump"):
        trio.run(main)


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ("worker.step:crash", "worker.step is a point of ullm, which this program does not have"),
        ("ledger.write:crash", "no action 'crash' at ledger.write; there are raise"),
        ("ledger.write:jump", "jump needs seconds"),
        ("ledger:raise", "no point 'ledger'"),
        ("ledger.write:raise@replica=1", "cannot be filtered by replica"),
        ("ledger.write:raise@token=0", "token must be at least 1"),
    ],
)
def test_plans_that_a_program_cannot_have(plan: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint), injected(plan):
        pass


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ("ledger.write:raise", "no point 'ledger.write'; there are worker.start"),
        ("scheduler.step:raise@request=a", "scheduler.step cannot be filtered by request; only worker.step"),
        ("http.request:refuse@token=3", "http.request cannot be filtered by token"),
        ("http.request:refuse@status=404", "status must be one of 429, 500, 502, 503, got 404"),
        ("http.request:refuse@retry_after=-1", "retry_after must be at least 0"),
        ("http.request:slow@status=503", "slow takes no status; only refuse does"),
        ("http.request:refuse@rank=1", "cannot be filtered by rank"),
    ],
)
def test_plans_that_an_engine_cannot_have(plan: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        FaultInjector.from_text(plan)
