"""Two replicas of the real model under load: one is killed, and all are replaced."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from tests.support.server import Serve
from tests.support.streams import Stream, texts, wait_begun
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX"),
]

TOKENS = 64
STREAMS = 6
LONGEST_GAP = 6.0
"""Seconds, on a machine that other tests keep busy."""
OPTIONS = ("--dtype", "float32", "--replicas", "2", "--cpu-threads", "1", "--num-blocks", "512")


def prompts() -> list[list[int]]:
    return [[1000 + 17 * number + place for place in range(40)] for number in range(STREAMS)]


def test_one_of_two_real_replicas_is_killed_and_all_are_replaced_under_load(serve: Serve) -> None:
    server = serve(*OPTIONS)
    undisturbed = texts([Stream(server, TOKENS, prompt) for prompt in prompts()])
    running = wait_begun([Stream(server, TOKENS, prompt) for prompt in prompts()])
    server.worker(0).kill()
    assert texts(running) == undisturbed
    gap = max(stream.gap for stream in running)
    logging.getLogger(__name__).info("one of two replicas killed: longest gap %.3f s", gap)
    assert gap < LONGEST_GAP
    eventually(lambda: all(replica["up"] for replica in server.replicas()))

    stop, ended = threading.Event(), dict[int, list[Stream]]()

    def client(number: int) -> None:
        mine = ended.setdefault(number, [])
        while not stop.is_set():
            mine.append(Stream(server, TOKENS, prompts()[number]).join())

    clients = [threading.Thread(target=client, args=[number]) for number in range(STREAMS)]
    for thread in clients:
        thread.start()
    try:
        assert server.admin("POST", "/admin/reload").status_code == 200
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert [replica["replica"] for replica in server.replicas()] == [2, 3]
    for number, mine in ended.items():
        assert set(texts(mine)) == {undisturbed[number]}
    logging.getLogger(__name__).info(
        "reload under load: %d answers, 0 failures", sum(map(len, ended.values()))
    )
