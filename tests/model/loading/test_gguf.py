"""GGUF files written here, read by ullm and by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.model.gguf_fixtures import HEADS, HIDDEN, VOCAB, finish, start_file, write_model
from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported
from ullm.model.loading.gguf import iterate_gguf_tensors, read_gguf_config, write_tokenizer

TEXTS = [
    "The capital of France is",
    "Hello  world\n\n\tx = 12345; y=\u00e9\u00ef",
    "I'll say \U0001f642 \u4f60\u597d, don't!  ",
    "<|im_start|>user\nhi<|im_end|>",
]


def by_transformers(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The config and tensors that transformers reads from the file."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return config, load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_config_is_the_one_that_transformers_reads(tmp_path: Path, arch: str, tied: bool) -> None:
    path = write_model(tmp_path / "model.gguf", arch, tied=tied)
    expected, _ = by_transformers(path)
    config = read_gguf_config(path)
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "max_position_embeddings",
        "vocab_size",
        "model_type",
    ):
        assert config[name] == getattr(expected, name), name
    assert config["rms_norm_eps"] == pytest.approx(1e-5)
    assert config["rope_theta"] == expected.rope_parameters["rope_theta"] == 50000.0
    assert config["head_dim"] == HIDDEN // HEADS
    assert config["tie_word_embeddings"] is tied
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["architectures"] == [type(transformers.AutoModelForCausalLM.from_config(expected)).__name__]
    assert config["torch_dtype"] == "float32"


def test_config_makes_a_transformers_model_of_the_same_shape(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "qwen3", tied=False)
    config = transformers.AutoConfig.for_model(**read_gguf_config(path))
    model = transformers.AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(dict(iterate_gguf_tensors(path)), strict=True)
    assert (missing, unexpected) == ([], [])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "kind",
    [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1, Kind.Q8_0],
    ids=lambda kind: kind.name,
)
def test_tensors_are_those_that_transformers_reads(tmp_path: Path, arch: str, kind: Kind) -> None:
    path = write_model(tmp_path / "model.gguf", arch, kind, tied=False)
    _, expected = by_transformers(path)
    tensors = dict(iterate_gguf_tensors(path))
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.float(), expected[name].float()), name
    plain = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
    assert tensors["lm_head.weight"].dtype == plain.get(kind, torch.float32)


@pytest.mark.parametrize(
    "kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL], ids=lambda kind: kind.name
)
def test_block_quantizations(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "model.gguf"
    writer = start_file(path)
    values, num_bytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 256, (VOCAB, 512 // values * num_bytes), dtype=np.uint8)
    raw &= 0xBB  # no exponent of all ones, so that no float16 scale is infinite or NaN
    writer.add_tensor("token_embd.weight", raw, raw_dtype=kind)
    finish(writer)
    _, expected = by_transformers(path)
    (name, tensor), *rest = iterate_gguf_tensors(path)
    assert (name, tensor.shape, rest) == ("model.embed_tokens.weight", (VOCAB, 512), [])
    assert torch.equal(tensor, expected[name])


def test_quantized_models_compute_in_bfloat16(tmp_path: Path) -> None:
    assert read_gguf_config(write_model(tmp_path / "a.gguf", kind=Kind.Q4_0))["torch_dtype"] == "bfloat16"
    assert read_gguf_config(write_model(tmp_path / "b.gguf", kind=Kind.F16))["torch_dtype"] == "float16"


def test_llama3_frequency_factors_become_rope_scaling(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    parameters = {**scaling, "rope_theta": 50000.0}
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        rope_parameters=parameters,
        max_position_embeddings=131072,
    )
    scaled = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    plain = 50000.0 ** -(torch.arange(0, 16, 2) / 16)
    for factors, expected in ((plain / scaled, scaling), (torch.full((8,), 3.0), None)):
        path = tmp_path / f"{expected is None}.gguf"
        writer = start_file(path)
        writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
        writer.add_tensor("rope_freqs.weight", factors.float().numpy())
        finish(writer)
        assert [name for name, _ in iterate_gguf_tensors(path)] == ["model.embed_tokens.weight"]
        if expected is None:
            with pytest.raises(ModelUnsupported, match="frequency factors"):
                read_gguf_config(path)
        else:
            assert read_gguf_config(path)["rope_scaling"] == expected


def test_yarn_scaling(tmp_path: Path) -> None:
    writer = start_file(tmp_path / "model.gguf", "qwen2")
    writer.add_string("qwen2.rope.scaling.type", "yarn")
    writer.add_float32("qwen2.rope.scaling.factor", 4.0)
    writer.add_uint32("qwen2.rope.scaling.original_context_length", 64)
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    finish(writer)
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert read_gguf_config(tmp_path / "model.gguf")["rope_scaling"] == expected


# --- damage ------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_reported_with_its_name(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "model.gguf", kind=Kind.Q8_0).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 10, 24, 60, *range(100, len(whole), len(whole) // 60), len(whole) - 64]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelFileBroken, match=r"cut\.gguf: (truncated|not a GGUF)"):
            list(iterate_gguf_tensors(cut))
        with pytest.raises(ModelFileBroken):
            read_gguf_config(cut)


def test_garbage_never_escapes_as_another_error(tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    whole = bytearray(write_model(tmp_path / "model.gguf").read_bytes())
    broken = tmp_path / "broken.gguf"
    messages = []
    for _ in range(300):
        damaged = bytearray(whole)
        start = int(random.integers(0, 1500))
        damaged[start : start + 8] = random.bytes(8)
        broken.write_bytes(damaged)
        try:
            read_gguf_config(broken)
            for _name, _tensor in iterate_gguf_tensors(broken):
                pass
        except (ModelFileBroken, ModelUnsupported) as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all("broken.gguf" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ModelFileBroken, "not a GGUF file"),
        (b"not a model at all, just some text", ModelFileBroken, "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(40), ModelUnsupported, "version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), ModelUnsupported, "big-endian"),
        (b"GGUF" + (3).to_bytes(4, "little") + bytes(40), ModelFileBroken, "general.architecture"),
    ],
)
def test_what_is_not_a_model(tmp_path: Path, content: bytes, error: type[Exception], message: str) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_gguf_config(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"none\.gguf"):
        read_gguf_config(tmp_path / "none.gguf")
    with pytest.raises(ModelFileBroken, match="cannot be read"):
        read_gguf_config(tmp_path)


def test_unknown_architecture_tensor_and_experts(tmp_path: Path) -> None:
    finish(start_file(tmp_path / "mamba.gguf", "mamba"))
    with pytest.raises(ModelUnsupported, match="'mamba'"):
        read_gguf_config(tmp_path / "mamba.gguf")
    writer = start_file(tmp_path / "moe.gguf", "qwen3")
    writer.add_expert_count(8)
    finish(writer)
    with pytest.raises(ModelUnsupported, match="experts"):
        read_gguf_config(tmp_path / "moe.gguf")
    writer = start_file(tmp_path / "odd.gguf")
    writer.add_tensor("blk.0.wonder.weight", np.zeros((4, 4), np.float32))
    finish(writer)
    with pytest.raises(ModelUnsupported, match=r"blk\.0\.wonder\.weight"):
        list(iterate_gguf_tensors(tmp_path / "odd.gguf"))


def test_metadata_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    writer = start_file(tmp_path / "heads.gguf")
    writer.kv_data[0].pop("llama.attention.head_count_kv")
    writer.add_head_count_kv([2, 4])
    finish(writer)
    writer = start_file(tmp_path / "text.gguf")
    writer.kv_data[0].pop("llama.block_count")
    writer.add_string("llama.block_count", "two")
    finish(writer)
    writer = start_file(tmp_path / "lacks.gguf")
    writer.kv_data[0].pop("llama.embedding_length")
    finish(writer)
    with pytest.raises(ModelUnsupported, match="different numbers of heads"):
        read_gguf_config(tmp_path / "heads.gguf")
    with pytest.raises(ModelFileBroken, match=r"'llama\.block_count' is 'two', not one positive number"):
        read_gguf_config(tmp_path / "text.gguf")
    with pytest.raises(ModelFileBroken, match=r"lacks 'llama\.embedding_length'"):
        read_gguf_config(tmp_path / "lacks.gguf")


# --- tokenizers --------------------------------------------------------------------------------

SPLITS = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "default": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


def trained(steps: list[Any]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def write_byte_level(path: Path, tokenizer: Tokenizer, pre: str) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    finish(writer)


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_tokenizer_is_the_original(tmp_path: Path, pre: str) -> None:
    original = trained(SPLITS[pre])
    write_byte_level(tmp_path / "model.gguf", original, pre)
    write_tokenizer(tmp_path / "model.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken"])
def test_byte_level_splits_are_those_of_transformers(tmp_path: Path, pre: str) -> None:
    path = tmp_path / "model.gguf"
    write_byte_level(path, trained(SPLITS["default"]), pre)
    arch, values, _ = get_gguf_tokenizer(str(path))
    expected, _ = convert_gguf_tokenizer(arch, values)
    write_tokenizer(path, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected.encode(text).ids
    adds_bos = pre != "qwen2"  # llama.cpp's default where the file does not say
    assert tokenizer.encode("").ids == [1] * adds_bos


def test_recommended_sampling_becomes_a_generation_config(tmp_path: Path) -> None:
    writer = start_file(tmp_path / "model.gguf")
    writer.add_tokenizer_model("llama")
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 40)
    writer.add_float32("general.sampling.penalty_repeat", 1.25)
    finish(writer)
    write_tokenizer(tmp_path / "model.gguf", tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    expected = {"temperature": 0.5, "top_k": 40, "repetition_penalty": 1.25}
    assert {name: written.get(name) for name in expected} == expected


def test_written_folder_loads_in_transformers(tmp_path: Path) -> None:
    write_byte_level(tmp_path / "model.gguf", trained(SPLITS["smollm"]), "smollm")
    write_tokenizer(tmp_path / "model.gguf", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == [2, 0]
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [tokenizer(text).input_ids for text in TEXTS] == [own.encode(text).ids for text in TEXTS]


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """A Llama 2 style vocabulary: control, bytes, then pieces whose score is minus their rank."""
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=[], show_progress=False)
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.train_from_iterator(["▁" + text for text in TEXTS[:2]] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merged = ["".join(merge) for merge in model["merges"]]
    letters = [token for token in model["vocab"] if token not in set(merged)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(merged))] + [-1e6] * len(letters)
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizer(tmp_path: Path, prefix: bool) -> None:
    path = tmp_path / "model.gguf"
    tokens, scores, types = sentencepiece_vocabulary()
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix)
    finish(writer)
    write_tokenizer(path, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    arch, values, _ = get_gguf_tokenizer(str(path))
    expected, _ = convert_gguf_tokenizer(arch, values)
    for text in TEXTS:
        encoding = tokenizer.encode(text)
        assert encoding.ids[0] == 1
        assert tokenizer.decode(encoding.ids) == text
        if prefix:
            assert encoding.ids[1:] == expected.encode(text, add_special_tokens=False).ids
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0])


def test_tokenizers_that_cannot_be_built(tmp_path: Path) -> None:
    for name, model, pre in (("bert", "bert", "default"), ("odd", "gpt2", "never-heard-of")):
        writer = GGUFWriter(tmp_path / name, "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["a", "aa"])
        writer.add_token_merges(["a a"])
        finish(writer)
        with pytest.raises(ModelUnsupported, match="--tokenizer"):
            write_tokenizer(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(("merges", "message"), [(["a q"], "inconsistent"), (["ab"], "not two tokens")])
def test_inconsistent_vocabulary(tmp_path: Path, merges: list[str], message: str) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(merges)
    finish(writer)
    with pytest.raises(ModelFileBroken, match=message):
        write_tokenizer(tmp_path / "model.gguf", tmp_path / "out")
