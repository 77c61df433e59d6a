"""What is said of one request field: its origin, and whether it is honoured."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any


class Effect(enum.Enum):
    """The effect of a field."""

    HONOURED = "honoured"
    REFUSED = "refused"
    """Status 400, except for neutral values: null, what is empty, and what the rule accepts."""
    IGNORED = "without effect"


class Origin(enum.Enum):
    """The API that a field comes from."""

    OPENAI = "OpenAI"
    ANTHROPIC = "Anthropic"
    VLLM = "vLLM"
    """A field of vLLM's that ullm does not have."""
    OWN = "ullm"
    """A field of ullm's that OpenAI's API does not have; most are vLLM's, too."""


@dataclass(frozen=True)
class FieldRule:
    """One request field.

    Args:
        note: values, defaults, reasons, alternatives.
        accepted: values of a refused field that ask for what happens anyway. An object stands for all that
            have its entries.
        unless: name and value of another field that makes a refused one harmless.
        empty_asks: an empty value asks for it, too.
    """

    name: str
    effect: Effect
    note: str = ""
    origin: Origin = Origin.OPENAI
    accepted: tuple[Any, ...] = ()
    unless: tuple[str, Any] | None = None
    empty_asks: bool = False

    @property
    def meaning(self) -> str:
        """The exceptions of a refusal, and the note, in Markdown."""
        return "; ".join(part for part in (self._exceptions(), self.note) if part)

    @property
    def refusal(self) -> str:
        """The message of the refusal."""
        exceptions = self._exceptions()
        text = f"{self.name} is not supported" + (f", {exceptions}" if exceptions else "")
        return (text + (f"; {self.note}" if self.note else "")).replace("`", "")

    def _exceptions(self) -> str:
        if self.unless is not None:
            name, value = self.unless
            return f"except with `{name}` {_code(value)}"
        return f"except for {' and '.join(map(_code, self.accepted))}" if self.accepted else ""


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def honoured(name: str, note: str = "") -> FieldRule:
    """Return a field that does what OpenAI says."""
    return FieldRule(name, Effect.HONOURED, note)


def own(name: str, note: str) -> FieldRule:
    """Return a field of ullm's own."""
    return FieldRule(name, Effect.HONOURED, note, Origin.OWN)


def refused(
    name: str,
    note: str,
    *accepted: Any,
    unless: tuple[str, Any] | None = None,
    empty_asks: bool = False,
) -> FieldRule:
    """Return a field that is refused, but for values that ask for nothing."""
    return FieldRule(name, Effect.REFUSED, note, accepted=accepted, unless=unless, empty_asks=empty_asks)


def ignored(name: str, note: str = "") -> FieldRule:
    """Return a field without effect."""
    return FieldRule(name, Effect.IGNORED, note)


def vllm_refused(name: str, note: str, *accepted: Any) -> FieldRule:
    """Return a field of vLLM's that is refused."""
    return FieldRule(name, Effect.REFUSED, note, Origin.VLLM, accepted)


def vllm_ignored(name: str, note: str) -> FieldRule:
    """Return a field of vLLM's without effect."""
    return FieldRule(name, Effect.IGNORED, note, Origin.VLLM)
