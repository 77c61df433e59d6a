"""The worker loop, with a runner whose steps are done when the test says so."""

import queue

import msgspec
import pytest

from ullm.config import EngineConfig
from ullm.errors import ConfigError, FrameBroken
from ullm.protocol.messages import (
    Asleep,
    Awake,
    Failed,
    ModelInfo,
    NotUnderstood,
    Ping,
    Pong,
    Progress,
    RankSpec,
    Ready,
    Sleep,
    Start,
    Step,
    StepResult,
    Stop,
    Stopped,
    Wake,
)
from ullm.testing import ScriptedRunner
from ullm.worker.loop import SLEEP_BUDGET, Ended, failed, load_runner, run_worker

START = Start(EngineConfig(), RankSpec(), "scripted:")
INFO = ModelInfo("Test", 0, 10, (), 10, 1, 1, "none", "none")


class Device:
    """A runner whose step n is done after ``polls[n]`` polls, and which logs its calls."""

    def __init__(self, polls):
        self.polls = polls
        self.diary = []

    def load(self, start, progress):
        return INFO

    def submit(self, step):
        self.diary.append(f"submit {step.step_id}")
        return Pending(self, step.step_id)

    def sleep(self, level):
        self.diary.append(f"sleep {level}")
        return {"kv": 8} if level == 1 else {"kv": 1, "weights": 100}

    def wake(self, progress):
        self.diary.append("wake")
        progress(Progress("load"))
        return msgspec.structs.replace(INFO, num_blocks=7)

    def close(self):
        self.diary.append("close")
        return {"kv": 0.5}

    def send(self, message):
        self.diary.append(f"sent {message.step_id}" if isinstance(message, StepResult) else message)


class Pending:
    def __init__(self, device, number):
        self.device = device
        self.number = number
        self.left = device.polls

    def done(self):
        self.left -= 1
        return self.left < 0

    def result(self):
        self.device.diary.append(f"waited for {self.number}" if self.left >= 0 else f"took {self.number}")
        return StepResult(self.number, [])


def inbox(*messages):
    box = queue.SimpleQueue()
    for message in messages:
        box.put(message)
    return box


def work(device, *messages):
    return run_worker(device, inbox(*messages), device.send)


def sent(device, *kinds):
    """The worker's messages of some kinds, without values that vary."""
    neutral = {Asleep: {"seconds": 0.0}, Awake: {"timings": {}}}
    return [
        msgspec.structs.replace(entry, **neutral.get(type(entry), {}))
        for entry in device.diary
        if isinstance(entry, kinds)
    ]


def test_on_a_cpu_each_result_leaves_before_the_next_step():
    device = Device(polls=0)
    assert work(device, START, Step(0, []), Step(1, []), Stop(1)) is Ended.STOPPED
    assert device.diary == [
        Ready(INFO, device.diary[0].timings),
        *("submit 0", "took 0", "sent 0"),
        *("submit 1", "took 1", "sent 1"),
        *("close", Stopped({"kv": 0.5})),
    ]


def test_on_a_device_the_next_step_is_submitted_before_the_first_is_waited_for():
    device = Device(polls=10**9)
    work(device, START, Step(0, []), Step(1, []), Step(2, []), Stop(1))
    assert device.diary[1:-2] == [
        *("submit 0", "submit 1"),
        *("waited for 0", "sent 0", "submit 2"),
        *("waited for 1", "sent 1"),
        *("waited for 2", "sent 2"),
    ]


def test_result_leaves_though_no_next_step_comes():
    """The test's inbox gives `Stop` only after the result was sent, as a scheduler would."""
    device = Device(polls=5)
    box = inbox(START, Step(0, []))

    def send(message):
        device.send(message)
        if isinstance(message, StepResult):
            box.put(Stop(1))

    assert run_worker(device, box, send) is Ended.STOPPED
    assert device.diary[1:4] == ["submit 0", "took 0", "sent 0"]


def test_ping_goes_through_the_loop_but_not_behind_a_running_step():
    device = Device(polls=10**9)
    work(device, START, Step(0, []), Ping(1), Stop(1))
    assert device.diary[1:5] == ["submit 0", Pong(1), "waited for 0", "sent 0"]


