"""Changes of the whole engine, one at a time: falling asleep, waking up, taking on new workers.

One actor carries them out, in the order in which they are asked for, so that nothing has to be said
about two of them at once. Whoever asks may go away; what was begun is finished.

Asleep is one thing, and taking requests is another: an engine that wakes on request takes them all the
time. They wait in the router, behind `Router.hold`, and their arrival is what wakes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import trio

from ullm.actors.router import Router
from ullm.config import MAX_SLEEP_LEVEL, EngineConfig, SleepMode
from ullm.engine.fleet import Fleet
from ullm.engine.replica import Replica
from ullm.engine.status import ReloadReport, SleepHealth
from ullm.errors import (
    ActorLost,
    EngineBusy,
    InvalidParameter,
    ReloadFailed,
    RequestError,
    SupervisionError,
    UllmError,
    first_cause,
)
from ullm.faults import FaultInjector
from ullm.hub import LocalModel
from ullm.logs import get_logger
from ullm.supervision.actor import Mailbox, Reply, ask

log = get_logger("ullm.engine.lifecycle")

AWAKE, FALLING_ASLEEP, ASLEEP, WAKING = "awake", "falling_asleep", "asleep", "waking"


@dataclass(frozen=True, slots=True)
class FallAsleep:
    """Sleep at this level or deeper."""

    level: int
    mode: SleepMode
    reply: Reply[None]


@dataclass(frozen=True, slots=True)
class WakeUp:
    """Be awake."""

    reply: Reply[None]


@dataclass(frozen=True, slots=True)
class TakeNewWorkers:
    """Load the model again, or another revision of it, in new workers."""

    model: str | None
    revision: str | None
    reply: Reply[ReloadReport]


Command = FallAsleep | WakeUp | TakeNewWorkers


class Lifecycle:
    """See the module.

    Args:
        find_model: blocking; called in a thread.
        on_model: called with the new configuration and files after a reload.
        on_failure: called with the cause when the engine cannot be woken.
        faults: what shall go wrong at the point ``engine.reload``.
    """

    def __init__(
        self,
        config: EngineConfig,
        router: Router,
        fleet: Fleet,
        find_model: Callable[[EngineConfig], LocalModel],
        on_model: Callable[[EngineConfig, LocalModel], None],
        on_failure: Callable[[BaseException], None],
        faults: FaultInjector,
    ) -> None:
        self.mailbox: Mailbox[Command] = Mailbox(float("inf"), "lifecycle")
        self.local: LocalModel | None = None
        self.state = AWAKE
        self.level: int | None = None
        self.sleeps: dict[int, int] = {}
        self.wakes = 0
        self.sleep_seconds: float | None = None
        self.wake_seconds: float | None = None
        self.given_back = 0
        self.reloads = {"succeeded": 0, "failed": 0}
        self._config = config
        self._router = router
        self._fleet = fleet
        self._find_model = find_model
        self._on_model = on_model
        self._on_failure = on_failure
        self._faults = faults
        self._quieting: trio.CancelScope | None = None
        self._since: float | None = None
        self._stopped = False  # all worker processes, at the deepest level

    # --- for the engine -------------------------------------------------------------------------------

    def health(self) -> SleepHealth:
        """The state of sleep."""
        return SleepHealth(
            state=self.state,
            level=self.level,
            registered=self.state == AWAKE or self._config.wake_on_request,
            seconds=0.0 if self._since is None else trio.current_time() - self._since,
        )

    async def sleep(self, level: int, mode: SleepMode) -> None:
        """Fall asleep; returns at once if the engine sleeps as deep already.

        Args:
            mode: requests in flight are waited for, aborted, or kept for the time after.

        Raises:
            InvalidParameter: no such level or mode.
            EngineBusy: a wake overtook it.
        """
        if level not in range(MAX_SLEEP_LEVEL + 1):
            raise InvalidParameter(f"level must be from 0 to {MAX_SLEEP_LEVEL}, got {level}", "level")
        if mode not in get_args(SleepMode):
            known = ", ".join(get_args(SleepMode))
            raise InvalidParameter(f"mode must be one of {known}; got {mode!r}", "mode")
        if mode == "abort" and self._quieting is not None:
            self._router.finish_old("abort")  # which another one, asked for before, still waits for
        await ask(self.mailbox, lambda reply: FallAsleep(level, mode, reply), float("inf"))

    async def wake(self) -> None:
        """Wake up; a sleep that still waits for requests is called off."""
        if self._quieting is not None:
            self._quieting.cancel()
        await ask(self.mailbox, WakeUp, float("inf"))

    async def reload(self, model: str | None, revision: str | None) -> ReloadReport:
        """Replace the workers by new ones that have loaded the model again, while requests go on.

        Raises:
            ReloadFailed: the new ones did not come up, and the old ones serve on.
        """
        return await ask(self.mailbox, lambda reply: TakeNewWorkers(model, revision, reply), float("inf"))

    def request_reload(self) -> None:
        """`reload`, with nobody waiting for it."""
        self.mailbox.send_nowait(TakeNewWorkers(None, None, Reply()))

    # --- the supervised child -------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Carry out commands. After a failure of this task, the engine is woken: a defined state."""
        self._since = self._since or trio.current_time()
        if self.state in (FALLING_ASLEEP, WAKING):
            await self._wake()
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sleep_when_idle)
                nursery.start_soon(self._wake_on_request)
                async for command in self.mailbox:
                    await self._carry_out(command)
        finally:
            if trio.current_effective_deadline() == float("-inf"):
                self.mailbox.close()  # stopped for good: those who still wait shall hear of it

    async def _carry_out(self, command: Command) -> None:
        try:
            match command:
                case FallAsleep():
                    await self._fall_asleep(command.level, command.mode)
                    command.reply.send(None)
                case WakeUp():
                    await self._wake()
                    command.reply.send(None)
                case TakeNewWorkers():
                    command.reply.send(await self._take_new_workers(command.model, command.revision))
        except RequestError as error:
            command.reply.fail(error)
        except ActorLost:
            await trio.sleep_forever()  # the tree is being stopped, and this task with it

    async def _sleep_when_idle(self) -> None:
        """Fall asleep by itself after ``--sleep-after``."""
        seconds = self._config.sleep_after
        while seconds is not None:
            with trio.CancelScope() as scope:
                if self.state == AWAKE and not self._router.live:
                    scope.deadline = trio.current_time() + seconds
                await self._router.wait_changed()
            if scope.cancelled_caught:
                log.info("idle: falling asleep", seconds=seconds)
                await self._quietly(self.sleep(self._config.sleep_level, "wait"))

    async def _wake_on_request(self) -> None:
        while True:
            if self.state == ASLEEP and self._router.held:
                await self._quietly(self.wake())
            await self._router.wait_changed()

    async def _quietly(self, change: Awaitable[None]) -> None:
        """Nobody asked for this, so nobody hears that it was overtaken."""
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
            "asleep", depth=level, seconds=round(self.sleep_seconds, 3), bytes_given_back=self.given_back
        )

    async def _make_quiet(self, mode: SleepMode) -> bool:
        """Deal with the requests in flight; False if a wake came in between."""
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
        await self._fleet.pause(0)  # a step that hangs is known to hang only while its scheduler waits for it
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

    async def _take_new_workers(self, model: str | None, revision: str | None) -> ReloadReport:
        began = trio.current_time()
        if revision is not None and os.path.exists(model or self._config.model):  # noqa: ASYNC240  # at once
            raise InvalidParameter("revision is for models of a hub; this one is a local path", "revision")
        await self._wake()
        try:
            await self._faults.at("engine.reload")
            config, local = await self._locate(model, revision)
            log.info("reloading", model=str(local.path))
            moved = await self._fleet.replace(
                config,
                str(local.path),
                swap=self._needs_swap(),
                patience=self._config.shutdown_timeout,
            )
        except ActorLost:  # the engine stops meanwhile
            raise
        except (UllmError, SupervisionError) as error:
            self.reloads["failed"] += 1
            cause = first_cause(error)
            log.error("reload failed; the old workers serve on", cause=str(cause))
            raise ReloadFailed(f"the new workers did not come up, the old ones serve on: {cause}") from error
        self._on_model(config, local)
        self._config, self.local = config, local
        self.reloads["succeeded"] += 1
        seconds = trio.current_time() - began
        log.info("reloaded", model=str(local.path), seconds=round(seconds, 3), moved=moved)
        serving = [replica.index for replica in self._fleet.replicas]
        return ReloadReport(str(local.path), config.revision, serving, seconds, moved)

    async def _locate(self, model: str | None, revision: str | None) -> tuple[EngineConfig, LocalModel]:
        """The configuration and the files of the new workers; they must speak the same tokens."""
        config = replace(
            self._config,
            model=model or self._config.model,
            revision=revision or (None if model else self._config.revision),
            served_model_name=self._config.model_names,
        )
        local = await trio.to_thread.run_sync(self._find_model, config)
        assert self.local is not None, "a running engine knows its model's files"
        digests = [await trio.to_thread.run_sync(_tokenizer_digest, which) for which in (self.local, local)]
        if digests[0] != digests[1]:
            raise ReloadFailed(f"{local.path} has another tokenizer; requests in flight could not go on")
        return config, local

    def _needs_swap(self) -> bool:
        """Whether memory cannot hold old and new workers at once: a GPU is filled with KV by design."""
        infos = [replica.group.info for replica in self._fleet.replicas]
        return any(info is not None and info.device.startswith("cuda") for info in infos)


def _memory(replica: Replica) -> int:
    """Bytes on devices that the workers hold by design: weights and KV cache."""
    info = replica.group.info
    if info is None or info.device == "cpu":
        return 0
    held = info.weight_bytes + info.num_blocks * info.block_size * info.kv_bytes_per_token
    return held * replica.config.world_size


def _tokenizer_digest(local: LocalModel) -> str:
    """Of the file that maps text to tokens; a GGUF file is its own."""
    path = Path(local.tokenizer_path)
    file = path / "tokenizer.json" if path.is_dir() else path
    return hashlib.blake2b(file.read_bytes()).hexdigest()
