"""``ullm serve --node-rank 1``: a host beside the engine's own, which runs workers for it."""

from __future__ import annotations

import trio

from ullm.cli.terminal import announce
from ullm.config import EngineConfig
from ullm.engine.current_model import find_local_model
from ullm.logs import configure
from ullm.nodes.agent import Agent
from ullm.protocol import stop_budget
from ullm.protocol.exit_codes import EXIT_ABANDONED, EXIT_OK
from ullm.supervision.signals import Watchdog, signal_ladder


def run_node(config: EngineConfig) -> int:
    """Run workers for the engine until it has stopped, or a signal comes; return the exit status.

    Raises:
        ConfigError: the engine lets this host not in, or the secret cannot be read.
        ServerUnreachable: there is no engine for as long as ``--start-timeout``.
    """
    configure(config.log_level, as_json=config.log_format == "json")
    return trio.run(_run, config)


async def _run(config: EngineConfig) -> int:
    agent = Agent(config, find_local_model)

    def leave() -> None:
        watchdog.arm(stop_budget.watchdog_seconds(config.shutdown_timeout))
        agent.leave()

    with Watchdog(exit_code=EXIT_ABANDONED) as watchdog:
        async with trio.open_nursery() as nursery:
            await nursery.start(
                lambda task_status: signal_ladder(
                    lambda _: leave(), lambda _: agent.leave_now(), task_status=task_status
                )
            )
            try:
                await agent.run(
                    lambda engine: announce(
                        f"ready: workers of --node-rank {config.node_rank} for {engine}\n"
                    )
                )
            finally:
                nursery.cancel_scope.cancel()
    return EXIT_OK
