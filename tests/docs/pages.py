"""The places in the pages that are made from the code, and what belongs there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.docs import (
    architectures,
    command_line,
    errors,
    folders,
    http_api,
    metrics,
    mutants,
    python_api,
    vllm,
)
from ullm.cli import options_doc

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MARK = re.compile(r"(?ms)^<!-- made: (?P<name>[\w-]+) -->\n.*?^<!-- end -->$")

TABLES: Mapping[str, Callable[[], str]] = {
    "architectures": architectures.architecture_table,
    "folders": folders.folder_table,
    "layers": folders.layer_table,
    "routes": http_api.route_table,
    "chat-fields": http_api.chat_fields,
    "completion-fields": http_api.completion_fields,
    "response-fields": http_api.response_fields,
    "message-fields": http_api.message_fields,
    "embedding-fields": http_api.embedding_fields,
    "score-fields": http_api.score_fields,
    "rerank-fields": http_api.rerank_fields,
    "other-fields": http_api.other_fields,
    "answers": http_api.answers,
    "statuses": http_api.status_table,
    "metrics": metrics.metric_table,
    "mutants": mutants.mutant_table,
    "request-errors": errors.request_errors,
    "start-errors": errors.start_errors,
    "program-errors": errors.program_errors,
    "supervision-errors": errors.supervision_errors,
    "commands": command_line.commands,
    "python-api": python_api.reference,
    "vllm-same": vllm.same_flags,
    "vllm-aliases": vllm.alias_table,
    "vllm-others": vllm.other_table,
}
"""Name of a place → the text that belongs there."""


def pages() -> list[Path]:
    """Return every page of the documentation, the README included."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def filled(text: str) -> str:
    """Return a page with every marked place filled."""
    return MARK.sub(
        lambda mark: f"<!-- made: {mark['name']} -->\n\n{TABLES[mark['name']]()}\n<!-- end -->", text
    )


def made_pages() -> dict[Path, str]:
    """Return the pages that have made parts, as the code says that they are to be."""
    marked = {path: text for path in pages() if MARK.search(text := path.read_text("utf-8"))}
    whole = {DOCS / "reference" / "configuration.md": options_doc.page()}
    return {path: filled(text) for path, text in marked.items()} | whole
