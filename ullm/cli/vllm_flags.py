"""vLLM's names of common flags: which are ullm's, too, which have no effect, and what replaces the others.

Aliases are declared on the options, in ullm/config/; here is what is no option of ullm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ullm.cli.flags import Option, engine_options, server_options
from ullm.cli.llama_flags import LLAMA_CPP
from ullm.errors import UsageError

WITHOUT_EFFECT: Mapping[str, str] = {
    "--disable-log-requests": "ullm logs requests only with --access-log.",
    "--no-enable-log-requests": "ullm logs requests only with --access-log.",
    "--disable-log-stats": "ullm logs no statistics; GET /metrics has them.",
    "--disable-uvicorn-access-log": "ullm writes an access log only with --access-log.",
    "--enable-chunked-prefill": "Prefill is always chunked.",
    "--enable-auto-tool-choice": "Calls of tools are always read.",
    "--enable-lora": "Adapters can always be loaded.",
    "--enable-sleep-mode": "The engine can always be put to sleep.",
}
"""Flag → why it changes nothing: what it asks for holds anyway. ``ullm serve`` accepts these."""

REFUSED: Mapping[str, str] = {
    "--enable-log-requests": "use --access-log, which logs no texts",
    "--no-enable-chunked-prefill": "prefill is always chunked; use --max-num-batched-tokens for the size",
    "--swap-space": "preempted sequences are computed again instead of swapped out; leave it out",
    "--cpu-offload-gb": "weights stay on one device; leave it out",
    "--kv-cache-dtype": "the KV cache has the computation dtype, --dtype; leave it out",
    "--distributed-executor-backend": "use --transport process, thread or ray",
    "--async-scheduling": "use --steps-ahead 1, which is the default",
    "--no-async-scheduling": "use --steps-ahead 0",
    "--speculative-config": "use --num-speculative-tokens; drafts come from repetitions, not from a model",
    "--speculative-model": "use --num-speculative-tokens; drafts come from repetitions, not from a model",
    "--max-seq-len-to-capture": "CUDA graphs do not depend on it; leave it out, or use --enforce-eager",
    "--seed": "requests carry a seed of their own, the field seed",
    "--download-dir": "set the environment variable ULLM_CACHE or HF_HUB_CACHE",
    "--hf-token": "set the environment variable HF_TOKEN",
    "--allowed-origins": "use --cors-origins, a list separated by commas",
    "--uvicorn-log-level": "use --log-level",
    "--root-path": "have the proxy strip the prefix",
    "--max-loras": "as many adapters as fit into memory are computed together; leave it out",
    "--max-cpu-loras": "every adapter stays loaded; leave it out, or unload adapters",
    "--max-lora-rank": "adapters of any rank are loaded; leave it out",
    "--lora-dtype": "adapters are computed in --dtype; leave it out",
    "--fully-sharded-loras": "each rank has its part of one of an adapter's two matrices; leave it out",
    "--tokenizer-mode": "there is one kind of tokenizer, the fast one; leave it out",
}
"""Flag → what to do instead."""

SAME = (
    *("--model", "--revision", "--tokenizer", "--served-model-name", "--chat-template", "--dtype"),
    *("--quantization", "--load-format", "--trust-remote-code", "--enforce-eager", "--block-size"),
    *("--gpu-memory-utilization", "--max-num-batched-tokens", "--host", "--port", "--api-key"),
    *("--ssl-keyfile", "--ssl-certfile", "--uds", "--master-addr", "--nnodes", "--node-rank"),
    *("--tool-call-parser", "--reasoning-parser", "--trust-request-chat-template"),
    *("--generation-config", "--api-server-count", "--headless"),
)
"""Flags that both programs have under the same name."""

NOTES: Mapping[str, str] = {
    "--served-model-name": "Several names: all words that follow, if the model is named by --model or as "
    "the first word; or repeat the option, or separate them by commas.",
    "--quantization": "Values differ: auto, none, int8 or int4, for weights on a CPU.",
    "--generation-config": "Values: auto or vllm; no folder.",
    "--load-format": "Values: auto or dummy.",
    "--block-size": "On CUDA it is rounded up to a multiple of 256.",
    "--master-addr": "Of loopback, unless --nnodes says that there are other hosts.",
    "--node-rank": "Other hosts than 0 need no --headless; all need --node-secret-file.",
    "--chat-template": "A file; the text of a template is not taken.",
    "--api-key": "Several keys: repeat the option.",
    "--ssl-certfile": "Needs --ssl-keyfile, also where one file holds both.",
    "--max-model-len": "A number of tokens; neither auto nor a suffix as in 8k.",
    "--lora-modules": "Entries NAME=FOLDER: all words that follow, or repeat the option, or separate them by "
    "commas; not as JSON.",
    "--headless": "Needs --listen, where front ends connect.",
    "--num-speculative-tokens": "A flag of older versions; later ones have it in --speculative-config.",
}


def without_effect() -> list[Option]:
    """Return the options that are accepted because what they ask for holds anyway; help leaves them out."""
    return [
        Option(flag.removeprefix("--").replace("-", "_"), bool, False, reason, "Logging", shown=False)
        for flag, reason in WITHOUT_EFFECT.items()
    ]


def check_without_effect(options: Mapping[str, Any]) -> None:
    """Raise `UsageError` for an option without effect that is turned off, which would need one."""
    for option in without_effect():
        if options.get(option.name) is False:
            raise UsageError(f"{option.flag}=false cannot be honoured: {option.help}")


def with_all_names(line: Sequence[str]) -> list[str]:
    """Return a command line in which ``--served-model-name a b`` is ``--served-model-name a,b``.

    Likewise ``--lora-modules a=x b=y``, whose words are told from others by their ``=``.

    vLLM takes all words that follow. Here the last of them may be the model, so this is done only where the
    model is named elsewhere: by ``--model``, or as the first word.
    """
    arguments = _joined(line, ("--lora-modules", "--lora"), lambda word: "=" in word)
    named = any(each.partition("=")[0] == "--model" for each in arguments)
    if not named and (len(arguments) < 2 or arguments[1].startswith("-")):
        return arguments
    return _joined(arguments, ("--served-model-name",), lambda word: True)


def _joined(line: Sequence[str], flags: Sequence[str], is_value: Callable[[str], bool]) -> list[str]:
    """Return a command line in which the words that follow a flag are one, joined by commas."""
    arguments, joined = list(line), list[str]()
    while arguments:
        joined.append(arguments.pop(0))
        if joined[-1] in flags:
            ends = (i for i, each in enumerate(arguments) if each.startswith("-") or not is_value(each))
            count = next(ends, len(arguments))
            joined += [",".join(arguments[:count])] if count else []
            del arguments[:count]
    return joined


def hint_for(option: str) -> str | None:
    """Return an error line for a flag of vLLM's or llama.cpp's that ullm does not have; else None."""
    flag = option.partition("=")[0]
    if flag in REFUSED:
        return f"{flag} is an option of vLLM: {REFUSED[flag]}"
    if flag in WITHOUT_EFFECT:
        return f"{flag} is an option of ullm serve only, and without effect: {WITHOUT_EFFECT[flag]}"
    if flag in LLAMA_CPP:
        return f"{flag} is an option of llama.cpp: {LLAMA_CPP[flag]}"
    return None


def with_both_names(line: str, arguments: Sequence[str]) -> str:
    """Return an error line in which an option that was given under another name has both names."""
    given = {argument.partition("=")[0] for argument in arguments}
    for option in [*engine_options(), *server_options()]:
        for alias in given.intersection(option.aliases):
            either = rf"(?<![\w-])(?:{re.escape(option.flag)}|{re.escape(alias)})(?![\w-])"
            line = re.sub(either, f"{alias} ({option.flag})", line, count=1)
    return line


def vllm_flags() -> Iterator[tuple[str, str, str]]:
    """Yield (flag of vLLM, option of ullm or an empty text, note) for every flag that is known here."""
    for option in [*engine_options(), *server_options()]:
        for name in (option.flag, *option.aliases):
            if name != option.flag or name in SAME:
                yield name, option.flag, NOTES.get(name, "")
    for flag, reason in WITHOUT_EFFECT.items():
        yield flag, "", f"Accepted, without effect: {reason}"
    for flag, advice in REFUSED.items():
        yield flag, "", f"Refused: {advice}."
