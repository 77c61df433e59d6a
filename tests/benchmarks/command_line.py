"""The command line of ``python -m tests.benchmarks``: one command for each benchmark."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, Parameter

from tests.benchmarks.batch.batch_command import batch
from tests.benchmarks.chat_routing import routing
from tests.benchmarks.compare.compare_command import compare
from tests.benchmarks.disturbance.disturbance_command import disturbance
from tests.benchmarks.events import events
from tests.benchmarks.front_end import front_end
from tests.benchmarks.holds import holds
from tests.benchmarks.migration import migration
from tests.benchmarks.offline.defaults_command import defaults
from tests.benchmarks.offline.offline_command import offline
from tests.benchmarks.pauses import pauses
from tests.benchmarks.perplexity.perplexity_command import perplexity
from tests.benchmarks.simulation.simulate_command import simulate
from tests.benchmarks.soak.soak_command import soak
from tests.benchmarks.startup import startup
from ullm.cli.exit_status import run_command_line

app = App(
    name="python -m tests.benchmarks",
    help="Measure ullm for the pages on performance and reliability in docs/explanation. Needs psutil; plots "
    "need matplotlib.",
    version_flags=[],
    result_action="return_value",
    default_parameter=Parameter(allow_repeating=True),
)
for command in (
    batch,
    compare,
    defaults,
    disturbance,
    events,
    front_end,
    holds,
    migration,
    offline,
    pauses,
    perplexity,
    routing,
    simulate,
    soak,
    startup,
):
    app.command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; return the exit status."""
    return run_command_line(app, sys.argv[1:] if arguments is None else arguments)
