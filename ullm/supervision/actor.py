"""The parts of an actor: a lifetime with a stop deadline, a bounded mailbox, questions with answers.

An actor is an async function that a supervisor runs in a task. The supervisor opens its `Lifetime`,
which the actor's own code never needs to see: `cleanup_scope` takes the stop deadline from it, and
`Mailbox` learns from it that the receiver has ended. A mailbox may outlive its actor: a restarted actor
goes on with the messages that are still queued. Longer than 300 lines, so that actors need one module only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import trio

from ullm.supervision.errors import ActorLost, AskTimeout, MailboxClosed, MailboxFull

T = TypeVar("T")
R = TypeVar("R")

CLEANUP_FALLBACK = 5.0
"""Seconds for cleanup where no stop deadline is set."""


class Lifetime:
    """One life of an actor, from its start to its end; a restarted actor has a new one.

    Tasks that the actor starts share it, because a task inherits its parent's context variables.

    Args:
        name: the actor's name, for error messages.

    Attributes:
        parent: that of the actor whose supervisor runs this one; None for the outermost.
        task: the actor's own task, while it runs.
        holds_up_siblings: whether its supervisor starts no other child before it is ready.
        state: returns the actor's state, see `publish_state`.
    """

    __slots__ = (
        "_at_end",
        "_followers",
        "ended",
        "holds_up_siblings",
        "name",
        "parent",
        "state",
        "stop_deadline",
        "task",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.parent = _lifetime.get()
        self.task: trio.lowlevel.Task | None = None
        self.holds_up_siblings = False
        self.state: Callable[[], Any] | None = None
        self.ended = False
        self.stop_deadline: float | None = None
        self._followers: set[Callable[[float], None]] | None = None
        self._at_end: set[Callable[[Lifetime], None]] | None = None

    @contextmanager
    def running(self) -> Iterator[Lifetime]:
        """Make this the current task's lifetime; leaving the block ends it."""
        token = _lifetime.set(self)
        self.task = trio.lowlevel.current_task()
        try:
            yield self
        finally:
            _lifetime.reset(token)
            self.end()

    def tighten(self, deadline: float) -> None:
        """Set the stop deadline, in trio's time, or move it to an earlier time; a later one is ignored."""
        if self.stop_deadline is not None and deadline >= self.stop_deadline:
            return
        self.stop_deadline = deadline
        for follower in tuple(self._followers or ()):
            follower(deadline)

    @contextmanager
    def followed_by(self, callback: Callable[[float], None]) -> Iterator[None]:
        """Within this block, call ``callback`` with the stop deadline, now if it is set, and as it moves."""
        if self._followers is None:
            self._followers = set()
        self._followers.add(callback)
        if self.stop_deadline is not None:
            callback(self.stop_deadline)
        try:
            yield
        finally:
            self._followers.discard(callback)

    def call_at_end(self, callback: Callable[[Lifetime], None]) -> None:
        """Call ``callback`` once when the actor has ended; it must not raise."""
        if self._at_end is None:
            self._at_end = set()
        self._at_end.add(callback)

    def end(self) -> None:
        """Mark the actor as ended. A second call does nothing."""
        self.ended = True
        self.parent = self.task = self.state = None
        callbacks, self._at_end = self._at_end, None
        for callback in callbacks or ():
            callback(self)


_lifetime: ContextVar[Lifetime | None] = ContextVar("lifetime", default=None)


def current_lifetime() -> Lifetime | None:
    """Return the lifetime of the actor that the current task belongs to; None outside of any."""
    return _lifetime.get()


def publish_state(read: Callable[[], Any]) -> None:
    """Let `Supervisor.get_state` read the state of the actor that the current task belongs to.

    Args:
        read: returns the state; called in the reader's task, so it must be quick and change nothing.

    Raises:
        RuntimeError: the task belongs to no actor.
    """
    lifetime = _lifetime.get()
    if lifetime is None:
        raise RuntimeError("publish_state must be called within a supervised child")
    lifetime.state = read


