"""``python -m tests.hostile.victims URL COUNT``: read so many long streams, until stdin ends.

After each line on stdin it writes one with the longest gap between two events of a stream since the line
before, in seconds, and the number of events. Streams that end begin anew; one that fails ends it with a
status that is not 0.
"""

from __future__ import annotations

import sys
from functools import partial

import httpx
import trio

from tests.hostile.catalogue import TEXT


class Watch:
    """The longest gap between two events of any stream, and how many events there were."""

    def __init__(self) -> None:
        self.longest, self.events = 0.0, 0

    async def read(self, url: str) -> None:
        """Read one stream after the other, without end."""
        body = {"prompt": "Hello", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        async with httpx.AsyncClient(timeout=300) as client:
            while True:
                async with client.stream("POST", url + TEXT, json=body) as stream:
                    stream.raise_for_status()
                    await self._note(stream)

    async def _note(self, stream: httpx.Response) -> None:
        last = None
        async for line in stream.aiter_lines():
            if not line.startswith("data: "):
                continue
            if '"error"' in line:
                raise RuntimeError(line)
            now = trio.current_time()
            self.longest = max(self.longest, 0.0 if last is None else now - last)
            last = now
            self.events += 1


async def main(url: str, count: int) -> None:
    watch = Watch()
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(watch.read, url)
        while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(f"{watch.longest:.4f} {watch.events}", flush=True)  # noqa: T201
            watch.longest, watch.events = 0.0, 0
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(partial(main, sys.argv[1], int(sys.argv[2])))
