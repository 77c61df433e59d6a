"""`Answers`: keeps stored answers, makes those in the background, and writes durable ones to a journal."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import trio

import ullm
from ullm.config import ServerConfig
from ullm.engine.state import EngineState
from ullm.errors import ConfigError, InvalidParameter
from ullm.hub import cache_dir
from ullm.journal.journal import Journal, JournalFull, NewTokens, SavedAnswer
from ullm.logs import get_logger
from ullm.protocol.messages import TokenLogprobs
from ullm.server.api.errors import AnswerNotDurable, AnswersNotKept, AnswerUnknown, ServedChanged
from ullm.server.api.response_requests import ResponsesRequest
from ullm.server.api.types import EngineInterface
from ullm.server.stored.answer import AnswerEnd, AnswerHead, StoredAnswer
from ullm.server.stored.completion import CompletionEnd, CompletionHead, Note, StoredCompletion
from ullm.server.stored.stored import AnyStored

MAX_BYTES = 256 << 20
"""Size of a journal, and of the answers in memory."""

COMMIT_SECONDS = 0.05
"""Time over which tokens are gathered into one transaction. Those that a kill loses are computed again."""

_STOPPING = frozenset(state.value for state in EngineState if state.is_stopping)

Make = Callable[[AnyStored, Callable[[], None]], Awaitable[str]]
"""Has the engine make an answer, or go on with it; calls the function after each change, and returns how it
ended: ``stop``, or why not."""

S = TypeVar("S", bound=AnyStored)

log = get_logger(__name__)


class _Written(NamedTuple):
    """What the journal has of an answer."""

    tokens: int = 0
    notes: int = 0

    def and_also(self, new: NewTokens) -> _Written:
        return _Written(self.tokens + len(new.token_ids), self.notes + len(new.notes))


class Answers:
    """The stored answers of one server; lives as long as its engine.

    Args:
        config: how many are kept, for how long, and where the journal is.

    Raises:
        ConfigError: the journal that the configuration names cannot be used.
    """

    def __init__(self, engine: EngineInterface, config: ServerConfig) -> None:
        self._engine = engine
        self._config = config
        self._answers: OrderedDict[str, AnyStored] = OrderedDict()
        self._written: dict[str, _Written] = {}
        self._changed = trio.Event()
        self._writing = trio.Lock()
        self._make: Make | None = None
        self._prepare: Callable[[AnyStored], object]
        self._keeps = config.connect is None or config.answers_listen is not None
        self._journal = self._open_journal()
        self._recovered = trio.Event()
        if self._journal is None:
            self._recovered.set()

    def serve(self, make: Make, prepare: Callable[[AnyStored], object]) -> None:
        """Begin to go on with unfinished answers, once the engine runs; only the first call has an effect.

        Args:
            make: makes an answer.
            prepare: says how one is read.
        """
        first, self._make, self._prepare = self._make is None, make, prepare
        if first:
            self._engine.start_soon(self._run)

    # --- for handlers ----------------------------------------------------------------------------------

    async def recovered(self) -> None:
        """Wait until the answers of an earlier process are there, which takes a moment after a start."""
        await self._recovered.wait()

    async def find(self, id: str, owner: str, kind: type[S]) -> S:
        """Return an answer.

        Raises:
            AnswerUnknown: there is none of that name and kind that this owner asked for.
            AnswersNotKept: this server keeps none.
        """
        if not self._keeps:
            raise AnswersNotKept
        await self.recovered()
        self._expire()
        answer = self._answers.get(id)
        if not isinstance(answer, kind) or answer.head.owner != owner:
            raise AnswerUnknown(id)
        return answer

    def is_free(self, id: str) -> bool:
        """Return whether no answer has this name."""
        return id not in self._answers

    def add(self, answer: AnyStored) -> None:
        """Keep a new answer in memory only, until `keep` or `remove`."""
        self._answers[answer.head.id] = answer

    def as_kept(self, asked: ResponsesRequest) -> ResponsesRequest:
        """Return a request that says of itself whether its answer is stored, where none is kept.

        Raises:
            AnswersNotKept: it asks for that.
        """
        if self._keeps or asked.store is False:
            return asked
        if asked.store or asked.background:
            raise AnswersNotKept
        return msgspec.structs.replace(asked, store=False)

    async def keep(self, answer: AnyStored) -> None:
        """Keep a new answer; a durable one is in the journal when this returns.

        Raises:
            AnswerNotDurable: the journal has no room.
        """
        if self._is_durable(answer):
            saved = SavedAnswer(answer.head.id, answer.head.owner, self._expiry(answer), answer.encode_head())
            try:
                await self._write(begun=[saved])
            except JournalFull as error:
                raise AnswerNotDurable(error) from error
            self._written[answer.head.id] = _Written()
        self.add(answer)
        self._expire()

    def survives(self, answer: AnyStored) -> bool:
        """Return whether an answer is in the journal, so that it goes on without its client."""
        return answer.head.id in self._written

    async def remove(self, answer: AnyStored) -> None:
        """Forget an answer, also in the journal; one that is being made is cancelled.

        Raises:
            AnswerNotDurable: the journal cannot be written to, so it is still there.
        """
        answer.scope.cancel()
        self._answers.pop(answer.head.id, None)
        if self._written.pop(answer.head.id, None) is not None:
            try:
                await self._write(removed=[answer.head.id])
            except JournalFull as error:
                raise AnswerNotDurable(error) from error

    def start(self, answer: AnyStored) -> None:
        """Make an answer in the background."""
        self._engine.start_soon(partial(self.make, answer))

    async def make(self, answer: AnyStored) -> None:
        """Make an answer, or go on with it, until it ends, however that happens."""
        assert self._make is not None, "serve comes first"
        reason, failure = "cancelled", None
        try:
            with answer.scope:
                reason = await self._make(answer, self._note)
        except (Exception, BaseExceptionGroup) as error:
            if isinstance(error, BaseExceptionGroup) and error.subgroup(trio.Cancelled) is not None:
                raise
            reason, failure = "error", error
        finally:
            self._end(answer, reason, failure)

    def _end(self, answer: AnyStored, reason: str, failure: BaseException | None) -> None:
        engine = self._engine  # which is elsewhere, and may be stopped alone, behind a front end
        stops = engine.state is not EngineState.RUNNING or engine.health().state in _STOPPING
        unfinished = reason in ("abort", "error") or (
            reason == "cancelled" and not answer.scope.cancelled_caught
        )
        if stops and unfinished and answer.head.id in self._written:
            answer.interrupted = True  # and goes on with the next start
            answer.announce()
            return
        answer.finish(reason, failure)
        self._note()

    # --- the journal -----------------------------------------------------------------------------------

    def _open_journal(self) -> Journal | None:
        """Open the journal if it is asked for, or if there is one; else the first durable answer does."""
        path = self._journal_path()
        if path is None or (self._config.journal is None and not path.is_file()):
            return None
        try:
            return Journal(path, MAX_BYTES)
        except ConfigError as error:
            if self._config.journal is not None:
                raise
            log.warning("answers in the background will not survive this process", cause=str(error))
            return None

    def _journal_path(self) -> Path | None:
        """Return where the journal is; None on a port that the next start will not have again."""
        if not self._keeps:
            return None
        if self._config.journal is not None:
            return Path(self._config.journal).expanduser()
        if not self._config.port:
            return None
        return cache_dir() / "journal" / f"answers-{self._config.port}.sqlite"

    def _is_durable(self, answer: AnyStored) -> bool:
        wanted = answer.durability
        if wanted == "never" or (wanted == "with --journal" and self._config.journal is None):
            return False
        if self._journal is None and (path := self._journal_path()) is not None:
            try:
                self._journal = Journal(path, MAX_BYTES)
            except ConfigError as error:
                log.warning("an answer in the background will not survive this process", cause=str(error))
        return self._journal is not None

    def _note(self) -> None:
        self._changed.set()

    async def _run(self) -> None:
        """Go on with unfinished answers, and write tokens down until the engine has stopped."""
        if self._journal is not None:
            await self._recover()
        self._recovered.set()
        try:
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                await self._commit()
                await trio.sleep(COMMIT_SECONDS)
        finally:
            with trio.CancelScope(shield=True):
                await self._commit()
            if self._journal is not None:
                self._journal.close()

    async def _recover(self) -> None:
        assert self._journal is not None, "the caller has checked"
        saved = await trio.to_thread.run_sync(self._journal.load)
        unfinished = 0
        for each in saved:
            try:
                answer = _restored(each)
            except (msgspec.ValidationError, msgspec.DecodeError, InvalidParameter, ValueError) as error:
                log.warning("an answer of the journal cannot be read", answer=each.id, cause=str(error))
                continue
            self._answers[each.id] = answer
            self._prepare(answer)
            self._written[each.id] = _Written(len(each.token_ids), len(each.notes))
            now = self.served(answer.head.params.lora)
            if not answer.ended and answer.head.served != now:
                answer.finish("error", ServedChanged(answer.head.served, now))
                self._note()
            elif not answer.ended:
                unfinished += 1
                self.start(answer)
        if unfinished:
            log.info("going on with the answers of an earlier run", answers=unfinished)

    async def _commit(self) -> None:
        """Write all tokens and ends that are new; without room for them, those answers end with an error."""
        live = [
            (id, written, self._answers[id]) for id, written in self._written.items() if id in self._answers
        ]
        tokens = [
            NewTokens(id, written.tokens, answer.log[written.tokens :], answer.notes[written.notes :])
            for id, written, answer in live
            if len(answer.log) > written.tokens
        ]
        ends = [(id, each.encode_end()) for id, _, each in live if each.ended and not each.end_written]
        if not tokens and not ends:
            return
        try:
            await self._write(tokens=tokens, ended=ends)
        except JournalFull as error:
            for id in (new.id for new in tokens):
                if id not in self._written:
                    continue  # was removed meanwhile
                log.error("an answer cannot be written down; it was given up", answer=id, cause=str(error))
                answer = self._answers[id]
                del self._written[id]
                answer.finish("error", AnswerNotDurable(error))
                answer.scope.cancel()
            return
        for new in tokens:
            if (written := self._written.get(new.id)) is not None:
                self._written[new.id] = written.and_also(new)
        for id, _ in ends:
            if id in self._answers:  # else it was removed meanwhile
                self._answers[id].end_written = True

    async def _write(self, **what: Any) -> None:
        assert self._journal is not None, "only durable answers are written"
        async with self._writing:
            await trio.to_thread.run_sync(partial(self._journal.write, **what))

    # --- limits ----------------------------------------------------------------------------------------

    def served(self, lora: str | None = None) -> str:
        """Return what an answer's text depends on: the model, its arithmetic, the adapter and the release."""
        info, config = self._engine.info, self._engine.config
        dtype = "" if info is None else info.dtype
        served = f"{config.model} {config.revision or ''} {dtype} ullm {ullm.__version__}"
        if lora is None:
            return served
        found = next((each.digest for each in self._engine.adapters if each.name == lora), "not loaded")
        return f"{served} adapter {lora} {found}"

    def _expiry(self, answer: AnyStored) -> float:
        return float(answer.head.created) + 3600 * self._config.stored_answer_hours

    def _expire(self) -> None:
        """Forget the oldest answers that have ended, as far as there are too many or they are too old."""
        size = sum(answer.size for answer in self._answers.values())
        for id, answer in list(self._answers.items()):
            too_old = self._expiry(answer) < time.time()
            too_many = len(self._answers) > self._config.max_stored_answers or size > MAX_BYTES
            if answer.ended and (too_old or too_many):
                size -= answer.size
                del self._answers[id]
                if self._written.pop(id, None) is not None:
                    self._engine.start_soon(partial(self._erase, id))

    async def _erase(self, id: str) -> None:
        try:
            await self._write(removed=[id])
        except JournalFull as error:
            log.warning("an old answer is still in the journal", answer=id, cause=str(error))


def _restored(saved: SavedAnswer) -> AnyStored:
    """Return an answer from the journal.

    Raises:
        msgspec.ValidationError, msgspec.DecodeError, InvalidParameter, ValueError: it cannot be read.
    """

    def decode(data: bytes, kind: Any) -> Any:
        return msgspec.msgpack.decode(data, type=kind)

    if saved.id.startswith("resp_"):
        end = None if saved.end is None else decode(saved.end, AnswerEnd)
        scores = [decode(each, TokenLogprobs) for each in saved.notes]
        return StoredAnswer(decode(saved.head, AnswerHead), saved.token_ids, end, scores)
    end = None if saved.end is None else decode(saved.end, CompletionEnd)
    notes = [decode(each, Note) for each in saved.notes]
    return StoredCompletion(decode(saved.head, CompletionHead), saved.token_ids, end, notes)
