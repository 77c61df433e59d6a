"""vLLM's names of common flags: which are ullm's, too, which have no effect, and what replaces the others.

Aliases are declared on the options, in ullm/config.py; here is what is no option of ullm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ullm.cli.flags import Option, engine_options, server_options
from ullm.errors import UsageError

WITHOUT_EFFECT: Mapping[str, str] = {
    "--disable-log-requests": "ullm does not log requests.",
    "--no-enable-log-requests": "ullm does not log requests.",
    "--disable-log-stats": "ullm logs no statistics; GET /metrics has them.",
    "--disable-uvicorn-access-log": "ullm writes no access log.",
    "--enable-chunked-prefill": "Prefill is always chunked.",
    "--enable-sleep-mode": "The engine can always be put to sleep.",
}
"""Flag → why it changes nothing: what it asks for holds anyway. ``ullm serve`` accepts these."""

REFUSED: Mapping[str, str] = {
    "--enable-log-requests": "ullm does not log requests; GET /metrics counts them",
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
    "--enable-lora": "LoRA adapters are not supported",
    "--lora-modules": "LoRA adapters are not supported",
    "--enable-auto-tool-choice": "tool calls are not parsed out of the text",
    "--tool-call-parser": "tool calls are not parsed out of the text",
    "--reasoning-parser": "reasoning is not parsed out of the text",
    "--tokenizer-mode": "there is one kind of tokenizer, the fast one; leave it out",
}
"""Flag → what to do instead."""

SAME = (
    *("--model", "--revision", "--tokenizer", "--served-model-name", "--chat-template", "--dtype"),
    *("--quantization", "--load-format", "--trust-remote-code", "--enforce-eager", "--block-size"),
    *("--gpu-memory-utilization", "--max-num-batched-tokens", "--host", "--port", "--api-key"),
    *("--ssl-keyfile", "--ssl-certfile"),
)
"""Flags that both programs have under the same name."""

NOTES: Mapping[str, str] = {
    "--served-model-name": "Several names: repeat the option, or separate them by commas.",
    "--quantization": "Values differ: auto, none, int8 or int4, for weights on a CPU.",
    "--load-format": "Values: auto or dummy.",
    "--block-size": "On CUDA it is rounded up to a multiple of 256.",
    "--pipeline-parallel-size": "Only 1 is supported.",
    "-pp": "Only 1 is supported.",
    "--chat-template": "A file; the text of a template is not taken.",
    "--api-key": "Several keys: repeat the option.",
    "--ssl-certfile": "Needs --ssl-keyfile, also where one file holds both.",
    "--max-model-len": "A number of tokens; neither auto nor a suffix as in 8k.",
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


def hint_for(option: str) -> str | None:
    """Return an error line for a flag of vLLM's that ullm does not have; None for any other."""
    flag = option.partition("=")[0]
    if flag in REFUSED:
        return f"{flag} is an option of vLLM: {REFUSED[flag]}"
    if flag in WITHOUT_EFFECT:
        return f"{flag} is an option of ullm serve only, and without effect: {WITHOUT_EFFECT[flag]}"
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
