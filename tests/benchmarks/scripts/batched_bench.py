"""A turn of llama-batched-bench, run as ``PYTHON batched_bench.py PROGRAM MODEL JOB RESULT``.

PROGRAM is llama.cpp's or a fork's. JOB and RESULT are those of ``offline_batch.py``; ``options`` has the
program's ``arguments``, a list. The program draws its own random prompts, so only their number and length are
taken from JOB, and it feeds random tokens instead of choosing them, so its figures lack the time of sampling.
All requests of a run must be equally long.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MISSING = 3
BATCH = 2048
"""Tokens per call, the program's own default, but at least the longest prompt."""


class Run(NamedTuple):
    """Requests that are submitted at once, all of one length."""

    requests: int
    prompt_tokens: int
    max_tokens: int


class Row(NamedTuple):
    """A row of the program's table."""

    prompt_tokens: int
    generated_tokens: int
    requests: int
    prompt_seconds: float
    generation_seconds: float


def main(program: str, model: str, job_file: str, result_file: str) -> int:
    """Run the program once for each length of prompt, and write the result."""
    job = json.loads(Path(job_file).read_text("utf-8"))
    runs = {name: run_of(asks) for name, asks in job["runs"].items()}
    rows: list[Row] = []
    began, inside = time.perf_counter(), 0.0
    for command in commands(program, model, runs.values(), job["options"].get("arguments", [])):
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
        except OSError as error:
            sys.stderr.write(f"cannot run {program}: {error.strerror}\n")
            return MISSING
        sys.stdout.write(done.stdout)
        sys.stdout.flush()
        if done.returncode:
            raise RuntimeError(f"{program} ended with status {done.returncode}")
        rows += parse(done.stdout)
        inside += sum(row.prompt_seconds + row.generation_seconds for row in parse(done.stdout))
    loads = len({run.prompt_tokens for run in runs.values()})
    result = {
        "version": "",
        "device": "cpu",
        "load_seconds": (time.perf_counter() - began - inside) / loads,
        "seconds": {name: seconds_of(run, rows) for name, run in runs.items()},
    }
    Path(result_file).write_text(json.dumps(result), "utf-8")
    return 0


def run_of(asks: Sequence[Mapping[str, Any]]) -> Run:
    """Return the form of a run.

    Raises:
        ValueError: its requests are not equally long.
    """
    forms = {(len(ask["prompt"]), ask["max_tokens"]) for ask in asks}
    if len(forms) != 1:
        raise ValueError(f"llama-batched-bench needs requests of one length, not {sorted(forms)}")
    return Run(len(asks), *forms.pop())


def commands(program: str, model: str, runs: Iterable[Run], arguments: Sequence[str]) -> Iterable[list[str]]:
    """Iterate over one command for each length of prompt: it loads the model, then measures all runs of it.

    The first of the tokens is computed with the prompt, so one less is generated.
    """
    by_prompt: dict[int, list[Run]] = {}
    for run in runs:
        by_prompt.setdefault(run.prompt_tokens, []).append(run)
    for prompt_tokens, alike in by_prompt.items():
        most, generated = max(run.requests for run in alike), max(1, max(run.max_tokens for run in alike) - 1)
        values = {
            "-m": model,
            "-c": most * (prompt_tokens + generated),
            "-b": max(BATCH, prompt_tokens),
            "-npp": prompt_tokens,
            "-ntg": generated,
            "-npl": ",".join(str(count) for count in sorted({run.requests for run in alike})),
        }
        yield [program, *(str(word) for pair in values.items() for word in pair), *arguments]


def parse(output: str) -> list[Row]:
    """Return the rows of the program's table."""
    rows = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.lstrip().startswith("|") and len(cells) == 10 and cells[0].isdigit():
            prompt, generated, requests = map(int, cells[:3])
            rows.append(Row(prompt, generated, requests, float(cells[4]), float(cells[6])))
    return rows


def seconds_of(run: Run, rows: Sequence[Row]) -> float:
    """Return the seconds of a run, from the row of as many requests with such prompts.

    Raises:
        RuntimeError: the program did not measure it.
    """
    for row in rows:
        if (row.requests, row.prompt_tokens) == (run.requests, run.prompt_tokens):
            return row.prompt_seconds + row.generation_seconds * (run.max_tokens - 1) / row.generated_tokens
    raise RuntimeError(
        f"llama-batched-bench printed no row of {run.requests} prompts of {run.prompt_tokens} tokens"
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
