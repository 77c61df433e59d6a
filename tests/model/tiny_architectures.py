"""Tiny random models of every architecture that transformers has as a causal language model.

`shrink` makes a small configuration from a class's default one by the names of its sizes, without knowing the
architectures; `OVERRIDES` has what single ones need besides. What became of each is in `TABLE`, which
``python -m tests.model.tiny_architectures [KIND …]`` writes; `python -m tests.docs` makes a page of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.model.model_fixtures import LogitsModel, random_tokens, reference_logits
from tests.model.outcomes import TABLE, Outcome
from ullm.errors import ModelError

TOLERANCE = 1e-4
"""Largest difference of a logit; they are near 5."""
PROMPTS = (7, 33, 600)
"""Lengths, in tokens."""
BLOCK = 16
VOCAB = 120
LAYERS = 4
POSITIONS = 1024
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "inner_dim"), 96),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32
    ),
    **dict.fromkeys(("intermediate_size_mlp", "block_ff_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "attention_head_dim", "kv_channels", "d_kv", "v_head_dim", "qk_nope_head_dim"), 16
    ),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input", "rotary_dim"), 16),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), POSITIONS
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("sliding_window", "local_attention", "attention_window"), 16),
}
"""Names of sizes in configurations → small values."""
PART = "_config"
"""The end of the names under which a configuration has others."""
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
WIDE_LAYERS = {"per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}}}
INDEXED = {"index_head_dim": 16, "index_n_heads": 4, "index_topk": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
TWO_ROPES = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}
OVERRIDES: dict[str, dict[str, Any]] = {
    **{f"granite{kind}": {"attention_multiplier": 0.25} for kind in ("", "_swa", "moe", "moe_swa")},
    "axk1": {"n_group": 1, "topk_group": 1},
    "bailing_hybrid": {"num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "cohere_compass_text": {"rope_parameters": TWO_ROPES},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "beam": INDEXED,
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v32": INDEXED,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {**EXPERTS, "moe_intermediate_size": 32},
    "dots3_note_text": WIDE_LAYERS,
    "gemma4_text": WIDE_LAYERS,
    "gemma4_unified_text": WIDE_LAYERS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "inkling_text": {"unpadded_vocab_size": VOCAB},
    "kimi_linear": {"num_experts_per_token": 2},
    "laguna": {"num_attention_heads_per_layer": [4] * LAYERS},
    "lfm2": {"full_attn_idxs": [0, 2], "layer_types": ["full_attention", "conv"] * 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2},
    "longcat_flash": {"num_layers": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "time_step_rank": 4},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True},
    "whisper": {"max_target_positions": POSITIONS},
}
"""What single architectures need besides."""


def causal_models() -> dict[str, str]:
    """Return ``model_type`` → class of all causal language models of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {kind: name for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str)}


def shrink(given: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with small sizes."""
    count = next((given[name] for name in COUNTS if isinstance(given.get(name), int)), None)
    small = dict(given)
    for name, value in given.items():
        if name in SIZES and (value is not None or name == "head_dim") and not isinstance(value, list | dict):
            small[name] = SIZES[name]
        elif isinstance(value, list) and len(value) == count:
            small[name] = some_of_each(value)
        elif name.endswith(PART) and isinstance(value, dict):
            small[name] = shrink(value, OVERRIDES.get(value.get("model_type", ""), {}))
    if "kv_lora_rank" in given:  # latent attention, whose heads have a rotated part of their own
        small |= {"head_dim": 8, "qk_head_dim": 24, "num_key_value_heads": 4}
    for name, token in TOKENS.items():
        if name in given:
            small[name] = token
    small.pop("transformers_version", None)
    return small | overrides


def some_of_each(values: list[Any]) -> list[Any]:
    """Return as many values, one per layer, as there are layers, with each kind of them among them."""
    kinds = list({str(value): value for value in values}.values())
    return [kinds[layer % len(kinds)] for layer in range(LAYERS)]


def tiny_config(kind: str) -> Any:
    """Return the tiny configuration of a ``model_type``."""
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[kind]
    small = shrink(default().to_dict(), OVERRIDES.get(kind, {}))
    small.pop("model_type", None)
    return default(**small)


def save_tiny_model(kind: str, folder: Path) -> Any:
    """Save a random model whose every parameter matters, and return what transformers reads from the file."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
        randomize(model)
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give weights that make a difference: matrices that keep the length of vectors, norms not 1."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim > 1:
            parameter.normal_(std=0.3 if "embed" in name else 1.2 * parameter.shape[-1] ** -0.5)
        else:
            usual = bool(parameter.isfinite().all()) and float(parameter.abs().max()) <= 2
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter if usual else 0))


def try_out(kind: str, name: str, folder: Path) -> Outcome:
    """Make a tiny model, and compare what ullm computes with what transformers does.

    Raises:
        Exception: whatever ullm raises that is no error of a model.
    """
    prompts = [random_tokens(length, seed) for seed, length in enumerate(PROMPTS)]
    try:
        reference = save_tiny_model(kind, folder)
        expected = [reference_logits(reference, prompt) for prompt in prompts]
    except Exception as error:  # whatever a class raises that needs another configuration
        return Outcome(name, "untried", f"{type(error).__name__}: {error}".splitlines()[-1].strip()[:100])
    try:
        ours = LogitsModel(folder, num_blocks=90, block_size=BLOCK)
    except ModelError as error:
        return Outcome(name, "refused", str(error).replace(f"{folder}: ", ""))
    error = max(
        float((found - logits).abs().max())
        for results in (together(ours, prompts), alone(ours, prompts))
        for found, logits in zip(results, expected, strict=True)
    )
    native = type(ours.model).__name__ != "TransformersModel"
    return Outcome(name, "native" if native else "transformers", error=error)


def together(ours: LogitsModel, prompts: list[list[int]]) -> list[Tensor]:
    """Compute prompts in steps that mix whole ones, chunks and single tokens."""
    short, middle, long = map(len, prompts)
    block = 0
    for number, prompt in enumerate(prompts):
        count = -(-len(prompt) // BLOCK)
        ours.add(number, prompt, list(range(block, block + count)))
        block += count
    steps = (
        ((0, 0, short), (1, 0, 20), (2, 0, long // 2)),
        ((1, 20, middle - 20), (2, long // 2, long - long // 2 - 1)),
        ((2, long - 1, 1),),
    )
    found: list[list[Tensor]] = [[] for _ in prompts]
    for step in steps:
        for number, logits in ours.step(*step).items():
            found[number].append(logits)
    return [torch.cat(parts) for parts in found]


def alone(ours: LogitsModel, prompts: list[list[int]]) -> list[Tensor]:
    """Compute each prompt in one step of its own."""
    found = []
    for number, prompt in enumerate(prompts, start=10):
        ours.add(number, prompt, list(range(45, 45 + -(-len(prompt) // BLOCK))))
        found.append(ours.step((number, 0, len(prompt)))[number])
    return found


def main(kinds: list[str]) -> None:
    """Try out all, or some, and write `TABLE`."""
    torch.set_num_threads(1)
    models = causal_models()
    table = json.loads(TABLE.read_text("utf-8")) if kinds else {}
    for kind in kinds or models:
        with tempfile.TemporaryDirectory() as folder:
            outcome = try_out(kind, models[kind], Path(folder))
        sys.stdout.write(f"{kind} {outcome}\n")
        table[kind] = {key: value for key, value in asdict(outcome).items() if value and key != "error"}
    TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
