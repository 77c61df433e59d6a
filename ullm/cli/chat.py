"""``ullm chat``: a conversation on the terminal.

A thread waits for input while the engine keeps running; Ctrl-C stops the current answer, not the program.
Without a terminal each line of stdin is a question, and only answers are printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import trio
from rich.console import Console

from ullm.cli.backend import ChatBackend, Message, StreamedAnswer, open_backend
from ullm.cli.interrupts import Interrupted, cancel_on_signal
from ullm.cli.terminal import fetch_model, stderr
from ullm.config import EngineConfig
from ullm.errors import RequestError, ServerRefused, ServerUnreachable
from ullm.hosting.config_sources import SAMPLING_FIELDS
from ullm.protocol.exit_codes import EXIT_SIGNAL_BASE
from ullm.sampling import SamplingParams

PROMPT = "› "
BLOCK = '"""'
HELP = f"""\
/help            this text
/reset           forget the conversation
/system TEXT     set the system message; without TEXT show it
/params          show the sampling parameters; /params NAME VALUE sets one, as in /params temperature 0.7
/exit            leave, as Ctrl-D does
{BLOCK}              begins and ends a question of several lines
Ctrl-C           stop the current answer, or empty the line
↑, Ctrl-R        earlier questions, also of other days; what is pasted is one question"""


class Leave(Exception):
    """The user wants to leave."""


