"""Worker processes: real ones, with real signals, each bounded in time."""

import logging
import os
import select
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
import trio

from ullm.actors.transports.base import STDERR_TAIL_LINES
from ullm.actors.transports.process import open_process
from ullm.errors import WorkerLost
from ullm.protocol.frames import FrameReader, encode
from ullm.protocol.messages import (
    FromWorker,
    NewSequence,
    Ping,
    Pong,
    Progress,
    ScheduledSequence,
    Sleep,
    Step,
    StepResult,
    Stop,
    Wake,
)
from ullm.testing import scripted_tokens

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.name != "posix", reason="signals and descriptors as on POSIX"),
]


async def hanging(worker, talk):
    """Wait until the runner has reported that it is about to hang."""
    await worker.send(talk.start())
    while (await talk.until(worker, Progress)).stage != "hanging":
        pass


async def lost(worker):
    """The error after the worker's last message."""
    with trio.fail_after(60):
        while True:
            try:
                await worker.receive()
            except WorkerLost as error:
                return error


@pytest.mark.parametrize("runner", ["Prints", "ReadsStdin"])
async def test_prints_and_reads_do_not_touch_the_frames(talk, runner):
    async with open_process(talk.spec(runner)) as worker:
        await talk.load(worker)
        for step_id in range(3):
            await worker.send(talk.step(step_id))
            result = await worker.receive()
            assert result.sampled[0].token_ids == scripted_tokens(talk.PROMPT, talk.GREEDY, 1)


async def test_prints_go_to_the_log(talk, caplog):
    caplog.set_level(logging.INFO, "ullm")
    async with open_process(talk.spec("Prints")) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        await worker.receive()
        await worker.stop(5)
    lines = [record.getMessage() for record in caplog.records if record.worker == "replica0.rank0"]
    (warning,) = [record for record in caplog.records if record.name == "ullm.hostile"]
    assert (warning.levelname, warning.getMessage()) == ("WARNING", "from a logger answer=42")
    for source in ("from python", "from a descriptor", "from C", "from a child"):
        assert source in lines


