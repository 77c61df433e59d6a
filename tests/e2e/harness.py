"""Servers in processes of their own, and streams read from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

START_SECONDS = 60.0


class Server:
    """``ullm serve`` in a process of its own.

    Args:
        arguments: after ``ullm serve --port 0``.
        command: another way to start it; must say ``ready: URL`` on stdout.
    """

    def __init__(
        self, *arguments: str, environ: Mapping[str, str] = {}, wait: bool = True, log: Path
    ) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ullm", "serve", "--port", "0", *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | dict(environ),
                text=True,
            )
        self.url = ""
        self.said = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if wait:
            self.wait_ready()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if line.startswith("ready: "):
                self.url = line.split()[1].removesuffix("/v1")
                self._ready.set()
        self._ready.set()

    def wait_ready(self) -> None:
        """Wait for the ready line; fail with the log if the server ends before."""
        assert self._ready.wait(START_SECONDS), f"not ready after {START_SECONDS} s\n{self.errors()}"
        assert self.url, f"ended before it was ready\n{self.errors()}"

    def errors(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_text("utf-8", "replace")

    def client(self, **options: Any) -> httpx.Client:
        """A plain HTTP client."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def children(self) -> list[psutil.Process]:
        """All processes below the server."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        return [p for p in self.children() if "ullm.actors.worker_main" in p.cmdline()]

    def worker(self) -> psutil.Process:
        """The one worker process."""
        (worker,) = self.workers()
        return worker

    def signal(self, number: int) -> None:
        """Send a signal to the server only."""
        self.process.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        """The exit status."""
        return self.process.wait(timeout)


class Stream:
    """One streamed completion, read in a thread until it ends, however that happens."""

    def __init__(self, server: Server, max_tokens: int, prompt: list[int] | None = None) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.done = False
        self.error: Exception | None = None
        self.failure: dict[str, str] | None = None
        self.begun = threading.Event()
        self._body = {
            "model": server_model(server),
            "prompt": prompt or [300, 301],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        self.usage: dict[str, int] | None = None
        self.gap = 0.0
        self._url = f"{server.url}/v1/completions"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = time.monotonic()
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self._take(line[6:])
                        self.gap, last = max(self.gap, time.monotonic() - last), time.monotonic()
        except httpx.HTTPError as error:
            self.error = error
        self.begun.set()

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self.failure = chunk["error"]
            return
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            self.begun.set()

    def join(self, timeout: float = 60) -> Stream:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the stream has no end"
        return self


def server_model(server: Server) -> str:
    with server.client() as client:
        name: str = client.get("/v1/models").json()["data"][0]["id"]
        return name


def streams(server: Server, count: int, max_tokens: int) -> list[Stream]:
    """Streams that have all begun."""
    found = [Stream(server, max_tokens, [300 + number]) for number in range(count)]
    for stream in found:
        assert stream.begun.wait(30)
    return found


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended. An orphan stays a zombie where nobody reaps it, as in containers."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


SCRIPTED = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")
"""Options that serve `scripted_model`."""


def eventually(what: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that sends no event, such as another process's end."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
