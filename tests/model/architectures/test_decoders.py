"""Native models against transformers, position by position, however a sequence is cut into steps."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.model.model_fixtures import (
    MODELS,
    VARIANTS,
    LogitsModel,
    random_tokens,
    reference_logits,
    save_tiny,
)
from ullm.errors import ModelUnsupported
from ullm.model.architectures.registry import NATIVE
from ullm.model.layers.lora import AdaptableModel
from ullm.model.layers.rope import read_rope, rope_cache

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[*MODELS, *VARIANTS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    return path, save_tiny(path, request.param)


def assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=TOLERANCE, rtol=0)


def test_prefill_in_one_step(pair: tuple[Path, Any]) -> None:
    path, reference = pair
    model, tokens = LogitsModel(path), random_tokens(41, seed=1)
    model.add(0, tokens, list(range(11)))
    assert_close(model.step((0, 0, 41))[0], reference_logits(reference, tokens))


def test_chunks_then_decode(pair: tuple[Path, Any]) -> None:
    path, reference = pair
    model, tokens = LogitsModel(path), random_tokens(30, seed=2)
    model.add(0, tokens, [9, 3, 17, 1, 22, 40, 41, 6])
    cuts = [(0, 7), (7, 9), (16, 1), (17, 5), *((p, 1) for p in range(22, 30))]
    ours = torch.cat([model.step((0, start, count))[0] for start, count in cuts])
    assert_close(ours, reference_logits(reference, tokens))


def test_long_chunks(pair: tuple[Path, Any]) -> None:
    """Long enough for fused attention, without a prefix and with one."""
    path, reference = pair
    model, tokens = LogitsModel(path, num_blocks=70), random_tokens(256, seed=5)
    model.add(0, tokens[:250], list(range(63)))
    whole = reference_logits(reference, tokens)
    assert_close(model.step((0, 0, 250))[0], whole[:250])
    model.add(2, tokens, [*range(20), *range(26, 70)])
    assert_close(model.step((2, 80, 176))[2], whole[80:])


def test_mixed_batch(pair: tuple[Path, Any]) -> None:
    """Decodes of different lengths, a chunk with a prefix and a whole prompt in one step."""
    path, reference = pair
    model = LogitsModel(path)
    tokens = [random_tokens(count, seed) for seed, count in enumerate((40, 23, 5, 26, 12))]
    for seq_id, ids in enumerate(tokens):
        model.add(seq_id, ids, list(range(seq_id * 10, seq_id * 10 + 10)))
    model.step((0, 0, 39), (1, 0, 22), (2, 0, 4), (3, 0, 15))
    found = model.step((3, 15, 11), (2, 4, 1), (0, 39, 1), (4, 0, 12), (1, 22, 1))
    for seq_id, ids in enumerate(tokens):
        assert_close(found[seq_id], reference_logits(reference, ids)[-len(found[seq_id]) :])


def test_prefix_of_another_sequence(pair: tuple[Path, Any]) -> None:
    """A sequence that starts in the middle, on blocks that another one filled."""
    path, reference = pair
    model, tokens = LogitsModel(path), random_tokens(24, seed=4)
    model.add(0, tokens[:17], [5, 6, 7, 8, 9])
    model.step((0, 0, 17))
    model.add(1, tokens, [5, 6, 7, 8, 30, 31])
    assert_close(model.step((1, 16, 8))[1], reference_logits(reference, tokens)[16:])


def test_native_file_sizes() -> None:
    """A model file is a page: everything shared is elsewhere."""
    files = {inspect.getsourcefile(native) for native in NATIVE.values()}
    assert len(files) > 8
    for file in files:
        assert file is not None
        assert len(Path(file).read_text("utf-8").splitlines()) < 100


@pytest.mark.parametrize("kind", ["proportional", "unheard-of"])
def test_unknown_rope_is_named(kind: str) -> None:
    with pytest.raises(ModelUnsupported, match=kind):
        rope_cache({"rope_type": kind, "rope_theta": 10000.0}, 16, 8)


def test_yarn_attention_factor_matches_transformers() -> None:
    from transformers import LlamaConfig

    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    }
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](
        LlamaConfig(head_dim=32, max_position_embeddings=512, rope_parameters=dict(rope))
    )
    cos, sin = rope_cache(rope, 32, 20)
    angles = torch.outer(torch.arange(20.0), frequencies)
    torch.testing.assert_close(cos[:, 0, :16], angles.cos() * factor)
    torch.testing.assert_close(sin[:, 0, 16:], angles.sin() * factor)


def test_longrope_matches_transformers_within_the_original_context() -> None:
    from transformers import Phi3Config

    config = {
        **{"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512},
        **{"original_max_position_embeddings": 128, "pad_token_id": 0},
    }
    rope = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2, 2, 3, 4, 5], "long_factor": [9.0] * 8}
    theirs = Phi3Config(**config, rope_scaling=dict(rope))
    frequencies, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, seq_len=100)
    ours = read_rope({**config, "rope_scaling": rope}, 10000.0, partial=True)
    cos, _ = rope_cache(ours, 16, 20)
    assert factor > 1
    torch.testing.assert_close(cos[:, 0, :8], torch.outer(torch.arange(20.0), frequencies).cos() * factor)


def test_adapters_find_one_fused_layer_and_no_expert(tmp_path: Path) -> None:
    """An expert sees some rows of a step only, so that what is added to them would go to others."""
    for name, present, absent in (
        ("phi3", "self_attn.qkv_proj", "self_attn.q_proj"),
        ("qwen2-moe", "mlp.shared_expert.up_proj", "mlp.experts.0.up_proj"),
        ("gemma3", "mlp.down_proj", "mlp.gate_up_proj"),
    ):
        save_tiny(tmp_path / name, name)
        model = LogitsModel(tmp_path / name).model
        assert isinstance(model, AdaptableModel)
        places = model.lora().places
        assert f"model.layers.0.{present}" in places
        assert f"model.layers.0.{absent}" not in places
