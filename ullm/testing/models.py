"""Small models, written to a folder within a second: random weights, a real tokenizer, a chat template.

Their text makes no sense, but everything else is as with a large model. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullm.testing.settings import ScriptedSettings

if TYPE_CHECKING:
    from ullm.hub import LocalModel

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
"""Token ids 0, 1, 2. The 256 single bytes follow, and then words."""

FIRST_WORD = len(SPECIAL_TOKENS) + 256
"""The first token id that is a piece of a word."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, which many models use."""

_CORPUS = """
The supervisor starts its children from left to right and stops them from right to left. A worker that
dies costs its clients a pause, not their answer; a request that was admitted ends with a final event.
One signal, one deadline, one order of cleanup: the drain, the abort, the stop. Tokens are drawn by a
pure function of the seed and of their index, so whatever else is in the batch, the text is the same.
Größe, façade, naïve, Ελλάδα, Москва, 東京タワー, 서울, שלום, مرحبا, 😀👍🏽🇫🇷 – “quoted”, 1 + 1 = 2; 3.14159.
Paris is the capital of France. Berlin is the capital of Germany. Rome is the capital of Italy.
"""


def tiny_tokenizer(
    folder: Path | str, *, vocab_size: int = 512, chat_template: str | None = CHAT_TEMPLATE
) -> int:
    """Write a byte-level BPE tokenizer; any text can be encoded.

    Args:
        vocab_size: most tokens; at least `FIRST_WORD`.
        chat_template: None for a model without one.

    Returns:
        the number of tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([_CORPUS], trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": IM_END,
        "pad_token": IM_END,
        "unk_token": END_OF_TEXT,
        "model_max_length": 1 << 20,
    }
    _write_json(folder / "tokenizer_config.json", config)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    size: int = backend.get_vocab_size()
    return size


def write_scripted_model(folder: Path | str, **settings: Any) -> Path:
    """Write what `ScriptedRunner` needs; starts without torch, and answers in words.

    Args:
        settings: fields of `ScriptedSettings`.
    """
    folder = Path(folder)
    vocab_size = tiny_tokenizer(folder)
    values = {"vocab_size": vocab_size, "first_token": FIRST_WORD, **settings}
    scripted = ScriptedSettings(**values)
    config = {
        "architectures": ["ScriptedForCausalLM"],
        "model_type": "scripted",
        "vocab_size": scripted.vocab_size,
        "eos_token_id": scripted.eos_token_id,
        "max_position_embeddings": scripted.context_len,
        "scripted": dataclasses.asdict(scripted),
    }
    _write_json(folder / "config.json", config)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")  # valid, and without tensors
    return folder


def write_tiny_model(
    folder: Path | str, architecture: str = "llama", *, seed: int = 0, dtype: str = "float32", **config: Any
) -> Path:
    """Write a model of two layers with random weights, as transformers saves it. Needs torch.

    Args:
        architecture: transformers' ``model_type``: ``llama``, ``qwen2``, ``qwen3``, ``gpt_neox``, …
        dtype: of the weights in the file.
        config: overrides of the model's config, such as ``num_key_value_heads``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    vocab_size = tiny_tokenizer(folder)
    values = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.3,  # far from uniform, so that greedy choices are clear
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = AutoConfig.for_model(architecture, **values | config)
        model = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def local_model(folder: Path | str, *, name: str = "tiny") -> LocalModel:
    """Return what `ullm.hub.resolve` would return for a folder."""
    from ullm.hub import LocalModel

    folder = Path(folder)
    files = {key: folder / f"{key}.json" for key in ("config", "generation_config")}
    content = {
        key: json.loads(file.read_text("utf-8")) if file.is_file() else {} for key, file in files.items()
    }
    return LocalModel(name=name, path=folder, tokenizer_path=folder, **content)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
