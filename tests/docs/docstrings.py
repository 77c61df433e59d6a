"""Docstrings as their parts: a summary, paragraphs, and the named sections below them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Raised by|Remedy):\s*(.*)$")
_ENTRY = re.compile(r"^(\w[\w, ]*): (.*)$")


@dataclass
class Docstring:
    """A docstring.

    Args:
        paragraphs: the text above the sections, one string each; the first is the summary.
        sections: name → its text, lines joined.
        entries: name of a section with entries → name of an argument, attribute or error → its text.
    """

    paragraphs: list[str] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)
    entries: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first paragraph."""
        return self.paragraphs[0] if self.paragraphs else ""


def parse(target: object) -> Docstring:
    """Return the parts of an object's own docstring."""
    parsed, section, lines = Docstring(), "", []
    for line in [*(inspect.getdoc(target) or "").splitlines(), ""]:
        heading = _SECTION.match(line)
        if heading:
            section, rest = heading[1], heading[2]
            parsed.sections[section] = rest
        elif section and (line.startswith(" ") or not line):
            _add(parsed, section, line)
        elif line:
            section = ""
            lines.append(line)
        elif lines:
            parsed.paragraphs.append(" ".join(lines))
            lines = []
    return parsed


def _add(parsed: Docstring, section: str, line: str) -> None:
    """Take a line of a section, which begins an entry or goes on with one."""
    text = line.strip()
    parsed.sections[section] = f"{parsed.sections[section]} {text}".strip()
    entries = parsed.entries.setdefault(section, {})
    begins = line.startswith("    ") and not line.startswith("     ") and _ENTRY.match(text)
    if begins:
        entries.update(dict.fromkeys((name.strip() for name in begins[1].split(",")), begins[2]))
    elif text and entries:
        last = list(entries)[-1]
        whole = entries[last]
        entries.update({name: f"{whole} {text}" for name, value in entries.items() if value == whole})


def markdown(text: str) -> str:
    """Return a docstring's text as Markdown: single quotes for code, pipes escaped for tables."""
    return text.replace("``", "`").replace("|", "\\|")


def sentence(text: str) -> str:
    """Return a text that begins with a capital, unless with code, and ends with a full stop."""
    text = text.strip()
    return text and text[0].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
