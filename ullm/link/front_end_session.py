"""One front end, as the engine sees it: its requests run here, and end when it has gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import trio

from ullm.engine import Engine, EngineState
from ullm.engine.current_model import CurrentModel
from ullm.errors import AdapterUnusable, ConfigError, EngineDead, LinkLost, RequestError
from ullm.hub import LocalModel
from ullm.link import tokenizer_files
from ullm.link.calls import Calls
from ullm.link.channel import Channel
from ullm.link.faults import to_fault
from ullm.link.messages import (
    Admitted,
    Alive,
    Answer,
    Call,
    Child,
    Failed,
    Finish,
    Login,
    Model,
    Pulse,
    Refused,
    Submit,
    ToEngine,
    Tokens,
)
from ullm.logs import get_logger
from ullm.protocol.messages import Frame
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import TokenEvent

PULSE_SECONDS = 1.0
"""Seconds between two pulses at most."""
LOOK_SECONDS = 0.1
"""Seconds between two looks at the engine, whose changes make a pulse at once."""
SILENCE_SECONDS = 30.0
"""Seconds without a sign of life after which a front end counts as lost: its host may have gone."""

log = get_logger(__name__)


@dataclass(eq=False)
class _Choice:
    """A choice of a request: its record, and how much of it the front end has been sent.

    Args:
        seq_id: the front end's number of it.
        base: tokens that it came with; the record has log probabilities of later ones only.
        sent: tokens that the front end has.
        scored: whether it has the log probabilities of the prompt.
    """

    seq_id: int
    record: RequestRecord
    request: _Request
    base: int
    sent: int
    scored: bool = False


@dataclass(eq=False)
class _Request:
    """A request of a front end; the engine's drain waits for its reader until `open` is empty."""

    open: set[int] = field(default_factory=set)


