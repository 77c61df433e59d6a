"""Chat templates, rendered in a process of their own, which can be killed.

Templates are programs that come with models, and requests bring their input: some loop, some double a string
until the memory is used up. No thread can be stopped in that, and the sandbox of Jinja prevents neither. So
one process renders all conversations of a model, one after the other, for some tenths of a millisecond more
than it would take here. It is started for the first conversation, and again after one that it does not
survive.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ullm.actors.template_child import Answer, Job, Templates, read_frame, write_frame
from ullm.errors import EngineNotReady, InvalidParameter, TemplateFailed
from ullm.hub.guarded import working_folder
from ullm.logs import get_logger
from ullm.system.interpreter import python_command, python_environment
from ullm.system.lifeline import Lifeline
from ullm.tokenization.chat_template import ChatTemplate

RENDER_SECONDS = 2.0
"""Processor time of one conversation; the largest one takes a tenth."""
MEMORY_BYTES = 512 << 20
"""Address space of the process, of which Python takes a tenth."""
WALL_SECONDS = 20.0 if os.name == "posix" else 5.0
"""Seconds after which the process is killed, the start included. Where the kernel limits its processor time,
that comes before on any machine that is not out of order."""
HELLO = ({"role": "user", "content": "Hello"},)
"""A conversation that every template can render; where one cannot, it is the template that is at fault."""

log = get_logger(__name__)


class _Died(Exception):
    """The process has ended without an answer.

    Args:
        too_much: what the job needed.
        known: whether that is why it has ended; else it ends each time, for a reason of its own.
    """

    def __init__(self, too_much: str = "", *, known: bool = True) -> None:
        self.too_much = too_much
        self.known = known


class TemplateProcess:
    """Renders the conversations of one model; its methods block, and may be called from several threads."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._templates = Templates(template.sources, template.special_tokens, RENDER_SECONDS, MEMORY_BYTES)
        self._busy = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = contextlib.ExitStack()
        self._template_sent = False
        self._closed = False
        self._judged = False
        self._failure: str | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation; see `ChatTemplate.render`.

        Raises:
            InvalidParameter: there is no template, or it rejects the messages or takes too long for them.
            TemplateFailed: it does so for every conversation.
            EngineNotReady: the process was lost, or cannot be started now.
        """
        if variables.get("chat_template") is None:
            self._template.choose(bool(tools))
        job = _encoded(Job(list(messages), add_generation_prompt, list(tools) if tools else None, variables))
        with self._busy:
            if self._failure is not None:
                raise TemplateFailed(self._failure)
            try:
                answer = self._ask(job)
            except _Died as death:
                answer = Answer(error=death.too_much, too_much=True)
            if not answer.error:
                return answer.text
            if not answer.refused:
                self._judge()
        if answer.too_much:
            answer.error = f"the model's chat template needs {answer.error} for these messages"
        raise InvalidParameter(answer.error, answer.param or "messages")

    def close(self) -> None:
        """Kill the process, and start no other one; who waits for a text gets an error."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        if self._busy.acquire(timeout=1.0):  # else who holds it reaps the process
            try:
                self._reap()
            finally:
                self._busy.release()

    def retire(self) -> None:
        """Start no other process, and end this one when it has nothing to do."""
        self._closed = True
        if self._busy.acquire(blocking=False):
            try:
                self._reap()
            finally:
                self._busy.release()

    def _judge(self) -> None:
        """Find out, once, whether the template can render anything at all.

        Raises:
            TemplateFailed: it cannot.
        """
        if self._judged:
            return
        try:
            answer = self._ask(_encoded(Job(list(HELLO), True, None, {})))
        except _Died as death:
            if not death.known:  # as where the machine has no memory left; that may pass
                raise EngineNotReady("without a process for chat templates, since each one is lost") from None
            answer = Answer(error=f"it needs {death.too_much}")
        else:
            if answer.too_much:
                answer.error = f"it needs {answer.error}"
        self._judged = True
        if answer.error and not answer.refused:
            self._failure = answer.error.removeprefix("the model's chat template ")
            log.error("the model's chat template fails for every conversation", cause=self._failure)
            raise TemplateFailed(self._failure)

    def _ask(self, job: bytes) -> Answer:
        """Return the answer to a job, from another process if the first one does not survive it.

        Raises:
            _Died: it needs too much.
            EngineNotReady: there is no process now.
        """
        for attempt in (1, 2):
            process = self._running()
            try:
                return self._exchange(process, job)
            except _Died as death:
                if death.too_much:
                    raise
                log.warning("the process that renders chat templates was lost", status=process.returncode)
                if attempt == 2:
                    raise _Died("more than its process survives", known=False) from None
            finally:
                if self._closed or process.returncode is not None:
                    self._reap()
        raise AssertionError("one of two attempts returns or raises")

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process, started if need be."""
        if self._closed:
            raise EngineNotReady("replacing its chat template, or stopping")
        if self._process is not None and self._process.poll() is not None:
            self._reap()
        if self._process is None:
            try:
                self._process = _start(self._lifeline.enter_context(Lifeline()))
            except OSError as error:
                self._lifeline.close()
                raise EngineNotReady(
                    f"without a process for chat templates, since none can be started: {error}"
                ) from error
            self._template_sent = False
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], job: bytes) -> Answer:
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        watch = threading.Timer(WALL_SECONDS, kill)
        watch.daemon = True
        watch.start()
        try:
            if not self._template_sent:
                write_frame(process.stdin, msgspec.msgpack.encode(self._templates))
                self._template_sent = True
            write_frame(process.stdin, job)
            frame = read_frame(process.stdout)
        except OSError:  # it has ended
            frame = None
        finally:
            watch.cancel()
        if frame is None:
            process.kill()
            process.wait()
            if self._closed:
                raise EngineNotReady("replacing its chat template, or stopping")
            if late.is_set() and os.name == "posix":  # nobody's fault: it did not get its processor time
                raise EngineNotReady("replacing its process for chat templates, which did not answer")
            raise _Died(_too_much(process.returncode, late.is_set()))
        answer = msgspec.msgpack.decode(frame, type=Answer)
        if answer.too_much:
            process.wait()  # it ends by itself
        return answer

    def _reap(self) -> None:
        """End the process, if there is one, and give back its pipes."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        self._lifeline.close()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:  # what was not written yet
                log.debug("the process that renders chat templates had not read all")


