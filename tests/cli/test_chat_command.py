"""The conversation, its commands, and Ctrl-C, with a backend that answers from a script."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from rich.console import Console

from ullm.cli.backend import StreamedAnswer
from ullm.cli.chat import Chat, Conversation, Leave
from ullm.cli.interrupts import Interrupted
from ullm.errors import PromptTooLong
from ullm.sampling import SamplingParams


class Echo:
    """Repeats the last message in pieces; hangs after the first when ``hang`` is set."""

    name = "echo"

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.hang: trio.Event | None = None
        self.refuse = False
        self.stopped = 0

    @asynccontextmanager
    async def ask(self, prompt: Any, params: SamplingParams) -> AsyncIterator[StreamedAnswer]:
        self.asked.append(prompt)
        if self.refuse:
            raise PromptTooLong(9, 8)
        details: dict[str, Any] = {"completion_tokens": 3, "finish_reason": "stop"}
        try:
            async with aclosing(self._pieces(prompt[-1]["content"])) as text:
                yield StreamedAnswer(text, details)
        except trio.Cancelled:
            self.stopped += 1
            raise

    async def _pieces(self, content: str) -> AsyncGenerator[str, None]:
        yield "you said "
        if self.hang is not None:
            self.hang.set()
            await trio.sleep_forever()
        yield content


def reader(*lines: str) -> Callable[[str], str]:
    left = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


@pytest.fixture
def out() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


async def test_a_conversation_remembers(out: Console) -> None:
    backend = Echo()
    chat = Chat(backend, Conversation(SamplingParams(), "be brief"), reader("hello", "", "again"), out)
    assert await chat.run() == 0
    assert written(out) == "you said hello\nyou said again\n"
    assert [message["role"] for message in backend.asked[-1]] == ["system", "user", "assistant", "user"]
    assert backend.asked[-1][2]["content"] == "you said hello"


async def test_several_lines_and_reset(out: Console) -> None:
    backend = Echo()
    lines = reader('"""one', "two", 'three"""', "/reset", "four", "/exit", "never")
    await Chat(backend, Conversation(SamplingParams()), lines, out).run()
    assert [prompt[-1]["content"] for prompt in backend.asked] == ["one\ntwo\nthree", "four"]
    assert len(backend.asked[-1]) == 1


async def test_a_refused_question_is_forgotten(out: Console, capsys: pytest.CaptureFixture[str]) -> None:
    backend = Echo()
    backend.refuse = True
    conversation = Conversation(SamplingParams())
    assert await Chat(backend, conversation, reader("too long"), out).run() == 1
    assert conversation.messages() == []
    assert "However, the prompt has 9 tokens" in capsys.readouterr().err


async def test_interrupt_stops_the_answer_and_not_the_program(out: Console) -> None:
    backend = Echo()
    backend.hang = trio.Event()
    asked = trio.Event()
    release = trio.Event()

    def read(prompt: str) -> str:
        if not asked.is_set():
            trio.from_thread.run_sync(asked.set)
            return "first"
        trio.from_thread.run(release.wait)
        raise EOFError

    conversation = Conversation(SamplingParams())
    chat = Chat(backend, conversation, read, out)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chat.run)
        await backend.hang.wait()
        assert chat.interrupt() is True
        await trio.testing.wait_all_tasks_blocked(0.01)
        release.set()
    assert backend.stopped == 1
    assert conversation.messages()[-1] == {"role": "assistant", "content": "you said "}


def test_interrupt_while_waiting_asks_once_on_a_terminal() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    chat = Chat(Echo(), Conversation(SamplingParams()), reader(), terminal)
    assert chat.interrupt() is True
    assert "Ctrl-C again" in written(terminal)
    assert chat.interrupt() is False


async def test_ctrl_c_at_an_empty_line_asks_again_once() -> None:
    typed = iter([Interrupted, "hi", Interrupted, Interrupted])
    shown: list[str] = []

    def read(prompt: str) -> str:
        shown.append(prompt)
        if (line := next(typed)) is Interrupted:
            raise Interrupted
        return str(line)

    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    backend = Echo()
    assert await Chat(backend, Conversation(SamplingParams()), read, terminal).run() == 130
    assert len(backend.asked) == 1
    assert written(terminal).count("Ctrl-C again") == 2
    assert len(shown) == 4


def test_interrupt_without_a_terminal_ends_at_once(out: Console) -> None:
    assert Chat(Echo(), Conversation(SamplingParams()), reader(), out).interrupt() is False


async def test_a_terminal_shows_a_footer() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    await Chat(Echo(), Conversation(SamplingParams()), reader("hi"), terminal).run()
    assert "you said hi" in written(terminal)
    assert "3 tokens" in written(terminal)


def test_commands() -> None:
    conversation = Conversation(SamplingParams(temperature=0.5))
    assert "/reset" in conversation.command("/help")
    assert "not a command" in conversation.command("/nonsense")
    assert conversation.command("/system be kind") == "system: be kind"
    assert conversation.messages() == [{"role": "system", "content": "be kind"}]
    assert conversation.command("/system") == "system: be kind"
    assert conversation.command("/params") == "temperature=0.5"
    with pytest.raises(Leave):
        conversation.command("/exit")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/params temperature 0", "temperature", 0.0),
        ("/params max_tokens 7", "max_tokens", 7),
        ("/params stop 'a b'", "stop", ("a b",)),
        ("/params stop_token_ids 1,2", "stop_token_ids", (1, 2)),
        ("/params seed null", "seed", None),
        ("/params ignore_eos true", "ignore_eos", True),
    ],
)
def test_setting_a_parameter(line: str, name: str, value: object) -> None:
    conversation = Conversation(SamplingParams(max_tokens=3, seed=1))
    conversation.command(line)
    assert getattr(conversation.params, name) == value


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/params temperature hot", "Expected `float`"),
        ("/params temperature -1", "temperature must be"),
        ("/params nonsense 1", "not a parameter"),
        ("/params temperature", "usage"),
        ("/params stop 'a", "quotation"),
    ],
)
def test_a_wrong_parameter_changes_nothing(line: str, says: str) -> None:
    params = SamplingParams()
    conversation = Conversation(params)
    assert says in conversation.command(line)
    assert conversation.params is params
