"""The messages between an engine and its front ends, as frames; see `ullm.protocol.frames`.

The first four open a connection and keep their form, so that versions which differ can still say so.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ullm.config import EngineConfig
from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.engine.status import EngineStatistics, Health
from ullm.protocol.messages import Adapter, Frame, ModelInfo
from ullm.sampling import SamplingParams
from ullm.scheduling.sequence import FinishReason, TokenEvent
from ullm.supervision import ChildInfo, ChildStatus, Kind, Restart

# --- opening a connection: the engine greets, the front end logs in, the engine welcomes or rejects it ----


class Greeting(Frame, frozen=True):
    """The engine's first frame.

    Args:
        version: of ullm; a front end has the same one.
        nonce: random bytes that the front end's proof depends on.
        needs_key: whether the engine lets in only those that know its key.
    """

    version: str
    nonce: bytes
    needs_key: bool


class Login(Frame, frozen=True):
    """The front end's first frame.

    Args:
        nonce: random bytes that the engine's proof depends on.
        proof: that it knows the key; empty without one. See `ullm.link.secret`.
        name: for the engine's log.
        tokenizer: digest of the tokenizer's files that it has; empty for none.
    """

    version: str
    nonce: bytes
    proof: bytes
    name: str
    tokenizer: str = ""


class Welcome(Frame, frozen=True):
    """The front end is let in.

    Args:
        proof: that the engine knows the key, too.
    """

    proof: bytes


class Rejected(Frame, frozen=True):
    """The front end is not let in, and the connection ends.

    Args:
        reason: one line that names the remedy.
    """

    reason: str


# --- to the engine ---------------------------------------------------------------------------------------


class Choice(Frame, frozen=True):
    """One choice of a request: all that it takes to run it, from its start or from where it was.

    Args:
        seq_id: the front end's number, unique in its life.
        params: with ``seed`` set and ``n`` 1.
        max_total: tokens of prompt and output together at which it ends.
        grammar: what constrains its tokens; empty if nothing does.
        token_ids: tokens that it has already.
        adapter_digest: digest of the adapter that ``params`` name, as the front end knows it.
    """

    seq_id: int
    params: SamplingParams
    max_total: int
    grammar: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    adapter_digest: str = ""


class Submit(Frame, frozen=True):
    """Run a request; answered by `Admitted` or `Refused`, and then by `Tokens`.

    Args:
        request_id: shown to the client.
        prompt_token_ids: of all choices.
        client: who sent it, as far as turns are concerned.
        session: see `Engine.generate`.
        resumed: an engine had admitted it before, or the front end while there was no engine; limits of
            requests do not concern it.
    """

    request_id: str
    prompt_token_ids: list[int]
    choices: list[Choice]
    client: str = ""
    session: str = ""
    resumed: bool = False


class Finish(Frame, frozen=True):
    """End a choice early; unknown ones are ignored, because its last tokens may be on their way."""

    seq_id: int
    reason: FinishReason


class Call(Frame, frozen=True):
    """Have the engine do something; answered by `Answer`.

    Args:
        number: unique on this connection.
        method: one of `ullm.link.calls`.
    """

    number: int
    method: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)


class Alive(Frame, frozen=True):
    """A sign of life of a front end."""


ToEngine = Login | Submit | Finish | Call | Alive


# --- to a front end --------------------------------------------------------------------------------------


class Model(Frame, frozen=True):
    """What requests get from now on; the first one says that the engine runs.

    Args:
        config: the engine's.
        tokenizer: digest of the tokenizer's files.
        files: those files, path → content; None if the front end has them.
        chat_template: the text of ``--chat-template``.
        adapters: LoRA adapters that are served beside it.
    """

    config: EngineConfig
    info: ModelInfo
    defaults: SamplingDefaults
    tokenizer: str
    files: dict[str, bytes] | None
    chat_template: str | None
    special_tokens_in_text: bool
    adapters: list[Adapter] = msgspec.field(default_factory=list)


class Child(msgspec.Struct, frozen=True):
    """`ChildInfo` without the values that only its own process can have."""

    child_id: str
    status: ChildStatus
    kind: Kind
    restart: Restart
    significant: bool
    restarts: int
    children: list[Child] = []

    @classmethod
    def of(cls, info: ChildInfo) -> Child:
        """Return a child as a message."""
        children = [cls.of(child) for child in info.children]
        return cls(
            info.child_id, info.status, info.kind, info.restart, info.significant, info.restarts, children
        )

    def info(self) -> ChildInfo:
        """Return it as the API shows it."""
        children = tuple(child.info() for child in self.children)
        return ChildInfo(
            self.child_id,
            self.status,
            self.kind,
            self.restart,
            self.significant,
            self.restarts,
            None,
            children,
        )


class Pulse(Frame, frozen=True):
    """A sign of life, with what the engine shows of itself.

    Args:
        state: the engine's; see `EngineState`.
        statistics: None before the first model is loaded.
    """

    state: str
    health: Health
    statistics: EngineStatistics | None
    children: list[Child]


class Fault(Frame, frozen=True):
    """An error that concerns one request.

    Args:
        kind: name of its class, if possible one of `ullm.errors`.
        message: its text, one line.
        param: the request's field at fault.
        retry_after: seconds, where the error has them.
    """

    kind: str
    message: str
    param: str | None = None
    retry_after: float | None = None


class Admitted(Frame, frozen=True):
    """The request runs or waits in the engine.

    Args:
        seq_id: of its first choice.
    """

    seq_id: int


class Refused(Frame, frozen=True):
    """The request is not taken.

    Args:
        seq_id: of its first choice.
    """

    seq_id: int
    error: Fault


class Tokens(Frame, frozen=True):
    """What is new in choices since the last such message: of one step, or of several."""

    events: list[TokenEvent]


class Failed(Frame, frozen=True):
    """A choice has failed."""

    seq_id: int
    error: Fault


class Answer(Frame, frozen=True):
    """The answer to a `Call`.

    Args:
        result: None also for an error.
    """

    number: int
    result: Any = None
    error: Fault | None = None


ToFrontEnd = Greeting | Welcome | Rejected | Model | Pulse | Admitted | Refused | Tokens | Failed | Answer
