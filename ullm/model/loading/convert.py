"""``python -m ullm.model.loading.convert WHAT SOURCE FOLDER [--trust-remote-code]``: one-off conversions.

They run in a process of their own, so that the front end never loads torch or transformers. ``tokenizer``
writes tokenizer.json and its companions, for a GGUF file also config.json; ``config`` writes only that
one, for a GGUF file whose tokenizer is not used; ``model`` writes a GGUF file's weights too, dequantized, as
bf16 safetensors. Progress goes to stdout as ``Progress DONE of TOTAL`` bytes. A
failure ends with exit status 1 and a line ``error CLASS MESSAGE``.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

from ullm.errors import ModelError, ModelFileBroken, ModelUnsupported, one_line
from ullm.hub.files import read_json

TRUST = "--trust-remote-code"
SENTENCEPIECE = ("sentencepiece", "google.protobuf")
"""What transformers needs to read a tokenizer.model."""


def main(arguments: list[str]) -> int:
    """Convert and return the exit status."""
    what, source, folder = arguments[0], Path(arguments[1]), Path(arguments[2])
    try:
        if source.is_dir():
            write_tokenizer_of_folder(source, folder, trust_remote_code=TRUST in arguments[3:])
        else:
            write_gguf(source, folder, what)
    except ModelError as error:
        _say(f"error {type(error).__name__} {error}")
        return 1
    return 0


def write_tokenizer_of_folder(source: Path, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write tokenizer.json for a checkpoint that has only an older format, such as tokenizer.model.

    Args:
        trust_remote_code: run the tokenizer's own code, if it comes with some.

    Raises:
        ModelUnsupported: packages are missing that its format needs; names them.
        ModelFileBroken: transformers cannot read or convert its tokenizer.
    """
    from transformers import AutoTokenizer

    check_sentencepiece(source)
    settings = read_json(source / "tokenizer_config.json", missing_ok=True)
    if "AutoTokenizer" in (settings.get("auto_map") or ()) and not trust_remote_code:
        raise ModelFileBroken(
            source, "its tokenizer comes with its own code: use --trust-remote-code if you trust it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a broken file, or the tokenizer's own code, may raise anything
        if "instantiate the backend tokenizer" in str(error):  # which lists what a programmer could pass
            raise ModelFileBroken(
                source,
                "has no file that a tokenizer can be made of, such as tokenizer.json or tokenizer.model; "
                "fetch the model again, or name another tokenizer with --tokenizer",
            ) from error
        raise ModelFileBroken(source, f"its tokenizer cannot be read: {one_line(error)}") from error
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelFileBroken(source, f"{type(tokenizer).__name__} cannot be written as tokenizer.json")


def check_sentencepiece(source: Path) -> None:
    """Return unless a folder's only tokenizer is a SentencePiece model that cannot be read here.

    Raises:
        ModelUnsupported: so it is; names what to install.
    """
    file = source / "tokenizer.model"
    if not file.is_file() or file.read_bytes()[:1] != b"\n":  # as protobuf begins; others are lists of tokens
        return
    missing = [name for name in SENTENCEPIECE if not is_installed(name)]
    if missing:
        raise ModelUnsupported(
            f"{file}: the model has no tokenizer.json, and to read this file {' and '.join(missing)} must be "
            "installed: pip install 'ullm-engine[sentencepiece]'; or name another tokenizer with --tokenizer"
        )


def is_installed(module: str) -> bool:
    """Return True if a module can be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


def write_gguf(source: Path, folder: Path, what: str) -> None:
    """Write config.json and generation_config.json of a GGUF file, and what else is wanted.

    Args:
        what: ``config``: nothing else; ``tokenizer``: the tokenizer; ``model``: the weights as well.

    Raises:
        ModelError: the file is broken or of an unsupported kind.
    """
    from ullm.model.loading.gguf import read_gguf_config, write_generation_config, write_tokenizer

    config = read_gguf_config(source, warn=False)  # the worker does
    write_generation_config(source, folder)
    if what != "config":
        write_tokenizer(source, folder)
    if what == "model":
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