class Conversation:
    """The turns of a conversation and its sampling parameters; no input or output."""

    def __init__(self, params: SamplingParams, system: str | None = None) -> None:
        self.params = params
        self.system = system
        self._turns: list[Message] = []

    def messages(self) -> list[Message]:
        """Return the whole conversation, the system message first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self._turns]

    def say(self, role: str, content: str) -> None:
        """Add a turn."""
        self._turns.append({"role": role, "content": content})

    def unsay(self) -> None:
        """Take back the last turn, because it could not be answered."""
        self._turns.pop()

    def command(self, line: str) -> str:
        """Execute a line that begins with a slash; return what to show.

        Raises:
            Leave: ``/exit``.
        """
        name, _, rest = line.partition(" ")
        match name:
            case "/help" | "/?":
                return HELP
            case "/reset":
                self._turns.clear()
                return "the conversation is forgotten"
            case "/system":
                self.system = rest.strip() or self.system
                return f"system: {self.system or '(the model’s own)'}"
            case "/params":
                return self._set_parameter(rest)
            case "/exit" | "/quit" | "/bye":
                raise Leave
        return f"{name} is not a command; /help lists them"

    def _set_parameter(self, text: str) -> str:
        try:
            words = shlex.split(text)
            if len(words) == 2:
                self.params = dataclasses.replace(self.params, **_parameter(words[0], words[1]))
            elif words:
                return "usage: /params NAME VALUE"
        except ValueError as error:  # InvalidParameter is one
            return str(error)
        default = SamplingParams()
        changed = {
            field.name: getattr(self.params, field.name)
            for field in dataclasses.fields(SamplingParams)
            if getattr(self.params, field.name) != getattr(default, field.name)
        }
        changed.pop("max_new_tokens", None)
        return "  ".join(f"{name}={value!r}" for name, value in changed.items()) or "all defaults"


def _parameter(name: str, text: str) -> dict[str, Any]:
    if name not in SAMPLING_FIELDS:
        raise ValueError(f"{name} is not a parameter; there are {', '.join(SAMPLING_FIELDS)}")
    hint = typing.get_type_hints(SamplingParams)[name]
    parts = (text,) if name == "stop" else text.split(",") if "tuple[" in str(hint) else text
    try:
        value = msgspec.convert(parts, hint, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name} {text}: {error}") from None
    # max_tokens has two names: set both, or they contradict each other.
    return {name: value, "max_new_tokens": value} if name == "max_tokens" else {name: value}


class Chat:
    """Runs a conversation on a terminal, or over pipes.

    Args:
        read_line: blocks until the user has typed a line; raises EOFError at the end, and `Interrupted`.
            Called in a thread.
        out: console that shows the answers.
    """

    def __init__(
        self, backend: ChatBackend, conversation: Conversation, read_line: Callable[[str], str], out: Console
    ) -> None:
        self._backend = backend
        self._conversation = conversation
        self._read_line = read_line
        self._out = out
        self._answering: trio.CancelScope | None = None
        self._warned = False

    async def run(self) -> int:
        """Converse until the user leaves.

        Returns:
            1 if the last question could not be answered, 128 + SIGINT after Ctrl-C twice, else 0.
        """
        status = 0
        self._note(f"{self._backend.name} · /help for help, Ctrl-D leaves")
        with contextlib.suppress(Leave):
            while True:
                try:
                    question = await self._question()
                except Interrupted:
                    if not self.interrupt():
                        return EXIT_SIGNAL_BASE + signal.SIGINT
                    continue
                self._warned = False
                if question.startswith("/") and "\n" not in question:
                    self._note(self._conversation.command(question))
                elif question.strip():
                    status = await self._answer(question)
        return status

    def interrupt(self) -> bool:
        """Handle Ctrl-C: stop the answer and return True; without one warn first, then return False."""
        if self._answering is not None:
            self._answering.cancel()
            return True
        first, self._warned = not self._warned, True
        if first:
            self._note("(Ctrl-C again, Ctrl-D or /exit leaves)")
        return first and self._out.is_terminal

    async def _question(self) -> str:
        line = await self._line(PROMPT)
        if not line.startswith(BLOCK):
            return line
        lines = [line.removeprefix(BLOCK)]
        while not lines[-1].endswith(BLOCK):
            lines.append(await self._line("… "))
        return "\n".join(lines).removesuffix(BLOCK).strip("\n")

    async def _line(self, prompt: str) -> str:
        shown = prompt if self._out.is_terminal else ""
        try:
            # A thread that waits for input cannot be stopped, so it is abandoned.
            return await trio.to_thread.run_sync(self._read_line, shown, abandon_on_cancel=True)
        except EOFError:
            raise Leave from None

    async def _answer(self, question: str) -> int:
        self._conversation.say("user", question)
        pieces: list[str] = []
        answer: StreamedAnswer | None = None
        started = trio.current_time()
        with trio.CancelScope() as scope:
            self._answering = scope
            try:
                async with self._backend.ask(
                    self._conversation.messages(), self._conversation.params
                ) as answer:
                    async for text in answer.text:
                        pieces.append(text)
                        await trio.to_thread.run_sync(self._write, text)
            except (RequestError, ServerRefused, ServerUnreachable) as error:
                stderr().print(f"error: {error}", markup=False, style="red")
                if not pieces:
                    self._conversation.unsay()
                    self._answering = None
                    return 1
        self._answering = None
        self._conversation.say("assistant", "".join(pieces))
        self._write("\n")
        self._note(_footer(answer, trio.current_time() - started, scope.cancelled_caught))
        return 0

    def _write(self, text: str) -> None:
        self._out.file.write(text)
        self._out.file.flush()

    def _note(self, text: str) -> None:
        if self._out.is_terminal:
            self._out.print(text, style="dim", markup=False, highlight=False)


def _footer(answer: StreamedAnswer | None, seconds: float, stopped: bool) -> str:
    details = {} if answer is None else answer.details
    tokens = details.get("completion_tokens")
    parts = ["stopped"] if stopped else []
    parts += [f"{tokens} tokens, {tokens / seconds:.0f} per second"] if tokens and seconds > 0 else []
    parts += ["cut off at --max-tokens"] if details.get("finish_reason") == "length" else []
    return " · ".join(parts)


def chat(
    config: EngineConfig,
    params: SamplingParams,
    *,
    system: str | None = None,
    url: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
) -> int:
    """Converse until the user leaves; return 128 + N if signal N ended it.

    Raises:
        UllmError: the model or the server is at fault.
    """
    if url is None:
        fetch_model(config, stderr())

    chats: list[Chat] = []

    async def converse() -> int:
        async with open_backend(config, url, model, api_key) as backend:
            chats.append(Chat(backend, Conversation(params, system), read, out))
            return await chats[-1].run()

    def fatal(number: int) -> bool:
        return number != signal.SIGINT or not chats or not chats[-1].interrupt()

    out = Console()
    with open_input(out) as read:
        return trio.run(cancel_on_signal, converse, fatal)


@contextlib.contextmanager
def open_input(out: Console) -> Iterator[Callable[[str], str]]:
    """Yield what reads a line: from the terminal, if that is both input and output, else from stdin."""
    if not (out.is_terminal and sys.stdin is not None and sys.stdin.isatty()):
        yield read_line
        return
    from ullm.cli.line_input import TerminalInput  # takes long to import

    terminal = TerminalInput()
    with _terminal_restored():
        try:
            yield terminal.read_line
        finally:
            terminal.close()


def read_line(prompt: str) -> str:
    """Read a line of what is piped in."""
    line = "" if sys.stdin is None else sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


@contextlib.contextmanager
def _terminal_restored() -> Iterator[None]:
    # A prompt that is abandoned leaves the terminal in its own mode.
    if sys.platform == "win32":
        yield
        return
    import ullm.system.posix

    termios = ullm.system.posix.termios

    try:
        before = termios.tcgetattr(sys.stdin)
    except (OSError, ValueError, termios.error):
        yield
        return
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
