"""The time limits of starts, in one table: no child of an engine may take for ever to become ready.

They are wide. A start that reaches its limit hangs, so it is ended and counts as a failure; the time that
loading a model may take is ``--start-timeout``, which a worker's own rank watches more closely.
"""

from __future__ import annotations

from typing import Final

ACTOR: Final = 60.0
"""For router, scheduler, lifecycle and standby pool, which begin to work at once."""
TOKENIZER: Final = 300.0
"""For reading the tokenizer's files, which may come from a slow disk."""
HTTP_SERVER: Final = 60.0
"""For each of the servers to take its socket over."""

GROUP_MARGIN: Final = 60.0
"""For opening the ranks' transports, and for the pause before a start that follows a failed one."""


def worker_group_seconds(start_timeout: float) -> float:
    """Return how long a worker group may take to start.

    Twice ``--start-timeout``, because a rank has its time again when the whole engine was suspended.
    """
    return 2 * start_timeout + GROUP_MARGIN