@contextmanager
def cleanup_scope(fallback: float = CLEANUP_FALLBACK) -> Iterator[trio.CancelScope]:
    """Open a shielded scope for an actor's cleanup, in which it can await although it is cancelled.

    The scope's deadline is the actor's stop deadline, and follows it when it moves. Where no stop
    deadline is set, it is ``fallback`` seconds from now.

    Example::

        try:
            await serve(connection)
        finally:
            with cleanup_scope():
                await connection.send(GOODBYE)
    """
    with trio.CancelScope(shield=True, deadline=trio.current_time() + fallback) as scope:
        lifetime = _lifetime.get()
        if lifetime is None:
            yield scope
            return

        def follow(deadline: float) -> None:
            scope.deadline = deadline

        with lifetime.followed_by(follow):
            yield scope


class Reply(Generic[R]):
    """The place for an actor's answer to one question; it travels in the message that asks."""

    __slots__ = ("_answered", "_error", "_unanswered", "_value", "abandoned")

    def __init__(self) -> None:
        self._answered = trio.Event()
        self._unanswered: set[Reply[Any]] | None = None
        self._error: BaseException | None = None
        self._value: R | None = None
        self.abandoned = False
        """Whether the asker no longer waits; an answer is then ignored."""

    @property
    def answered(self) -> bool:
        """Whether there is an answer, a value or an error."""
        return self._answered.is_set()

    def send(self, value: R) -> None:
        """Answer. Only the first answer counts."""
        if not self.answered:
            self._value = value
            self._settle()

    def fail(self, error: BaseException) -> None:
        """Answer with an exception, which `ask` raises. Only the first answer counts."""
        if not self.answered:
            self._error = error
            self._settle()

    async def wait(self) -> R:
        """Wait for the answer and return it.

        Raises:
            ActorLost: the actor ended before it answered.
            BaseException: the error that the actor passed to `fail`.
        """
        await self._answered.wait()
        if self._error is not None:
            raise self._error
        return cast(R, self._value)

    def _settle(self) -> None:
        self._answered.set()
        if self._unanswered is not None:
            self._unanswered.discard(self)


class _Question:
    """A queued message whose sender waits for an answer."""

    __slots__ = ("message", "reply")

    def __init__(self, message: object, reply: Reply[Any]) -> None:
        self.message = message
        self.reply = reply


@dataclass(frozen=True)
class MailboxStatistics:
    """The state of a mailbox.

    Args:
        capacity: maximum number of queued messages.
        queued: messages sent and not yet received.
        waiting_senders: tasks in `Mailbox.send` because it is full.
        waiting_receivers: tasks in `Mailbox.receive` because it is empty.
        unanswered: questions that were received and wait for their answer.
        received: messages taken out since the mailbox was made.
        dropped: messages that were still queued when the mailbox was closed and its receiver had ended.
        closed: whether it takes no more messages.
    """

    name: str
    capacity: float
    queued: int
    waiting_senders: int
    waiting_receivers: int
    unanswered: int
    received: int
    dropped: int
    closed: bool


