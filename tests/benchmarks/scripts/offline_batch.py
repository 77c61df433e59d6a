"""One engine's turn, run as ``PYTHON offline_batch.py ENGINE MODEL JOB RESULT``.

It runs in the engine's own Python, so it needs nothing but that engine. JOB is a JSON file with ``runs``
(name → list of ``prompt``, ``max_tokens``), ``warm_up`` (such a list), ``temperature``, ``longest``,
``device`` and ``options``, which are the engine's own. RESULT is written at the end: the seconds of each run,
and a digest of the tokens that it generated. Exit status 3: the engine cannot be imported, and the last line
says why.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

MISSING = 3

OfflineRequest = dict[str, Any]
TokenIds = list[list[int]]
"""The generated tokens of each request, in the requests' order."""


class OfflineEngine(Protocol):
    """A loaded engine."""

    version: str
    device: str

    def run(self, asks: Sequence[OfflineRequest]) -> TokenIds:
        """Generate for all requests at once."""

    def close(self) -> None:
        """Release all resources."""


class Ullm:
    """ullm's `LLM`; ``options`` are the fields of its ``EngineConfig``."""

    def __init__(self, model: str, job: dict[str, Any]) -> None:
        import asyncio

        import msgspec

        import ullm
        from ullm.config import EngineConfig

        self.version = ullm.__version__
        self._temperature = job["temperature"]
        self._make = ullm.SamplingParams
        self._llm = ullm.LLM(msgspec.convert(job["options"], EngineConfig))
        asyncio.run(self._llm.ready())
        self.device: str = self._llm.config.device

    def run(self, asks: Sequence[OfflineRequest]) -> TokenIds:
        params = [
            self._make(temperature=self._temperature, max_tokens=ask["max_tokens"], ignore_eos=True)
            for ask in asks
        ]
        answers = self._llm.generate_sync([ask["prompt"] for ask in asks], params)
        return [choice.token_ids for choices in answers for choice in choices]

    def close(self) -> None:
        self._llm.shutdown()


class Vllm:
    """vLLM's offline ``LLM``; ``options`` are its keyword arguments."""

    def __init__(self, model: str, job: dict[str, Any]) -> None:
        import vllm

        self.version, self.device = vllm.__version__, "its own choice"
        self._temperature, self._params = job["temperature"], vllm.SamplingParams
        wanted = {
            "dtype": "bfloat16",
            "max_model_len": job["longest"],
            "max_num_seqs": widest(job),
            **job["options"],
        }
        self._llm: Any = vllm.LLM(model=model, **wanted)

    def run(self, asks: Sequence[OfflineRequest]) -> TokenIds:
        params = [
            self._params(
                temperature=self._temperature, max_tokens=ask["max_tokens"], ignore_eos=True, detokenize=False
            )
            for ask in asks
        ]
        prompts = [{"prompt_token_ids": ask["prompt"]} for ask in asks]
        answers = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def close(self) -> None:
        del self._llm


class NanoVllm:
    """nano-vllm's ``LLM``; ``options`` are its keyword arguments. It has no greedy decoding."""

    def __init__(self, model: str, job: dict[str, Any]) -> None:
        from importlib import metadata

        import nanovllm

        self.version, self.device = metadata.version("nano-vllm"), "cuda"
        self._temperature, self._params = max(job["temperature"], 1e-5), nanovllm.SamplingParams
        wanted = {
            "max_model_len": job["longest"],
            "max_num_seqs": widest(job),
            "max_num_batched_tokens": max(16384, job["longest"]),
            **job["options"],
        }
        self._llm: Any = nanovllm.LLM(model, **wanted)

    def run(self, asks: Sequence[OfflineRequest]) -> TokenIds:
        params = [
            self._params(temperature=self._temperature, max_tokens=ask["max_tokens"], ignore_eos=True)
            for ask in asks
        ]
        answers = self._llm.generate([ask["prompt"] for ask in asks], params, use_tqdm=False)
        return [answer["token_ids"] for answer in answers]

    def close(self) -> None:
        del self._llm  # it ends its workers when the interpreter does


