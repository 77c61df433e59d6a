"""``python -m tests.docs``: write every made table and page; ``--check`` only names those that differ."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.docs.pages import ROOT, made_pages


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or compare them; return 1 if ``--check`` finds one that differs."""
    stale = {path: text for path, text in made_pages().items() if path.read_text("utf-8") != text}
    for path, text in stale.items():
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
        if "--check" not in arguments:
            path.write_text(text, "utf-8")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
