"""vLLM's flags beside ullm's, for docs/how-to/migrating-from-vllm.md."""

from __future__ import annotations

import re

from tests.docs.docstrings import table
from ullm.cli.vllm_flags import vllm_flags

_FLAG = re.compile(r"(?<![`\w])(--?[a-z][\w-]*(?: [0-9])?)")


def same_flags() -> str:
    """Return the flags that mean the same in both programs, and what differs in their values."""
    rows = [(flag, note) for flag, option, note in vllm_flags() if flag == option]
    notes = "".join(f"- `{flag}`: {note}\n" for flag, note in rows if note)
    return ", ".join(f"`{flag}`" for flag, _ in rows) + f".\n\n{notes}"


def alias_table() -> str:
    """Return a row per name of vLLM's that is accepted for an option with another name."""
    rows = [
        [f"`{flag}`", f"`{option}`", note] for flag, option, note in vllm_flags() if option not in ("", flag)
    ]
    return table(["vLLM", "ullm", "note"], rows)


def other_table() -> str:
    """Return a row per flag that ullm has no option for: why it has no effect, or what to do instead."""
    rows = [[f"`{flag}`", _FLAG.sub(r"`\1`", note)] for flag, option, note in vllm_flags() if not option]
    return table(["vLLM", "ullm"], rows)
