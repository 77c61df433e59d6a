"""Quantized checkpoints: each format is read as it says, natively and through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.model.model_fixtures import (
    SHAPE,
    LogitsModel,
    random_tokens,
    reference_logits,
    save_tiny,
)
from tests.model.quantized_fixtures import (
    AWQ,
    CASES,
    Case,
    compressed,
    gptq_config,
    mxfp4,
    quantize_checkpoint,
    torchao_config,
)
from ullm.errors import ModelError, ModelFileBroken, ModelUnsupported
from ullm.model.layers.quantization import QuantizedWeight
from ullm.model.loading.quantized.formats import find_format
from ullm.model.loading.sources import iterate_sources

PACKED = {
    *("gptq", "gptq-asymmetric", "gptq-8", "gptq-v2", "gptq-of-a-file", "awq", "awq-of-a-file", "w4a16"),
    *("w4a16-asymmetric", "w4a16-channel", "w8a16", "w2a16", "w8a8", "mxfp4", "bnb-8"),
    *("ao-8", "ao-8-groups", "ao-int4", "ao-int4-asymmetric"),
}
"""Formats whose codes the kernels compute with."""


def logits_of(path: Path, tokens: list[int], **options: Any) -> torch.Tensor:
    model = LogitsModel(path, **options)
    model.add(0, tokens, list(range(16)))
    return model.step((0, 0, len(tokens)))[0]


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_format(name: str, tmp_path: Path) -> None:
    """In float32 exactly; codes for the kernels within the rounding of scales to float16."""
    model = save_tiny(tmp_path, "llama")
    quantize_checkpoint(tmp_path, model, CASES[name])
    state, layers = model.state_dict(), 0
    for key, source in iterate_sources(tmp_path, None):
        values = source.read(0, 0, source.shape[0])
        torch.testing.assert_close(values, state[key], rtol=1e-6, atol=1e-7)
        codes = source.codes()
        assert (codes is not None) == source.has_codes
        if isinstance(codes, QuantizedWeight):
            layers += 1
            error = (codes.dequantize() - state[key]).abs()
            # A code of four bits is at most 15 scales from its minimum, both rounded to eleven digits.
            assert error.max() <= 2**-11 * 2 * codes.dequantize().abs().max() + 1e-6
            size = codes.nbytes - codes.bits.nbytes
            assert size == codes.codes.nbytes + 4 * codes.scales.numel()
    assert layers == (21 if name in PACKED else 0)


@pytest.mark.parametrize("name", CASES)
def test_models_compute_with_these_values(name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    quantize_checkpoint(tmp_path, model, CASES[name])
    tokens = random_tokens(40, seed=2)
    expected = reference_logits(model, tokens)
    for options in ({"quantization": "none"}, {"cpu_kernels": False}):
        found = logits_of(tmp_path, tokens, **options)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    model_ = LogitsModel(tmp_path)
    formats = set(model_.model.weight_formats())
    if name not in PACKED:
        assert formats == {"float32"}
        return
    assert formats == {"float32", "int4" if "4" in name and name != "mxfp4" else formats_of(name)}
    found = logits_of(tmp_path, tokens)
    # The kernels round the inputs of such products to eight bits.
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def formats_of(name: str) -> str:
    eight = ("gptq-8", "w8a16", "w8a8", "mxfp4", "bnb-8", "ao-8", "ao-8-groups")
    return "int8" if name in eight else "int4"


@pytest.mark.parametrize("name", ["gptq-act-order", "awq", "fp8-blocks", "nf4-nested", "w8a8"])
def test_models_through_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**SHAPE)
    model = transformers.GPTNeoXForCausalLM(config).float().eval()
    model.save_pretrained(tmp_path)
    quantize_checkpoint(tmp_path, model, CASES[name])
    tokens = random_tokens(20, seed=2)
    found = logits_of(tmp_path, tokens)
    torch.testing.assert_close(found, reference_logits(model, tokens), rtol=1e-3, atol=1e-3)


def test_experts_of_gpt_oss() -> None:
    """The experts' matrices, as transformers' own code makes them of the same tensors."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from ullm.model.loading.quantized.interface import FoundConfig, Part
    from ullm.model.loading.quantized.mxfp4 import Mxfp4

    codes, scales, values = mxfp4(torch.randn(3 * 10, 64, generator=torch.Generator().manual_seed(1)))
    blocks, exponents = codes.reshape(3, 10, 2, 16), scales.reshape(3, 10, 2)
    form = Mxfp4(FoundConfig(Path(), {}))
    tensors = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": exponents}
    parts = {}
    for name, tensor in tensors.items():
        weight, part = form.split(name, "U8") or ("", "")
        assert weight == "experts.gate_up_proj"
        parts[part] = Part(Path(), name, tuple(tensor.shape), "U8", lambda tensor=tensor: tensor)
    weight_ = form.weight("experts.gate_up_proj", parts)
    assert weight_.shape == (3, 64, 10)
    assert torch.equal(weight_.values(), values.reshape(3, 10, 64).transpose(1, 2))
    reference = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    assert torch.equal(weight_.values(), reference)


def test_two_ranks_have_their_parts(tmp_path: Path) -> None:
    """Each rank narrows the codes; a cut through a group of inputs is computed from the values."""
    from ullm.model.layers.parallel import ParallelContext

    model = save_tiny(tmp_path, "llama")
    quantize_checkpoint(tmp_path, model, CASES["w4a16"])
    for rank in range(2):
        loaded = LogitsModel(tmp_path, ParallelContext(rank, 2))
        assert "int4" in loaded.model.weight_formats()


