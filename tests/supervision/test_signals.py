"""The signal ladder and the watchdog, mostly with real signals in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from ullm.supervision import STOP_SIGNALS, Watchdog, forced_exit_code, signal_ladder

posix_only = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals to another process")

SERVER = textwrap.dedent(
    """
    import trio
    from ullm.supervision import ChildSpec, cleanup_scope, leave_now, open_supervisor, signal_ladder

    def say(*words):
        print(*words, flush=True)

    async def worker(*, task_status):
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            with cleanup_scope():
                say("worker cleans up")

    async def main():
        drained, hurried = trio.Event(), trio.Event()

        def drain(signum):
            say("drain", signum.name)
            drained.set()

        def hurry(signum):
            say("hurry", signum.name)
            hurried.set()

        def kill(signum):
            say("kill", signum.name)
            leave_now(signum)

        async def ladder(*, task_status):
            await signal_ladder(drain, hurry, kill, task_status=task_status)

        async with open_supervisor("root", [ChildSpec("signals", ladder), ChildSpec("worker", worker)]):
            say("ready")
            await drained.wait()
            await hurried.wait()
            if HANG:
                await trio.sleep_forever()
        say("stopped in order")

    trio.run(main)
    """
)


class LadderProcess:
    """A process under test: its lines, its exit code."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._text = b""

    async def says(self) -> str:
        """Its next line; "" when it has ended."""
        assert self.process.stdout is not None
        while b"\n" not in self._text:
            chunk = await self.process.stdout.receive_some()
            if not chunk:
                return ""
            self._text += chunk
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()


