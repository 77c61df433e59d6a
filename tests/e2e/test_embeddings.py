"""Vectors of a tiny model: those of transformers, whatever runs beside, and after the loss of a worker."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModel

from tests.support.server import Server, starting_servers
from ullm.config import EngineConfig
from ullm.errors import InvalidParameter
from ullm.llm import LLM
from ullm.testing import write_tiny_model

pytestmark = pytest.mark.process

PROMPTS = [[5], [5, 6, 7], [300, 17, 301, 18, 302, 19, 303], list(range(40, 140)), [*range(40, 130), 9]]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "cpu_kernels": False,
    "standby_workers": 0,
    "transport": "thread",
    "context_len": 256,
}


def expected(model: Path, pooling: str) -> list[torch.Tensor]:
    """Return what transformers computes, prompt by prompt."""
    reference = AutoModel.from_pretrained(model, dtype=torch.float32)
    vectors = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            hidden = reference(torch.tensor([prompt])).last_hidden_state[0]
            vectors.append(hidden[-1] if pooling == "last" else hidden.mean(0))
    return vectors


def furthest(found: list[list[float]], wanted: list[torch.Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(float((torch.tensor(each) - other).abs().max()) for each, other in pairs)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_vectors_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    """By ullm's own code, and by transformers' over paged attention; prompts in chunks, all at once."""
    model = write_tiny_model(tmp_path / "model", architecture)
    config = EngineConfig(model=str(model), max_num_batched_tokens=32, **OPTIONS)
    with LLM(config) as llm:
        for pooling in ("last", "mean"):
            wanted = expected(model, pooling)
            assert furthest(llm.embed(PROMPTS, pooling=pooling, normalize=False), wanted) < 1e-4
            for prompt, other in zip(PROMPTS, wanted, strict=True):
                (alone,) = llm.embed([prompt], pooling=pooling)  # also with what the prefix cache has by now
                assert math.isclose(math.hypot(*alone), 1, rel_tol=1e-5)
                assert furthest([alone], [other / other.norm()]) < 1e-4


def test_a_killed_worker_costs_a_pause(tiny_model: Path) -> None:
    options = {**OPTIONS, "transport": "process", "faults": "worker.step:crash@nth=3,times=1"}
    config = EngineConfig(model=str(tiny_model), max_num_batched_tokens=32, **options)
    with LLM(config) as llm:
        found = llm.embed(PROMPTS, pooling="mean", normalize=False)
        restarts = llm._thread.call(_restarts, llm)
    assert restarts == 1
    assert furthest(found, expected(tiny_model, "mean")) < 1e-4


async def _restarts(llm: LLM) -> int:
    engine = await llm._host.wait_ready()
    return engine.statistics().worker_restarts_total


def test_a_scripted_model_has_none(scripted_model: Path) -> None:
    scripted = {"load_format": "dummy", "runner": "ullm.testing:ScriptedRunner", "standby_workers": 0}
    with LLM(EngineConfig(model=str(scripted_model), **scripted)) as llm:  # type: ignore[arg-type]
        with pytest.raises(InvalidParameter, match="no hidden states"):
            llm.embed("hello")


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with starting_servers() as start:
        yield start("--model", str(tiny_model), "--dtype", "float32", "--standby-workers", "0")


def test_openais_client(server: Server, tiny_model: Path) -> None:
    """Which asks for base64 by itself."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model=tiny_model.name, input=PROMPTS)
        numbers = client.embeddings.create(model=tiny_model.name, input=PROMPTS, encoding_format="float")
    wanted = [vector / vector.norm() for vector in expected(tiny_model, "last")]
    assert furthest([each.embedding for each in answer.data], wanted) < 1e-4
    assert furthest([each.embedding for each in numbers.data], wanted) < 1e-4
    assert answer.usage.prompt_tokens == sum(map(len, PROMPTS))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX system")
def test_vectors_cross_the_link_to_a_front_end(tiny_model: Path) -> None:
    options = ("--model", str(tiny_model), "--dtype", "float32", "--standby-workers", "0")
    with starting_servers() as start:
        server = start(*options, "--api-server-count", "1")
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": PROMPTS, "normalize": False})
    found = [each["embedding"] for each in answer.json()["data"]]
    assert furthest(found, expected(tiny_model, "last")) < 1e-4
