"""The rounds: each engine in a process of its own, one after the other, in an order that rotates."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import trio

from tests.benchmarks.batch.contenders import Contender
from tests.benchmarks.batch.engine_load import EngineJob, EngineLoad, EngineResult
from tests.benchmarks.compare.comparison_rounds import Turn, order
from tests.benchmarks.compare.hardware import MeasuredDevice, measure_device, read_config
from tests.benchmarks.compare.scenarios import Figures
from ullm.errors import UllmError, UsageError
from ullm.testing.processes import descendants, psutil_module

TURN_SECONDS = 1800.0
"""Seconds after which an engine's turn is given up."""

Say = Callable[[str], None]


class ContenderFailed(UllmError):
    """An engine's turn failed; the last line of its log says why."""

    def __init__(self, contender: Contender, what: str, log: Path) -> None:
        lines = log.read_text("utf-8", "replace").strip().splitlines() if log.exists() else []
        reason = f": {lines[-1].strip()}" if lines else ""
        super().__init__(f"{contender.name} {what}{reason} (log: {log})")


@dataclass(frozen=True)
class BatchSetup:
    """The setup, equal for all rounds.

    Args:
        model: folder or file that every engine loads.
        device: ``auto``, ``cpu`` or ``cuda``, for engines that have the choice.
        output: folder for jobs, results and logs.
    """

    model: Path
    load: EngineLoad
    device: str
    output: Path

    def job(self, number: int) -> EngineJob:
        """Return the requests of a round.

        Raises:
            UsageError: the model's config names no vocab_size.
        """
        if not isinstance(size := read_config(self.model).get("vocab_size"), int):
            raise UsageError(f"the config of {self.model} names no vocab_size")
        return self.load.job(size, number)


@dataclass
class FinishedRounds:
    """The turns of all rounds, the job of each round, and the name of the device."""

    turns: list[Turn] = field(default_factory=list)
    jobs: list[EngineJob] = field(default_factory=list)
    device: str = ""


async def run_rounds(
    contenders: Sequence[Contender],
    bench: BatchSetup,
    rounds: int,
    say: Say,
    measure: Callable[[str], MeasuredDevice] = measure_device,
    before: FinishedRounds | None = None,
) -> FinishedRounds:
    """Run all rounds; an engine that fails is reported, and the others continue.

    Args:
        say: gets a line after each turn.
        measure: measures the device before each turn.
        before: earlier rounds, to continue with new requests; not changed.

    Raises:
        MachineUnknown: the device could not be measured.
    """
    finished = FinishedRounds() if before is None else FinishedRounds([*before.turns], [*before.jobs])
    for _ in range(rounds):
        number = len(finished.jobs)
        finished.jobs.append(bench.job(number))
        for contender in order(contenders, number):
            device = await trio.to_thread.run_sync(measure, bench.device)
            finished.device = device.name
            turn = Turn(number, contender.name, None, device.limits)
            try:
                result = await take_turn(contender, bench, finished.jobs[-1], number)
                turn = replace(turn, figures=_figures(bench.load, finished.jobs[-1], result))
            except UllmError as error:
                turn = replace(turn, error=" ".join(str(error).split()))
            finished.turns.append(turn)
            say(_line(turn))
    return finished


async def take_turn(contender: Contender, bench: BatchSetup, job: EngineJob, number: int) -> EngineResult:
    """Run one engine, and end its whole process tree.

    Raises:
        ContenderFailed: the engine is not installed, failed, or took too long.
    """
    name = "".join(c if c.isalnum() else "-" for c in contender.name)
    job_file, result, log = (
        bench.output / f"{name}-{number + 1}.{end}" for end in ("job.json", "json", "log")
    )
    content = {**msgspec.to_builtins(job), "device": bench.device, "options": dict(contender.options)}
    job_file.write_bytes(msgspec.json.encode(content))
    result.unlink(missing_ok=True)
    command = contender.command(bench.model, job_file, result)
    status = await _run(contender, command, log)
    job_file.unlink()
    if status is None:
        raise ContenderFailed(contender, f"was not done after {TURN_SECONDS:.0f} s", log)
    if status or not result.exists():
        raise ContenderFailed(contender, f"ended with status {status}", log)
    return msgspec.json.decode(result.read_bytes(), type=EngineResult)


def _figures(load: EngineLoad, job: EngineJob, result: EngineResult) -> Figures:
    return Figures(load.figures(job, result), {}, result.texts)


async def _run(contender: Contender, command: Sequence[str], log: Path) -> int | None:
    """Run an engine; return its exit status, None if it took too long."""
    with log.open("wb") as output:
        try:
            process = await trio.lowlevel.open_process(
                list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise ContenderFailed(contender, f"cannot run {command[0]}: {error.strerror}", log) from None
    try:
        with trio.move_on_after(TURN_SECONDS):
            return await process.wait()
        return None
    finally:
        with trio.CancelScope(shield=True):
            _end(process.pid)
            await process.wait()


def _end(pid: int) -> None:
    """Kill a process and its descendants."""
    psutil = psutil_module()
    try:
        tree = [psutil.Process(pid), *descendants(pid)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _line(turn: Turn) -> str:
    if turn.figures is None:
        return f"round {turn.round + 1}: {turn.error}"
    shown = [f"{metric.name} {value:.3g} {metric.unit}" for metric, value in turn.figures.values.items()]
    return f"round {turn.round + 1}: {turn.candidate}: {', '.join(shown)}"
