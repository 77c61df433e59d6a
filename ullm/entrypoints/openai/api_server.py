"""``python -m ullm.entrypoints.openai.api_server --model …``: ``ullm serve`` at vLLM's module path.

Takes every flag of ``ullm serve``, vLLM's names of the common ones included, and ``--use-threading`` for
``--transport thread``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

USE_THREADING = "--use-threading"


def translate(arguments: Sequence[str]) -> list[str]:
    """Return the equivalent arguments of ``ullm serve``."""
    threading = [argument for argument in arguments if argument == USE_THREADING]
    others = [argument for argument in arguments if argument != USE_THREADING]
    return ["serve", *others, *(["--transport", "thread"] if threading else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; return the exit status of ``ullm serve``."""
    from ullm.cli.app import main as run

    return run(translate(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    from ullm.cli.early import answer_signals, fill_closed_descriptors, unset_empty_variables

    fill_closed_descriptors()
    unset_empty_variables(os.environ)
    answer_signals(["serve"])
    sys.exit(main())