def test_pending_steps_are_finished_before_sleep():
    device = Device(polls=10**9)
    work(device, START, Step(0, []), Step(1, []), Sleep(1), Wake(), Step(2, []), Stop(1))
    assert [entry for entry in device.diary if isinstance(entry, str)] == [
        *("submit 0", "submit 1", "waited for 0", "sent 0", "waited for 1", "sent 1"),
        *("sleep 1", "wake", "submit 2", "waited for 2", "sent 2", "close"),
    ]


def test_deeper_sleep_follows_and_adds_up():
    device = Device(polls=0)
    work(device, START, Sleep(1), Sleep(1), Sleep(2), Sleep(2), Sleep(1), Wake(), Sleep(2), Stop(1))
    shallow, deep = Asleep({"kv": 8}), Asleep({"kv": 9, "weights": 100})
    assert sent(device, Asleep) == [shallow, shallow, deep, deep, deep, Asleep({"kv": 1, "weights": 100})]
    assert [entry for entry in device.diary if isinstance(entry, str)] == [
        *("sleep 1", "sleep 2", "wake", "sleep 2", "close")
    ]


def test_wake_answers_with_what_was_found_and_shows_signs_of_life():
    device = Device(polls=0)
    work(device, START, Wake(), Sleep(2), Wake(), Wake(), Stop(1))
    woken = Awake(msgspec.structs.replace(INFO, num_blocks=7))
    assert sent(device, Awake, Progress) == [
        *(Awake(INFO), Progress("sleep", SLEEP_BUDGET), Progress("load"), woken, woken)
    ]


def test_asleep_it_answers_pings_and_computes_nothing():
    device = Device(polls=0)
    work(device, START, Sleep(1), Step(3, []), Ping(1), Stop(1))
    assert sent(device, NotUnderstood, Pong, Stopped) == [
        NotUnderstood("Step came while asleep at level 1"),
        *(Pong(1), Stopped({"kv": 0.5})),
    ]


@pytest.mark.parametrize("message", [Sleep(1), Wake(), Step(0, [])])
def test_nothing_comes_before_start(message):
    device = Device(polls=0)
    work(device, message, Stop(1))
    assert sent(device, NotUnderstood) == [NotUnderstood(f"{type(message).__name__} came before Start")]


@pytest.mark.parametrize("level", [-1, 0, 3])
def test_levels_that_are_none_of_a_worker_s(level):
    device = Device(polls=0)
    work(device, START, Sleep(level), Step(0, []), Stop(1))
    assert sent(device, NotUnderstood) == [NotUnderstood(f"Sleep has level {level}; workers know (1, 2)")]
    assert "submit 0" in device.diary


def test_broken_frame_ends_the_loop():
    device = Device(polls=0)
    assert work(device, FrameBroken("a frame that is not msgpack")) is Ended.FAILED
    (message,) = device.diary
    assert (message.kind, message.message) == ("FrameBroken", "a frame that is not msgpack")


@pytest.mark.parametrize("message", [NotUnderstood("odd"), "a text", None, Pong(1)])
def test_unknown_message_is_answered_and_the_loop_goes_on(message):
    device = Device(polls=0)
    assert work(device, message, Ping(1), Stop(1)) is Ended.STOPPED
    assert isinstance(device.diary[0], NotUnderstood)
    assert device.diary[1] == Pong(1)


def test_exception_is_the_last_message_and_the_runner_is_left_open():
    device = Device(polls=0)
    device.submit = None
    assert work(device, START, Step(0, []), Ping(1)) is Ended.FAILED
    assert isinstance(device.diary[-1], Failed)
    assert "close" not in device.diary


def test_exception_without_words():
    assert failed(ValueError()) == Failed("ValueError", "no message", "ValueError\n")


def test_runner_is_named_by_module_and_class():
    assert isinstance(load_runner("ullm.testing:ScriptedRunner"), ScriptedRunner)
    assert type(load_runner("ullm.model.runner:ModelRunner")).__name__ == "ModelRunner"  # its former path
    with pytest.raises(ConfigError, match=r"--runner 'ullm\.testing:No' cannot be imported"):
        load_runner("ullm.testing:No")
