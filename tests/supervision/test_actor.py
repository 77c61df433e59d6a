"""Lifetimes, cleanup scopes, mailboxes, questions."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision.actor import (
    CLEANUP_FALLBACK,
    Lifetime,
    Mailbox,
    MailboxStatistics,
    Reply,
    ask,
    cleanup_scope,
    current_lifetime,
)
from ullm.supervision.errors import ActorLost, AskTimeout, MailboxClosed, MailboxFull

# --- lifetimes and cleanup -----------------------------------------------------------------------


async def test_lifetime_is_that_of_the_task_and_its_children(nursery: trio.Nursery) -> None:
    seen: list[Lifetime | None] = []

    async def look() -> None:
        seen.append(current_lifetime())

    assert current_lifetime() is None
    with Lifetime("a").running() as lifetime:
        assert current_lifetime() is lifetime
        async with trio.open_nursery() as inner:
            inner.start_soon(look)
    nursery.start_soon(look)
    await wait_all_tasks_blocked()
    assert seen == [lifetime, None]
    assert lifetime.ended


async def test_the_stop_deadline_only_moves_forward_in_urgency() -> None:
    lifetime = Lifetime("a")
    heard: list[float] = []
    with lifetime.followed_by(heard.append):
        for deadline in (math.inf, 30.0, 40.0, 20.0, 20.0):
            lifetime.tighten(deadline)
    lifetime.tighten(10.0)
    assert heard == [math.inf, 30.0, 20.0]
    assert lifetime.stop_deadline == 10.0
    with lifetime.followed_by(heard.append):
        assert heard[-1] == 10.0


async def test_end_is_told_once() -> None:
    lifetime = Lifetime("a")
    told: list[Lifetime] = []
    lifetime.call_at_end(told.append)
    lifetime.end()
    lifetime.end()
    assert told == [lifetime]


async def test_cleanup_scope_outside_of_any_actor(autojump_clock: MockClock) -> None:
    with trio.CancelScope() as outer:
        outer.cancel()
        with cleanup_scope() as scope:
            assert scope.deadline == trio.current_time() + CLEANUP_FALLBACK == trio.current_time() + 5.0
            await trio.sleep(4)  # shielded
            await trio.sleep(4)
        assert scope.cancelled_caught


async def test_cleanup_scope_of_an_actor_that_nobody_stops(autojump_clock: MockClock) -> None:
    with Lifetime("a").running(), cleanup_scope(fallback=2.0) as scope:
        assert scope.deadline == trio.current_time() + 2.0


@pytest.mark.parametrize("deadline", [0.5, 100.0, math.inf])
async def test_cleanup_scope_has_the_stop_deadline(autojump_clock: MockClock, deadline: float) -> None:
    with Lifetime("a").running() as lifetime:
        lifetime.tighten(trio.current_time() + deadline)
        with cleanup_scope() as scope:
            assert scope.deadline == trio.current_time() + deadline


async def test_cleanup_scopes_follow_the_deadline(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    with Lifetime("a").running() as lifetime:
        with cleanup_scope() as outer, cleanup_scope() as inner:
            lifetime.tighten(began + 50.0)
            assert outer.deadline == inner.deadline == began + 50.0
            lifetime.tighten(began + 10.0)
            await trio.sleep(20)
        assert trio.current_time() == began + 10.0
        lifetime.tighten(began + 1.0)
    assert outer.deadline == began + 10.0  # a closed scope is forgotten


# --- mailboxes -----------------------------------------------------------------------------------


async def test_messages_come_in_order() -> None:
    mailbox = Mailbox[int](10, "actor")
    for number in range(3):
        mailbox.send_nowait(number)
    await mailbox.send(3)
    assert [await mailbox.receive() for _ in range(3)] == [0, 1, 2]
    assert mailbox.receive_nowait() == 3
    with pytest.raises(trio.WouldBlock):
        mailbox.receive_nowait()


async def test_full_mailbox(nursery: trio.Nursery) -> None:
    mailbox = Mailbox[int](1, "actor")
    mailbox.send_nowait(1)
    with pytest.raises(MailboxFull, match="the mailbox of actor already holds 1 messages"):
        mailbox.send_nowait(2)
    nursery.start_soon(mailbox.send, 2)
    await wait_all_tasks_blocked()
    assert mailbox.statistics().waiting_senders == 1
    assert [await mailbox.receive(), await mailbox.receive()] == [1, 2]


async def test_iteration_ends_when_closed_and_empty() -> None:
    mailbox = Mailbox[str](10, "actor")
    seen: list[str] = []
    with Lifetime("actor").running():
        mailbox.send_nowait("a")
        assert mailbox.receive_nowait() == "a"
        mailbox.send_nowait("b")
        mailbox.close()
        async for message in mailbox:
            seen.append(message)
        assert seen == ["b"]
        with pytest.raises(MailboxClosed, match="the mailbox of actor is closed"):
            await mailbox.receive()
        with pytest.raises(MailboxClosed):
            mailbox.receive_nowait()


async def test_closing_wakes_everyone(nursery: trio.Nursery) -> None:
    full, empty = Mailbox[int](1, "full"), Mailbox[int](1, "empty")
    full.send_nowait(1)
    closed: list[str] = []

    async def send() -> None:
        with pytest.raises(MailboxClosed):
            await full.send(2)
        closed.append("sender")

    async def receive() -> None:
        with pytest.raises(MailboxClosed):
            await empty.receive()
        closed.append("receiver")

    nursery.start_soon(send)
    nursery.start_soon(receive)
    await wait_all_tasks_blocked()
    full.close()
    empty.close()
    await wait_all_tasks_blocked()
    assert sorted(closed) == ["receiver", "sender"]
    for mailbox in (full, empty):
        with pytest.raises(MailboxClosed):
            mailbox.send_nowait(3)
        mailbox.close()  # again


async def test_statistics_are_a_frozen_value(nursery: trio.Nursery) -> None:
    mailbox = Mailbox[int](5, "actor")
    for number in range(3):
        mailbox.send_nowait(number)
    await mailbox.receive()
    statistics = mailbox.statistics()
    assert statistics == MailboxStatistics("actor", 5, 2, 0, 0, 0, received=1, dropped=0, closed=False)
    with pytest.raises(AttributeError):
        statistics.queued = 7  # type: ignore[misc]


async def test_a_restarted_actor_goes_on_with_the_same_mailbox() -> None:
    mailbox = Mailbox[int](10, "actor")
    for number in range(4):
        mailbox.send_nowait(number)
    seen: list[tuple[str, int]] = []
    for life in ("first", "second"):
        with Lifetime(life).running():
            seen += [(life, await mailbox.receive()) for _ in range(2)]
    assert seen == [("first", 0), ("first", 1), ("second", 2), ("second", 3)]


async def test_what_nobody_will_receive_is_dropped_and_counted() -> None:
    mailbox = Mailbox[int](10, "actor")
    with Lifetime("actor").running():
        mailbox.send_nowait(1)
        await mailbox.receive()
        mailbox.send_nowait(2)
        mailbox.close()
        assert mailbox.statistics().queued == 1  # the actor may still receive it
    assert (mailbox.statistics().queued, mailbox.statistics().dropped) == (0, 1)


async def test_sending_and_receiving_costs_microseconds() -> None:
    mailbox = Mailbox[int](math.inf, "actor")
    rounds = 2000

    async def cost() -> float:
        began = time.process_time()
        for number in range(rounds):
            mailbox.send_nowait(number)
            await mailbox.receive()
        return (time.process_time() - began) / rounds

    # Some 10 µs on a slow machine; the bound is for what would be a mistake, such as a thread hop.
    assert min([await cost() for _ in range(5)]) < 100e-6


# --- questions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Square:
    number: int
    reply: Reply[int]


class Squarer:
    """An actor that squares; odd things happen at some numbers."""

    def __init__(self) -> None:
        self.mailbox = Mailbox[Square](10, "squarer")
        self.served: list[int] = []

    async def run(self) -> None:
        with Lifetime("squarer").running():
            async for question in self.mailbox:
                self.served.append(question.number)
                if question.number < 0:
                    question.reply.fail(ValueError("negative"))
                elif question.number == 13:
                    return
                elif question.number != 7:  # which it forgets to answer
                    question.reply.send(question.number**2)

    async def square(self, number: int, seconds: float = 5.0) -> int:
        return await ask(self.mailbox, lambda reply: Square(number, reply), seconds)


@pytest.fixture
async def squarer(nursery: trio.Nursery) -> Squarer:
    actor = Squarer()
    nursery.start_soon(actor.run)
    return actor


async def test_ask(squarer: Squarer) -> None:
    assert await squarer.square(3) == 9
    assert squarer.mailbox.statistics().unanswered == 0


async def test_an_answer_may_be_an_error(squarer: Squarer) -> None:
    with pytest.raises(ValueError, match="negative"):
        await squarer.square(-1)


async def test_ask_times_out(squarer: Squarer, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    with pytest.raises(AskTimeout, match=r"squarer did not answer within 2\.5 s"):
        await squarer.square(7, 2.5)
    assert trio.current_time() - began == 2.5
    assert squarer.mailbox.statistics().unanswered == 0


async def test_the_timeout_includes_the_wait_for_room(autojump_clock: MockClock) -> None:
    mailbox = Mailbox[Square](0, "nobody")
    with pytest.raises(AskTimeout):
        await ask(mailbox, lambda reply: Square(1, reply), 1.0)


async def test_ask_of_an_actor_that_ends_meanwhile(squarer: Squarer) -> None:
    with pytest.raises(ActorLost, match="squarer ended before it answered"):
        await squarer.square(13)


async def test_all_unanswered_questions_fail_when_the_actor_ends(
    squarer: Squarer, nursery: trio.Nursery
) -> None:
    lost: list[int] = []

    async def forgotten() -> None:
        with pytest.raises(ActorLost):
            await squarer.square(7)
        lost.append(7)

    for _ in range(3):
        nursery.start_soon(forgotten)
    await wait_all_tasks_blocked()
    assert squarer.mailbox.statistics().unanswered == 3
    with pytest.raises(ActorLost):
        await squarer.square(13)
    await wait_all_tasks_blocked()
    assert lost == [7, 7, 7]


async def test_a_queued_question_waits_for_the_next_incarnation(
    squarer: Squarer, nursery: trio.Nursery
) -> None:
    with pytest.raises(ActorLost):
        await squarer.square(13)
    answers: list[int] = []

    async def question() -> None:
        answers.append(await squarer.square(4))

    nursery.start_soon(question)
    await wait_all_tasks_blocked()
    assert answers == []
    nursery.start_soon(squarer.run)
    await wait_all_tasks_blocked()
    assert answers == [16]


async def test_a_queued_question_fails_when_the_actor_is_gone_for_good(
    squarer: Squarer, nursery: trio.Nursery
) -> None:
    with pytest.raises(ActorLost):
        await squarer.square(13)
    lost: list[bool] = []

    async def question() -> None:
        with pytest.raises(ActorLost):
            await squarer.square(4)
        lost.append(True)

    nursery.start_soon(question)
    await wait_all_tasks_blocked()
    squarer.mailbox.close()
    await wait_all_tasks_blocked()
    assert lost == [True]
    with pytest.raises(ActorLost, match="the mailbox of squarer is closed"):
        await squarer.square(4)


async def test_a_cancelled_asker_is_known_to_the_actor(autojump_clock: MockClock) -> None:
    mailbox = Mailbox[Square](10, "slow")
    with trio.move_on_after(1):
        await ask(mailbox, lambda reply: Square(1, reply), 100.0)
    question = mailbox.receive_nowait()
    assert question.reply.abandoned
    question.reply.send(1)  # no harm
    assert mailbox.statistics().unanswered == 0


async def test_only_the_first_answer_counts() -> None:
    reply = Reply[int]()
    assert not reply.answered
    reply.send(1)
    reply.send(2)
    reply.fail(ValueError("late"))
    assert reply.answered
    assert await reply.wait() == 1