async def test_large_messages_in_both_directions(talk):
    prompt = list(range(3, 990)) * 100
    async with open_process(talk.spec()) as worker:
        await talk.load(worker, f"num_blocks={len(prompt)},context_len={2 * len(prompt)}")
        blocks = list(range(-(-len(prompt) // 16)))[:16]
        for step_id in range(3):
            new = NewSequence(step_id, prompt, len(prompt), talk.GREEDY, [])
            rows = [ScheduledSequence(step_id, 0, 16 * 16, False, blocks)]
            await worker.send(Step(step_id, rows, [new], released=[step_id - 1]))
            assert (await worker.receive()).step_id == step_id


async def test_sigkill_is_seen_at_once_and_named(talk):
    async with open_process(talk.spec()) as worker:
        await talk.load(worker)
        os.kill(worker.pid, signal.SIGKILL)
        with trio.fail_after(30):  # not the time of a step or a ping
            error = await lost(worker)
        assert str(error) == "replica0.rank0 was killed by SIGKILL"
        with pytest.raises(WorkerLost, match="SIGKILL"):
            await worker.send(Ping(1))


async def test_crash_in_c_leaves_its_traceback_in_the_error(talk):
    async with open_process(talk.spec("Segfaults")) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        error = await lost(worker)
    assert error.cause == "was killed by SIGSEGV"
    assert any("Segmentation fault" in line for line in error.stderr_tail)
    assert len(error.stderr_tail) <= STDERR_TAIL_LINES


async def test_exit_names_status_and_last_words(talk):
    async with open_process(talk.spec("Exits")) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        error = await lost(worker)
    assert error.cause == "exited with status 3: some reason"
    assert error.stderr_tail == ("some reason",)


async def test_child_that_never_speaks(talk, monkeypatch, tmp_path):
    program = tmp_path / "not-python"
    program.write_text("#!/bin/sh\necho no such interpreter >&2\nexit 4\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    async with open_process(talk.spec()) as worker:
        error = await lost(worker)
    assert error.cause == "exited with status 4: no such interpreter"


async def test_garbage_on_the_pipe_loses_the_worker(talk):
    async with open_process(talk.spec("WritesGarbage")) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        error = await lost(worker)
        assert "not msgpack" in error.cause
        assert not await still_there(worker.pid)


async def test_closed_pipe_loses_the_worker(talk):
    async with open_process(talk.spec("ClosesThePipe")) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        error = await lost(worker)
    assert error.cause == "closed its pipe without ending"


async def test_stop_interrupts_loading_at_once(talk):
    async with open_process(talk.spec("Sleeps")) as worker:
        await hanging(worker, talk)
        report = await worker.stop(60)
    assert report.outcome == "stopped"
    assert report.seconds < 1


async def test_stop_interrupts_waking_at_once(talk):
    async with open_process(talk.spec("HangsInWake")) as worker:
        await talk.load(worker)
        await worker.send(Sleep(1))
        await worker.send(Wake())
        while (await talk.until(worker, Progress)).stage != "hanging":
            pass
        report = await worker.stop(60)
    assert report.outcome == "stopped"
    assert report.seconds < 1


async def test_stop_does_not_wait_for_loading_that_cannot_be_interrupted(talk):
    async with open_process(talk.spec("HoldsTheInterpreter")) as worker:
        await hanging(worker, talk)
        report = await worker.stop(60)
    assert report.outcome == "killed"
    assert report.seconds < 1.5


async def test_stop_before_the_interpreter_is_up(talk):
    async with open_process(talk.spec()) as worker:
        report = await worker.stop(60)
    assert report.outcome == "stopped"
    assert report.seconds < 1.5


async def test_stop_interrupts_a_step_by_sigterm(talk):
    async with open_process(talk.spec("SleepsInStep")) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        report = await worker.stop(2.0)
    assert report.outcome == "stopped"
    assert 1.5 <= report.seconds < 2.0


async def test_stop_kills_what_does_not_listen_within_its_budget(talk):
    async with open_process(talk.spec("IgnoresSigterm")) as worker:
        await talk.load(worker)
        report = await worker.stop(1.0)
        assert report.outcome == "killed"
        assert 0.9 < report.seconds < 1.2
        assert not worker.alive()
        assert (await lost(worker)).cause == "was killed by SIGKILL"


async def test_stop_kills_a_stopped_process(talk):
    async with open_process(talk.spec()) as worker:
        await talk.load(worker)
        os.kill(worker.pid, signal.SIGSTOP)
        assert (await worker.stop(0.5)).outcome == "killed"


async def test_stop_with_no_budget_kills_now(talk):
    async with open_process(talk.spec()) as worker:
        await talk.load(worker)
        with trio.fail_after(30):
            report = await worker.stop(0)
        assert report.outcome == "killed"


async def test_failing_close_is_a_failed_stop_and_the_process_ends(talk):
    async with open_process(talk.spec("RaisesInClose")) as worker:
        await talk.load(worker)
        report = await worker.stop(5)
        assert report.outcome == "killed"
        assert report.seconds < 2
        assert not worker.alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_to_the_group_are_not_for_the_worker(talk, number):
    async with open_process(talk.spec()) as worker:
        await talk.load(worker)
        os.kill(worker.pid, number)
        await worker.send(talk.step())
        assert isinstance(await worker.receive(), StepResult)
        assert (await worker.stop(5)).outcome == "stopped"


async def test_worker_is_in_a_session_of_its_own(talk):
    async with open_process(talk.spec()) as worker:
        assert os.getsid(worker.pid) == worker.pid != os.getsid(0)


async def test_kill_takes_what_the_worker_started(talk):
    async with open_process(talk.spec("HasAChild")) as worker:
        await worker.send(talk.start())
        while not (stage := (await talk.until(worker, Progress)).stage).startswith("child "):
            pass
        worker.kill()
        assert not await still_there(int(stage.split()[1]))


async def test_cancelled_sender_leaves_no_half_frame(talk):
    """A message larger than the pipe, to a worker that does not read, whose sender gives up."""
    new = NewSequence(0, [900] * 25_000, 25_000, talk.GREEDY, [])
    async with open_process(talk.spec()) as worker:
        await talk.load(worker)
        os.kill(worker.pid, signal.SIGSTOP)
        with trio.move_on_after(0.1):
            for step_id in range(1000):
                await worker.send(Step(step_id, [], [new], released=[0]))
        os.kill(worker.pid, signal.SIGCONT)
        await worker.send(Ping(1))
        assert await talk.until(worker, Pong) == Pong(1)


async def test_threads_to_compute_with(talk, monkeypatch, tmp_path):
    (tmp_path / "reports_threads.py").write_text(
        textwrap.dedent(
            """
            import os
            from ullm.protocol.messages import Progress
            from ullm.testing import ScriptedRunner

            class Runner(ScriptedRunner):
                def load(self, start, progress):
                    progress(Progress("threads " + os.environ["OMP_NUM_THREADS"]))
                    return super().load(start, progress)
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = type(talk.spec())(talk.spec().rank, "reports_threads:Runner", cpu_threads=3)
    async with open_process(spec) as worker:
        await worker.send(talk.start())
        while not (stage := (await talk.until(worker, Progress)).stage).startswith("threads"):
            pass
    assert stage == "threads 3"


PARENT = """
import sys, trio
from ullm.actors.transports import WorkerSpec, open_transport
from ullm.config import EngineConfig
from ullm.protocol.messages import Progress, RankSpec, Start

async def main(runner):
    async with open_transport("process")(WorkerSpec(RankSpec(), runner)) as worker:
        await worker.send(Start(EngineConfig(num_blocks=16), RankSpec(), "scripted:"))
        stage = None
        while stage not in ("hanging", "load"):
            message = await worker.receive()
            stage = getattr(message, "stage", None)
        print(worker.pid, flush=True)
        await trio.sleep_forever()

trio.run(main, sys.argv[1])
"""


@pytest.mark.parametrize(
    "runner", ["ullm.testing:ScriptedRunner", "hostile_runners:Sleeps", "hostile_runners:HoldsTheInterpreter"]
)
async def test_worker_is_gone_when_its_parent_is_killed(runner, monkeypatch):
    """Idle, in a long step, and in a step that holds the interpreter's lock."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    parent = await trio.lowlevel.open_process(
        [sys.executable, "-c", PARENT, runner], stdout=subprocess.PIPE, env=environment
    )
    try:
        with trio.fail_after(60):
            pid = int(await parent.stdout.receive_some())
        watched = os.pidfd_open(pid)
    finally:
        parent.kill()
        await parent.wait()
        await parent.stdout.aclose()
    try:
        with trio.fail_after(1):
            await trio.lowlevel.wait_readable(watched)
    finally:
        os.close(watched)


async def test_nothing_is_left_behind(talk):
    """Descriptors, processes, zombies: after every way to end."""
    await use_and_drop(talk)  # what is opened once and for all
    before, children = open_descriptors(), psutil.Process().children()
    for _ in range(3):
        await use_and_drop(talk)
    assert open_descriptors() == before
    assert psutil.Process().children() == children


async def use_and_drop(talk):
    async with open_process(talk.spec()) as worker:
        await talk.load(worker)
        await worker.stop(5)
    async with open_process(talk.spec()) as worker:
        worker.kill()
    with trio.move_on_after(0.2):
        async with open_process(talk.spec("Sleeps")) as worker:
            await trio.sleep_forever()
    async with open_process(talk.spec("Exits")) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        await lost(worker)


async def test_worker_holds_none_of_our_descriptors(talk):
    with open(os.devnull) as ours:  # noqa: ASYNC230
        os.set_inheritable(ours.fileno(), True)
        async with open_process(talk.spec()) as worker, open_process(talk.spec()) as other:
            await talk.load(worker)
            await talk.load(other)
            for pid in (worker.pid, other.pid):
                names = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
                assert sum(name.startswith("pipe:") for name in names) == 5  # in, out, lifeline, 1 and 2


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


async def still_there(pid):
    """Whether a process still runs a second from now; return as soon as it has ended."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        with trio.move_on_after(1):
            await trio.lowlevel.wait_readable(watched)
        return not select.select([watched], [], [], 0)[0]
    finally:
        os.close(watched)


async def test_stop_message_alone_ends_the_process(talk):
    """The transport's escalation is not needed for a worker that listens."""
    async with open_process(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(Stop(5))
        error = await lost(worker)
    assert error.cause == "exited with status 0"


async def test_reader_alone_ends_an_orphan_where_there_is_no_lifeline(talk):
    """As on macOS and Windows: the end of stdin is enough, also in a long step."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-m", "ullm.worker.main", "--name", "orphan"]
    process = await trio.lowlevel.open_process(
        [*command, "--runner", "hostile_runners:Sleeps"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        await process.stdin.send_all(encode(talk.start()))
        reader, message = FrameReader(FromWorker), None
        while getattr(message, "stage", None) != "hanging":
            if (message := reader.next()) is None:
                reader.feed(await process.stdout.receive_some(1 << 16))
        await process.stdin.aclose()
        with trio.fail_after(1):
            assert await process.wait() == 1
    finally:
        process.kill()
        await process.stdout.aclose()


def test_worker_process_imports_only_what_it_needs():
    program = (
        "import sys; import ullm.worker.main; "
        "print(*sorted({'trio', 'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == ""
    assert result.returncode == 0, result.stderr
