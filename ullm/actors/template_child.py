"""The process that renders chat templates: ``python -m ullm.actors.template_child``.

It reads jobs from stdin and writes an answer to each to stdout, both as frames of `read_frame`. If a job
takes more processor time than it may, the kernel ends the process, also inside of C code; if it needs more
memory, it fails with a MemoryError. The process ends when its stdin does, so it does not outlive the one that
started it.
"""

from __future__ import annotations

import signal
import struct
import sys
from typing import IO, Any

import msgspec

from ullm.errors import InvalidParameter
from ullm.tokenization.chat_template import ChatTemplate, TemplateFault

MAX_CHARACTERS = 16 << 20
"""Characters of a rendered text; far more than any context holds."""

_PREFIX = struct.Struct("<I")


class Job(msgspec.Struct):
    """A conversation to render; ``variables`` are further ones of the template."""

    messages: list[Any]
    add_generation_prompt: bool
    tools: list[Any] | None
    variables: dict[str, Any]


class Answer(msgspec.Struct):
    """The answer to a job: a text, or why there is none.

    Args:
        error: one line.
        refused: the template refuses the messages on purpose, or they are wrong whatever the template is.
        too_much: the job needed more than it may.
    """

    text: str = ""
    error: str = ""
    param: str | None = None
    refused: bool = False
    too_much: bool = False


class Templates(msgspec.Struct):
    """The first frame: what `ChatTemplate` takes, and limits.

    Args:
        seconds: processor time of one job.
        memory: bytes of the process's address space, all jobs and Python included.
    """

    sources: dict[str, str]
    special_tokens: dict[str, str]
    seconds: float
    memory: int


def write_frame(stream: IO[bytes], body: bytes) -> None:
    """Write a frame: four bytes of length, little endian, and that many bytes."""
    stream.write(_PREFIX.pack(len(body)) + body)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Read a frame; None where the stream ends instead."""
    prefix = stream.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    (length,) = _PREFIX.unpack(prefix)
    body = stream.read(length)
    return body if len(body) == length else None


def main() -> None:
    """Serve jobs until there are no more, or one has used up the memory."""
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    first = read_frame(jobs)
    if first is None:
        return
    templates = msgspec.msgpack.decode(first, type=Templates)
    _limit_memory(templates.memory)
    _limit_time(templates.seconds)
    template = ChatTemplate(templates.sources, templates.special_tokens)
    _limit_time(0)
    while (frame := read_frame(jobs)) is not None:
        _limit_time(templates.seconds)
        answer = _answer(template, msgspec.msgpack.decode(frame, type=Job))
        _limit_time(0)
        write_frame(answers, msgspec.msgpack.encode(answer))
        if answer.too_much:
            return


def _answer(template: ChatTemplate, job: Job) -> Answer:
    try:
        text = template.render(
            job.messages,
            add_generation_prompt=job.add_generation_prompt,
            tools=job.tools,
            **job.variables,
        )
        text.encode()
    except MemoryError:
        return Answer(error="more memory than it may have", too_much=True)
    except UnicodeEncodeError:
        return Answer(error="the model's chat template makes text of it that is not valid Unicode")
    except TemplateFault as error:
        return Answer(error=error.message, param=error.param)
    except InvalidParameter as error:
        return Answer(error=error.message, param=error.param, refused=True)
    if len(text) > MAX_CHARACTERS:
        return Answer(error=f"a text of more than {MAX_CHARACTERS} characters", too_much=True)
    return Answer(text)


def _limit_memory(size: int) -> None:
    if sys.platform != "win32":
        from ullm.system.posix import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _limit_time(seconds: float) -> None:
    """Have the kernel end this process after so much processor time; 0: never."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
