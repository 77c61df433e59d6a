"""What `ullm.cli.launched` runs: a server that stops when its launcher has gone."""

from __future__ import annotations

import os

import trio

from ullm.cli.orders import STDIN, Order
from ullm.cli.serve import run_process
from ullm.hosting.engine_host import EngineHost
from ullm.logs import get_logger
from ullm.server import inherited_socket

log = get_logger(__name__)


def run_part(order: Order) -> int:
    """Serve as ordered; return the exit status."""
    sockets = [inherited_socket(descriptor) for descriptor in order.sockets]
    return run_process(order.engine, order.server, sockets, _stop_without_launcher)


async def _stop_without_launcher(host: EngineHost) -> None:
    """Request the stop when the pipe closes that the launcher holds open."""
    while True:
        await trio.lowlevel.wait_readable(STDIN)
        if not os.read(STDIN, 1):
            break
    log.warning("the launcher is gone; stopping")
    host.request_stop(by="the launcher's end")
