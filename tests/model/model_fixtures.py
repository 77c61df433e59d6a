"""Tiny random models with transformers' answers, and a way to run ours step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ullm.config import EngineConfig
from ullm.model.architectures.registry import load_model
from ullm.model.execution.rank import choose_gather
from ullm.model.execution.runner import ModelRunner
from ullm.model.execution.sequences import SequenceTable
from ullm.model.layers.parallel import ParallelContext
from ullm.model.loading.checkpoint import read_checkpoint
from ullm.protocol.messages import NewSequence, RankSpec, ScheduledSequence, Start, Step, StepResult
from ullm.sampling import SamplingParams

VOCAB = 120
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-head-dim": ("Llama", {"head_dim": 32, "rope_parameters": YARN_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": ("Qwen2", WINDOWS),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}

TWO_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {"head_dim": 32, "sliding_window": 6, "layer_types": TWO_KINDS, "pad_token_id": 0}
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [4.0] * 4,
    "attention_factor": 1.3,
    "original_max_position_embeddings": 256,
}
GRANITE = {"embedding_multiplier": 6.0, "logits_scaling": 3.0, "residual_multiplier": 0.4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "Gemma2",
        {**GEMMA, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **GEMMA,
            "query_pre_attn_scalar": 40,
            "rope_parameters": {
                "full_attention": LINEAR_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "granite": ("Granite", {**GRANITE, "attention_multiplier": 0.3, "attention_bias": True}),
    "olmo2": ("Olmo2", {"pad_token_id": 0}),
    "olmo3": ("Olmo3", {"pad_token_id": 0, "sliding_window": 6, "layer_types": TWO_KINDS}),
    "phi3": (
        "Phi3",
        {
            "pad_token_id": 0,
            "sliding_window": 9,
            "original_max_position_embeddings": 256,
            "rope_parameters": LONGROPE,
        },
    ),
    "smollm3": ("SmolLM3", {"pad_token_id": 0, "no_rope_layers": [1, 0, 1]}),
    "mixtral": ("Mixtral", {**EXPERTS, "sliding_window": 7}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 2}),
}
"""The other native architectures, with what sets them apart."""
HEADS = {"Gemma3Text": "Gemma3ForCausalLM"}


def save_tiny(folder: Path, name: str, **save: Any) -> Any:
    """Save a random model of `MODELS` and return it, for its answers."""
    import transformers  # takes seconds, which processes that only load models need not spend

    family, changes = (MODELS | VARIANTS)[name]
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms at 1 and biases at 0 would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, **save)
    return model


@torch.no_grad()
def reference_logits(model: Any, tokens: list[int]) -> Tensor:
    """``[tokens, vocab]`` from transformers."""
    logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@torch.no_grad()
def reference_greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    """Greedy continuation, without a cache."""
    found = list(tokens)
    for _ in range(count):
        found.append(int(reference_logits(model, found)[-1].argmax()))
    return found[len(tokens) :]


def random_tokens(count: int, seed: int) -> list[int]:
    """A prompt."""
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()


def config(path: Path, **options: Any) -> EngineConfig:
    """For a tiny model on a CPU in float32."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "block_size": 4,
        "num_blocks": 64,
        "max_bs": 8,
    }
    return EngineConfig(model=str(path), **(defaults | options)).on_device("cpu")


class LogitsModel:
    """A model and a pool, without a sampler: steps in, logits of all their positions out."""

    def __init__(self, path: Path, parallel: ParallelContext | None = None, **options: Any) -> None:
        cpu, options_ = torch.device("cpu"), config(path, **options)
        checkpoint = read_checkpoint(path, options_, cpu)
        self.model = load_model(checkpoint, options_, cpu, parallel or ParallelContext(), lambda: None)
        size = options_.block_size
        make = choose_gather(self.model)
        self.backend = make(self.model.kv_shape, options_.num_blocks or 1, size, self.model.dtype, cpu)
        self.table = SequenceTable(size)

    def add(self, seq_id: int, tokens: list[int], blocks: list[int]) -> None:
        """A sequence with all its blocks."""
        self.table.add(NewSequence(seq_id, tokens, len(tokens), GREEDY, blocks))

    @torch.inference_mode()
    def step(self, *rows: tuple[int, int, int]) -> dict[int, Tensor]:
        """Rows ``(seq_id, start, count)`` → logits ``[count, vocab]`` of each."""
        plan = self.table.plan(
            Step(0, [ScheduledSequence(seq_id, start, count, False) for seq_id, start, count in rows])
        )
        batch = self.backend.prepare(plan.layout)
        logits = self.model.logits(self.model.forward(batch.token_ids, batch))
        return {
            row.seq_id: logits[end - row.count : end]
            for (row, _), end in zip(plan.sequences, plan.ends, strict=True)
        }


