"""Fixtures shared by the tests of all transports."""

from pathlib import Path

import pytest

from ullm.actors.transports import WorkerSpec
from ullm.config import EngineConfig
from ullm.protocol.messages import NewSequence, RankSpec, Ready, ScheduledSequence, Start, Step
from ullm.sampling import SamplingParams

SCRIPTED = "ullm.testing:ScriptedRunner"
GREEDY = SamplingParams(temperature=0)
PROMPT = [5, 6, 7]


@pytest.fixture(autouse=True)
def _hostile_runners_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def talk():
    return Talk


class Talk:
    """Messages that tests send, and how to wait for an answer."""

    GREEDY = GREEDY
    PROMPT = PROMPT

    @staticmethod
    def spec(runner="ScriptedRunner", rank=0):
        module = "ullm.testing" if runner == "ScriptedRunner" else "hostile_runners"
        return WorkerSpec(RankSpec(rank=rank), f"{module}:{runner}")

    @staticmethod
    def start(settings=""):
        return Start(EngineConfig(num_blocks=16), RankSpec(), f"scripted:{settings}")

    @staticmethod
    def step(step_id=0):
        """A step that repeats the same prompt, for any number."""
        new = [NewSequence(step_id, PROMPT, 3, GREEDY, [step_id % 16])]
        return Step(
            step_id, [ScheduledSequence(step_id, 0, 3, True)], new, released=[step_id - 1] if step_id else []
        )

    @staticmethod
    async def until(transport, kind):
        """The first message of a kind."""
        while not isinstance(message := await transport.receive(), kind):
            pass
        return message

    @classmethod
    async def load(cls, transport, settings=""):
        await transport.send(cls.start(settings))
        return await cls.until(transport, Ready)