@asynccontextmanager
async def server(program: str) -> AsyncIterator[LadderProcess]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        with trio.fail_after(60):
            yield LadderProcess(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()


@posix_only
@pytest.mark.process
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_first_signal_drains_second_hurries(second: signal.Signals) -> None:
    async with server(SERVER.replace("HANG", "False")) as running:
        assert await running.says() == "ready"
        running.process.send_signal(signal.SIGTERM)
        assert await running.says() == "drain SIGTERM"
        running.process.send_signal(second)
        assert await running.says() == f"hurry {second.name}"
        assert await running.says() == "worker cleans up"
        assert await running.says() == "stopped in order"
        assert await running.process.wait() == 0


@posix_only
@pytest.mark.process
@pytest.mark.parametrize("third", [signal.SIGTERM, signal.SIGINT])
async def test_third_signal_leaves_now_with_its_code(third: signal.Signals) -> None:
    async with server(SERVER.replace("HANG", "True")) as running:
        assert await running.says() == "ready"
        for number, expected in ((signal.SIGINT, "drain SIGINT"), (signal.SIGTERM, "hurry SIGTERM")):
            running.process.send_signal(number)
            assert await running.says() == expected
        running.process.send_signal(third)
        assert await running.says() == f"kill {third.name}"
        assert await running.says() == ""
        assert await running.process.wait() == forced_exit_code(third) == 128 + third


@posix_only
@pytest.mark.process
async def test_previous_handlers_are_restored() -> None:
    program = textwrap.dedent(
        """
        import signal, trio
        from ullm.supervision import signal_ladder

        def mine(signum, frame):
            print("my own handler", flush=True)
            raise SystemExit(3)

        async def main():
            async with trio.open_nursery() as nursery:
                await nursery.start(signal_ladder, print, print, print)
                assert signal.getsignal(signal.SIGTERM) is not mine
                nursery.cancel_scope.cancel()

        signal.signal(signal.SIGTERM, mine)
        trio.run(main)
        assert signal.getsignal(signal.SIGTERM) is mine
        print("ready", flush=True)
        signal.pause()
        """
    )
    async with server(program) as running:
        assert await running.says() == "ready"
        running.process.send_signal(signal.SIGTERM)
        assert await running.says() == "my own handler"
        assert await running.process.wait() == 3


@pytest.mark.process
async def test_watchdog_ends_a_process_whose_child_was_abandoned() -> None:
    """trio itself would wait for the abandoned task for ever."""
    program = textwrap.dedent(
        """
        import trio
        from ullm.supervision import ChildSpec, Watchdog, open_supervisor

        async def stubborn(*, task_status):
            with trio.CancelScope(shield=True):
                task_status.started()
                await trio.sleep_forever()

        async def main():
            async with open_supervisor("root", [ChildSpec("stubborn", stubborn, shutdown=0.1)]) as supervisor:
                pass
            print(supervisor.reports[0].outcome, flush=True)
            Watchdog().arm(0.1)

        trio.run(main)
        print("unreachable", flush=True)
        """
    )
    async with server(program) as running:
        assert await running.says() == "abandoned"
        assert await running.says() == ""
        assert await running.process.wait() == 71


@pytest.mark.process
async def test_watchdog_ends_a_process_whose_event_loop_is_blocked() -> None:
    program = textwrap.dedent(
        """
        import threading
        from ullm.supervision import Watchdog

        Watchdog(exit_code=70).arm(0.1)
        print("armed", flush=True)
        threading.Event().wait()
        """
    )
    async with server(program) as running:
        assert await running.says() == "armed"
        assert await running.process.wait() == 70


class Exit:
    """Stands in for os._exit."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.called = threading.Event()

    def __call__(self, code: int) -> None:
        self.code = code
        self.called.set()


def test_watchdog_fires_once() -> None:
    exit = Exit()
    watchdog = Watchdog(exit_code=7, exit=exit)
    watchdog.arm(0.0)
    assert exit.called.wait(30)
    assert exit.code == 7
    watchdog.cancel()


def test_cancelled_watchdog_does_not_fire() -> None:
    exit = Exit()
    before = threading.active_count()
    with Watchdog(exit=exit) as watchdog:
        watchdog.arm(3600.0)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert exit.code is None
    watchdog.cancel()  # again


def test_watchdog_can_be_armed_earlier_but_not_later() -> None:
    exit = Exit()
    with Watchdog(exit=exit) as watchdog:
        watchdog.arm(float("inf"))
        watchdog.arm(3600.0)
        watchdog.arm(0.0)
        watchdog.arm(3600.0)
        assert exit.called.wait(30)
    assert exit.code == 71


def test_watchdog_can_be_armed_again_after_cancelling() -> None:
    exit = Exit()
    with Watchdog(exit=exit) as watchdog:
        watchdog.arm(3600.0)
        watchdog.cancel()
        watchdog.arm(0.0)
        assert exit.called.wait(30)


async def test_ladder_in_process() -> None:
    """Further signals after the third call the last step again."""
    calls: list[str] = []
    received = trio.Event()

    def step(name: str) -> object:
        def act(signum: signal.Signals) -> None:
            calls.append(f"{name} {signum.name}")
            received.set()

        return act

    async with trio.open_nursery() as nursery:
        await nursery.start(signal_ladder, step("drain"), step("hurry"), step("kill"))
        for _ in range(4):
            received = trio.Event()
            signal.raise_signal(signal.SIGINT)
            await received.wait()
        nursery.cancel_scope.cancel()
    assert calls == ["drain SIGINT", "hurry SIGINT", "kill SIGINT", "kill SIGINT"]
    assert signal.SIGTERM in STOP_SIGNALS


def failing_cleanup() -> None:
    raise OSError("the disk has gone")


def test_a_watchdog_cleans_up_before_it_ends_the_process() -> None:
    exit = Exit()
    done: list[int | None] = []
    with Watchdog(exit=exit) as watchdog:
        watchdog.cleanup = lambda: done.append(exit.code)
        watchdog.arm(0.0)
        assert exit.called.wait(30)
    assert done == [None]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_cleanup_that_fails_does_not_keep_the_process() -> None:
    exit = Exit()
    with Watchdog(exit=exit) as watchdog:
        watchdog.cleanup = failing_cleanup
        watchdog.arm(0.0)
        assert exit.called.wait(30)
    assert exit.code == 71


# --- a limit of processes ------------------------------------------------------------------------------


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function from whose call on no thread can be started."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    return lambda: monkeypatch.setattr(threading.Thread, "start", refuse)


def test_a_watchdog_is_armed_without_a_new_thread(no_threads: Callable[[], None]) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def exit(code: int) -> None:
        codes.append(code)
        ended.set()

    with Watchdog(exit_code=71, exit=exit) as watchdog:
        no_threads()
        watchdog.arm(0.0)
        assert ended.wait(60)
    assert codes == [71]


def test_a_watchdog_without_a_thread_is_told_and_survived(
    no_threads: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    no_threads()
    watchdog = Watchdog()
    watchdog.arm(0.0)
    watchdog.cancel()
    assert "can't start new thread" in caplog.text


def test_a_watchdog_can_be_armed_again(no_threads: Callable[[], None]) -> None:
    ended = threading.Event()
    watchdog = Watchdog(exit=lambda code: ended.set())
    watchdog.arm(1000.0)
    watchdog.cancel()
    watchdog.arm(0.0)
    assert ended.wait(60)