def load_runner(path: Path, rank: RankSpec | None = None, **options: Any) -> ModelRunner:
    """A `ModelRunner` with the model loaded."""
    runner = ModelRunner()
    runner.load(Start(config(path, **options), rank or RankSpec(), str(path)), lambda _: None)
    return runner


def generate(
    runner: ModelRunner, tokens: list[int], count: int, *, chunk: int = 1000, seq_id: int = 0
) -> list[int]:
    """Greedy tokens of one sequence through hand-made steps; digests on a rank that does not choose."""
    blocks = list(range(-(-(len(tokens) + count) // 4)))
    new, found = [NewSequence(seq_id, tokens, len(tokens), GREEDY, blocks)], []
    for start in range(0, len(tokens), chunk):
        rows = [
            ScheduledSequence(seq_id, start, min(chunk, len(tokens) - start), start + chunk >= len(tokens))
        ]
        result = runner.submit(Step(start, rows, new)).result()
        new = []
    found += _tokens(result)
    for i in range(count - 1):
        result = runner.submit(Step(i, [ScheduledSequence(seq_id, len(tokens) + i, 1, True)])).result()
        found += _tokens(result)
    return found


def _tokens(result: StepResult) -> list[int]:
    """The only sequence's token; on a rank that does not choose tokens, the digest of those it has."""
    return result.sampled[0].token_ids if result.sampled else [result.digest]


def step_by_step(runner: ModelRunner, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Greedy tokens; prompts come one after the other, so that steps mix their chunks with decodes."""
    found: list[list[int]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for number in range(steps):
        rows, new = [], []
        for i, prompt in enumerate(prompts[: number + 1]):
            if not done[i]:
                new.append(NewSequence(i, prompt, len(prompt), GREEDY, list(range(8 * i, 8 * i + 8))))
            count = min(4, len(prompt) - done[i]) if done[i] < len(prompt) else 1
            rows.append(ScheduledSequence(i, done[i], count, done[i] + count >= len(prompt)))
            done[i] += count
        for sampled in runner.submit(Step(number, rows, new)).result().sampled:
            found[sampled.seq_id] += sampled.token_ids
    return found


def outputs(
    path: Path, prompts: list[list[int]], *, chunk: int, lose_after: int | None = None, **options: Any
) -> list[list[int]]:
    """Twelve greedy tokens of each prompt, computed together, in chunks; perhaps with a loss of all KV."""
    runner = load_runner(path, dtype="bfloat16", num_blocks=400, **options)
    tokens = [list(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    greedy = SamplingParams(temperature=0, seed=0)

    def introduce() -> list[NewSequence]:
        blocks = [list(range(40 * i, 40 * i + 40)) for i in range(len(prompts))]
        return [NewSequence(i, tokens[i], len(prompts[i]), greedy, blocks[i]) for i in range(len(prompts))]

    new, forget = introduce(), list[int]()
    for number in range(1, 200):
        rows = []
        for i, known in enumerate(tokens):
            count = min(chunk, len(known) - computed[i])
            if len(known) < len(prompts[i]) + 12:
                rows.append(ScheduledSequence(i, computed[i], count, computed[i] + count == len(known)))
                computed[i] += count
        if not rows:
            break
        for sampled in runner.submit(Step(number, rows, new, forget)).result().sampled:
            tokens[sampled.seq_id] += sampled.token_ids
        new, forget = [], []
        if number == lose_after:
            new, forget, computed = introduce(), list(range(len(prompts))), [0] * len(prompts)
    runner.close()
    return [known[len(prompt) :] for known, prompt in zip(tokens, prompts, strict=True)]