def test_parts_of_a_weight_may_be_in_several_files(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    quantize_checkpoint(tmp_path, model, CASES["gptq"])
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"part{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, tmp_path / file)
    index = {"weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = random_tokens(10, seed=2)
    found = logits_of(tmp_path, tokens, quantization="none")
    torch.testing.assert_close(found, reference_logits(model, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (gptq_config(3), "GPTQ with 3 bits"),
        (gptq_config(checkpoint_format="marlin"), "'marlin'"),
        (gptq_config(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic"),
        (AWQ | {"version": "gemv"}, "AWQ in the format 'gemv'"),
        (AWQ | {"bits": 3}, "AWQ with 3 bits"),
        (compressed("nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
        (compressed("pack-quantized", num_bits=3), "with 3 bits"),
        (compressed("marlin-24"), "marlin-24"),
        (compressed("pack-quantized") | {"sparsity_config": {"format": "sparse-bitmask"}}, "sparse-bitmask"),
        (compressed("pack-quantized") | {"transform_config": {"config_groups": {"u": {}}}}, "transforms"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt with NVFP4"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
            "codes in",
        ),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "torchao"}, "torchao with no named scheme"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao with int4_weight_only"),
        (torchao_config("Int4WeightOnlyConfig", group_size=32), "torchao with Int4WeightOnlyConfig"),
        (
            torchao_config("FqnToConfig", fqn_to_config={"a": None, "b": {"_type": "NVFP4Config"}}),
            "torchao with NVFP4Config",
        ),
        ({"bits": 4}, "unknown"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_variants_that_are_not_read_are_named(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelUnsupported) as refused:
        find_format(tmp_path, {"quantization_config": config})
    text = str(refused.value)
    assert words in text
    assert "choosing-a-model.md" in text
    assert "\n" not in text


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of one layer, or drop them."""
    layer = "model.layers.0.mlp.down_proj."
    found = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del found[layer + name]
        else:
            found[layer + name] = tensor
    save_file(found, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("gptq", {"scales": None}, "no 'scales'"),
        ("gptq", {"scales": torch.ones(2, 64)}, "has shape (2, 64), expected (3, 64)"),
        ("gptq", {"g_idx": torch.full((96,), 7)}, "groups beyond the 3"),
        ("awq", {"qzeros": torch.zeros(3, 9, dtype=torch.int32)}, "expected (3, 8)"),
        ("w4a16", {"weight_shape": torch.tensor([64, 192])}, "not (64, 192) in 4 bits"),
        ("w4a16", {"weight_scale": torch.ones(63, 3)}, "expected (64, 3)"),
        ("w8a8", {"weight_scale": torch.ones(7)}, "no scale for each part"),
        ("w8a8", {"weight_scale": None}, "has no scale"),
        ("fp8-blocks", {"weight_scale_inv": None}, "has no scale"),
        ("ao-8", {"_weight_scale": None}, "no 'scale'"),
        ("ao-8", {"_weight_qdata": torch.zeros(64, 48, dtype=torch.uint8)}, "stored in U8"),
        ("ao-8", {"_weight_act_pre_scale": torch.ones(96)}, "act_pre_scale"),
        ("ao-int4", {"_weight_qdata": torch.full((64, 96), 8, dtype=torch.int8)}, "more than four bits"),
        ("ao-int4", {"_weight_zero_point": torch.zeros(64, 2)}, "expected (64, 3)"),
        ("nf4", {"weight.absmax": torch.ones(5)}, "expected (96,)"),
        ("nf4", {"weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "quant_state"),
        ("nf4", {"weight.quant_map": None}, "no 'quant_map'"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_damage_is_named(
    name: str, tensors: dict[str, torch.Tensor | None], words: str, tmp_path: Path
) -> None:
    quantize_checkpoint(tmp_path, save_tiny(tmp_path, "llama"), CASES[name])
    change(tmp_path, **tensors)
    with pytest.raises(ModelError) as refused:
        LogitsModel(tmp_path)
    assert words in str(refused.value)
    assert "down_proj" in str(refused.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    """Older torchao checkpoints are pickles, which are programs."""
    save_tiny(tmp_path, "llama")
    quantize_checkpoint(tmp_path, save_tiny(tmp_path, "llama"), CASES["ao-8"])
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*convert the weights") as refused:
        LogitsModel(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_config_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    for config in (
        [1],
        {"quant_method": "gptq", "bits": "four"},
        {"quant_method": "fp8", "weight_block_size": 3},
    ):
        with pytest.raises(ModelFileBroken, match=r"config\.json"):
            find_format(tmp_path, {"quantization_config": config})


def test_a_scale_that_float16_cannot_hold_is_not_packed(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1e-5)
            layer.mlp.down_proj.weight.mul_(1e5)
    model.save_pretrained(tmp_path)
    quantize_checkpoint(tmp_path, model, CASES["w8a8"])
    for key, source in iterate_sources(tmp_path, None):
        if key.endswith(("up_proj.weight", "q_proj.weight")):
            assert source.has_codes == key.endswith("q_proj.weight")
    tokens = random_tokens(10, seed=2)
    expected = reference_logits(model, tokens)
    assert (logits_of(tmp_path, tokens) - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_a_tied_model_with_a_quantized_head(tmp_path: Path) -> None:
    """The head of the file is used, not the embedding."""
    model = save_tiny(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    case: Case = CASES["w4a16"]
    made, values = case.encode("lm_head", tensors.pop("lm_head.weight"))
    save_file(tensors | {k: v.contiguous() for k, v in made.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"quantization_config": case.config, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        model.lm_head.weight.copy_(values)
    tokens = random_tokens(10, seed=2)
    found = logits_of(tmp_path, tokens, quantization="none")
    torch.testing.assert_close(found, reference_logits(model, tokens), rtol=1e-3, atol=1e-3)
