"""Draining before Hypercorn stops, with a stand-in for Hypercorn's module."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import signal
import sys
import types
from typing import Any

import pytest
import trio

from ullm.hosting.hypercorn import DrainFirst, asyncio_either, trio_either


class ShutdownError(Exception):
    """As Hypercorn's."""


async def raise_shutdown(trigger: Any) -> None:
    await trigger()
    raise ShutdownError


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("stand_in")
    module.raise_shutdown = raise_shutdown  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    return module


class Drain:
    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> None:
        self.count += 1


async def test_the_trigger_drains_first(module: Any) -> None:
    drain, triggered, signalled = Drain(), trio.Event(), trio.Event()
    with DrainFirst("stand_in", drain, signalled.wait, trio_either, signalled.set):
        assert module.raise_shutdown is not raise_shutdown
        triggered.set()
        with pytest.raises(ShutdownError):
            await module.raise_shutdown(triggered.wait)
    assert drain.count == 1
    assert module.raise_shutdown is raise_shutdown


async def test_a_signal_drains_and_a_second_one_means_nothing(module: Any) -> None:
    drain, signalled = Drain(), trio.Event()
    before = signal.getsignal(signal.SIGTERM)
    with DrainFirst("stand_in", drain, signalled.wait, trio_either, signalled.set):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(ShutdownError):
            await module.raise_shutdown(trio.sleep_forever)
    assert drain.count == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_same_on_asyncio(module: Any) -> None:
    async def main() -> None:
        signalled = asyncio.Event()

        async def wait() -> None:
            await signalled.wait()

        with DrainFirst("stand_in", drain, wait, asyncio_either, signalled.set):
            signalled.set()
            with pytest.raises(ShutdownError):
                await module.raise_shutdown(asyncio.Event().wait)

    drain = Drain()
    asyncio.run(main())
    assert drain.count == 1


async def test_an_ignored_signal_stays_ignored(module: Any) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with DrainFirst("stand_in", Drain(), trio.sleep_forever, trio_either, lambda: None):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


async def test_a_hypercorn_that_cannot_be_made_to_drain(
    module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    del module.raise_shutdown
    before = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ullm").propagate = True
    with caplog.at_level(logging.WARNING, "ullm.hosting.hypercorn"):
        with DrainFirst("stand_in", Drain(), trio.sleep_forever, trio_either, lambda: None):
            assert signal.getsignal(signal.SIGTERM) is before
    assert "--graceful-timeout" in caplog.text


@pytest.mark.parametrize("name", ["hypercorn.trio.run", "hypercorn.asyncio.run"])
def test_the_installed_hypercorn_has_the_private_name_that_is_replaced(name: str) -> None:
    """If this fails after an upgrade, `ullm.hosting.hypercorn` has to be adapted to the new release."""
    module = importlib.import_module(name)
    function = getattr(module, "raise_shutdown", None)
    assert inspect.iscoroutinefunction(function), f"{name} has no coroutine function raise_shutdown"
    assert len(inspect.signature(function).parameters) == 1, "it takes the trigger to wait for"
    assert "raise_shutdown" in module.worker_serve.__code__.co_names, (
        "worker_serve looks it up when it is called"
    )
    assert "raise ShutdownError" in inspect.getsource(function), "it ends the server by an exception"


async def test_another_server_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with DrainFirst("no.such.module", Drain(), trio.sleep_forever, trio_either, lambda: None):
        assert signal.getsignal(signal.SIGTERM) is before
