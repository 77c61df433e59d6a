"""``python -m tests.model.loading.corrupt_child FOLDER FIRST END KIND…``: start models with a damaged file.

For every seed and every kind a line of JSON says what is tried, and another one what became of it. The
process is bounded: the system refuses memory beyond that of whole models and `ROOM`, and ends the process by
a signal when a case computes for longer than `SECONDS`, or waits for longer than `WAIT`.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from tests.model.gguf_fixtures import HIDDEN, VOCAB, block_shapes, finish, start_file
from tests.model.loading.corruptions import corrupt
from tests.model.lora_fixtures import matrices, write_adapter
from tests.model.model_fixtures import SHAPE, config, generate, load_runner, save_tiny
from tests.model.quantized_fixtures import CASES, quantize_checkpoint
from ullm.actors.tokenizer import TokenizerActor
from ullm.engine.sampling_defaults import read_sampling_defaults
from ullm.errors import UllmError
from ullm.hub import LocalModel, locate, resolve
from ullm.hub.adapters import find_adapter
from ullm.model.loading.convert import write_gguf
from ullm.protocol.messages import Adapter
from ullm.testing import local_model, tiny_tokenizer

SECONDS = 20
"""Processor time within which a damaged file of some hundred kilobytes must be refused."""
WAIT = 100
"""Seconds that it may take in all, on a machine that others use, too."""
ROOM = 256 << 20
"""Bytes of address space that a start may take beyond what the whole models have taken."""
TOKENS = [3, 4, 5, 6, 7, 8]


def native(folder: Path) -> None:
    save_tiny(folder, "llama")


def shards(folder: Path) -> None:
    save_tiny(folder, "qwen3", max_shard_size="60KB")


def foreign(folder: Path, **save: Any) -> None:
    """A model that runs through transformers' code."""
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SHAPE)).save_pretrained(folder, **save)


def foreign_shards(folder: Path) -> None:
    foreign(folder, max_shard_size="60KB")


def quantized(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        quantize_checkpoint(folder, save_tiny(folder, "llama"), CASES[name])

    return write


def gguf_file(folder: Path, **split: Any) -> None:
    """A GGUF file with a tokenizer, and a template for chats."""
    writer = start_file(folder / "model.gguf", **split)
    writer.add_tokenizer_model("llama")
    writer.add_token_scores([-float(index) for index in range(VOCAB)])
    writer.add_token_types([2, 3, 3, *[1] * (VOCAB - 3)])
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    values = np.random.default_rng(7)
    for name, shape in {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}.items():
        writer.add_tensor(name, values.standard_normal(shape, dtype=np.float32))
    for name, shape in block_shapes("llama").items():
        whole = values.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, whole)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(whole, kind), raw_dtype=kind)
    finish(writer)


def gguf_parts(folder: Path) -> None:
    gguf_file(folder, split_max_tensors=8)


def with_adapter(folder: Path) -> None:
    model = save_tiny(folder, "llama")
    write_adapter(
        folder / "adapter", matrices(model, ("q_proj", "down_proj"), 4, 1), target_modules=["q_proj"]
    )


def with_tokens(folder: Path) -> None:
    """A native model with all files that a tokenizer may have."""
    native(folder)
    files: dict[str, dict[str, Any]] = {
        "added_tokens.json": {"<tool>": 512, "</tool>": 513},
        "special_tokens_map.json": {
            "eos_token": {"content": "<|im_end|>", "special": True},
            "additional_special_tokens": ["<extra>"],
        },
        "generation_config.json": {"eos_token_id": [2, 0], "temperature": 0.6, "top_k": 20, "top_p": 0.9},
    }
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    decoder = {"512": {"content": "<tool>", "special": False}, "513": {"content": "</tool>"}}
    files["tokenizer_config.json"] = {**settings, "added_tokens_decoder": decoder}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "safetensors": (native, "model.safetensors"),
    "shard": (shards, "model-00001-of-*.safetensors"),
    "index": (shards, "model.safetensors.index.json"),
    "config": (native, "config.json"),
    "foreign-safetensors": (foreign, "model.safetensors"),
    "foreign-index": (foreign_shards, "model.safetensors.index.json"),
    "foreign-config": (foreign, "config.json"),
    "gptq": (quantized("gptq"), "model.safetensors"),
    "nf4": (quantized("nf4-nested"), "model.safetensors"),
    "quantized-config": (quantized("w4a16"), "config.json"),
    "gguf": (gguf_file, "model.gguf"),
    "gguf-part": (gguf_parts, "model-00002-of-*.gguf"),
    "adapter": (with_adapter, "adapter/adapter_model.safetensors"),
    "adapter-config": (with_adapter, "adapter/adapter_config.json"),
    "tokenizer": (with_tokens, "tokenizer.json"),
    "tokenizer-config": (with_tokens, "tokenizer_config.json"),
    "added-tokens": (with_tokens, "added_tokens.json"),
    "special-tokens": (with_tokens, "special_tokens_map.json"),
    "generation-config": (with_tokens, "generation_config.json"),
    "template": (with_tokens, "chat_template.jinja"),
}
"""Name → how the whole model is written, and the file of it that is damaged."""


