"""The records of all live requests: those that wait for a replica, those on hold, and signals of change."""

from __future__ import annotations

import trio

from ullm.scheduling.request import RequestRecord


class RequestTable:
    """Live request records by ``seq_id``. Its methods are synchronous, except those that wait."""

    def __init__(self) -> None:
        self._records: dict[int, RequestRecord] = {}
        self._waiting: dict[int, RequestRecord] = {}
        self._arrivals = 0
        self._last_arrival = float("inf")  # later ones are on hold
        self._changed = trio.Event()
        self._idle = trio.Event()
        self._idle.set()

    def arrival(self) -> int:
        """Return a number for a new choice: its ``seq_id``, and its place in the queue."""
        self._arrivals += 1
        return self._arrivals

    def find(self, request_id: str) -> list[int]:
        """Return the ``seq_id`` of each live choice of a request."""
        return [record.seq_id for record in self._records.values() if record.request_id == request_id]

    @property
    def live(self) -> int:
        """Choices not yet finished."""
        return len(self._records)

    @property
    def held(self) -> int:
        """Live choices that arrived after `hold`."""
        return sum(record.arrival > self._last_arrival for record in self._records.values())

    def hold(self) -> None:
        """Keep requests that arrive from now on waiting; earlier ones run on."""
        self._last_arrival = self._arrivals

    def release(self) -> None:
        """End `hold`."""
        self._last_arrival = float("inf")

    async def wait_idle(self) -> None:
        """Wait until no request is live."""
        while self._records:
            await self._idle.wait()

    async def wait_changed(self) -> None:
        """Wait until a request or a replica comes or goes."""
        await self._changed.wait()

    def announce_change(self) -> None:
        """Wake the tasks in `wait_changed`."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _insert(self, record: RequestRecord) -> None:
        if not self._records:
            self._idle = trio.Event()
        self._records[record.seq_id] = self._waiting[record.seq_id] = record

    def _requeue(self, record: RequestRecord) -> None:
        """Have a record wait for a replica again; late messages about its former number are ignored."""
        del self._records[record.seq_id]
        self._waiting.pop(record.seq_id, None)  # it may have been waiting already
        record.replica = None
        record.seq_id = self.arrival()
        self._records[record.seq_id] = self._waiting[record.seq_id] = record

    def _remove(self, record: RequestRecord) -> None:
        del self._records[record.seq_id]
        self._waiting.pop(record.seq_id, None)
        if not self._records:
            self._idle.set()
        self.announce_change()
