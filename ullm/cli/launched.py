"""``python -m ullm.cli.launched``: an engine or a front end that the launcher has started.

What it is comes through stdin, so that no key is on a command line. The pipe stays open as long as the
launcher lives; when it closes, this process stops in order.
"""

from __future__ import annotations

import sys

from ullm.cli.early import answer_signals
from ullm.cli.orders import read_order


def main() -> int:
    """Read the order and serve; return the exit status."""
    answer_signals(["serve"])
    order = read_order()
    if order is None:
        return 0
    from ullm.cli.exit_status import run_function
    from ullm.machine import collect_rarely, lasting_imports

    with lasting_imports():
        from ullm.cli.launched_part import run_part
    collect_rarely()
    return run_function(lambda: run_part(order), debug=order.engine.log_level == "debug")


if __name__ == "__main__":
    sys.exit(main())
