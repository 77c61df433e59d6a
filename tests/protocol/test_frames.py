"""Frames: any message, cut anywhere, comes out whole; anything else is refused."""

import gc
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullm.config import EngineConfig
from ullm.errors import FrameBroken
from ullm.protocol import frames
from ullm.protocol.frames import FrameReader, encode
from ullm.protocol.messages import (
    Adapter,
    AdapterKept,
    Asleep,
    Awake,
    BlocksExported,
    BlocksImported,
    ExportBlocks,
    Failed,
    FromWorker,
    ImportBlocks,
    Inject,
    KeepAdapter,
    ModelInfo,
    NewSequence,
    NotUnderstood,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Progress,
    RankSpec,
    Ready,
    Sampled,
    ScheduledSequence,
    SharedMemory,
    Sleep,
    Start,
    Step,
    StepResult,
    Stop,
    Stopped,
    TokenLogprobs,
    ToWorker,
    Wake,
)
from ullm.sampling import SamplingParams
from ullm.scheduling.sequence import TokenEvent

PARAMS = SamplingParams(seed=-3, stop=("a", "é"), logit_bias={5: -1.5}, logprobs=2, max_tokens=4)
ADAPTER = Adapter("sql", "/adapters/sql", "00ff", 3)
TO_WORKER = [
    Start(EngineConfig(model="m", device_ids=(0, 1), cpu_threads=2), RankSpec(rank=1, epoch=3), "/models/m"),
    Step(
        7,
        [
            ScheduledSequence(1, 0, 3, True),
            ScheduledSequence(2, 5, 1, False, [9]),
            ScheduledSequence(3, 5, 2, True, [], [8]),
        ],
        [NewSequence(1, [1, 2, 3], 2, PARAMS, [4], 0, adapter=ADAPTER)],
        [8],
    ),
    Ping(2**40),
    Stop(1.5),
    Prepare(EngineConfig(model="m"), RankSpec(), "/models/m"),
    Sleep(2),
    Wake(),
    KeepAdapter(ADAPTER, wanted=True),
    ExportBlocks(1, [3, 4], "00ff", SharedMemory("/proc/1/fd/7", "ullm-kv-1")),
    ImportBlocks(2, [5], "00ff", 3, 1 << 31, None, b"abc"),
    Inject("hang", 0.5),
]
LOGPROBS = TokenLogprobs(3, -0.5, 1, [(3, -0.5), (4, -2.0)])
INFO = ModelInfo("LlamaForCausalLM", 10, 1000, (1, 2), 4096, 8, 16, "float32", "cpu")
FROM_WORKER = [
    Ready(INFO, {"load": 0.5}),
    Progress("load", 3.0),
    StepResult(7, [Sampled(1, [3], [LOGPROBS], [LOGPROBS]), Sampled(2, [])], 0.01),
    Pong(1),
    Prepared({"import": 0.5}),
    Asleep({"kv_cache": 1 << 40}, 0.1),
    Awake(INFO, {"load": 0.5}),
    Failed("OutOfMemory", "no room", "Traceback …"),
    NotUnderstood("what?"),
    AdapterKept(3, "is broken"),
    BlocksExported(1, 3, 1 << 31, b"abc"),
    BlocksImported(2, "no room", no_memory=True),
    Stopped({"kv": 0.1}),
]


def read_all(reader):
    messages = []
    while (message := reader.next()) is not None:
        messages.append(message)
    return messages


@pytest.mark.parametrize(("language", "messages"), [(ToWorker, TO_WORKER), (FromWorker, FROM_WORKER)])
@given(data=st.data())
def test_messages_survive_any_cut(language, messages, data):
    stream = b"".join(map(encode, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    reader, received = FrameReader(language), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:end])
        received += read_all(reader)
    assert received == messages


def test_every_message_is_covered():
    assert {type(message) for message in TO_WORKER} == set(ToWorker.__args__)
    assert {type(message) for message in FROM_WORKER} == set(FromWorker.__args__)


def test_message_of_unknown_type_is_told_from_garbage():
    reader = FrameReader(ToWorker)
    reader.feed(encode(Pong(1)) + encode(Ping(2)))
    unknown, known = read_all(reader)
    assert isinstance(unknown, NotUnderstood)
    assert "Pong" in unknown.detail
    assert known == Ping(2)


def test_message_with_a_value_of_a_wrong_type():
    reader = FrameReader(ToWorker)
    body = msgspec.msgpack.encode(["Ping", "one"])
    reader.feed(struct.pack("<I", len(body)) + body)
    assert "Expected `int`, got `str`" in reader.next().detail


def test_message_that_its_own_checks_refuse():
    reader = FrameReader(ToWorker)
    body = encode(TO_WORKER[0])[4:].replace(b"\xacmax_restarts\x03", b"\xacmax_restarts\xff")
    reader.feed(struct.pack("<I", len(body)) + body)
    assert "--max-restarts must be at least 0" in reader.next().detail


def test_garbage_is_broken():
    reader = FrameReader(ToWorker)
    reader.feed(b"\x02\x00\x00\x00\xc1\xc1")
    with pytest.raises(FrameBroken, match="not msgpack"):
        reader.next()


def test_text_on_the_pipe_is_broken_by_its_length():
    reader = FrameReader(ToWorker)
    reader.feed(b"Traceback (most recent call last)")
    with pytest.raises(FrameBroken, match="frame of 1667330644 bytes"):
        reader.next()


def test_too_long_message_is_refused_by_its_sender(monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME", 100)
    with pytest.raises(FrameBroken, match="NotUnderstood of "):
        encode(NotUnderstood("x" * 100))


@pytest.mark.parametrize("value", [2**70, "\ud800", object()])
def test_a_value_that_no_frame_carries_is_refused_by_its_sender(value):
    with pytest.raises(FrameBroken, match="NotUnderstood that cannot be encoded"):
        encode(NotUnderstood(value))


@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_are_broken(data):
    reader = FrameReader(FromWorker)
    reader.feed(data)
    try:
        for message in read_all(reader):
            assert isinstance(message, FromWorker)
    except FrameBroken:
        pass


def test_values_of_a_step_are_not_tracked_by_the_garbage_collector():
    """Each step has thousands of them, and traversing them triggers full collections."""
    result = StepResult(1, [Sampled(number, [number]) for number in range(3)])
    reader: FrameReader[FromWorker] = FrameReader(FromWorker)
    reader.feed(encode(result))
    decoded = reader.next()
    assert decoded == result
    step = Step(1, [ScheduledSequence(1, 0, 1, sample=True)])
    assert not any(map(gc.is_tracked, [decoded, *decoded.sampled, step, *step.scheduled]))
    assert not gc.is_tracked(TokenEvent(1, 0, [5]))
