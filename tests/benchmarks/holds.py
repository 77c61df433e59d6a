"""``python -m tests.benchmarks holds``: how long others wait while a server deals with each costly request.

A server of a scripted model gets every request of `tests.hostile.catalogue` that costs much, one after the
other. Meanwhile a second client asks ``/live`` again and again: its longest wait is the longest hold of the
event loop, and what the machine itself adds.
"""

from __future__ import annotations

import http.client
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from cyclopts import Parameter

from tests.benchmarks.shared_options import write_report
from tests.benchmarks.soak.soak_report import table
from tests.hostile.catalogue import CHAT, COSTLY, SLOW_WORD, TEMPLATE_DOUBLES, TEMPLATE_LOOPS, TEXT, Hostile
from ullm.cli.options import Json, Output
from ullm.cli.terminal import stderr
from ullm.errors import UsageError
from ullm.testing import write_scripted_model
from ullm.testing.models import CHAT_TEMPLATE
from ullm.testing.server import SCRIPTED, ServerProcess

ASK_SECONDS = 0.001
"""Pause between two questions of the second client."""


class Hold(msgspec.Struct, frozen=True):
    """What one request did.

    Args:
        status: of the answer; 0: there was none in time.
        seconds: until it was there.
        longest: the second client's longest wait, in seconds.
    """

    name: str
    status: int
    seconds: float
    longest: float


class HoldsReport(msgspec.Struct, frozen=True):
    """All measurements; the first one is of a request that costs nothing."""

    when: str
    holds: list[Hold]

    def json(self) -> str:
        """Return all measurements as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def markdown(self) -> str:
        """Return a table, request by request."""
        rows = [["request", "status", "answer, ms", "longest wait of others, ms"]]
        rows += [
            [hold.name, str(hold.status or "none"), f"{1e3 * hold.seconds:.0f}", f"{1e3 * hold.longest:.0f}"]
            for hold in self.holds
        ]
        return table(rows) + "\n"


@dataclass
class Bystander:
    """Asks ``/live`` again and again, and notes the longest wait."""

    address: str
    longest: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Ask until it is stopped."""
        connection = http.client.HTTPConnection(self.address, timeout=300)
        while not self._stop.wait(ASK_SECONDS):
            began = time.perf_counter()
            connection.request("GET", "/live")
            connection.getresponse().read()
            self.longest = max(self.longest, time.perf_counter() - began)
        connection.close()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask within this context."""
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def measure(address: str, hostile: Hostile, patience: float) -> Hold:
    """Send one request beside a bystander.

    Args:
        patience: seconds to wait for the answer.
    """
    body, bystander, status = hostile.body(), Bystander(address), 0
    with bystander.asking():
        time.sleep(20 * ASK_SECONDS)
        connection = http.client.HTTPConnection(address, timeout=patience)
        headers = {"Content-Type": hostile.content_type} if hostile.content_type else {}
        began = time.perf_counter()
        try:
            connection.request(hostile.method, hostile.path, body, headers)
            answer = connection.getresponse()
            answer.read()
            status = answer.status
        except OSError:  # none in time
            status = 0
        seconds = time.perf_counter() - began
        connection.close()
    return Hold(hostile.name, status, seconds, bystander.longest)


def run_holds(tree: Path | None, patience: float, requests: Sequence[Hostile] = COSTLY) -> HoldsReport:
    """Measure requests with a server of their own.

    Args:
        tree: folder with another version of ullm.
        patience: seconds to wait for each answer.
    """
    cheap = Hostile("one token", TEXT, lambda: b'{"prompt":"hi","max_tokens":1}', (200,))
    chat = Hostile(
        "one token of a chat",
        CHAT,
        lambda: b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":1}',
        (200,),
    )
    # Those that a server may not survive come last.
    order = sorted(requests, key=lambda hostile: SLOW_WORD.encode() in hostile.body()[:1000])
    with tempfile.TemporaryDirectory() as folder:
        model = write_scripted_model(Path(folder) / "model", step_seconds=0.001)
        template = TEMPLATE_LOOPS + TEMPLATE_DOUBLES + CHAT_TEMPLATE
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
        environ = {} if tree is None else {"PYTHONPATH": str(tree)}
        options = ("--model", str(model), *SCRIPTED, "--standby-workers", "0")
        with ServerProcess(*options, environ=environ, log=Path(folder) / "log") as server:
            address = urlsplit(server.url).netloc
            for _ in range(3):  # what is loaded on first use
                measure(address, cheap, patience)
                measure(address, chat, patience)
            holds = []
            for hostile in [cheap, chat, *order]:
                holds.append(measure(address, hostile, patience))
                stderr().print(f"{hostile.name}: {holds[-1].longest * 1e3:.0f} ms", markup=False)
            server.process.kill()
    return HoldsReport(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), holds)


def holds(
    *,
    tree: Annotated[
        Path | None, Parameter(help="Folder of another version of ullm, to measure that.")
    ] = None,
    patience: Annotated[float, Parameter(help="Seconds to wait for an answer.")] = 60.0,
    json: Json = False,
    output: Output = None,
) -> int:
    """Measure how long others wait while a server deals with costly requests."""
    if patience <= 0:
        raise UsageError(f"--patience must be above 0, got {patience:g}")
    if tree is not None and not (tree / "ullm").is_dir():
        raise UsageError(f"--tree {tree}: no folder ullm in it")
    report = run_holds(tree, patience)
    write_report(report.markdown(), report.json(), output)
    sys.stdout.write(report.json() + "\n" if json else report.markdown())
    return 0
