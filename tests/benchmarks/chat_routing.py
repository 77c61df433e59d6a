"""``python -m tests.benchmarks routing``: chats of several turns on replicas of a real model, by each policy.

A server per policy gets the same chats: each turn is the whole chat so far and a new message. What counts is
the share of prompt tokens that came from a prefix cache, which a busy machine hardly changes, and the time to
the first token as a ratio to that of the first policy in the same run.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
from cyclopts import Parameter

from tests.benchmarks.shared_options import Model, write_report
from tests.benchmarks.soak.soak_report import table
from ullm.cli.options import Json, Output
from ullm.cli.terminal import stderr
from ullm.config import DEFAULT_MODEL
from ullm.errors import UsageError
from ullm.testing.server import ServerProcess

POLICIES = ("round-robin", "least-loaded", "prefix")
SYSTEM_TOKENS = 96
MESSAGE_TOKENS = 64
ANSWER_TOKENS = 8
TIMEOUT = 300.0


class PolicyResult(msgspec.Struct):
    """What one policy did.

    Args:
        prompt_tokens, cached_tokens: of all turns after the first ones of their chats.
        first_token: seconds, of each of those turns.
    """

    policy: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token: list[float] = []
    failed: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that came from a cache."""
        return self.cached_tokens / max(1, self.prompt_tokens)


class RoutingReport(msgspec.Struct, frozen=True):
    """All policies; the first one is what the others are compared with."""

    results: list[PolicyResult]

    def json(self) -> str:
        """Return all measurements as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def markdown(self) -> str:
        """Return a table, policy by policy."""
        base = statistics.median(self.results[0].first_token)
        rows = [["routing", "turns", "failed", "hit rate", "time to first token, ratio of medians"]]
        for result in self.results:
            ratio = statistics.median(result.first_token) / base
            turns = str(len(result.first_token))
            rows.append([result.policy, turns, str(result.failed), f"{result.hit_rate:.0%}", f"{ratio:.2f}"])
        return table(rows) + "\n"


def _chat(url: str, number: int, turns: int, result: PolicyResult) -> None:
    """Have one chat; note all turns but the first."""
    source = random.Random(number)
    tokens = [1000 + number % 4] * 2 + [1000 + place for place in range(SYSTEM_TOKENS)]
    for turn in range(turns):
        tokens += [source.randrange(1000, 40_000) for _ in range(MESSAGE_TOKENS)]
        body = {"prompt": tokens, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = _ask(url, body)
        if answer is None:
            result.failed += 1
            return
        seconds, usage = answer
        if turn:
            result.prompt_tokens += usage["prompt_tokens"]
            result.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
            result.first_token.append(seconds)


def _ask(url: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]] | None:
    """Return the seconds to the first token and the usage; None if the answer is not complete."""
    began, first, usage = time.monotonic(), None, None
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = msgspec.json.decode(line[6:])
            usage = chunk.get("usage") or usage
            if first is None and chunk.get("choices"):
                first = time.monotonic() - began
    return None if first is None or usage is None else (first, usage)


def measure_policy(policy: str, model: str, replicas: int, chats: int, turns: int) -> PolicyResult:
    """Start a server with a policy, have all chats at once, and stop it."""
    result = PolicyResult(policy)
    options = ("--model", model, "--replicas", str(replicas), "--routing", policy, "--standby-workers", "0")
    with tempfile.TemporaryDirectory() as folder, ServerProcess(*options, log=Path(folder) / "log") as server:
        server.wait_ready()
        threads = [
            threading.Thread(target=_chat, args=(server.url, number, turns, result))
            for number in range(chats)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return result


def routing(
    *,
    model: Model = DEFAULT_MODEL,
    replicas: Annotated[int, Parameter(help="Number of replicas.")] = 2,
    chats: Annotated[int, Parameter(help="Number of chats at a time.")] = 5,
    turns: Annotated[int, Parameter(help="Number of turns of each chat, at least 2.")] = 5,
    output: Output = None,
    json: Json = False,
) -> int:
    """Compare the policies of --routing on chats of several turns: hit rate, and time to first token."""
    if replicas < 1 or chats < 1 or turns < 2:
        raise UsageError(f"--replicas {replicas} --chats {chats} --turns {turns}: at least 1, 1 and 2")
    results = []
    for policy in POLICIES:
        stderr().print(policy, markup=False)
        results.append(measure_policy(policy, model, replicas, chats, turns))
    report = RoutingReport(results)
    write_report(report.markdown(), report.json(), output)
    sys.stdout.write(report.json() + "\n" if json else report.markdown())
    return 1 if any(result.failed for result in results) else 0
