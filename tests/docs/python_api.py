"""The public classes and functions, for docs/reference/python-api.md."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ullm
import ullm.engine
import ullm.engine.generation
import ullm.engine.output
import ullm.engine.status
import ullm.llm
import ullm.protocol.messages
from tests.docs.docstrings import markdown, parse, sentence, table

PENDING_SHUTDOWN = typing.get_type_hints(ullm.llm.LLM.shutdown)["return"]

SUBJECTS: Mapping[str, tuple[Any, ...]] = {
    "Engines on trio": (ullm.open_engine, ullm.engine.Engine, ullm.engine.generation.Generation),
    "LLM": (ullm.llm.LLM, ullm.llm.TokenStream, PENDING_SHUTDOWN),
    "What requests ask and get": (
        ullm.SamplingParams,
        ullm.engine.output.Output,
        ullm.llm.GenerateOutput,
        ullm.llm.Completion,
        ullm.protocol.messages.TokenLogprobs,
    ),
    "What an engine tells about itself": (
        ullm.engine.status.Health,
        ullm.engine.status.ReplicaHealth,
        ullm.engine.status.SleepHealth,
        ullm.engine.status.ReloadReport,
        ullm.engine.status.EngineStatistics,
        ullm.llm.ShutdownReport,
    ),
}
"""Heading → what it shows. Configurations are in configuration.md, errors in errors.md."""


CALLED = (ullm.open_engine, ullm.llm.LLM)
"""Those that programs call; objects of the other classes come from them."""
PLAIN: Mapping[str, str] = {
    "num_prompt_tokens": "Tokens of the prompt.",
    "num_generated_tokens": "Tokens generated so far.",
    "token_ids": "The new tokens.",
    "text": "The text.",
    "finish_reason": "`stop`, `length`, `abort` or `timeout`.",
    "token_id": "The token.",
    "logprob": "Its log probability.",
    "replica": "Its number, from 0; a reload counts on.",
    "replicas": "One per replica.",
    "sleep": "Whether the engine sleeps, and takes requests.",
    "worker_pids": "Process numbers of its workers, one per rank.",
    "revision": "The revision that was loaded, if one was asked for.",
    "kv_blocks_used": "KV blocks that sequences use.",
    "kv_blocks_total": "KV blocks that there are.",
    "prefix_cache_hit_tokens": "Prompt tokens found in the prefix cache.",
    "prefix_cache_query_tokens": "Prompt tokens looked up in it.",
    "prompt_tokens_total": "Prompt tokens of admitted requests.",
    "generation_tokens_total": "Tokens generated.",
    "preemptions_total": "Sequences preempted for lack of KV blocks.",
    "worker_restarts_total": "Restarts of worker groups.",
    "requests_resumed_total": "Submissions of interrupted requests.",
}
"""Name of a field → its meaning, where the name nearly says it and no docstring does."""


def reference() -> str:
    """Return a section per subject with one per class or function."""
    return "\n".join(
        f"## {title}\n\n" + "\n".join(_section(target) for target in targets)
        for title, targets in SUBJECTS.items()
    )


def _section(target: Any) -> str:
    doc = parse(target)
    parts = [f"### {target.__name__}", f"`{target.__module__}`", *map(markdown, doc.paragraphs)]
    if target in CALLED:
        parts.insert(2, f"```text\n{_call(target)}\n```")
    parts += _arguments(target, doc.entries)
    parts += [_raises(doc.entries)] if "Raises" in doc.entries else []
    members = list(_members(target)) if inspect.isclass(target) else []
    if members:
        parts.append(table(["member", "what it does"], members).rstrip())
    return "\n\n".join(parts) + "\n"


def _is_value(target: Any) -> bool:
    """Tell a struct or a dataclass, whose fields are a table, from other classes."""
    return hasattr(target, "__struct_fields__") or hasattr(target, "__dataclass_fields__")


def _arguments(target: Any, entries: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    texts = entries.get("Args", {})
    if not _is_value(target):
        if texts and target in CALLED:
            yield table(
                ["argument", "meaning"], [[f"`{n}`", sentence(markdown(t))] for n, t in texts.items()]
            ).rstrip()
        return
    hints = target.__annotations__
    names = getattr(target, "__struct_fields__", None) or tuple(target.__dataclass_fields__)
    rows = [
        [
            f"`{n}`",
            f"`{markdown(_short(str(hints[n])))}`",
            sentence(markdown(texts.get(n) or PLAIN.get(n, ""))),
        ]
        for n in names
    ]
    yield table(["field", "type", "meaning"], rows).rstrip()


def _raises(entries: Mapping[str, Mapping[str, str]]) -> str:
    lines = [f"- `{name}`: {sentence(markdown(text))}" for name, text in entries["Raises"].items()]
    return "Raises:\n\n" + "\n".join(lines)


def _members(cls: type) -> Iterator[list[str]]:
    """Yield the public methods and properties, with their own docstrings' first paragraphs."""
    names = dict.fromkeys(name for base in cls.__mro__ for name in vars(base) if not name.startswith("_"))
    for name in names:
        member = inspect.getattr_static(cls, name)
        if isinstance(member, property):
            yield [f"`{name}`", markdown(parse(member).summary)]
        elif inspect.isfunction(member):
            yield [f"`{_signature(member, name)}`", markdown(parse(member).summary)]


def _signature(function: Any, name: str) -> str:
    """Return how to call a method, for a table."""
    signature = inspect.signature(function)
    called = f"{name}({', '.join(_parameters(signature))}) -> {_short(str(signature.return_annotation))}"
    return markdown(f"await {called}" if inspect.iscoroutinefunction(function) else called)


def _call(target: Any) -> str:
    """Return how to call a function or a class, one line per parameter."""
    lines = "".join(f"    {each},\n" for each in _parameters(inspect.signature(target)))
    return f"{target.__name__}(\n{lines})"


def _parameters(signature: inspect.Signature) -> Iterator[str]:
    """Yield the parameters but ``self``, as they are written in the code."""
    keyword_only = False
    for each in signature.parameters.values():
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        stars = "**" if each.kind is each.VAR_KEYWORD else ""
        default = "" if each.default is each.empty else f" = {each.default!r}"
        yield f"{stars}{each.name}: {_short(str(each.annotation))}{default}"


def _short(annotation: str) -> str:
    """Return an annotation without the modules that would hide the names."""
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", annotation)
