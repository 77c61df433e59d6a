"""Measure the CPU kernels beside the first start on a machine, for the next one."""

from __future__ import annotations

import os
import subprocess

import msgspec
import trio

from ullm.config import EngineConfig, Tuning
from ullm.hub.tuning import read_tuning
from ullm.logs import get_logger
from ullm.protocol.messages import ModelInfo
from ullm.system.interpreter import python_command, python_environment
from ullm.system.lifeline import Lifeline

log = get_logger(__name__)

DELAY = 10.0
"""Seconds from the start of serving: commands that give one answer end before."""
NICENESS = 19
PROGRAM = (
    f"import os, sys; os.nice({NICENESS}); from ullm.model.calibrate import main; raise SystemExit(main())"
)


def is_wanted(config: EngineConfig, model_path: str, info: ModelInfo) -> bool:
    """Return True if the CPU kernels compute the model in processes, and nothing was measured for it yet."""
    return (
        config.calibrates_kernels
        and config.worker_transport == "process"
        and info.tuning == Tuning().origin
        and hasattr(os, "nice")
        and read_tuning(config, model_path) is None
    )


async def calibrate_for_next_start(config: EngineConfig, model_path: str, info: ModelInfo) -> None:
    """Measure at the lowest priority, in a process that ends with this task; this engine stays as it is."""
    if not is_wanted(config, model_path, info):
        return
    await trio.sleep(DELAY)
    try:
        with Lifeline() as lifeline:
            done = await trio.run_process(
                python_command("-c", PROGRAM),
                env=python_environment(),
                stdin=msgspec.json.encode((config, model_path)),
                stdout=subprocess.DEVNULL,
                capture_stderr=True,
                check=False,
                pass_fds=lifeline.pass_fds,
                task_status=lifeline,
            )
    except OSError as error:
        log.warning("the CPU kernels were not calibrated", reason=str(error))
        return
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        log.warning("the CPU kernels were not calibrated", reason=lines[-1])
    else:
        log.info("CPU kernels calibrated for the next start", model=config.model_name)
