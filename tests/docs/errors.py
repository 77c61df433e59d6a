"""Every error that ullm raises on purpose, for docs/reference/errors.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

import ullm.errors
import ullm.server.api.errors
import ullm.supervision
from tests.docs.docstrings import markdown, parse, sentence
from ullm.errors import EngineDead, RequestError, UllmError, UsageError

START = frozenset(
    {"ConfigError", "ResourceUnavailable", "UsageError", "PortTaken", "StartCancelled"}
    | {"ModelError", "ModelNotFound", "ModelFileBroken", "ModelUnsupported", "OutOfMemory"}
)
"""Errors that keep a command from starting, beside those of the model."""

Group = Callable[[type[BaseException]], bool]


def classes() -> list[type[BaseException]]:
    """Return every error class, in the order of its definition; each module's own."""
    found: dict[str, type[BaseException]] = {}
    for module in (ullm.errors, ullm.server.api.errors, ullm.supervision):
        found |= {name: error for name, error in _exported(module) if name not in found}
    return list(found.values())


def _exported(module: ModuleType) -> list[tuple[str, type[BaseException]]]:
    names = dict.fromkeys([*vars(module), *getattr(module, "__all__", ())])
    values = [(name, getattr(module, name)) for name in names]
    return [
        (name, value)
        for name, value in values
        if inspect.isclass(value)
        and issubclass(value, BaseException)
        and value.__module__.startswith("ullm.")
    ]


def request_errors() -> str:
    """Return the errors of one request, which have an HTTP status."""
    return _sections(lambda error: issubclass(error, RequestError))


def start_errors() -> str:
    """Return the errors that keep a command from starting."""
    return _sections(lambda error: error.__name__ in START)


def program_errors() -> str:
    """Return the other errors that a program with an engine may see."""
    return _sections(
        lambda error: (
            issubclass(error, UllmError)
            and error.__name__ not in START
            and not issubclass(error, RequestError)
            and not _of_supervision(error)
        )
    )


def supervision_errors() -> str:
    """Return the errors of the supervision library."""
    return _sections(_of_supervision)


def _of_supervision(error: type[BaseException]) -> bool:
    return error.__module__.startswith("ullm.supervision") and error is not ullm.supervision.Shutdown


def _sections(belongs: Group) -> str:
    return "\n".join(_section(error) for error in classes() if belongs(error))


def _section(error: type[BaseException]) -> str:
    doc = parse(error)
    lines = [f"### {error.__name__}", "", *(f"{markdown(text)}\n" for text in doc.paragraphs)]
    if issubclass(error, RequestError):
        code = f", code `{error.code}`" if error.code else ""
        lines.append(f"- **HTTP status:** {error.status}{code}, type `{error.type}`")
    exit_code = exit_status(error)
    if exit_code is not None:
        lines.append(f"- **Exit status:** {exit_code}")
    for name in ("Raised by", "Remedy"):
        if name in doc.sections:
            lines.append(f"- **{name}:** {sentence(markdown(doc.sections[name]))}")
    return "\n".join(lines) + "\n"


def exit_status(error: type[BaseException]) -> int | None:
    """Return the status with which a command ends that this error ends; None for errors that do not."""
    if error.__name__ in START:
        return 2 if issubclass(error, UsageError) else 1
    return 70 if issubclass(error, EngineDead) else None
