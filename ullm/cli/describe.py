"""What ``ullm doctor MODEL`` and ``ullm pull`` say of a model before it is loaded."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from ullm.cli.child import ask_child
from ullm.cli.terminal import fetch_model, stderr
from ullm.config import EngineConfig

TIMEOUT = 600.0
"""Seconds, in which transformers may read a model of a few GB twice."""


def doctor_model(config: EngineConfig, *, as_json: bool) -> int:
    """Print what a model is, whether it runs and fits; return 1 if not.

    Raises:
        ModelError: the model cannot be found.
        ResourceUnavailable: it could not be examined.
    """
    model = fetch_model(config, stderr(), refresh=False)
    found = describe(config, str(model.path), compare=True)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")
    else:
        show(found, model.name, Console(highlight=False))
    return 0 if found["runs"] != "refused" and found["fits"] is not False else 1


def describe(config: EngineConfig, path: str, *, compare: bool) -> dict[str, Any]:
    """Return `ullm.model.describe.Description` of a model, from a process of its own."""
    message = msgspec.json.encode((config, path, compare))
    answer = ask_child("ullm.model.describe", message, TIMEOUT, task=f"examining {path}")
    found: dict[str, Any] = msgspec.json.decode(answer)
    return found


def show(found: dict[str, Any], name: str, console: Console) -> None:
    """Print a description, one fact a line."""
    for key, value in lines(found, name):
        console.print(Text(f"{key:<14}{value}"), soft_wrap=True)


def lines(found: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """Return the facts and their names."""
    how = {"native": "natively", "transformers": "through transformers' code", "refused": "not at all"}
    reason = f" ({found['reason']})" if found["reason"] else ""
    facts = [("model", name)]
    if found["architecture"]:
        facts.append(("architecture", found["architecture"]))
    facts.append(("runs", how[found["runs"]] + reason))
    if found["dtype"]:
        facts += [("arithmetic", found["dtype"]), ("weights", found["quantization"] or "not known")]
        facts.append(("context", f"{found['context_len']:,} tokens"))
    if found["window"]:
        facts.append(("window", f"{found['window']:,} tokens; what is behind it takes no memory"))
    if found["parameters"] is not None:
        facts.append(("parameters", f"{found['parameters']:,}, {gib(found['weight_bytes'])}"))
    for length, size in sorted((int(length), size) for length, size in found["memory"].items()):
        facts.append(("memory", f"{gib(size)} with one text of {length:,} tokens"))
    if found["fits"] is not None:
        verdict = "fits" if found["fits"] else "does not fit"
        facts.append(("", f"{verdict} into the {gib(found['available'])} that are free"))
    if found["verified"]:
        facts.append(("verified", found["verified"]))
    return facts


def gib(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / (1 << 30):.2f} GiB"