class FrontEndSession:
    """Serves one front end that has logged in.

    Args:
        login: what it said of itself.
    """

    def __init__(self, engine: Engine, calls: Calls, channel: Channel[ToEngine], login: Login) -> None:
        self._engine = engine
        self._intake = engine.intake
        self._calls = calls
        self._channel = channel
        self._name = login.name
        self._tokenizer = login.tokenizer
        self._choices: dict[int, _Choice] = {}
        self._dirty: dict[int, _Choice] = {}
        self._outbox: list[Frame] = []
        self._pulse: Pulse | None = None
        self._told: EngineState | None = None
        self._news = trio.Event()
        self._model: tuple[object, ...] = ()

    async def run(self) -> None:
        """Serve it until it leaves.

        Raises:
            LinkLost: it has left, maybe in a group.
        """
        log.info("front end connected", front_end=self._name)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                nursery.start_soon(self._watch_engine)
                await self._receive(nursery)
        finally:
            self._abort_all()

    # --- what it asks for ----------------------------------------------------------------------------

    async def _receive(self, nursery: trio.Nursery) -> None:
        while True:
            with trio.move_on_after(SILENCE_SECONDS) as patience:
                message = await self._channel.receive()
            if patience.cancelled_caught:
                raise LinkLost(f"no sign of life for {SILENCE_SECONDS:g} s")
            match message:
                case Submit():
                    self._submit(message)
                case Finish():
                    choice = self._choices.get(message.seq_id)
                    if choice is not None:
                        self._intake.finish(choice.record, message.reason)
                        self._close(choice)
                case Call():
                    nursery.start_soon(self._call, message)
                case Alive():
                    pass
                case _:
                    raise LinkLost(f"it sent a {type(message).__name__}, which is out of place")

    def _submit(self, submit: Submit) -> None:
        request = _Request()
        first = submit.choices[0].seq_id
        try:
            choices = [self._choice(submit, number, request) for number in range(len(submit.choices))]
            self._intake.admit([choice.record for choice in choices], resumed=submit.resumed)
        except RequestError as error:
            self._post(Refused(first, to_fault(error)))
            return
        for choice in choices:
            self._choices[choice.seq_id] = choice
            request.open.add(choice.seq_id)
        self._post(Admitted(first))

    def _choice(self, submit: Submit, number: int, request: _Request) -> _Choice:
        sent = submit.choices[number]
        adapter = self._intake.current.adapters.find(sent.params.lora)
        if adapter is not None and adapter.digest != sent.adapter_digest:
            raise AdapterUnusable(f"adapter {adapter.name!r} is another one by now; send the request again")
        arrival = self._intake.arrival()
        record = RequestRecord(
            seq_id=arrival,
            request_id=submit.request_id,
            prompt_token_ids=submit.prompt_token_ids,
            params=sent.params,
            max_total=sent.max_total,
            arrival=arrival,
            notify=partial(self._note, sent.seq_id),
            grammar=sent.grammar,
            adapter=adapter,
            client=submit.client,
            session=submit.session,
            token_ids=list(sent.token_ids),
        )
        known = len(sent.token_ids)
        return _Choice(sent.seq_id, record, request, known, known, scored=known > 0)

    async def _call(self, call: Call) -> None:
        try:
            answer = Answer(call.number, await self._calls.carry_out(call.method, call.arguments))
        except Exception as error:
            if not isinstance(error, RequestError | ConfigError):
                log.error("a call of a front end failed", method=call.method, exc_info=True)
            answer = Answer(call.number, None, to_fault(error))
        self._post(answer)

    # --- what it is told -------------------------------------------------------------------------------

    def _note(self, seq_id: int, time: float) -> None:
        """Note that a record has changed; called by the router."""
        choice = self._choices.get(seq_id)
        if choice is not None:
            self._dirty[seq_id] = choice
            self._news.set()

    def _post(self, message: Frame) -> None:
        self._outbox.append(message)
        self._news.set()

    async def _send(self) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            messages, self._outbox = self._outbox, []
            if self._engine.state is not self._told:  # before the requests that end by it
                self._beat()
            if self._pulse is not None:
                messages.append(self._pulse)
                self._pulse = None
            ended = self._collect(messages)
            await self._channel.send(*messages)
            for choice in ended:
                self._close(choice)

    def _collect(self, messages: list[Frame]) -> list[_Choice]:
        """Add what is new in all choices; return those that have ended with it."""
        dirty, self._dirty = list(self._dirty.values()), {}
        events: list[TokenEvent] = []
        ended: list[_Choice] = []
        for choice in dirty:
            error = choice.record.error
            if isinstance(error, EngineDead):
                continue  # the connection ends with the engine, and the next engine goes on
            if error is not None:
                messages.append(Failed(choice.seq_id, to_fault(error)))
                ended.append(choice)
            elif (event := _news_of(choice)) is not None:
                events.append(event)
                if choice.record.done:
                    ended.append(choice)
        if events:
            messages.append(Tokens(events))
        return ended

    async def _watch_engine(self) -> None:
        """Tell the front end of a change at once, and that all is well from time to time."""
        told, due = None, 0.0
        while True:
            await self._tell_model()
            health = self._engine.health()
            state = (health.state, health.ready, health.sleep.state, str(self._engine.state))
            if state != told or trio.current_time() >= due:
                told, due = state, trio.current_time() + PULSE_SECONDS
                self._beat()
                self._news.set()
            await trio.sleep(LOOK_SECONDS)

    def _beat(self) -> None:
        """Have the next frame say how the engine is."""
        engine = self._engine
        self._told = engine.state
        statistics = None if engine.info is None else engine.statistics()
        children = [Child.of(info) for info in engine.children()]
        self._pulse = Pulse(str(engine.state), engine.health(), statistics, children)

    async def _tell_model(self) -> None:
        """Send what requests get from now on, if the engine runs and that has changed."""
        current = self._intake.current
        local, info = current.local, current.info
        known = (current.config, local, info, *current.adapters)
        if (
            self._engine.state is not EngineState.RUNNING
            or local is None
            or info is None
            or self._model == known
        ):
            return
        files = await trio.to_thread.run_sync(tokenizer_files.read, local.tokenizer_path)
        message = _model(current, local, files)
        if message.tokenizer == self._tokenizer:
            message = _without_files(message)
        self._model, self._tokenizer = known, message.tokenizer
        self._post(message)

    # --- the end -----------------------------------------------------------------------------------------

    def _close(self, choice: _Choice) -> None:
        if self._choices.pop(choice.seq_id, None) is None:
            return
        self._dirty.pop(choice.seq_id, None)
        choice.request.open.discard(choice.seq_id)
        if not choice.request.open:
            self._intake.leave()

    def _abort_all(self) -> None:
        running = list(self._choices.values())
        for choice in running:
            self._intake.finish(choice.record, "abort")
            self._close(choice)
        log.info("front end left", front_end=self._name, aborted=len(running))


def _news_of(choice: _Choice) -> TokenEvent | None:
    """Return what a front end does not have of a choice yet, and count it as sent."""
    record, sent = choice.record, choice.sent
    new = record.token_ids[sent:]
    if not new and not record.done:
        return None
    start = sent - choice.base
    scores = record.logprobs[start : start + len(new)] if record.params.logprobs is not None else None
    prompt = None if choice.scored else record.prompt_logprobs
    choice.sent, choice.scored = sent + len(new), True
    return TokenEvent(
        seq_id=choice.seq_id,
        index=sent,
        token_ids=new,
        logprobs=scores,
        prompt_logprobs=prompt,
        finish_reason=record.finish_reason,
        stop_reason=record.stop_reason,
        num_cached_tokens=record.num_cached_tokens,
        embedding=record.embedding,
    )


def _model(current: CurrentModel, local: LocalModel, files: dict[str, bytes]) -> Model:
    assert current.info is not None, "the caller has checked"
    in_text = local.special_tokens_in_text
    name = tokenizer_files.digest(files, local.chat_template, special_tokens_in_text=in_text)
    return Model(
        current.config,
        current.info,
        current.sampling_defaults,
        name,
        files,
        local.chat_template,
        in_text,
        list(current.adapters),
    )


def _without_files(model: Model) -> Model:
    return Model(
        model.config,
        model.info,
        model.defaults,
        model.tokenizer,
        None,
        model.chat_template,
        model.special_tokens_in_text,
        model.adapters,
    )