class Transformers:
    """transformers' continuous batching, as ``generate_batch`` uses it, with a length for each request.

    ``options`` are fields of its ``ContinuousBatchingConfig``, and ``attn_implementation`` of the model.
    """

    def __init__(self, model: str, job: dict[str, Any]) -> None:
        import torch
        import transformers

        self.version = transformers.__version__
        self.device = job["device"]
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        options = dict(job["options"])
        loaded = {"attn_implementation": options.pop("attn_implementation", None)}
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, **{key: value for key, value in loaded.items() if value}
        ).to(self.device)
        sampling = {"do_sample": True, "temperature": job["temperature"]} if job["temperature"] else {}
        settings = {"eos_token_id": -1, "max_new_tokens": job["longest"], **sampling}
        generation: Any = transformers.GenerationConfig.from_dict(settings)
        batching = transformers.ContinuousBatchingConfig(**{"max_requests_per_batch": widest(job), **options})
        self._manager: Any = self._model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self._manager.warmup()
        self._manager.start()

    def run(self, asks: Sequence[OfflineRequest]) -> TokenIds:
        names = [self._manager.add_request(ask["prompt"], max_new_tokens=ask["max_tokens"]) for ask in asks]
        tokens: dict[str, list[int]] = {}
        while len(tokens) < len(asks):
            answer = self._manager.get_result(timeout=1)
            if answer is None and not self._manager.is_running():
                raise RuntimeError("the thread of transformers' continuous batching has ended")
            if answer is not None and answer.is_finished():
                tokens[answer.request_id] = answer.generated_tokens
        return [tokens[name] for name in names]

    def close(self) -> None:
        self._manager.stop(block=True)


class OpenVino:
    """OpenVINO GenAI's continuous batching on the CPU, which reads a GGUF file itself.

    ``options`` are fields of its ``SchedulerConfig``, and ``properties`` of the device.
    """

    def __init__(self, model: str, job: dict[str, Any]) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.version, self.device = openvino_genai.__version__, "CPU"
        options = dict(job["options"])
        properties = options.pop("properties", {})
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = widest(job)
        for name, value in options.items():
            setattr(scheduler, name, value)
        self._tensor: Callable[[list[int]], Any] = lambda ids: openvino.Tensor(
            numpy.array([ids], dtype=numpy.int64)
        )
        self._settings = openvino_genai.GenerationConfig
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, self.device, properties
        )

    def run(self, asks: Sequence[OfflineRequest]) -> TokenIds:
        settings = [self._greedy(ask["max_tokens"]) for ask in asks]
        answers = self._pipeline.generate([self._tensor(ask["prompt"]) for ask in asks], settings)
        return [list(answer.m_generation_ids[0]) for answer in answers]

    def _greedy(self, max_tokens: int) -> Any:
        settings = self._settings()
        settings.max_new_tokens, settings.ignore_eos = max_tokens, True
        settings.do_sample, settings.apply_chat_template = False, False
        return settings

    def close(self) -> None:
        del self._pipeline


ENGINES: dict[str, Callable[[str, dict[str, Any]], OfflineEngine]] = {
    "ullm": Ullm,
    "vllm": Vllm,
    "nano-vllm": NanoVllm,
    "transformers": Transformers,
    "openvino": OpenVino,
}


def main(name: str, model: str, job_file: str, result_file: str) -> int:
    """Load, warm up, measure, write the result."""
    job = json.loads(Path(job_file).read_text("utf-8"))
    began = time.perf_counter()
    try:
        engine = ENGINES[name](model, job)
    except ImportError as error:
        sys.stderr.write(f"{sys.executable} cannot import {name}: {error}\n")
        return MISSING
    loaded = time.perf_counter() - began
    seconds, texts = {}, {}
    try:
        checked(engine, job["warm_up"])
        for run, asks in job["runs"].items():
            seconds[run], texts[run] = checked(engine, asks)
    finally:
        engine.close()
    result = {
        "version": engine.version,
        "device": engine.device,
        "load_seconds": loaded,
        "seconds": seconds,
        "texts": texts,
    }
    Path(result_file).write_text(json.dumps(result), "utf-8")
    return 0


def checked(engine: OfflineEngine, asks: Sequence[OfflineRequest]) -> tuple[float, str]:
    """Return the seconds that the requests took, and a digest of their tokens.

    Raises:
        RuntimeError: other numbers of tokens than were asked for, which would not be comparable.
    """
    began = time.perf_counter()
    tokens = engine.run(asks)
    seconds = time.perf_counter() - began
    if [len(each) for each in tokens] != [ask["max_tokens"] for ask in asks]:
        count, expected = sum(map(len, tokens)), sum(ask["max_tokens"] for ask in asks)
        raise RuntimeError(f"{count} tokens were generated, {expected} were asked for")
    return seconds, hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def widest(job: dict[str, Any]) -> int:
    """Return the number of requests that are submitted at once."""
    return max(map(len, job["runs"].values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
