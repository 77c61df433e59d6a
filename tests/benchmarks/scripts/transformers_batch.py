"""transformers' ``generate`` behind HTTP, run as ``PYTHON transformers_batch.py MODEL PORT [DTYPE]``.

Requests that arrive together are one static batch: padded on the left, generated to the longest
``max_tokens``, each token sent as it comes. `transformers serve` cannot stand in: it has no plain
completions and no way to ignore the end of a sequence.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GATHER = 0.03
"""Seconds that the first request of a batch waits for others."""


class StaticRequest:
    """One request and its tokens, which end with None."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.prompt: str = body["prompt"]
        self.max_tokens: int = body["max_tokens"]
        self.prompt_tokens = 0
        self.tokens: queue.Queue[int | None] = queue.Queue()


class BatchStreamer:
    """A streamer that hands each row's token to its request; the first call has the prompts."""

    def __init__(self, jobs: list[StaticRequest]) -> None:
        self._jobs = jobs
        self._count = -1

    def put(self, tokens: Any) -> None:
        """Take one token of each row."""
        self._count += 1
        if self._count == 0:
            return
        for job, token in zip(self._jobs, tokens.tolist(), strict=True):
            if self._count <= job.max_tokens:
                job.tokens.put(token)
            if self._count == job.max_tokens:
                job.tokens.put(None)

    def end(self) -> None:
        """Do nothing: every request has had its last token."""


class BatchingModel:
    """The model, and the thread that it runs in."""

    def __init__(self, path: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype)
        )  # in eval mode
        self.jobs: queue.Queue[StaticRequest] = queue.Queue()

    def run(self) -> None:
        """Run batch after batch, for ever."""
        while True:
            jobs = [self.jobs.get()]
            time.sleep(GATHER)
            while not self.jobs.empty():
                jobs.append(self.jobs.get())
            self.generate(jobs)

    def generate(self, jobs: list[StaticRequest]) -> None:
        """Run one batch to its end."""
        inputs = self.tokenizer([job.prompt for job in jobs], return_tensors="pt", padding=True)
        for job, mask in zip(jobs, inputs["attention_mask"], strict=True):
            job.prompt_tokens = int(mask.sum())
        count = max(job.max_tokens for job in jobs)
        with self.torch.inference_mode():
            self.model.generate(
                **inputs,
                streamer=BatchStreamer(jobs),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=self.tokenizer.pad_token_id,
            )


def handler(name: str, model: BatchingModel) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers requests."""

    class BatchHandler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._json({"data": [{"id": name}]})

        def do_POST(self) -> None:
            job = StaticRequest(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            model.jobs.put(job)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self._stream(job)
            self.close_connection = True

        def _stream(self, job: StaticRequest) -> None:
            while (token := job.tokens.get()) is not None:
                # A token may be half a character; the replacement character stands for it here.
                self._event([{"index": 0, "text": model.tokenizer.decode([token]) or "\u200b"}])
            usage = {"prompt_tokens": job.prompt_tokens, "completion_tokens": job.max_tokens}
            self._event([{"index": 0, "text": "", "finish_reason": "length"}], usage)
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> None:
            event = json.dumps({"choices": choices, "usage": usage})
            self.wfile.write(b"data: " + event.encode() + b"\n\n")
            self.wfile.flush()

        def _json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    return BatchHandler


class BatchServer(ThreadingHTTPServer):
    """A server with room for many connections at once."""

    request_queue_size = 1024
    daemon_threads = True


def main() -> None:
    """Load, then serve until killed."""
    path, port, dtype = sys.argv[1], int(sys.argv[2]), (sys.argv[3:] or ["bfloat16"])[0]
    model = BatchingModel(path, dtype)
    threading.Thread(target=model.run, daemon=True).start()
    BatchServer(("127.0.0.1", port), handler(path, model)).serve_forever()


if __name__ == "__main__":
    main()
