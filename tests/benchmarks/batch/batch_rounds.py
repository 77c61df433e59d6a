"""The rounds: each engine in a process of its own, one after the other, in an order that rotates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import trio

from tests.benchmarks import scripts
from tests.benchmarks.batch.batch_load import BatchJob, BatchLoad, vocab_size
from tests.benchmarks.batch.contenders import Contender
from tests.benchmarks.compare.comparison_rounds import Turn
from tests.benchmarks.compare.hardware import (
    PROBE_SECONDS,
    Limits,
    MachineUnknown,
    measure_bandwidth,
)
from tests.benchmarks.compare.scenarios import Figures, Metric
from ullm.errors import UllmError
from ullm.testing.processes import descendants, psutil_module

TURN_SECONDS = 1800.0
"""Seconds after which an engine's turn is given up."""
THROUGHPUT = Metric("all requests at once, output", "tok/s")
SECONDS = Metric("all requests at once", "s", "lower")
SINGLE = Metric("one request alone, decoding", "tok/s")
LOADING = Metric("until it can generate", "s", "lower")

Say = Callable[[str], None]


class ContenderFailed(UllmError):
    """An engine's turn failed; the last line of its log says why."""

    def __init__(self, contender: Contender, what: str, log: Path) -> None:
        lines = log.read_text("utf-8", "replace").strip().splitlines() if log.exists() else []
        reason = f": {lines[-1].strip()}" if lines else ""
        super().__init__(f"{contender.name} {what}{reason} (log: {log})")


class EngineResult(msgspec.Struct, frozen=True):
    """The result that ``offline_batch.py`` writes."""

    version: str
    device: str
    load_seconds: float
    seconds: float
    single_tokens: int
    single_seconds: float
    first_seconds: float


@dataclass(frozen=True)
class MeasuredDevice:
    """The device that the engines run on."""

    name: str
    limits: Limits


@dataclass(frozen=True)
class BatchSetup:
    """The setup, equal for all rounds.

    Args:
        model: folder that every engine loads.
        device: ``auto``, ``cpu`` or ``cuda``, for engines that have the choice.
        output: folder for jobs, results and logs.
    """

    model: Path
    load: BatchLoad
    device: str
    output: Path

    def job(self, number: int) -> BatchJob:
        """Return the requests of a round."""
        return replace(self.load, seed=self.load.seed + number).job(vocab_size(self.model))


@dataclass(frozen=True)
class BatchRound:
    """The requests of a round, and the device as measured before it."""

    job: BatchJob
    device: MeasuredDevice


def measure_device(device: str) -> MeasuredDevice:
    """Measure the bandwidth and arithmetic of a device, in a process that has PyTorch.

    Raises:
        MachineUnknown: that process failed.
    """
    script = str(Path(scripts.__file__).with_name("device_limits.py"))
    try:
        done = subprocess.run(
            [sys.executable, script, device],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
        raise MachineUnknown(f"--device {device} cannot be measured: {lines[-1]}") from None
    except subprocess.SubprocessError as error:
        raise MachineUnknown(f"{script}: {error}") from None
    result = json.loads(done.stdout.splitlines()[-1])
    return MeasuredDevice(
        result["device"], Limits(result["bandwidth"] or measure_bandwidth(), result["arithmetic"])
    )


async def run_rounds(
    contenders: Sequence[Contender],
    bench: BatchSetup,
    rounds: int,
    say: Say,
    measure: Callable[[str], MeasuredDevice] = measure_device,
) -> tuple[list[Turn], list[BatchRound]]:
    """Run all rounds; an engine that fails is reported, and the others continue.

    Args:
        say: gets a line after each turn.
        measure: measures the device before each round.

    Raises:
        MachineUnknown: the device could not be measured.
    """
    turns, finished = [], []
    for number in range(rounds):
        finished.append(BatchRound(bench.job(number), await trio.to_thread.run_sync(measure, bench.device)))
        shift = number % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            turn = Turn(number, contender.name, None, finished[-1].device.limits.bandwidth)
            try:
                result = await take_turn(contender, bench, finished[-1].job, number)
                turn = replace(turn, figures=figures(result, finished[-1].job))
            except UllmError as error:
                turn = replace(turn, error=" ".join(str(error).split()))
            turns.append(turn)
            say(_line(turn))
    return turns, finished


async def take_turn(contender: Contender, bench: BatchSetup, job: BatchJob, number: int) -> EngineResult:
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


def figures(result: EngineResult, job: BatchJob) -> Figures:
    """Return an engine's result by metric."""
    return Figures(
        {
            THROUGHPUT: job.output_tokens / result.seconds,
            SECONDS: result.seconds,
            SINGLE: result.single_tokens / result.single_seconds,
            LOADING: result.load_seconds,
        },
        {},
    )


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
    values = turn.figures.values
    return (
        f"round {turn.round + 1}: {turn.candidate}: {values[THROUGHPUT]:.0f} tok/s in "
        f"{values[SECONDS]:.1f} s, alone {values[SINGLE]:.0f} tok/s"
    )
