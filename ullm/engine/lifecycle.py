"""Changes of the whole engine, one at a time: falling asleep, waking up, reloading.

One actor carries them out in the order of their requests, so that no two of them meet. The caller may
disconnect; a change that has started always completes.

Being asleep and taking requests are two things: an engine that wakes on request takes them all the time.
They wait in the router, behind `Router.hold`, and their arrival wakes the engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import get_args

import trio

from ullm.actors.router import Router
from ullm.config import MAX_SLEEP_LEVEL, SleepMode
from ullm.engine.current_model import CurrentModel
from ullm.engine.fleet import Fleet
from ullm.engine.reload import Reloader
from ullm.engine.replica import Replica
from ullm.engine.status import ReloadReport, SleepHealth
from ullm.errors import (
    ActorLost,
    AdapterUnusable,
    EngineBusy,
    InvalidParameter,
    RequestError,
    SupervisionError,
    UllmError,
    first_cause,
)
from ullm.logs import get_logger
from ullm.protocol.messages import Adapter
from ullm.supervision.actor import Mailbox, Reply, ask

log = get_logger(__name__)

AWAKE, FALLING_ASLEEP, ASLEEP, WAKING = "awake", "falling_asleep", "asleep", "waking"

MAX_RELOADS = 2
"""Reloads that were requested without a caller who waits: one that runs, and one that follows."""


@dataclass(frozen=True, slots=True)
class FallAsleep:
    """A command: sleep at this level or deeper."""

    level: int
    mode: SleepMode
    reply: Reply[None]


@dataclass(frozen=True, slots=True)
class WakeUp:
    """A command: be awake."""

    reply: Reply[None]


@dataclass(frozen=True, slots=True)
class ReloadModel:
    """A command: load the model again, or another revision of it, in new workers."""

    model: str | None
    revision: str | None
    reply: Reply[ReloadReport]


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """A command: load an adapter into all workers, and serve it."""

    adapter: Adapter
    reply: Reply[None]


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """A command: serve an adapter no more."""

    name: str
    reply: Reply[None]


Command = FallAsleep | WakeUp | ReloadModel | LoadAdapter | UnloadAdapter


class Lifecycle:
    """The actor that puts an engine to sleep, wakes it up, and reloads its model.

    It is one class because sleeps, wake-ups and reloads wait for each other, and each has to know what the
    others are about to do.

    Args:
        on_failure: called with the cause when the engine cannot be woken.
        stopping: returns whether a stop was requested, after which no reload begins.

    Attributes:
        state: ``awake``, ``falling_asleep``, ``asleep`` or ``waking``.
        level: of sleep; None while awake.
        sleeps: level → times that the engine fell asleep so deeply.
        wakes: times that it woke up.
        sleep_seconds, wake_seconds: duration of the last change; None before the first.
        given_back: bytes given back by the present sleep; 0 while awake.
    """

    def __init__(
        self,
        current: CurrentModel,
        router: Router,
        fleet: Fleet,
        reloader: Reloader,
        on_failure: Callable[[BaseException], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.mailbox: Mailbox[Command] = Mailbox(float("inf"), "lifecycle")
        self.state = AWAKE
        self.level: int | None = None
        self.sleeps: dict[int, int] = {}
        self.wakes = 0
        self.sleep_seconds: float | None = None
        self.wake_seconds: float | None = None
        self.given_back = 0
        self._current = current
        self._router = router
        self._fleet = fleet
        self._reloader = reloader
        self._on_failure = on_failure
        self._stopping = stopping
        self._requested: list[ReloadModel] = []  # by `request_reload`, and not done yet
        self._quieting: trio.CancelScope | None = None
        self._since: float | None = None
        self._stopped = False  # all worker processes, at the deepest level

    # --- for the engine -------------------------------------------------------------------------------

    @property
    def registered(self) -> bool:
        """Whether requests are taken: always while awake, and asleep if they wake the engine."""
        return self.state == AWAKE or self._current.config.wake_on_request

    def health(self) -> SleepHealth:
        """Return what the probes show of sleep."""
        return SleepHealth(
            state=self.state,
            level=self.level,
            registered=self.registered,
            seconds=0.0 if self._since is None else trio.current_time() - self._since,
        )

    async def sleep(self, level: int, mode: SleepMode) -> None:
        """Fall asleep; return at once if the engine sleeps as deep already.

        Args:
            mode: wait for the requests in flight, abort them, or keep them until the engine wakes.

        Raises:
            InvalidParameter: no such level or mode.
            EngineBusy: a wake called it off.
        """
        if level not in range(MAX_SLEEP_LEVEL + 1):
            raise InvalidParameter(f"level must be from 0 to {MAX_SLEEP_LEVEL}, got {level}", "level")
        if mode not in get_args(SleepMode):
            known = ", ".join(get_args(SleepMode))
            raise InvalidParameter(f"mode must be one of {known}; got {mode!r}", "mode")
        if mode == "abort" and self._quieting is not None:
            self._router.finish_old("abort")  # an earlier sleep still waits for these requests
        await ask(self.mailbox, lambda reply: FallAsleep(level, mode, reply), float("inf"))

    async def wake(self) -> None:
        """Wake up; a sleep that still waits for requests is called off."""
        if self._quieting is not None:
            self._quieting.cancel()
        await ask(self.mailbox, WakeUp, float("inf"))

    async def reload(self, model: str | None, revision: str | None) -> ReloadReport:
        """Have the workers replaced by new ones; see `Reloader.reload`.

        Raises:
            InvalidParameter: a revision of a local path.
            ReloadFailed: the new model cannot be used, or the new workers did not come up; the old ones
                serve on.
        """
        return await ask(self.mailbox, lambda reply: ReloadModel(model, revision, reply), float("inf"))

    async def load_adapter(self, adapter: Adapter) -> None:
        """Load an adapter into all workers, which are woken for it, and serve it from then on.

        Raises:
            AdapterUnusable: it cannot be used; nothing has changed.
            EngineBusy: a stop overtook it.
        """
        await ask(self.mailbox, lambda reply: LoadAdapter(adapter, reply), float("inf"))

    async def unload_adapter(self, name: str) -> None:
        """Serve an adapter no more; requests in flight end with it.

        Raises:
            ModelUnknown: there is none of that name.
        """
        await ask(self.mailbox, lambda reply: UnloadAdapter(name, reply), float("inf"))

    def request_reload(self) -> None:
        """Begin a reload without waiting for it; the log says how it goes.

        At most one waits while another one runs: it will read the files as they are then, so that further
        requests ask for the same.
        """
        if len(self._requested) >= MAX_RELOADS:
            log.info("a reload is waiting already")
            return
        self._requested.append(ReloadModel(None, None, Reply()))
        self.mailbox.send_nowait(self._requested[-1])

    # --- the supervised child -------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Carry out commands. When it is restarted after a failure, wake the engine: a defined state."""
        self._since = self._since or trio.current_time()
        task_status.started()  # before it wakes, which may take as long as loading the model
        if self.state in (FALLING_ASLEEP, WAKING):
            await self._wake()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sleep_when_idle)
                nursery.start_soon(self._wake_on_request)
                async for command in self.mailbox:
                    await self._carry_out(command)
        finally:
            if trio.current_effective_deadline() == float("-inf"):
                self.mailbox.close()  # stopped for good: pending callers get an error

    async def _carry_out(self, command: Command) -> None:
        try:
            match command:
                case FallAsleep():
                    await self._fall_asleep(command.level, command.mode)
                    command.reply.send(None)
                case WakeUp():
                    await self._wake()
                    command.reply.send(None)
                case LoadAdapter():
                    await self._load_adapter(command.adapter)
                    command.reply.send(None)
                case UnloadAdapter():
                    await self._unload_adapter(command.name)
                    command.reply.send(None)
                case ReloadModel():
                    command.reply.send(await self._reload(command.model, command.revision))
        except RequestError as error:
            command.reply.fail(error)
        except ActorLost:
            await trio.sleep_forever()  # the tree is being stopped, and this task with it
        finally:
            if command in self._requested:
                self._requested.remove(command)

    async def _sleep_when_idle(self) -> None:
        """Fall asleep after ``--sleep-after`` seconds without requests."""
        seconds = self._current.config.sleep_after
        while seconds is not None:
            with trio.CancelScope() as scope:
                if self.state == AWAKE and not self._router.live:
                    scope.deadline = trio.current_time() + seconds
                await self._router.wait_changed()
            if scope.cancelled_caught:
                log.info("idle: falling asleep", seconds=seconds)
                await self._quietly(self.sleep(self._current.config.sleep_level, "wait"))

    async def _wake_on_request(self) -> None:
        while True:
            if self.state == ASLEEP and self._router.held:
                await self._quietly(self.wake())
            await self._router.wait_changed()

    async def _quietly(self, change: Awaitable[None]) -> None:
        """Await a change that has no caller, who would have to be told that it was overtaken."""
        try:
            await change
        except EngineBusy as error:
            log.debug("overtaken", cause=str(error))

    def _enter(self, state: str) -> None:
        self.state, self._since = state, trio.current_time()
        self._router.announce_change()

    # --- sleep ----------------------------------------------------------------------------------------

    async def _fall_asleep(self, level: int, mode: SleepMode) -> None:
        if self.level is not None and level <= self.level:
            return
        began = trio.current_time()
        if self.level is None:
            self._router.hold()
            self._enter(FALLING_ASLEEP)
            if not await self._make_quiet(mode):
                self._router.release()
                self._enter(AWAKE)
                raise EngineBusy("the engine was woken before it had fallen asleep")
        self.given_back = await self._pause_or_stop(level)
        self.level = level
        self.sleeps[level] = self.sleeps.get(level, 0) + 1
        self.sleep_seconds = trio.current_time() - began
        self._enter(ASLEEP)
        log.info(
            "asleep", level=level, seconds=round(self.sleep_seconds, 3), bytes_given_back=self.given_back
        )

    async def _make_quiet(self, mode: SleepMode) -> bool:
        """Wait for the requests in flight, abort or keep them; return False if a wake came in between."""
        if mode == "abort":
            self._router.finish_old("abort")
        if mode == "keep":
            return True
        with trio.CancelScope() as self._quieting:
            while self._router.live > self._router.held:
                await self._router.wait_changed()
        overtaken, self._quieting = self._quieting.cancelled_caught, None
        return not overtaken

    async def _pause_or_stop(self, level: int) -> int:
        if level < MAX_SLEEP_LEVEL:
            return await self._fleet.pause(level)
        await self._fleet.pause(0)  # a step that hangs is noticed only while its scheduler waits for it
        self._stopped = True
        return max(self.given_back, sum(map(_memory, self._fleet.replicas))) + await self._fleet.stop_all()

    async def _wake(self) -> None:
        if self.state == AWAKE:
            return
        began = trio.current_time()
        self._enter(WAKING)
        if self._stopped:
            await self._start_workers()
        await self._fleet.resume()
        if self._fleet.given_up:
            await trio.sleep_forever()  # until the engine's stop ends this
        self.level, self.given_back = None, 0
        self.wakes += 1
        self.wake_seconds = trio.current_time() - began
        self._router.release()
        self._enter(AWAKE)
        log.info("awake", seconds=round(self.wake_seconds, 3))

    async def _start_workers(self) -> None:
        try:
            await self._fleet.start_all()
        except ActorLost:
            raise
        except (UllmError, SupervisionError) as error:
            self._on_failure(first_cause(error))
            await trio.sleep_forever()  # until the engine's stop ends this
        self._stopped = False

    # --- reload ---------------------------------------------------------------------------------------

    async def _reload(self, model: str | None, revision: str | None) -> ReloadReport:
        began = trio.current_time()
        if self._stopping():
            log.info("not reloading: a stop was requested")
            raise EngineBusy("a stop was requested; it overtook the reload")
        self._reloader.check(model, revision)
        await self._wake()
        return await self._reloader.reload(model, revision, began)

    # --- adapters -------------------------------------------------------------------------------------

    async def _load_adapter(self, adapter: Adapter) -> None:
        if self._stopping():
            raise EngineBusy("a stop was requested; it overtook the adapter")
        await self._wake()
        adapters = self._current.adapters
        try:
            await self._fleet.keep_adapter(adapter)
        except AdapterUnusable:
            await self._fleet.keep_adapter(adapter, wanted=False)  # other replicas may have it
            raise
        former = adapters.find(adapter.name) if adapter.name in adapters else None
        adapters.put(adapter)
        if former is not None:
            await self._fleet.keep_adapter(former, wanted=False)
        log.info("adapter loaded", adapter=adapter.name, path=adapter.path)

    async def _unload_adapter(self, name: str) -> None:
        adapter = self._current.adapters.find(name)
        assert adapter is not None, "a name finds an adapter, or raises"
        self._current.adapters.remove(name)
        if self.state == AWAKE:  # asleep, workers have dropped it
            await self._fleet.keep_adapter(adapter, wanted=False)
        log.info("adapter unloaded", adapter=name)


def _memory(replica: Replica) -> int:
    """Return the bytes of weights and KV cache that a replica's workers hold on devices."""
    info = replica.group.info
    if info is None or info.device == "cpu":
        return 0
    held = info.weight_bytes + info.num_blocks * info.block_size * info.kv_bytes_per_token
    return held * replica.config.world_size
