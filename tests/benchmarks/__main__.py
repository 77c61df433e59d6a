"""``python -m tests.benchmarks NAME …``: run one benchmark."""

from __future__ import annotations

import sys

from ullm.cli.early import answer_signals, python_handlers_after


def main() -> int:
    """Run the command line, with early signals handled; return the exit status."""
    answer_signals(())
    with python_handlers_after():
        from tests.benchmarks.command_line import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
