"""The engine: one supervision tree, from the moment it is opened until all of it is gone.

    async with open_engine(EngineConfig(model="…")) as engine:
        async with engine.generate("Hello", SamplingParams(max_tokens=20)) as generation:
            async for output in generation:
                print(output.text)

Leaving the block, cancelling the scope around it, and `Engine.request_shutdown` all start the same
orderly stop: admitted requests run on until the deadline less what the teardown needs, then end with
``finish_reason="abort"``, then the tree is stopped in the reverse order of its start.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import trio

from ullm.actors.router import Router
from ullm.actors.tokenizer import TokenizerActor
from ullm.actors.transports import OpenTransport
from ullm.config import EngineConfig, SleepMode
from ullm.engine.adapters import Adapters
from ullm.engine.admission import Admission
from ullm.engine.current_model import CurrentModel, FindModel, find_local_model
from ullm.engine.fleet import Fleet
from ullm.engine.generation import Generation
from ullm.engine.intake import Intake
from ullm.engine.life import EngineLife
from ullm.engine.lifecycle import Lifecycle
from ullm.engine.readers import Readers
from ullm.engine.reload import Reloader
from ullm.engine.running import running
from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.engine.shutdown_report import ShutdownReport
from ullm.engine.state import EngineState
from ullm.engine.status import EngineStatistics, Health, ReloadReport, SleepHealth
from ullm.engine.stop import EngineStop
from ullm.engine.tree import EngineParts, EngineTree
from ullm.engine.view import EngineView
from ullm.engine.workers import open_workers
from ullm.errors import ActorLost, ConfigError, EngineBusy, EngineNotReady, ReloadFailed
from ullm.faults import FaultAction, FaultInjector, FaultReport
from ullm.hub import LocalModel
from ullm.protocol.messages import ModelInfo
from ullm.sampling import SamplingParams
from ullm.supervision import ChildInfo, ChildSpec


class Engine:
    """The façade of an engine; made by `open_engine`.

    It has more than 20 methods because it is the whole interface to an engine; each of them is one call of
    the part that does the work.

    Args:
        first_children: children that start before all others and stop after them, such as the HTTP
            server, which can therefore answer probes from the first moment to the last.
        transport: starts workers, instead of ``config.transport``.
        find_model: replaces `find_local_model`; called in a thread.

    Attributes:
        faults: arms faults and counts them; see docs/how-to/fault-injection.md.
        intake: takes records of requests that were made in another process.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        first_children: Sequence[ChildSpec] = (),
        transport: OpenTransport | None = None,
        find_model: FindModel | None = None,
    ) -> None:
        find_model = find_model or find_local_model
        self.faults = faults = FaultInjector.from_text(
            config.faults, transport=config.worker_transport if transport is None else ""
        )
        self._life = EngineLife()
        self._current = CurrentModel(config)
        self._router = Router(config, faults)
        self._readers = readers = Readers()
        self._stop = EngineStop(self._current, self._life, self._router, readers)
        workers, standby, hosts = open_workers(config, transport, faults, self._stop.requested.is_set)
        self._fleet = Fleet(config, self._router, workers, self._stop.give_up, faults, standby)
        reloader = Reloader(self._current, self._router, self._fleet, find_model, faults)
        self._lifecycle = Lifecycle(
            self._current,
            self._router,
            self._fleet,
            reloader,
            self._stop.give_up,
            self._stop.requested.is_set,
        )
        self._admission = Admission(self._life, self._router, self._lifecycle, readers)
        parts = EngineParts(
            self._life, self._current, self._router, self._fleet, self._lifecycle, self._stop, faults, hosts
        )
        self._tree = EngineTree(parts, first_children, find_model)
        self._view = EngineView(parts, reloader)
        self.intake = Intake(self._admission, self._router, self._current)

    # --- the model -----------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """The configuration as it holds now; a reload changes model and revision."""
        return self._current.config

    @property
    def model_name(self) -> str:
        """The name that the API shows."""
        return self._current.config.model_name

    @property
    def info(self) -> ModelInfo | None:
        """Facts about the loaded model; None before the first worker is up."""
        return self._current.info

    @property
    def tokenizer(self) -> TokenizerActor | None:
        """The tokenizer of the loaded model; None before its files are found."""
        return self._current.tokenizer

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """What the model recommends for requests that name no sampling parameters."""
        return self._current.sampling_defaults

    # --- requests --------------------------------------------------------------------------------------

    def check_admission(self) -> None:
        """Return if a request would be admitted now; cheap, to refuse one before it is tokenized.

        Raises:
            EngineDead, EngineNotReady, EngineDraining, EngineSleeping, QueueFull
        """
        self._admission.check()

    def generate(
        self,
        prompt: Sequence[int] | str,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        pace: Callable[[], float] | None = None,
        client: str = "",
        emitted: Sequence[int] = (),
        session: str = "",
    ) -> Generation:
        """Make a request, to be entered with ``async with`` and then iterated; see `Generation`.

        It is admitted when it is entered.

        Args:
            client: who sends it; of equal priority, waiting requests of several clients run in turn.
            emitted: tokens that the answer has already, as from an earlier process. It goes on after them as
                it would have, and its first output has them again. For requests of one choice.
            session: of several replicas, requests of one session go to the same one while that has room.

        Raises:
            EngineDead, EngineNotReady, EngineDraining, EngineSleeping, QueueFull
        """
        self._admission.check()
        name = request_id or f"req-{uuid.uuid4().hex}"
        return Generation(
            self._admission,
            self._router,
            self._current,
            prompt,
            params,
            name,
            pace,
            client,
            emitted,
            session,
        )

    def start_soon(self, task: Callable[[], Awaitable[object]]) -> None:
        """Run a task from when the engine runs until it has stopped; an error of it is logged."""
        self._tree.start_soon(task)

    def answering(self) -> AbstractContextManager[None]:
        """Have the drain of a stop wait for this block: an answer that is made elsewhere."""
        return self._readers.reading()

    def abort(self, request_id: str) -> bool:
        """End a request with what it has; return False if there is none of that name."""
        seq_ids = self._router.find(request_id)
        for seq_id in seq_ids:
            self._router.finish(seq_id, "abort")
        return bool(seq_ids)

    # --- what is inside ----------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """The state of the engine; only goes forward."""
        return self._life.state

    @property
    def report(self) -> ShutdownReport | None:
        """How the stop went; None until the engine is gone."""
        return self._stop.report

    def health(self) -> Health:
        """Return what the probes answer."""
        return self._view.health()

    def statistics(self) -> EngineStatistics:
        """Return counts and sizes over all replicas, as a frozen value."""
        return self._view.statistics()

    def children(self) -> tuple[ChildInfo, ...]:
        """Return the supervision tree as it is now; empty before it is started."""
        return self._tree.children()

    @property
    def http_faults(self) -> FaultInjector:
        """Faults between this process and its clients."""
        return self.faults

    async def manage_faults(self, action: FaultAction, plan: str = "") -> FaultReport:
        """Show the plan of faults, add to it, or disarm it; return what is armed and has happened.

        Raises:
            ConfigError: the plan cannot be parsed.
        """
        await trio.lowlevel.checkpoint()
        if action == "arm":
            self.faults.arm(plan)
        elif action == "clear":
            self.faults.clear()
        return self.faults.describe()

    # --- sleeping and reloading ----------------------------------------------------------------------------

    async def sleep(self, level: int | None = None, mode: SleepMode = "wait") -> SleepHealth:
        """Give memory back until `wake`, or until a request comes; see `ullm.config.SleepConfig`.

        Does nothing if the engine sleeps as deep already; a deeper level may follow.

        Args:
            level: 0 pauses; 1 moves weights to host memory and drops the KV cache; 2 drops weights too;
                3 ends the worker processes. Default: the configuration's.
            mode: ``wait`` for the requests in flight, ``abort`` them, or ``keep`` them until the wake.

        Raises:
            InvalidParameter: no such level or mode.
            EngineNotReady, EngineDraining, EngineDead: it does not run.
            EngineBusy: a wake or a stop overtook it.
        """
        return await self._change(
            self._lifecycle.sleep, self.config.sleep_level if level is None else level, mode
        )

    async def wake(self) -> SleepHealth:
        """Wake the engine; return when requests run again.

        Raises:
            EngineNotReady, EngineDraining, EngineDead: it does not run.
            EngineBusy: a stop overtook it.
        """
        return await self._change(self._lifecycle.wake)

    async def reload(self, model: str | None = None, revision: str | None = None) -> ReloadReport:
        """Load the model again in new workers, which take over while requests go on; none of them fails.

        From its end on, new requests get the new model's chat template and end-of-sequence tokens, too.

        Args:
            model: another place of the weights; they must have the same tokenizer.
            revision: another revision of a hub model.

        Raises:
            ReloadFailed: the new model cannot be used, or the new workers did not come up; the old ones
                serve on.
            EngineNotReady, EngineDraining, EngineDead: it does not run.
            EngineBusy: a stop overtook it.
        """
        await trio.lowlevel.checkpoint_if_cancelled()  # else a stop that it began would be the answer
        self._life.check_running()
        with self._overtaken_by_stop():
            return await self._lifecycle.reload(model, revision)

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters that are served."""
        return self._current.adapters

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> None:
        """Load a LoRA adapter into all workers and serve it under its name, while requests go on.

        An engine that sleeps is woken.

        Args:
            path: its folder, which must stay as it is: workers that are restarted read it again.
            replace: take the place of an adapter of the same name; requests in flight end with that one.

        Raises:
            AdapterUnusable: it cannot be used with this model; nothing has changed.
            InvalidParameter: the name is taken.
            EngineNotReady, EngineDraining, EngineDead: the engine does not run.
            EngineBusy: a stop overtook it.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._life.check_running()
        self.adapters.check_new(name, self.config.model_names, replace=replace)
        adapter = await self.adapters.read(name, path)
        with self._overtaken_by_stop():
            await self._lifecycle.load_adapter(adapter)

    async def unload_adapter(self, name: str) -> None:
        """Serve a LoRA adapter no more. Requests in flight end with it; its memory is free when they have.

        Raises:
            ModelUnknown: there is none of that name.
            EngineNotReady, EngineDraining, EngineDead: the engine does not run.
            EngineBusy: a stop overtook it.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._life.check_running()
        with self._overtaken_by_stop():
            await self._lifecycle.unload_adapter(name)

    def request_reload(self) -> None:
        """Begin a reload, if the engine runs and none waits already; return at once. The log says more."""
        if self.state is EngineState.RUNNING and not self._stop.requested.is_set():
            self._lifecycle.request_reload()

    async def _change(self, change: Callable[..., Awaitable[None]], *arguments: Any) -> SleepHealth:
        await trio.lowlevel.checkpoint_if_cancelled()  # else a stop that it began would be the answer
        self._life.check_running()
        with self._overtaken_by_stop():
            await change(*arguments)
        return self._lifecycle.health()

    @contextmanager
    def _overtaken_by_stop(self) -> Iterator[None]:
        """Tell a caller whose change did not complete why: the engine stops, or the actor has failed."""
        try:
            yield
        except (ActorLost, ReloadFailed) as error:
            if self.state is EngineState.RUNNING:
                failed = isinstance(error, ReloadFailed)
                raise error if failed else EngineNotReady("restarting a part of itself") from error
            raise EngineBusy(f"the engine is {self.state.value}; it was overtaken") from error

    # --- stopping ------------------------------------------------------------------------------------------

    def request_shutdown(self, timeout: float | None = None, *, by: str = "shutdown()") -> None:
        """Begin the orderly stop; return at once. Later calls can only make it sooner.

        Args:
            timeout: seconds from now until all is gone; default: the configuration's.
            by: who requests it, for the report.
        """
        self._stop.request(timeout, by)

    def expedite(self) -> None:
        """Skip the rest of the drain: end all requests now, and stop in order."""
        self._stop.hurry()

    def kill(self, signal_number: int) -> None:
        """Kill the workers, so that nothing holds up the stop; the signal becomes the exit code."""
        self._stop.force(signal_number)
        self._fleet.kill()

    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:  # noqa: ASYNC109  # a promise, not a scope
        """Stop in order, and return how it went."""
        self.request_shutdown(timeout)
        return await self.wait_stopped()

    async def wait_stop_requested(self) -> None:
        """Wait until a stop is requested, by whomever, or the engine has failed."""
        await self._stop.requested.wait()

    async def wait_stopped(self) -> ShutdownReport:
        """Wait for the end of the engine, whoever requests it."""
        return await self._stop.wait_finished()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Start the tree, be ready when it is, and supervise it until it has stopped.

        Raises:
            UllmError: it could not start; the first cause, not what wraps it.
            StartCancelled: a stop was requested before it had started.
            EngineDead: it failed beyond its restart limits, and has been stopped in order.
        """
        await self._tree.run(task_status=task_status)


@asynccontextmanager
async def open_engine(
    config: EngineConfig,
    *,
    first_children: Sequence[ChildSpec] = (),
    transport: OpenTransport | None = None,
    find_model: Callable[[EngineConfig], LocalModel] | None = None,
) -> AsyncIterator[Engine]:
    """Start an engine, and stop it in order on leaving; the arguments are those of `Engine`.

    If the engine fails beyond its restart limits, the block is cancelled and `EngineDead` raised. What the
    block itself raises comes out as it was.

    Raises:
        UllmError: it could not start; one line that names the cause and the remedy.
        StartCancelled: a stop was requested before it had started.
        EngineDead: it failed while it ran.
    """
    if config.nnodes == 1 and config.link_certfile is not None:
        raise ConfigError(
            "--link-certfile, --link-keyfile and --link-ca-file have no effect on one host without front "
            "ends; leave them out"
        )
    engine = Engine(config, first_children=first_children, transport=transport, find_model=find_model)
    async with running(engine):
        yield engine
