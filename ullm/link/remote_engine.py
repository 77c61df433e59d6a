"""An engine in another process, as a front end's HTTP surface sees it."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import msgspec
import trio

from ullm.actors.tokenizer import TokenizerActor
from ullm.config import EngineConfig, ServerConfig, SleepMode
from ullm.engine.adapters import Adapters
from ullm.engine.current_model import CurrentModel
from ullm.engine.life import EngineLife
from ullm.engine.readers import Readers
from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.engine.shutdown_report import ShutdownReport
from ullm.engine.state import EngineState
from ullm.engine.status import EngineStatistics, Health, ReloadReport, SleepHealth
from ullm.engine.stop import EngineStop
from ullm.errors import ConfigError
from ullm.faults import FaultAction, FaultPlan, FaultReport
from ullm.link.address import Address
from ullm.link.connection import Connection, OpenStream
from ullm.link.engine_view import EngineSeen
from ullm.link.front_end_tree import FrontEndTree
from ullm.link.remote_generation import RemoteAdmission, RemoteGeneration
from ullm.link.remote_router import RemoteRouter
from ullm.link.secret import engine_key
from ullm.protocol.messages import Adapter, ModelInfo
from ullm.sampling import SamplingParams
from ullm.supervision import ChildInfo, ChildSpec
from ullm.tls.link_tls import link_tls

T = TypeVar("T")


def _opener(address: Address, config: EngineConfig) -> OpenStream:
    """Return what connects to an engine: through TLS, if that is configured and there is a network."""
    tls = link_tls(config)
    if tls is None or address.is_unix:
        return address.connect

    async def connect() -> trio.abc.Stream:
        return await tls.connect(await address.connect(), address.host)

    return connect


class RemoteEngine:
    """The façade of an engine at the other end of a link; has what the HTTP surface and a host use of one.

    It lives and stops as a front end: its drain waits for its own streams, and the engine goes on.

    Args:
        config: the front end's own; of it count the shutdown timeout and the log level, the rest comes from
            the engine.
        server_config: where the engine is, and how long requests wait for it.
        first_children: children that start before all others and stop after them, such as the HTTP server.
        open_stream: connects to the engine, instead of ``server_config.connect``.
        key: shared with the engine; default: as configured.

    Raises:
        ConfigError: no address, or a key that cannot be used.
    """

    def __init__(
        self,
        config: EngineConfig,
        server_config: ServerConfig,
        *,
        first_children: Sequence[ChildSpec] = (),
        open_stream: OpenStream | None = None,
        key: bytes | None = None,
    ) -> None:
        where = server_config.connect or ""
        if open_stream is None:
            open_stream = _opener(Address.parse("--connect", where), config)
        self._life = EngineLife()
        self._current = CurrentModel(config)
        self._router = RemoteRouter()
        self._seen = EngineSeen(self._life, self._current, self._router, server_config)
        self._connection = Connection(
            where, open_stream, key or engine_key(server_config), self._router, self._seen
        )
        self._readers = Readers()
        self._stop = EngineStop(self._current, self._life, self._router, self._readers)
        self._tree = FrontEndTree(
            self._life, self._current, self._seen, self._connection, self._stop, first_children, self
        )

    # --- the model -------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """The engine's configuration, with this process's own shutdown timeout and log level."""
        return self._current.config

    @property
    def model_name(self) -> str:
        """The name that the API shows."""
        return self._current.config.model_name

    @property
    def info(self) -> ModelInfo | None:
        """Facts about the loaded model; None before an engine has run."""
        return self._current.info if self._life.started else None

    @property
    def tokenizer(self) -> TokenizerActor | None:
        """The tokenizer, which runs in this process; None before an engine has run."""
        return self._current.tokenizer if self._life.started else None

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """What the model recommends for requests that name no sampling parameters."""
        return self._current.sampling_defaults

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters that the engine serves."""
        return self._current.adapters

    # --- requests ----------------------------------------------------------------------------------

    def check_admission(self) -> None:
        """Return if a request would be taken now, as far as is known here.

        Raises:
            EngineDead, EngineNotReady, EngineDraining, EngineSleeping
        """
        self._seen.check()

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
    ) -> RemoteGeneration:
        """Make a request; as `Engine.generate`. Losses of the engine are pauses of its outputs."""
        self._seen.check()
        name = request_id or f"req-{uuid.uuid4().hex}"
        admission = RemoteAdmission(self._seen, self._router, self._readers)
        return RemoteGeneration(
            admission, self._router, self._current, prompt, params, name, pace, client, emitted, session
        )

    def start_soon(self, task: Callable[[], Awaitable[object]]) -> None:
        """Run a task in this process until it stops; an error of it is logged."""
        self._tree.start_soon(task)

    def answering(self) -> AbstractContextManager[None]:
        """Have the drain of a stop wait for this block: an answer that is made elsewhere."""
        return self._readers.reading()

    # --- what is inside ------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """The state of this front end; only goes forward."""
        return self._life.state

    @property
    def report(self) -> ShutdownReport | None:
        """How the stop of this front end went; None until it is gone."""
        return self._stop.report

    def health(self) -> Health:
        """Return what the probes answer: this front end's stop, the engine's absence, or the engine's own."""
        return self._seen.health()

    def statistics(self) -> EngineStatistics:
        """Return the engine's counts as it told them last, at most a second ago while it lives."""
        return self._seen.statistics()

    def children(self) -> tuple[ChildInfo, ...]:
        """Return the engine's supervision tree as it told it last."""
        return self._seen.children()

    # --- what administrators do --------------------------------------------------------------------------

    async def sleep(self, level: int | None = None, mode: SleepMode = "wait") -> SleepHealth:
        """See `Engine.sleep`; also EngineNotReady if the engine is away or lost meanwhile."""
        return await self._call(SleepHealth, "sleep", level=level, mode=mode)

    async def wake(self) -> SleepHealth:
        """See `Engine.wake`."""
        return await self._call(SleepHealth, "wake")

    async def reload(self, model: str | None = None, revision: str | None = None) -> ReloadReport:
        """See `Engine.reload`."""
        return await self._call(ReloadReport, "reload", model=model, revision=revision)

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> None:
        """See `Engine.load_adapter`; the folder is on the engine's host."""
        found = await self._call(list[Adapter], "load_adapter", name=name, path=path, replace=replace)
        self.adapters.replace_all(found)

    async def unload_adapter(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        self.adapters.replace_all(await self._call(list[Adapter], "unload_adapter", name=name))

    @property
    def http_faults(self) -> None:
        """Return None: the plan of faults is the engine's, in its own process."""

    async def manage_faults(self, action: FaultAction, plan: str = "") -> FaultReport:
        """See `Engine.manage_faults`.

        Raises:
            ConfigError: as there; a fault between server and client cannot happen in the engine's process.
        """
        found = FaultPlan.parse(plan).faults if action == "arm" else ()
        if any(fault.point.startswith("http.") for fault in found):
            raise ConfigError(
                "--faults: http.* cannot happen here: these front ends are apart from the engine"
            )
        return await self._call(FaultReport, "manage_faults", action=action, plan=plan)

    def request_reload(self) -> None:
        """Begin a reload of the engine, if it is there; return at once."""
        self._post("request_reload")

    def request_engine_shutdown(self, timeout: float | None = None) -> None:
        """Begin the orderly stop of the engine, which drains through all front ends; return at once.

        Args:
            timeout: seconds until all of the engine is gone; default: this process's own.

        Raises:
            EngineNotReady: it is away.
        """
        self._seen.check_connected()
        seconds = self.config.shutdown_timeout if timeout is None else timeout
        self._post("shutdown", timeout=seconds, by="admin")

    async def _call(self, result: type[T], method: str, **arguments: Any) -> T:
        return msgspec.convert(await self._connection.call(method, **arguments), result, strict=False)

    def _post(self, method: str, **arguments: Any) -> None:
        self._connection.post_call(method, arguments)

    # --- stopping this front end --------------------------------------------------------------------------

    def request_shutdown(self, timeout: float | None = None, *, by: str = "shutdown()") -> None:
        """Begin the orderly stop of this front end; return at once. Later calls can only make it sooner."""
        self._stop.request(timeout, by)

    def expedite(self) -> None:
        """Skip the rest of the drain: end all requests of this front end now, and stop in order."""
        self._stop.hurry()

    def kill(self, signal_number: int) -> None:
        """Note the signal that cuts the stop short; there are no workers here."""
        self._stop.force(signal_number)

    async def wait_running(self) -> None:
        """Wait until requests are taken, or no longer."""
        await self._life.cell.wait_for(EngineState.RUNNING)

    async def wait_stop_requested(self) -> None:
        """Wait until a stop is requested, or this front end has failed."""
        await self._stop.requested.wait()

    async def wait_stopped(self) -> ShutdownReport:
        """Wait for the end of this front end, whoever requests it."""
        return await self._stop.wait_finished()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until stopped; ready when an engine runs at the other end.

        Raises:
            LinkRefused: the engine does not let this front end in.
            StartCancelled: a stop was requested before an engine had come.
            EngineDead: a part of this front end failed again and again.
        """
        await self._tree.run(task_status=task_status)
