"""Models with weights of eight and four bits, from plain checkpoints and from GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from tests.model.gguf_fixtures import write_model
from tests.model.model_fixtures import MODELS, LogitsModel, outputs, random_tokens, save_tiny
from ullm.errors import ConfigError
from ullm.model.architectures.decoder import Decoder, DecoderLayer
from ullm.model.kernels.cpu import build
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.quantization import QuantizedWeight
from ullm.model.loading.gguf import gguf_sources, is_quantized
from ullm.model.loading.gguf_blocks import read_codes

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
CODED = [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q8_0]


def logits(path: Path, prompt: list[int], **options: Any) -> torch.Tensor:
    model = LogitsModel(path, **options)
    model.add(0, prompt, list(range(20)))
    return model.step((0, 0, len(prompt)))[0].float()


def packed_kinds(model: LogitsModel) -> set[torch.dtype]:
    """Return the weights that the linear layers multiply by."""
    assert isinstance(model.model, Decoder)
    weights = model.model.packed_weights()
    return {tensor.dtype for name, tensor in weights.items() if name.endswith(".packed")}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error relative to the spread of the logits; a wrong product's is above 1.

    Random models enlarge it from layer to layer.
    """
    return ((got - expected).square().mean() / expected.var()).sqrt().item()


@needs_compiler
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"qwen3"}))  # whose heads do not suit the kernels
def test_logits_differ_little(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, name)
    prompt = random_tokens(30, seed=3)
    expected = logits(tmp_path, prompt)
    assert error(logits(tmp_path, prompt, quantization="int8"), expected) < 0.1
    assert 0.01 < error(logits(tmp_path, prompt, quantization="int4"), expected) < 0.7


@needs_compiler
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_text_is_the_same_alone_among_others_in_chunks_and_resumed(
    quantization: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, "llama")
    prompts = [random_tokens(count, seed=count) for count in (1, 5, 16, 33, 70, 101)]
    options: dict[str, Any] = {"quantization": quantization}
    before = torch.get_num_threads()
    alone = [outputs(tmp_path, [prompt], chunk=1000, **options)[0] for prompt in prompts]
    assert outputs(tmp_path, prompts, chunk=1000, **options) == alone
    assert outputs(tmp_path, prompts, chunk=7, **options) == alone
    assert outputs(tmp_path, prompts, chunk=30, lose_after=9, **options) == alone
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert outputs(tmp_path, prompts, chunk=1000, **options) == alone
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_random_weights_can_be_quantized_too(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-tied")
    prompt = random_tokens(9, seed=1)
    found = logits(tmp_path, prompt, quantization="int8", load_format="dummy")
    assert found.isfinite().all()
    assert found.std() > 0


def test_asking_for_what_this_machine_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"--quantization int8 needs .* --quantization none"):
        LogitsModel(tmp_path, quantization="int8", cpu_kernels=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        LogitsModel(tmp_path, quantization="int4")
    path = write_model(tmp_path / "model.gguf", kind=Kind.Q4_1)
    assert LogitsModel(path).model.weight_bytes() > 0  # as plain numbers, since nobody has asked


@needs_compiler
def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is not what is missing."""
    save_tiny(tmp_path, "llama")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernels").write_text("a file where a folder should be")
    monkeypatch.setenv("ULLM_CACHE", str(cache))
    with pytest.raises(ConfigError) as caught:
        LogitsModel(tmp_path, quantization="int8")
    said = str(caught.value)
    assert f"cannot be kept in {cache / 'kernels'}: File exists" in said
    assert "ULLM_CACHE" in said
    assert "install" not in said


@needs_compiler
def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho it hurts >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("ULLM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ConfigError, match=r"broken-c\+\+ could not compile them: it hurts; set CXX"):
        LogitsModel(tmp_path, quantization="int8")


# --- GGUF --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)
def test_codes_are_what_the_format_says(kind: Kind) -> None:
    values, num_bytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 256, (12, 512 // values * num_bytes), dtype=np.uint8)
    scales = np.random.default_rng(4).uniform(0.01, 1, 2).astype(np.float16).view(np.uint8)
    blocks = raw.reshape(-1, num_bytes)
    blocks[:, :2] = scales[:2]
    if kind in (Kind.Q4_1, Kind.Q4_K):
        blocks[:, 2:4] = scales[2:]
    expected = torch.from_numpy(dequantize(raw, kind))
    codes = read_codes(raw, kind, (12, 512))
    assert sorted(set(codes.bits.tolist())) == [8 if kind == Kind.Q8_0 else 4]
    # Only the products of Q4_K's scales are rounded, to float16.
    largest = expected.abs().max().item()
    torch.testing.assert_close(
        codes.dequantize(), expected, rtol=1e-6, atol=1e-3 * largest * (kind == Kind.Q4_K)
    )


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_sources_have_the_same_numbers_as_codes_and_as_values(arch: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", arch, Kind.Q4_1, tied=False)
    for source in gguf_sources(path):
        codes = source.codes()
        assert (codes is None) == (len(source.shape) == 1)
        if codes is not None:
            torch.testing.assert_close(codes.dequantize(), source.values(), rtol=0, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q5_1], ids=lambda kind: kind.name)
def test_a_file_is_run_as_it_is(kind: Kind, tied: bool, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "llama", kind, tied=tied)
    prompt = random_tokens(30, seed=3)
    prompt = [token % 40 for token in prompt]  # the file's vocabulary
    plain = logits(path, prompt, quantization="none")
    assert error(logits(path, prompt), plain) < 0.25
    assert packed_kinds(LogitsModel(path)) == {torch.uint8}


@needs_compiler
def test_files_of_plain_numbers_are_not_quantized(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "llama", Kind.F16)
    assert not is_quantized(path)
    assert packed_kinds(LogitsModel(path, dtype="float32")) == {torch.float16}  # as in the file
    assert is_quantized(write_model(tmp_path / "other.gguf", "llama", Kind.Q8_0))


@needs_compiler
def test_what_is_stored_in_four_bits_can_be_wanted_in_eight(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "llama", Kind.Q4_1)
    sizes = [LogitsModel(path, quantization=kind).model.weight_bytes() for kind in ("auto", "int8", "none")]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1]


def test_a_store_takes_codes_only_if_it_is_to(tmp_path: Path) -> None:
    store = QuantizedWeight.empty(4, 32, 8, as_stored=True)
    assert store[:2].as_stored
    assert store.nbytes == 4 * 32 + 4 * 2 * 2 + 4


@needs_compiler
@pytest.mark.parametrize("quantization", ["auto", "int8", "int4"])
def test_ranks_share_a_layer(quantization: str, tmp_path: Path) -> None:
    """Two ranks have 48 of 96 inputs each, one and a half groups."""
    path, x = write_model(tmp_path / "model.gguf", "llama", Kind.Q4_1), torch.randn(5, 96)

    def down(parallel: ParallelContext, inputs: torch.Tensor) -> torch.Tensor:
        model = LogitsModel(path, parallel, quantization=quantization).model
        assert isinstance(model, Decoder)
        layer = model.model.layers[0]
        assert isinstance(layer, DecoderLayer)
        return layer.mlp.down_proj.forward(inputs.contiguous())

    expected = down(ParallelContext(), x)
    found = sum(down(ParallelContext(rank, 2), x[:, 48 * rank : 48 * rank + 48]) for rank in (0, 1))
    assert isinstance(found, torch.Tensor)
    assert error(found, expected) < (0.1 if quantization == "int4" else 0.02)
