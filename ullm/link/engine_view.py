"""What a front end knows of its engine: what that told last, and since when it is silent."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import trio

from ullm.actors.tokenizer import TokenizerActor
from ullm.config import ServerConfig
from ullm.engine.current_model import CurrentModel
from ullm.engine.life import EngineLife
from ullm.engine.lifecycle import AWAKE
from ullm.engine.state import EngineState
from ullm.engine.status import EngineStatistics, Health, SleepHealth
from ullm.errors import EngineDead, EngineDraining, EngineNotReady, EngineSleeping, UllmError
from ullm.link import tokenizer_files
from ullm.link.messages import Model, Pulse
from ullm.link.remote_router import RemoteRouter
from ullm.logs import get_logger
from ullm.supervision import ChildInfo

_NOTHING = EngineStatistics(0, 0, 0, 0, 0, 0, 0, 0, 0, {}, 0, 0, 0)
TOKENS = "tokenizer.json"
"""The file that says which token means what; a chat template may change beneath running requests."""
AWAY = "the engine is away; requests wait for it"

log = get_logger(__name__)


class EngineSeen:
    """Takes what the engine says of itself, and decides by it whether requests are taken.

    Args:
        current: what new requests get; filled in here.
        server_config: for how long requests wait for an engine that is away, and how many.

    Attributes:
        first_model: set when an engine has run for the first time.
    """

    def __init__(
        self, life: EngineLife, current: CurrentModel, router: RemoteRouter, server_config: ServerConfig
    ) -> None:
        self._life = life
        self._current = current
        self._router = router
        self._patience = server_config.engine_timeout
        self._max_waiting = server_config.max_waiting
        self._own = current.config
        self._pulse: Pulse | None = None
        self._runs = False
        self._away_since = trio.current_time()
        self._given_up = False
        self._digest = ""
        self._tokens = b""
        self.first_model = trio.Event()
        self.changed = trio.Event()

    # --- what it hears -----------------------------------------------------------------------------------

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer's files that are known; empty for none."""
        return self._digest

    async def take_model(self, model: Model) -> None:
        """Give new requests what the engine has now; those of another tokenizer cannot go on."""
        if model.tokenizer != self._digest:
            await self._take_tokenizer(model)
        own = self._own
        self._current.config = replace(
            model.config,
            shutdown_timeout=own.shutdown_timeout,
            log_level=own.log_level,
            log_format=own.log_format,
            faults="",
        )
        self._current.sampling_defaults = model.defaults
        self._current.adapters.replace_all(model.adapters)
        self._current.serve(model.info)
        self._runs, self._given_up = True, False
        self.first_model.set()
        self._announce()

    async def _take_tokenizer(self, model: Model) -> None:
        assert model.files is not None, "the engine sends files that a front end does not have"
        folder = await trio.to_thread.run_sync(tokenizer_files.keep, model.tokenizer, model.files)
        local = tokenizer_files.local_model(
            model.config.model_name,
            folder,
            model.chat_template,
            special_tokens_in_text=model.special_tokens_in_text,
        )
        before, self._tokens = self._tokens, model.files.get(TOKENS, b"")
        if self._current.tokenizer is None:
            self._current.tokenizer = TokenizerActor(local)  # loads when it runs
        else:
            loaded = TokenizerActor(local)
            await trio.to_thread.run_sync(loaded.load)
            if self._tokens != before:
                self._end_all()
            self._current.tokenizer.take_over(loaded)
        self._digest = model.tokenizer

    def _end_all(self) -> None:
        """End requests whose tokens the engine would take for others."""
        cause = "the engine was started again with another tokenizer; send the request again"
        ended = self._router.fail_all(lambda: EngineDead(cause))
        log.warning("the engine has another tokenizer now", requests_ended=ended)

    def take_pulse(self, pulse: Pulse) -> None:
        """Remember what the engine is like."""
        self._pulse = pulse
        self._announce()

    def take_loss(self) -> None:
        """Note that the engine is gone."""
        if self._runs:
            self._away_since = trio.current_time()
        self._runs = False
        self._announce()

    async def watch_absence(self) -> None:
        """Give up waiting for an engine that stays away: end what waits, and take nothing new."""
        while True:
            changed = self.changed
            if self._runs or self._given_up or not self.first_model.is_set():
                await changed.wait()
                continue
            with trio.move_on_at(self._away_since + self._patience):
                await changed.wait()
            if not self._runs and trio.current_time() >= self._away_since + self._patience:
                self._given_up = True
                ended = self._router.fail_all(self._absent)
                log.error("the engine stays away; requests are refused", requests_ended=ended)

    def _announce(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    def _absent(self) -> UllmError:
        return EngineNotReady(f"away for more than {self._patience:g} s")

    # --- what follows from it ----------------------------------------------------------------------------

    def check(self) -> None:
        """Return if a request would be taken now; only the engine's answer is binding.

        Raises:
            EngineDead, EngineNotReady, EngineDraining, EngineSleeping
        """
        self._life.check_running()
        if self._runs:
            self._check_engine()
        elif self._given_up:
            raise self._absent()
        elif self._router.live >= self._max_waiting:
            raise EngineNotReady(f"away, and {self._router.live} requests wait for it (--max-waiting)")

    def _check_engine(self) -> None:
        pulse = self._pulse
        if pulse is None:
            return
        if pulse.state not in (EngineState.STARTING, EngineState.RUNNING):
            raise EngineDraining(pulse.state)
        if not pulse.health.sleep.registered:
            raise EngineSleeping

    def check_connected(self) -> None:
        """Return if there is an engine at the other end.

        Raises:
            EngineNotReady: there is none.
        """
        if not self._runs:
            raise EngineNotReady("away")

    @property
    def sleep_state(self) -> str:
        """Whether the engine sleeps; see `SleepHealth`."""
        return AWAKE if self._pulse is None or not self._runs else self._pulse.health.sleep.state

    def health(self) -> Health:
        """Return what the probes answer."""
        life, pulse = self._life, self._pulse
        if life.state is EngineState.RUNNING and self._runs and pulse is not None:
            return pulse.health
        if life.state is EngineState.RUNNING:
            state, detail = "restarting", AWAY if not self._given_up else str(self._absent())
        else:
            state, detail = life.state.value, life.failure or life.state.value
            if life.state is EngineState.STARTING and pulse is not None:
                detail = f"the engine is {pulse.state}"
        return Health(
            state=state,
            live=life.failure is None,
            ready=False,
            detail=detail,
            replicas=[]
            if pulse is None
            else [msgspec.structs.replace(replica, up=False) for replica in pulse.health.replicas],
            sleep=SleepHealth() if pulse is None else pulse.health.sleep,
        )

    def statistics(self) -> EngineStatistics:
        """Return the engine's counts as they were last."""
        return _NOTHING if self._pulse is None or self._pulse.statistics is None else self._pulse.statistics

    def children(self) -> tuple[ChildInfo, ...]:
        """Return the engine's tree as it was last."""
        return () if self._pulse is None else tuple(child.info() for child in self._pulse.children)