def read_by_front_end(path: Path, folder: Path) -> None:
    """Read what the front end reads of a model, and encode and decode a text."""
    found = resolve(config(folder)) if path == folder else gguf_model(path)
    read_sampling_defaults(config(path), found)
    actor = TokenizerActor(found)
    actor.load()
    actor.decode([0, 1, 300])
    actor.describe()


def gguf_model(path: Path) -> LocalModel:
    """Do what `resolve` does, without a process for the conversion."""
    locate(str(path), config(path), lambda *_: None)
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    write_gguf(path, folder, "tokenizer")
    made = local_model(folder)
    return LocalModel(made.name, path, made.config, folder, made.generation_config)


def compute(path: Path, folder: Path) -> None:
    """Load the weights, and the adapter if there is one, and compute some tokens."""
    runner = load_runner(path, cpu_kernels=False)
    try:
        if (adapter := folder / "adapter").exists():
            found, digest = find_adapter(adapter)
            if refusal := runner.keep_adapter(Adapter("adapter", str(found), digest, 1), wanted=True):
                raise Refused(refusal)
        generate(runner, TOKENS, 2)
    finally:
        runner.close()


class Refused(UllmError):
    """An adapter that a worker refuses."""


def outcome(kind: str, folder: Path) -> dict[str, str]:
    """Start a model; say why it is refused, or that it is served, or what failed that must not."""
    path = folder
    if kind.startswith("gguf"):
        path = next(folder.glob("model-00001-of-*.gguf"), folder / "model.gguf")
    refusals = list[str]()
    for part in (read_by_front_end, compute):  # in processes of their own, and neither waits for the other
        try:
            part(path, folder)
        except UllmError as error:
            refusals.append(str(error).replace(str(folder), "FOLDER"))
        except BaseException as error:  # a panic of a library in Rust is no Exception
            return {"fault": "".join(traceback.format_exception(error))}
    return {"refused": refusals[0], "last": refusals[-1]} if refusals else {"served": ""}


@contextmanager
def bounded() -> Iterator[None]:
    """End this process if what follows takes too long."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def limit_memory() -> None:
    """Allow this process only `ROOM` more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def write_models(root: Path, kinds: list[str]) -> None:
    """Write the whole models, and start each once."""
    written: dict[Callable[[Path], None], Path] = {}
    for kind in kinds:
        write = KINDS[kind][0]
        if write in written:
            shutil.copytree(written[write], root / kind)
            continue
        written[write] = root / kind
        (root / kind).mkdir()
        if not kind.startswith("gguf"):
            tiny_tokenizer(root / kind)
        write(root / kind)
        whole = Path(shutil.copytree(root / kind, root / f"{kind}-whole"))
        if (result := outcome(kind, whole)) != {"served": ""}:
            say(kind=kind, seed=-1, **result)


def main(root: Path, seeds: range, kinds: list[str]) -> None:
    """Write the whole models, start each, and then damaged ones."""
    torch.set_num_threads(1)
    write_models(root, kinds)
    gc.collect()
    gc.freeze()
    limit_memory()
    for seed in seeds:
        for kind in kinds:
            copy = Path(shutil.copytree(root / kind, root / f"{kind}-{seed}", symlinks=True))
            damage = corrupt(next(copy.glob(KINDS[kind][1])), random.Random(f"{kind} {seed}"))
            say(kind=kind, seed=seed, damage=damage)
            with bounded():
                result = outcome(kind, copy)
            say(kind=kind, seed=seed, **result)
            shutil.rmtree(copy)
            gc.collect()  # files that are mapped count as memory, until the objects are gone


if __name__ == "__main__":
    main(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])), sys.argv[4:])
