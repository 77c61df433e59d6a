"""Waiting requests of several clients run in turn."""

from __future__ import annotations

from ullm.scheduling.turns import REMEMBERED, Turns


def test_one_clients_requests_come_one_after_the_other() -> None:
    turns = Turns()
    assert [turns.take("a") for _ in range(4)] == [0, 1, 2, 3]


def test_another_client_comes_before_what_the_first_has_queued() -> None:
    turns = Turns()
    first = [("a", turns.take("a")) for _ in range(5)]
    turns.served(first[1][1])
    second = [("b", turns.take("b")) for _ in range(3)]
    waiting = sorted(first[2:] + second, key=lambda each: each[1])
    assert [client for client, _ in waiting] == ["b", "a", "b", "a", "b", "a"]


def test_absence_is_not_saved_up() -> None:
    turns = Turns()
    for _ in range(100):
        turns.served(turns.take("a"))
    assert turns.take("b") == 99  # not 0: that would be a hundred turns in a row
    assert turns.take("a") == 100


def test_clients_without_a_turn_to_come_are_forgotten() -> None:
    turns = Turns()
    for number in range(10 * REMEMBERED):
        turns.served(turns.take("busy"))
        turns.take(f"client {number}")
    assert len(turns._last) <= 2 * REMEMBERED + 1
    assert turns.take("busy") == 10 * REMEMBERED
