"""``python -m tests.benchmarks migration``: the gap in a long stream that a reload moves to other workers.

A server has one replica of a real model and one stream with a long prompt. A reload starts another replica
and moves the stream there: with its KV, or computing it again. What counts is the longest pause between two
events of the stream while that happens.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
from cyclopts import Parameter

from tests.benchmarks.shared_options import Model, Rounds, write_report
from tests.benchmarks.soak.soak_report import table
from ullm.cli.options import Json, Output
from ullm.cli.terminal import stderr
from ullm.config import DEFAULT_MODEL
from ullm.errors import UsageError
from ullm.testing.server import ServerProcess

WAYS = {"KV handed over": "--kv-handover", "computed again": "--no-kv-handover"}
DRAIN = 1.0
"""Seconds of --shutdown-timeout: so long the old replica may go on before its stream is moved."""
EVENTS_BEFORE = 20
TIMEOUT = 600.0
KEY = "benchmark"


class Move(msgspec.Struct, frozen=True):
    """One move.

    Args:
        gap: seconds of the longest pause between two events from the reload on.
        usual: median pause before it.
        moved: whether the KV was handed over.
        bytes: of KV that was.
        copying: seconds that it took, beside the computation.
    """

    way: str
    gap: float
    usual: float
    moved: bool
    bytes: int
    copying: float


class MigrationReport(msgspec.Struct, frozen=True):
    """All moves of both ways."""

    context: int
    moves: list[Move]

    def json(self) -> str:
        """Return all measurements as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def markdown(self) -> str:
        """Return a table, way by way; medians and ranges."""
        rows = [
            ["KV at the move", "moves", "longest gap, s (median, range)", "usual gap, s", "MiB", "copy, s"]
        ]
        for way in WAYS:
            moves = [move for move in self.moves if move.way == way]
            gaps = [move.gap for move in moves]
            span = f"{statistics.median(gaps):.2f} ({min(gaps):.2f} to {max(gaps):.2f})"
            usual, size, copying = (
                statistics.median(values)
                for values in zip(*((move.usual, move.bytes, move.copying) for move in moves), strict=True)
            )
            rows.append(
                [way, str(len(moves)), span, f"{usual:.3f}", f"{size / (1 << 20):.1f}", f"{copying:.2f}"]
            )
        return table(rows) + "\n"


class TimedStream:
    """A stream whose events' times are noted in a thread; it is left when it is not needed any more."""

    def __init__(self, url: str, body: dict[str, object]) -> None:
        self.times: list[float] = []
        self.begun, self.left = threading.Event(), threading.Event()
        self._url, self._body = url, body
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream(
            "POST", f"{self._url}/v1/completions", json=self._body, timeout=TIMEOUT
        ) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.times.append(time.monotonic())
                if len(self.times) >= EVENTS_BEFORE:
                    self.begun.set()
                if self.left.is_set():
                    return
        self.begun.set()

    @property
    def is_read(self) -> bool:
        """Whether further events may come."""
        return self._thread.is_alive()

    def leave(self) -> None:
        """Leave it at its next event, and wait for that."""
        self.left.set()
        self._thread.join(TIMEOUT)


def measure_move(way: str, model: str, context: int, tokens: int, seed: int) -> Move:
    """Start a server, move one stream by a reload, and stop the server."""
    source = random.Random(seed)
    prompt = [source.randrange(1000, 40_000) for _ in range(context)]
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    options = (
        "--model",
        model,
        "--standby-workers",
        "0",
        "--shutdown-timeout",
        str(DRAIN),
        WAYS[way],
        "--admin-key",
        KEY,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(*options, log=Path(folder) / "log") as server,
    ):
        server.wait_ready()
        stream = TimedStream(server.url, body)
        if not stream.begun.wait(TIMEOUT):
            raise UsageError(f"the stream has not begun within {TIMEOUT:g} s")
        began = time.monotonic()
        _reload(server)
        events = len(stream.times)
        while len(stream.times) < events + EVENTS_BEFORE and not stream.left.is_set():
            if not stream.is_read:
                raise UsageError("the stream ended before the reload did; raise --tokens")
            time.sleep(0.01)
        stream.leave()
        metrics = _samples(httpx.get(f"{server.url}/metrics").text)
    gaps = [(at, after - at) for at, after in zip(stream.times, stream.times[1:], strict=False)]
    return Move(
        way,
        max(gap for at, gap in gaps if at + gap >= began),
        statistics.median(gap for at, gap in gaps if at + gap < began),
        metrics['ullm_kv_handovers_total{outcome="moved"}'] == 1,
        int(metrics["ullm_kv_handover_bytes_total"]),
        metrics["ullm_kv_handover_seconds_total"],
    )


def _reload(server: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server.url}/admin/reload", headers=headers, timeout=TIMEOUT)
    if answer.status_code != 200:
        raise UsageError(f"the reload failed: {answer.text}")


def _samples(text: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def migration(
    *,
    model: Model = DEFAULT_MODEL,
    context: Annotated[int, Parameter(help="Tokens of the prompt.")] = 1500,
    tokens: Annotated[int, Parameter(help="Most tokens of the stream, which is left earlier.")] = 500,
    rounds: Rounds = 3,
    output: Output = None,
    json: Json = False,
) -> int:
    """Compare the gap in a stream that a reload moves: with KV handed over, and computed again."""
    if min(context, tokens, rounds) < 1:
        raise UsageError(f"--context {context} --tokens {tokens} --rounds {rounds}: at least 1 each")
    moves = []
    for number in range(rounds):
        for way in WAYS:
            stderr().print(f"round {number + 1}: {way}", markup=False)
            moves.append(measure_move(way, model, context, tokens, number))
    report = MigrationReport(context, moves)
    write_report(report.markdown(), report.json(), output)
    sys.stdout.write(report.json() + "\n" if json else report.markdown())
    wrong = [move for move in moves if move.moved is not (WAYS[move.way] == "--kv-handover")]
    return 1 if wrong else 0
