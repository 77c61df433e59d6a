"""A runner that takes a minute to prepare, for `ullm serve --runner slow_to_prepare:Runner`."""

from __future__ import annotations

import time
from collections.abc import Callable

from ullm.logs import get_logger
from ullm.protocol.messages import Prepare, Progress
from ullm.testing import ScriptedRunner

log = get_logger("ullm.tests")


class Runner(ScriptedRunner):
    """As scripted, but for its preparation."""

    def prepare(self, prepare: Prepare, progress: Callable[[Progress], None]) -> None:
        """Say so, and sleep."""
        log.info("preparing for a minute")
        time.sleep(60)