def _too_much(status: int | None, late: bool) -> str:
    if sys.platform != "win32" and status == -signal.SIGPROF:
        return "more processor time than it may have"
    return f"more than {WALL_SECONDS:g} s" if late else ""


def _start(lifeline: Lifeline) -> subprocess.Popen[bytes]:
    options: dict[str, Any] = {"pass_fds": lifeline.pass_fds}
    if os.name == "posix":
        options["start_new_session"] = True  # a terminal's Ctrl-C is not for it
    else:
        options["creationflags"] = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    process = subprocess.Popen(
        python_command("-m", "ullm.actors.template_child"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=working_folder(),
        env=python_environment(),
        **options,
    )
    lifeline.started(process)
    return process


def _encoded(job: Job) -> bytes:
    """Return a job as bytes.

    Raises:
        InvalidParameter: it has a value that no JSON has.
    """
    try:
        return _encoder.encode(job)
    except UnicodeEncodeError as error:
        raise InvalidParameter(
            f"a text of the messages has half a surrogate pair, at character {error.start}; it is not "
            "valid Unicode",
            "messages",
        ) from None
    except (TypeError, OverflowError, ValueError, RecursionError) as error:
        raise InvalidParameter(f"the messages cannot be rendered: {error}", "messages") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"a {type(value).__name__} is neither a text, a number, a list nor an object")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