class Mailbox(Generic[T]):
    """A bounded queue of messages to one actor.

    Args:
        capacity: maximum number of queued messages; ``math.inf`` for no bound.
        name: the actor's name, for error messages.
    """

    def __init__(self, capacity: float, name: str) -> None:
        self.name = name
        self._sender, self._receiver = trio.open_memory_channel[T | _Question](capacity)
        self._receivers: dict[Lifetime | None, set[Reply[Any]]] = {}
        self._closed = False
        self._received = 0
        self._dropped = 0

    async def send(self, message: T) -> None:
        """Queue a message; wait while the mailbox is full.

        Raises:
            MailboxClosed: the mailbox is closed, or was closed meanwhile.
        """
        await self._put(message)

    def send_nowait(self, message: T) -> None:
        """Queue a message without waiting.

        Raises:
            MailboxFull: there is no room.
            MailboxClosed: the mailbox is closed.
        """
        try:
            self._sender.send_nowait(message)
        except trio.WouldBlock:
            capacity = self._sender.statistics().max_buffer_size
            raise MailboxFull(f"the mailbox of {self.name} already holds {capacity} messages") from None
        except trio.ClosedResourceError:
            raise self._closed_error() from None

    async def receive(self) -> T:
        """Wait for the next message and return it.

        Raises:
            MailboxClosed: the mailbox is closed and empty.
        """
        self._register()
        try:
            return self._take(await self._receiver.receive())
        except trio.EndOfChannel:
            raise self._closed_error() from None

    def receive_nowait(self) -> T:
        """Return the next message without waiting.

        Raises:
            trio.WouldBlock: there is none.
            MailboxClosed: the mailbox is closed and empty.
        """
        self._register()
        try:
            return self._take(self._receiver.receive_nowait())
        except trio.EndOfChannel:
            raise self._closed_error() from None

    def __aiter__(self) -> Mailbox[T]:
        """Iterate over messages as they come, until the mailbox is closed and empty."""
        return self

    async def __anext__(self) -> T:
        """Return the next message."""
        try:
            return await self.receive()
        except MailboxClosed:
            raise StopAsyncIteration from None

    def close(self) -> None:
        """Take no more messages. Those that are queued can still be received while the actor lives."""
        self._closed = True
        self._sender.close()
        if not self._receivers:
            self._drop_queued()

    def statistics(self) -> MailboxStatistics:
        """Return the state of the mailbox as a frozen value."""
        inside = self._receiver.statistics()
        return MailboxStatistics(
            name=self.name,
            capacity=inside.max_buffer_size,
            queued=inside.current_buffer_used,
            waiting_senders=inside.tasks_waiting_send,
            waiting_receivers=inside.tasks_waiting_receive,
            unanswered=sum(map(len, self._receivers.values())),
            received=self._received,
            dropped=self._dropped,
            closed=self._closed,
        )

    async def _put(self, item: T | _Question) -> None:
        try:
            await self._sender.send(item)
        except trio.ClosedResourceError:
            raise self._closed_error() from None

    def _register(self) -> None:
        """Remember the receiver, so that its askers learn when it ends."""
        lifetime = _lifetime.get()
        if lifetime not in self._receivers:
            self._receivers[lifetime] = set()
            if lifetime is not None:
                lifetime.call_at_end(self._receiver_ended)

    def _take(self, item: T | _Question) -> T:
        self._received += 1
        if not isinstance(item, _Question):
            return item
        unanswered = self._receivers.get(_lifetime.get())
        if unanswered is not None and not item.reply.answered and not item.reply.abandoned:
            item.reply._unanswered = unanswered
            unanswered.add(item.reply)
        return cast(T, item.message)

    def _receiver_ended(self, lifetime: Lifetime) -> None:
        for reply in tuple(self._receivers.pop(lifetime)):
            reply.fail(ActorLost(f"{self.name} ended before it answered"))
        if self._closed and not self._receivers:
            self._drop_queued()

    def _drop_queued(self) -> None:
        """Drop the queued messages, which nobody will receive, and fail the questions among them."""
        while True:
            try:
                item = self._receiver.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                return
            self._dropped += 1
            if isinstance(item, _Question):
                item.reply.fail(ActorLost(f"{self.name} ended before it answered"))

    def _closed_error(self) -> MailboxClosed:
        return MailboxClosed(f"the mailbox of {self.name} is closed")


async def ask(
    mailbox: Mailbox[T],
    make_message: Callable[[Reply[R]], T],
    timeout: float,  # noqa: ASYNC109 (the error names the actor, which the caller's scope could not)
) -> R:
    """Send a question, wait for the answer and return it.

    Args:
        make_message: builds the message around the `Reply` that the actor answers to.
        timeout: seconds for queueing and answering together.

    Raises:
        AskTimeout: no answer came in time.
        ActorLost: the actor ended before it answered, or its mailbox is closed.
    """
    reply: Reply[R] = Reply()
    try:
        with trio.move_on_after(timeout):
            await mailbox._put(_Question(make_message(reply), reply))
            return await reply.wait()
    except MailboxClosed as error:
        raise ActorLost(str(error)) from None
    finally:
        reply.abandoned = True
        reply._settle()
    raise AskTimeout(f"{mailbox.name} did not answer within {timeout:g} s")
