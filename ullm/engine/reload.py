"""Reloading: new replicas take the places of the old ones, and their model becomes the current one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from ullm.actors.router import Router
from ullm.actors.tokenizer import TokenizerActor
from ullm.config import EngineConfig
from ullm.engine.current_model import CurrentModel, FindModel
from ullm.engine.fleet import Fleet
from ullm.engine.replica import Replica
from ullm.engine.sampling_defaults import read_sampling_defaults
from ullm.engine.status import ReloadReport
from ullm.errors import (
    ActorLost,
    AdapterUnusable,
    InvalidParameter,
    ModelFileBroken,
    ReloadFailed,
    StartFailed,
    SupervisionError,
    UllmError,
    first_cause,
)
from ullm.faults import FaultInjector
from ullm.hub import LocalModel
from ullm.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class _Candidate:
    """A model that may become the current one; its files have been read."""

    config: EngineConfig
    local: LocalModel
    tokenizer: TokenizerActor


class Reloader:
    """Replaces the replicas by new ones with another model, while requests go on.

    Args:
        faults: faults to inject at the point ``engine.reload``.

    Attributes:
        counts: ``succeeded`` and ``failed`` → reloads.
    """

    def __init__(
        self,
        current: CurrentModel,
        router: Router,
        fleet: Fleet,
        find_model: FindModel,
        faults: FaultInjector,
    ) -> None:
        self.counts = {"succeeded": 0, "failed": 0}
        self._current = current
        self._router = router
        self._fleet = fleet
        self._find_model = find_model
        self._faults = faults

    def check(self, model: str | None, revision: str | None) -> None:
        """Return if a reload of this model makes sense.

        Raises:
            InvalidParameter: a local path has no revisions.
        """
        if revision is not None and os.path.exists(model or self._current.config.model):
            raise InvalidParameter("revision is for models of a hub; this one is a local path", "revision")

    async def reload(self, model: str | None, revision: str | None, began: float) -> ReloadReport:
        """Replace all workers by new ones that have loaded the model again, while requests go on.

        From its end on, new requests get all of the new model: weights, chat template, end-of-sequence
        tokens.

        Args:
            began: when the reload was begun, in trio's time.

        Raises:
            ReloadFailed: the new model cannot be used, or the new workers did not come up; the old ones serve
                on.
        """
        try:
            await self._faults.at("engine.reload")
            candidate = await self._locate(model, revision)
            log.info("reloading", model=str(candidate.local.path))
            moved = await self._replace_all(candidate)
        except ActorLost:  # the engine stops meanwhile
            raise
        except (UllmError, SupervisionError) as error:
            self.counts["failed"] += 1
            cause = first_cause(error)
            log.error("reload failed; the old workers serve on", cause=str(cause))
            raise ReloadFailed(f"the model is not reloaded, the old workers serve on: {cause}") from error
        self.counts["succeeded"] += 1
        seconds = trio.current_time() - began
        path = str(candidate.local.path)
        log.info("reloaded", model=path, seconds=round(seconds, 3), moved=moved)
        indices = [replica.index for replica in self._fleet.replicas]
        return ReloadReport(path, candidate.config.revision, indices, seconds, moved)

    async def _locate(self, model: str | None, revision: str | None) -> _Candidate:
        """Find the new model and read its files, except for the weights.

        Raises:
            ReloadFailed: its tokens are not those of the current model.
            UllmError: it is nowhere, or a file is broken, its chat template included.
        """
        current = self._current
        assert current.local is not None, "a running engine knows its model's files"
        config = replace(
            current.config,
            model=model or current.config.model,
            revision=revision or (None if model else current.config.revision),
            served_model_name=current.config.model_names,
        )
        local = await trio.to_thread.run_sync(self._find_model, config)
        digests = [await trio.to_thread.run_sync(_tokenizer_digest, each) for each in (current.local, local)]
        if digests[0] != digests[1]:
            raise ReloadFailed(f"{local.path} has another tokenizer; requests in flight could not go on")
        read_sampling_defaults(config, local)
        tokenizer = TokenizerActor(local)
        await trio.to_thread.run_sync(partial(tokenizer.load, strict=True))
        if (
            current.tokenizer is not None
            and current.tokenizer.has_chat_template > tokenizer.has_chat_template
        ):
            log.warning("the new model has no chat template; chats will be refused", model=str(local.path))
        return _Candidate(config, local, tokenizer)

    async def _replace_all(self, candidate: _Candidate) -> int:
        """Replace all replicas by new ones, or none: the old ones serve until the last new one is up.

        Returns:
            Requests that were moved from old replicas to new ones.

        Raises:
            StartFailed: a new one did not come up; the old ones serve on.
        """
        fleet, old = self._fleet, list(self._fleet.replicas)
        new = await self._start_beside(old, candidate)
        fleet.replicas[:] = new
        info = fleet.replicas[0].group.info
        self._current.replace(candidate.config, candidate.local, candidate.tokenizer, info)
        for replica in new:
            self._router.retire(replica.index, retired=False)
        moved = await self._retire(old)
        fleet.prepare_standbys()
        return moved

    async def _start_beside(self, old: Sequence[Replica], candidate: _Candidate) -> list[Replica]:
        """Start a new replica for each old one; they get no requests yet.

        Where memory does not hold both, an old one sleeps as soon as its new one starts; its requests go on
        with those that are awake, or wait.

        Raises:
            StartFailed, AdapterUnusable: one did not come up, or cannot use an adapter that is served; those
                that did are stopped, and the old ones are awake.
        """
        new: list[Replica] = []
        swap = self._needs_swap()
        try:
            for each in old:
                new.append(self._make_for(each, candidate))
                if swap and each.failure is None:
                    await each.scheduler.pause(1).reached.wait()
                await self._fleet.start(new[-1])
                await self._fleet.wait_settled(new[-1])
            for each in new:
                if each.failure is not None:
                    raise StartFailed(f"replica{each.index}", each.failure)
            for adapter in self._current.adapters:
                await self._fleet.keep_adapter(adapter, new)
        except (StartFailed, AdapterUnusable):
            for former, each in zip(old, new, strict=False):
                await self._take_back(former, each, swap=swap)
            raise
        return new

    def _make_for(self, old: Replica, candidate: _Candidate) -> Replica:
        new = self._fleet.make(old.slot, candidate.config)
        local = candidate.local
        new.group.load_from(str(local.path), self._fleet.tuning, str(local.tokenizer_path))
        new.group.continue_after(old.group)
        self._router.retire(new.index)
        return new

    async def _take_back(self, old: Replica, new: Replica, *, swap: bool) -> None:
        await self._fleet.stop_if_started(new)
        old.group.continue_after(new.group)
        if swap:
            old.scheduler.resume()

    async def _retire(self, old: Sequence[Replica]) -> int:
        """Stop replicas when their requests have ended, or time is up; return how many had not ended."""
        for each in old:
            self._router.retire(each.index)
        with trio.move_on_after(self._current.config.shutdown_timeout):
            while any(self._router.load(each.index) for each in old):
                await self._router.wait_changed()
        moved = sum(self._router.load(each.index) for each in old)
        for each in old:
            await self._router.hand_over(each.index)
        for each in old:
            if each.failure is None:
                await each.scheduler.pause(0).reached.wait()  # the step in flight ends, or is known to hang
            await self._fleet.stop(each)
            self._fleet.former_restarts += each.group.restarts
        return moved

    def _needs_swap(self) -> bool:
        """Whether memory cannot hold old and new workers at once: a GPU is filled with KV by design."""
        infos = [replica.group.info for replica in self._fleet.replicas]
        return any(info is not None and info.device.startswith("cuda") for info in infos)


def _tokenizer_digest(local: LocalModel) -> str:
    """Return the digest of the file that maps text to tokens; a GGUF file is its own.

    Raises:
        ModelFileBroken: the file cannot be read.
    """
    path = Path(local.tokenizer_path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return hashlib.blake2b(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelFileBroken(file, f"cannot be read: {error.strerror or error}") from None
