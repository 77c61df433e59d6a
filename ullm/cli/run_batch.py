"""``ullm run-batch``: the requests of a file, answered by an engine in this process, one line for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import trio

from ullm.cli.batch_lines import BatchLine, Earlier, LineFault, answered, failed, parse, read_output
from ullm.cli.interrupts import run_interruptibly
from ullm.cli.terminal import fetch_model, stderr
from ullm.config import EngineConfig, ServerConfig
from ullm.errors import ResourceUnavailable, UsageError

if TYPE_CHECKING:
    from quart_trio import QuartTrio
    from rich.console import Console

BUSY = (429, 503, 529)
"""Statuses of requests that are sent again, since the engine has no room or restarts a part of itself."""
PAUSE, MOST_PAUSES = 0.5, 240
"""Seconds before a request is sent again, and how often it is."""


@dataclass
class Tally:
    """How far a batch is."""

    done: int = 0
    failed: int = 0


def run_batch(
    config: EngineConfig,
    server: ServerConfig,
    source: Path,
    output: Path,
    *,
    concurrency: int,
    resume: bool,
) -> int:
    """Answer the lines of ``source`` in ``output``; return 0, 1 if a request failed, or 128 + a signal.

    Raises:
        UsageError: the command line is wrong.
        ResourceUnavailable: the files cannot be used as they are.
        UllmError: the engine cannot start, or has failed.
    """
    if concurrency < 1:
        raise UsageError(f"--concurrency must be at least 1, got {concurrency}")
    console = stderr()
    with ExitStack() as stack:
        lines = stack.enter_context(source.open("rb"))
        earlier = _earlier(output, resume=resume)
        total = sum(1 for line in lines if line.strip())
        lines.seek(0)
        fetch_model(config, console)
        written = stack.enter_context(_open_output(output, earlier))
        tally = Tally()

        async def main() -> int:
            from ullm.engine import open_engine
            from ullm.server import create_app

            # Without what concerns clients on the network.
            inside = replace(server, api_key=None, api_key_file=None, allowed_hosts=(), port=0, journal=None)
            async with open_engine(config) as engine:
                app = create_app(engine, inside, local=True)
                with _progress(console, total) as advance:
                    await answer_lines(app, lines, written, tally, concurrency, earlier.done, advance)
            return 1 if tally.failed else 0

        status = run_interruptibly(main)
        console.print(_summary(tally, len(earlier.done), output, status), markup=False)
        return status


def _earlier(output: Path, *, resume: bool) -> Earlier:
    if not output.exists() or not output.stat().st_size:
        return Earlier()
    if not resume:
        raise ResourceUnavailable(f"{output} exists; --resume goes on with it, or name another file")
    return read_output(output)


def _open_output(output: Path, earlier: Earlier) -> BinaryIO:
    if not earlier.size:
        return output.open("wb")
    file = output.open("r+b")
    file.truncate(earlier.size)
    file.seek(0, os.SEEK_END)
    return file


def _summary(tally: Tally, before: int, output: Path, status: int) -> str:
    earlier = f", {before} were answered before" if before else ""
    stopped = "; stopped, --resume goes on" if status > 1 else ""
    return f"{output}: {tally.done} requests answered, {tally.failed} of them failed{earlier}{stopped}"


async def answer_lines(
    app: QuartTrio,
    lines: Iterable[bytes],
    output: BinaryIO,
    tally: Tally,
    concurrency: int,
    known: frozenset[str] = frozenset(),
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Answer lines as places get free; each answer is written when it is complete.

    Args:
        known: names of requests that are left out.
        advance: called for each line that is dealt with.

    Raises:
        OSError: an answer cannot be written; names the file.
    """
    taken, places = set[str](), trio.Semaphore(concurrency)

    def write(line: bytes, *, fine: bool) -> None:
        try:
            output.write(line)
            output.flush()
        except OSError as error:
            error.filename = output.name
            raise
        tally.done += 1
        tally.failed += not fine
        advance()

    async def run(asked: BatchLine) -> None:
        try:
            status, line = await _ask(app, asked)
        finally:
            places.release()
        write(line, fine=status == 200)

    async with trio.open_nursery() as nursery:
        for number, raw in enumerate(lines, 1):
            await trio.lowlevel.checkpoint()
            if not raw.strip():
                continue
            try:
                asked = parse(raw, number)
                if asked.custom_id in taken:
                    raise LineFault(f"line {number}: its custom_id came before", asked.custom_id)
            except LineFault as fault:
                write(failed(fault), fine=False)
                continue
            taken.add(asked.custom_id)
            if asked.custom_id in known:
                advance()
                continue
            await places.acquire()
            nursery.start_soon(run, asked)


async def _ask(app: QuartTrio, asked: BatchLine) -> tuple[int, bytes]:
    import msgspec

    from ullm.server.in_process import post

    body = msgspec.json.encode(asked.body)
    for _ in range(MOST_PAUSES):
        answer = await post(app, asked.url, body)
        if answer.status not in BUSY:
            break
        await trio.sleep(PAUSE)
    name = answer.headers.get("x-request-id", "")
    return answer.status, answered(asked, answer.status, name, answer.body)


class _progress:
    """A bar on a terminal; nothing elsewhere."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._stack = ExitStack()

    def __enter__(self) -> Callable[[], object]:
        if not self._console.is_terminal:
            return lambda: None
        from rich.progress import Progress

        bar = self._stack.enter_context(Progress(console=self._console, transient=True))
        task = bar.add_task("requests", total=self._total)
        return lambda: bar.advance(task)

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
