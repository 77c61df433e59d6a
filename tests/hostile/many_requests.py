"""Many requests, a tenth of them costly or malformed, beside streams of victims: what it does to a server.

``python -m tests.hostile.many_requests 10000 [--http2]`` starts one, and says what came of it.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx
import psutil
import trio

from tests.hostile.catalogue import CHAT, COSTLY, MALFORMED, TEMPLATE_DOUBLES, TEMPLATE_LOOPS, TEXT, Hostile
from ullm.system.interpreter import python_command, python_environment
from ullm.testing import write_scripted_model
from ullm.testing.models import CHAT_TEMPLATE
from ullm.testing.server import SCRIPTED, ServerProcess

VICTIMS = 8
CLIENTS = 16
"""Requests in flight at a time."""
SHARE = 10
"""One request in so many is hostile."""
NUM_BLOCKS = 8192
"""KV blocks: enough for the longest contexts of all victims and clients. With fewer, victims would wait for
one another's blocks."""

ORDINARY = [
    Hostile("a short answer", TEXT, lambda: b'{"prompt":"hi","max_tokens":2}', (200,)),
    Hostile("a stream", TEXT, lambda: b'{"prompt":"hi","max_tokens":4,"stream":true}', (200,)),
    Hostile(
        "a chat",
        CHAT,
        lambda: b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":2}',
        (200,),
    ),
]
RARELY = 0.01
"""How often those come that may take seconds, beside others: else they would be all that happens."""
HOSTILE = [*COSTLY, *MALFORMED]
WEIGHTS = [RARELY if hostile.seconds > 5 else 1.0 for hostile in HOSTILE]


@dataclass
class Outcome:
    """What came of a run.

    Args:
        wrong: answers that are not those of the catalogue: what, status → how often.
        gap_alone: longest gap of the victims beside ordinary requests, in seconds.
        gap: longest gap beside all.
        before, after: open files and bytes of the server, when warm and at the end.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    gap_alone: float = 0.0
    gap: float = 0.0
    events: int = 0
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    hold: float = 0.0
    seconds: float = 0.0
    status: int | None = None

    @property
    def failed(self) -> int:
        """Answers with 5xx."""
        return sum(count for status, count in self.statuses.items() if status >= 500)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[ServerProcess]:
    """Start a server of the model that the catalogue is for."""
    model = write_scripted_model(folder / "model", step_seconds=0.005, num_blocks=NUM_BLOCKS)
    template = TEMPLATE_LOOPS + TEMPLATE_DOUBLES + CHAT_TEMPLATE
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    arguments = ("--model", str(model), *SCRIPTED, "--standby-workers", "0", "--max-bs", "64")
    with ServerProcess(*arguments, *options, log=folder / "log") as server:
        yield server


async def send(server: ServerProcess, requests: Iterator[Hostile], outcome: Outcome, http2: bool) -> None:
    """Send requests until there are no more, some at a time."""

    async def client() -> None:
        async with httpx.AsyncClient(
            base_url=server.url, timeout=300, http2=http2, http1=not http2
        ) as connection:
            for request in requests:
                headers = {} if request.content_type is None else {"Content-Type": request.content_type}
                try:
                    answer = await connection.request(
                        request.method, request.path, content=request.body(), headers=headers
                    )
                except httpx.TransportError as error:
                    # httpx does not read the answer to a body that it is still sending (RFC 9113, 8.1).
                    if not http2 or request.statuses != (413,) or not isinstance(error, httpx.ProtocolError):
                        outcome.wrong[f"{request.name}: {type(error).__name__} {error}"] += 1
                else:
                    outcome.statuses[answer.status_code] += 1
                    if answer.status_code not in request.statuses or request.says not in answer.text:
                        outcome.wrong[f"{request.name}: {answer.status_code} {answer.text[:200]}"] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(CLIENTS):
            nursery.start_soon(client)


def mixture(seed: int, count: int) -> Iterator[Hostile]:
    """Draw requests, a tenth of them hostile."""
    source = random.Random(seed)
    for _ in range(count):
        if source.randrange(SHARE):
            yield source.choice(ORDINARY)
        else:
            yield source.choices(HOSTILE, WEIGHTS)[0]


def footprint(server: ServerProcess) -> tuple[int, int]:
    process = psutil.Process(server.process.pid)
    return process.num_fds(), process.memory_info().rss


def run_many(folder: Path, count: int, *, http2: bool = False, seed: int = 0) -> Outcome:
    """Send ``count`` requests beside victims, then stop the server."""
    outcome, began = Outcome(), time.monotonic()
    warm = max(100, count // 20)
    with serving(folder, *(("--http2",) if http2 else ())) as server:
        trio.run(send, server, mixture(seed + 1, warm), Outcome(), http2)
        with _victims(server) as longest_gap:
            time.sleep(1.0)
            longest_gap()
            trio.run(send, server, iter(random.Random(seed).choices(ORDINARY, k=warm)), outcome, http2)
            outcome.gap_alone, _ = longest_gap()
            _settle(server)
            outcome.before = footprint(server)
            trio.run(send, server, mixture(seed, count), outcome, http2)
            outcome.gap, outcome.events = longest_gap()
            _settle(server)
            outcome.after = footprint(server)
        metrics = httpx.get(f"{server.url}/metrics").text
        outcome.hold = float(metrics.partition("\nullm_event_loop_hold_seconds ")[2].split()[0])
        server.process.terminate()
        outcome.status = server.process.wait(60)
    outcome.seconds = time.monotonic() - began
    return outcome


def _settle(server: ServerProcess) -> None:
    """Wait until the connections of earlier clients are gone."""
    deadline, least = time.monotonic() + 10, math.inf
    while time.monotonic() < deadline:
        files, _ = footprint(server)
        if files < least:
            least, deadline = files, min(deadline, time.monotonic() + 1)
        time.sleep(0.05)


@contextmanager
def _victims(server: ServerProcess) -> Iterator[object]:
    """Have a process read streams; yields a function that returns its longest gap since the last call."""
    process = subprocess.Popen(
        python_command("-m", "tests.hostile.victims", server.url, str(VICTIMS)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=python_environment(),
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    try:
        yield lambda: _ask(stdin, stdout)
    finally:
        stdin.close()
        stdout.close()
        status = process.wait(30)
    if status != 0:
        raise RuntimeError(f"a victim's stream failed: status {status}")


def _ask(stdin: IO[str], stdout: IO[str]) -> tuple[float, int]:
    stdin.write("\n")
    stdin.flush()
    gap, events = stdout.readline().split()
    return float(gap), int(events)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(run_many(Path(name), int(sys.argv[1]), http2="--http2" in sys.argv))  # noqa: T201
