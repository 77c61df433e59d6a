"""``python -m ullm.model.loading.convert {tokenizer|model} SOURCE FOLDER``: one-off conversions.

They run in a process of their own, so that the front end never loads torch or transformers. ``tokenizer``
writes tokenizer.json and its companions, for a GGUF file also config.json; ``model`` writes a GGUF file's
weights too, dequantized, as bf16 safetensors. Progress goes to stdout as ``Progress DONE of TOTAL`` bytes. A
failure ends with exit status 1 and a line ``error CLASS MESSAGE``.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from ullm.errors import ModelError, ModelFileBroken


def main(arguments: list[str]) -> int:
    """Convert and return the exit status."""
    what, source, folder = arguments[0], Path(arguments[1]), Path(arguments[2])
    try:
        if source.is_dir():
            write_tokenizer_of_folder(source, folder)
        else:
            write_gguf(source, folder, weights=what == "model")
    except ModelError as error:
        _say(f"error {type(error).__name__} {error}")
        return 1
    return 0


def write_tokenizer_of_folder(source: Path, folder: Path) -> None:
    """Write tokenizer.json for a checkpoint that has only an older format, such as tokenizer.model.

    Raises:
        ModelFileBroken: transformers cannot read or convert its tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileBroken(source, f"its tokenizer cannot be read: {reason}") from error
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelFileBroken(source, f"{type(tokenizer).__name__} cannot be written as tokenizer.json")


def write_gguf(source: Path, folder: Path, *, weights: bool) -> None:
    """Write config.json, generation_config.json and the tokenizer of a GGUF file, and on request its weights.

    Raises:
        ModelError: the file is broken or of an unsupported kind.
    """
    from ullm.model.loading.gguf import read_gguf_config, write_tokenizer

    config = read_gguf_config(source)
    write_tokenizer(source, folder)
    if weights:
        config = {**config, "torch_dtype": "bfloat16"}
        write_weights(source, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_weights(source: Path, folder: Path) -> None:
    """Write the tensors of a GGUF file, rounded to bf16, to one model.safetensors."""
    import torch
    from safetensors.torch import save_file

    from ullm.model.loading.gguf import iterate_gguf_tensors

    tensors: dict[str, torch.Tensor] = {}
    done, total = 0, bf16_bytes(source)
    for name, tensor in iterate_gguf_tensors(source):
        tensors[name] = tensor.to(torch.bfloat16).contiguous()
        done += tensors[name].nbytes
        _say(f"Progress {done} of {total}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bf16_bytes(source: Path) -> int:
    """Return the bytes that a GGUF file's tensors take as bf16."""
    from ullm.model.loading.gguf_file import GgufFile

    return sum(2 * math.prod(tensor.shape) for tensor in GgufFile(source).tensors.values())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
