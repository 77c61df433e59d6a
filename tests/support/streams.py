"""Requests to a server, read in threads of their own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import httpx

from tests.support.waiting import SECONDS

if TYPE_CHECKING:
    from tests.support.server import Server


class Stream:
    """One request, read in a thread until it ends, however that happens.

    Args:
        chat: a chat completion of the prompt's numbers, instead of a completion of its tokens.
        stream: by server-sent events; otherwise in one piece.
        body: more fields of the request.
    """

    def __init__(
        self,
        server: Server,
        max_tokens: int,
        prompt: list[int] | None = None,
        *,
        chat: bool = False,
        stream: bool = True,
        **body: Any,
    ) -> None:
        self.text = ""
        self.status: int | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.error: Exception | None = None
        self.failure: dict[str, str] | None = None
        self.usage: dict[str, int] | None = None
        self.token_ids: list[int] = []
        self.gap = 0.0
        self.chunks = 0
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.prompt = prompt = prompt or [300, 301]
        content = {"messages": [{"role": "user", "content": str(prompt)}]} if chat else {"prompt": prompt}
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        self.body = {
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **content,
            **options,
            **body,
        }
        self._url = f"{server.url}/v1/{'chat/' if chat else ''}completions"
        self._leaving = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self.body, timeout=SECONDS, verify=False) as response:
                self.status = response.status_code
                self._read(response)
        except httpx.HTTPError as error:
            self.error = error
        self.begun.set()
        self.ended.set()

    def _read(self, response: httpx.Response) -> None:
        last = time.monotonic()
        if not response.headers["content-type"].startswith("text/event-stream"):
            response.read()
            return self._take(response.json())
        for line in _lines(response):
            if self._leaving:
                return
            if line.startswith("data: "):
                self.done = line == "data: [DONE]"
                if not self.done:
                    self._take(json.loads(line[6:]))
                self.gap, last = max(self.gap, time.monotonic() - last), time.monotonic()

    def _take(self, chunk: dict[str, Any]) -> None:
        self.failure = chunk.get("error") or self.failure
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            message = choice.get("delta") or choice.get("message")
            self.text += message.get("content") or "" if message is not None else choice.get("text", "")
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            self.token_ids += choice.get("token_ids") or ()
            if self.text:
                self.chunks += 1
                self.begun.set()

    def leave(self) -> None:
        """Hang up at the next event."""
        self._leaving = True

    def join(self, timeout: float = 2 * SECONDS) -> Stream:
        """Wait for its end."""
        assert self.ended.wait(timeout), "the stream has no end"
        self._thread.join()
        return self


def _lines(response: httpx.Response) -> Iterator[str]:
    """Yield lines as they come. Those of httpx end at U+2028 and the like, too, which JSON may contain."""
    rest = b""
    for data in response.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in lines)


def streams(server: Server, count: int, max_tokens: int) -> list[Stream]:
    """Start streams, and wait until all of them have begun."""
    return wait_begun([Stream(server, max_tokens, [300 + number]) for number in range(count)])


def wait_begun(running: list[Stream]) -> list[Stream]:
    """Wait until all of these have their first token, and return them."""
    for stream in running:
        assert stream.begun.wait(SECONDS), "no first token"
    return running


def texts(running: Sequence[Stream]) -> list[str]:
    """Wait for streams to end, and return their texts; fail if one of them is not complete."""
    for stream in running:
        stream.join()
        assert (stream.error, stream.failure, stream.status) == (None, None, 200)
        assert stream.finish_reason == "length"
        assert stream.usage is not None
        assert stream.usage["completion_tokens"] == stream.body["max_tokens"]
        assert stream.done == ("stream" in stream.body)
    return [stream.text for stream in running]
