"""A server like vLLM's and llama.cpp's: ``/health``, models, streamed completions with usage.

It takes a millisecond per 100 prompt tokens unless it knows their prefix, and one per generated token.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Peer(ThreadingHTTPServer):
    """The server, and the prefixes that it knows."""

    daemon_threads = True
    request_queue_size = 128
    refuse = False
    ready_at = 0.0

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.prefixes: set[str] = set()
        self.computing = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Peer

    def do_GET(self) -> None:
        ready = time.monotonic() >= self.server.ready_at
        self.answer(200 if ready else 503, {"data": [{"id": "peer"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["ignore_eos"] is True
        if self.server.refuse:
            self.answer(500, {"error": {"message": "no"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        words = body["prompt"].split()
        self.prefill(words)
        for _ in range(body["max_tokens"]):
            time.sleep(0.001)
            self.event({"choices": [{"index": 0, "text": "x"}]})
        usage = {"prompt_tokens": len(words), "completion_tokens": body["max_tokens"]}
        self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def prefill(self, words: list[str]) -> None:
        prefix = " ".join(words[:500])
        with self.server.computing:
            known = len(words) > 500 and prefix in self.server.prefixes
            time.sleep(0.0 if known else len(words) / 100_000)
            self.server.prefixes.add(prefix)

    def event(self, value: dict[str, Any]) -> None:
        self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--exit", type=int)
    parser.add_argument("--refuse", action="store_true")
    options = parser.parse_args()
    if options.exit is not None:
        sys.stderr.write("no more memory\n")
        sys.exit(options.exit)
    peer = Peer(options.port)
    peer.ready_at, peer.refuse = time.monotonic() + options.start, options.refuse
    peer.serve_forever()


if __name__ == "__main__":
    main()
