"""What cannot be sent to a worker costs its sender only: no lost worker, no restart, no missing step."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import Open, collect, tokens_of
from ullm.errors import RequestTooLarge
from ullm.protocol import frames
from ullm.protocol.messages import Step
from ullm.sampling import SamplingParams


def forged(**fields: Any) -> SamplingParams:
    """Make parameters with values that their own checks would refuse."""
    params = SamplingParams(temperature=0, max_tokens=4)
    for name, value in fields.items():
        object.__setattr__(params, name, value)
    return params


@pytest.mark.parametrize(
    "params",
    [
        forged(logit_bias={5: object()}),
        forged(top_k=2**70),
        forged(repetition_penalty="\ud800"),
        forged(stop_token_ids=tuple(range(300))),  # too many for the frames of this test
    ],
)
async def test_what_no_frame_carries_fails_alone(
    clock: MockClock, opened: Open, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    async with opened() as (engine, workers):
        expected = tokens_of(await collect(engine))
        monkeypatch.setattr(frames, "MAX_FRAME", 1200)
        beside: list[int] = []

        async def neighbour() -> None:
            beside.extend(tokens_of(await collect(engine)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbour)
            await trio.sleep(2.5)
            with pytest.raises(RequestTooLarge, match="cannot be sent to a worker"):
                await collect(engine, params=params)
        assert beside == expected
        assert engine.statistics().worker_restarts_total == 0
        assert engine.statistics().kv_blocks_used == 0
        (worker,) = workers.started
        numbers = [message.step_id for message in worker.received if isinstance(message, Step)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        for message in worker.received:
            if isinstance(message, Step):
                frames.encode(message)
