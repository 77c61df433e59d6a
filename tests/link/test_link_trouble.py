"""A front end and its engine: strangers, odd frames, administrators, and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

import ullm
from tests.support.engine import PROMPT, collect, tokens_of
from tests.support.linked import KEY, World, front_end, linked
from ullm.config import EngineConfig, ServerConfig
from ullm.engine.running import running
from ullm.errors import (
    ConfigError,
    EngineDead,
    EngineDraining,
    EngineNotReady,
    InvalidParameter,
    LinkRefused,
    QueueFull,
    RequestPoisoned,
)
from ullm.link import Gate, RemoteEngine, messages
from ullm.link.channel import Channel
from ullm.link.faults import to_error, to_fault
from ullm.link.messages import Admitted, Failed, Finish, Greeting, Submit, ToFrontEnd, Tokens
from ullm.link.remote_router import MAX_LOSSES, RemoteRouter
from ullm.link.secret import engine_key, proof
from ullm.protocol.frames import encode
from ullm.protocol.messages import Frame
from ullm.sampling import SamplingParams
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import TokenEvent
from ullm.testing import open_scripted_engine, write_scripted_model

GREEDY = SamplingParams(temperature=0, max_tokens=6)


# --- who may come in ------------------------------------------------------------------------------------


async def refusal(model: Path, gate_key: bytes | None, key: bytes | None) -> str:
    """What a front end says that is not let in."""
    async with trio.open_nursery() as nursery:
        world = World(model, nursery)
        world.gate_key = gate_key
        await world.start_engine()
        engine = front_end(world, key=key)
        with pytest.raises(LinkRefused) as refused, trio.fail_after(60):
            async with running(engine):
                raise AssertionError("it was let in")
        world.kill()
    return str(refused.value)


@pytest.mark.parametrize(
    ("gate_key", "key", "line"),
    [
        (KEY, KEY[::-1], "the front end does not know the engine's key"),
        (KEY, None, "the engine wants a key"),
        (None, KEY, "the engine has no key"),
    ],
)
async def test_another_key(
    clock: MockClock, model: Path, gate_key: bytes | None, key: bytes | None, line: str
) -> None:
    assert line in await refusal(model, gate_key, key)


async def test_another_version_says_so_on_both_sides(
    clock: MockClock, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_scripted_engine(model) as there, trio.open_nursery() as nursery:
        ours, theirs = memory_stream_pair()
        nursery.start_soon(Gate(there, None).serve_stream, theirs)
        channel: Channel[ToFrontEnd] = Channel(ours, ToFrontEnd)
        greeting = await channel.receive()
        assert isinstance(greeting, Greeting)
        await channel.send(messages.Login("0.0.1", b"n", b"", "old"))
        answer = await channel.receive()
    line = f"the engine is ullm {ullm.__version__}, the front end 0.0.1; install the same version on both"
    assert answer == messages.Rejected(line)
    assert any(line in str(vars(record)) for record in caplog.records)

    async def greet() -> trio.abc.Stream:
        ours, theirs = memory_stream_pair()
        await theirs.send_all(encode(Greeting("0.0.1", b"n", False)))
        return ours

    engine = RemoteEngine(EngineConfig(), _connecting(), open_stream=greet)
    with pytest.raises(LinkRefused, match=r"the engine is ullm 0\.0\.1, this front end is"):
        async with running(engine):
            raise AssertionError("it was let in")


def _connecting(**options: Any) -> ServerConfig:
    return ServerConfig(connect="unix:/in/memory", **options)


async def test_an_impostor_does_not_get_requests(clock: MockClock) -> None:
    """Somebody else listens where the engine should: without the key it cannot welcome."""

    async def open_stream() -> trio.abc.Stream:
        ours, theirs = memory_stream_pair()
        await theirs.send_all(encode(Greeting(ullm.__version__, b"n", True)))
        await theirs.send_all(encode(messages.Welcome(b"x" * 32)))
        return ours

    engine = RemoteEngine(EngineConfig(), _connecting(), open_stream=open_stream, key=KEY)
    with pytest.raises(LinkRefused, match="does not know the engine's key"):
        async with running(engine):
            raise AssertionError("it was let in")


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x00\x00\x00\x00", b""])
async def test_somebody_who_speaks_something_else_is_hung_up_on(
    clock: MockClock, model: Path, first: bytes
) -> None:
    async with open_scripted_engine(model) as there, trio.open_nursery() as nursery:
        ours, theirs = memory_stream_pair()
        nursery.start_soon(Gate(there, KEY).serve_stream, theirs)
        if first:
            await ours.send_all(first)
        with trio.fail_after(60):
            while await ours.receive_some(1 << 16):
                pass


def test_the_proof_depends_on_everything() -> None:
    proofs = {
        proof(key, side, greeting, login)
        for key in (KEY, KEY[::-1])
        for side in ("engine", "front end")
        for greeting in (b"1", b"2")
        for login in (b"1", b"2")
    }
    assert len(proofs) == 16


def test_where_the_key_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(KEY + b"\n")
    config = _connecting(engine_key_file=str(file))
    assert engine_key(config, {}) == KEY
    assert engine_key(_connecting(), {"ULLM_ENGINE_KEY": KEY.decode()}) == KEY
    assert engine_key(_connecting(), {}) is None
    with pytest.raises(ConfigError, match="5 bytes are too few for a secret; take at least 16"):
        engine_key(_connecting(), {"ULLM_ENGINE_KEY": "short"})
    with pytest.raises(ConfigError, match="No such file"):
        engine_key(_connecting(engine_key_file=str(tmp_path / "none")), {})


# --- odd frames --------------------------------------------------------------------------------------------


def a_request(router: RemoteRouter, choices: int = 1) -> list[RequestRecord]:
    numbers = [router.arrival() for _ in range(choices)]
    return [
        RequestRecord(number, "r", [1, 2], SamplingParams(seed=1), 20, number, lambda time: None)
        for number in numbers
    ]


async def test_frames_that_come_twice_or_late_change_nothing() -> None:
    router, sent = RemoteRouter(), list[Frame]()
    router.connect(sent.append)
    records = a_request(router, 2)
    submission = router.submit(records)
    first, second = (record.seq_id for record in records)
    assert isinstance(sent[0], Submit)
    for _ in range(2):
        router.take(Admitted(first))
        router.take(Tokens([TokenEvent(first, 0, [5, 6]), TokenEvent(second, 0, [8])]))
        router.take(Tokens([TokenEvent(first, 1, [6, 7], finish_reason="length")]))
        router.take(Failed(99, to_fault(EngineNotReady("x"))))
    assert records[0].token_ids == [5, 6, 7]
    assert records[1].token_ids == [8]
    assert (submission.admitted, router.live) == (True, 1)
    router.finish(second, "stop")
    router.take(Tokens([TokenEvent(second, 1, [9])]))
    assert records[1].token_ids == [8]
    assert sent[1:] == [Finish(second, "stop")]
    await router.wait_idle()


async def test_missing_tokens_are_noticed() -> None:
    router = RemoteRouter()
    router.connect(lambda message: None)
    records = a_request(router)
    router.submit(records)
    with pytest.raises(ValueError, match="missing"):
        router.take(Tokens([TokenEvent(records[0].seq_id, 2, [5])]))


async def test_a_request_that_loses_engine_after_engine_is_given_up() -> None:
    router, sent = RemoteRouter(), list[Frame]()
    router.connect(sent.append)
    (poison,), (good,) = a_request(router), a_request(router)
    router.submit([poison])
    router.submit([good])
    for loss in range(MAX_LOSSES + 1):
        assert poison.error is None
        router.take(Tokens([TokenEvent(good.seq_id, loss, [5])]))
        router.disconnect()
        router.connect(sent.append)
    assert isinstance(poison.error, RequestPoisoned)
    assert (good.error, router.live) == (None, 1)


def test_errors_keep_their_status_on_the_way() -> None:
    for error in (
        QueueFull(8, 8, retry_after=3.0),
        InvalidParameter("n: no", "n"),
        EngineDraining(),
        RequestPoisoned("r", 3),
    ):
        there = to_error(msgspec.msgpack.decode(msgspec.msgpack.encode(to_fault(error)), type=messages.Fault))
        assert type(there) is type(error)
        assert (str(there), there.status, there.code) == (str(error), error.status, error.code)
        assert getattr(there, "retry_after", None) == getattr(error, "retry_after", None)
        assert there.param == error.param
    assert isinstance(to_error(to_fault(KeyError("x"))), RuntimeError)


# --- through the link ---------------------------------------------------------------------


async def test_what_administrators_do(clock: MockClock, model: Path) -> None:
    async with linked(model) as (engine, world):
        assert (await engine.sleep(1)).state == "asleep"
        await trio.sleep(2)
        assert engine.health().sleep.state == "asleep"
        assert (await engine.wake()).state == "awake"
        report = await engine.reload()
        assert report.replicas
        assert len(tokens_of(await collect(engine, params=GREEDY))) == 6
        await engine.manage_faults("arm", "worker.step:crash@nth=1000")
        assert len((await engine.manage_faults("show")).armed) == 1
        assert not (await engine.manage_faults("clear")).armed
        with pytest.raises(ConfigError, match="nonsense"):
            await engine.manage_faults("arm", "nonsense")
        with pytest.raises(InvalidParameter, match="level"):
            await engine.sleep(9)
        await trio.sleep(2)
        assert {child.child_id for child in engine.children()} >= {"router", "lifecycle"}
        assert engine.statistics().generation_tokens_total >= 6
        engine.request_engine_shutdown()
        await world.engines[0].wait_stopped()
        await trio.sleep(1)
        with pytest.raises(EngineNotReady, match="away"):
            await engine.wake()


async def test_a_request_that_the_engine_refuses(clock: MockClock, model: Path) -> None:
    async with trio.open_nursery() as nursery:
        world = World(model, nursery)
        await world.start_engine(max_queue=1, max_bs=1)
        engine = front_end(world)
        await nursery.start(engine.run)
        async with engine.generate(PROMPT, GREEDY), engine.generate(PROMPT, GREEDY):
            with pytest.raises(QueueFull) as refused:
                await collect(engine, params=GREEDY)
            assert (refused.value.status, refused.value.retry_after) == (429, 1.0)
        assert len(tokens_of(await collect(engine, params=GREEDY))) == 6
        engine.request_shutdown()
        report = await engine.wait_stopped()
        assert (report.aborted, report.exit_code) == (0, 0)
        world.kill()


async def test_the_engine_drains_through_its_front_ends(clock: MockClock, model: Path) -> None:
    async with linked(model) as (engine, world):
        async with engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12)) as generation:
            await anext(generation)
            world.engines[0].request_shutdown(60.0)
            await trio.sleep(1)
            assert engine.health().state == "draining"
            with pytest.raises(EngineDraining):
                engine.check_admission()
            outputs = [output async for output in generation]
        assert outputs[-1].num_generated_tokens == 12
        report = await world.engines[0].wait_stopped()
        assert report.aborted == 0
        assert trio.current_time() < 30


async def test_a_front_end_drains_its_streams(clock: MockClock, model: Path) -> None:
    async with linked(model) as (engine, world):
        async with engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8)) as generation:
            await anext(generation)
            engine.request_shutdown(60.0)
            outputs = [output async for output in generation]
        assert outputs[-1].finish_reason == "length"
        assert (await engine.wait_stopped()).aborted == 0
        assert world.engines[0].state == "running"


async def test_an_engine_with_another_tokenizer_ends_what_it_cannot_go_on_with(
    clock: MockClock, model: Path, tmp_path: Path
) -> None:
    async with linked(model) as (engine, world):
        async with engine.generate(PROMPT, SamplingParams(max_tokens=50)) as generation:
            await anext(generation)
            world.kill()
            world.model = write_scripted_model(tmp_path / "other")
            file = world.model / "tokenizer.json"
            file.write_text(file.read_text() + "\n")
            await world.start_engine()
            with pytest.raises(EngineDead, match="another tokenizer"):
                async for _ in generation:
                    pass
        assert len(tokens_of(await collect(engine, params=GREEDY))) == 6


async def test_another_chat_template_ends_nothing(clock: MockClock, model: Path, tmp_path: Path) -> None:
    async with linked(model) as (engine, world):
        expected = tokens_of(await collect(engine, params=GREEDY))
        async with engine.generate(PROMPT, GREEDY) as generation:
            world.kill()
            world.model = write_scripted_model(tmp_path / "other")
            (world.model / "chat_template.jinja").write_text("changed")
            await world.start_engine()
            assert tokens_of([output async for output in generation]) == expected
        assert engine.tokenizer is not None
        assert engine.tokenizer.describe()["chat_template"] == "changed"


async def test_a_hung_engine_counts_as_lost(clock: MockClock, model: Path) -> None:
    """It takes connections, as the kernel does for a process that is suspended, and says nothing."""
    async with linked(model) as (engine, world):
        expected = tokens_of(await collect(engine, params=GREEDY))
        async with engine.generate(PROMPT, GREEDY) as generation:
            world.hang()
            with trio.fail_after(60):
                await trio.sleep(20)
                assert engine.health().state == "restarting"
                await world.start_engine()
                outputs = [output async for output in generation]
        assert tokens_of(outputs) == expected
