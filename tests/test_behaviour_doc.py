"""The pages of promises and ported suites name tests that exist; no promise and no case lacks one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISES = (ROOT / "docs" / "explanation" / "behaviour.md").read_text("utf-8")
PORTED = (ROOT / "docs" / "explanation" / "ported-suites.md").read_text("utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
RUNS_THE_PROGRAM = "process"
"""The marker of tests that start real processes."""
WITHOUT_COUNTERPART = frozenset(
    {
        "sleep: wake-up by tags (weights, then KV)",
        "cancellation: disaggregated prefill, decode",
        "etcd or NATS outage",
        "`sup_start_ignore_init`",
        "`external_start_no_progress_log`",
        "`get_callback_module`",
    }
)
"""Cases of other suites about what does not exist here; the page says so. Everything else needs a test."""


def promises() -> list[tuple[str, str]]:
    """Heading and text of each promise."""
    _, *sections = re.split(r"(?m)^### ", re.sub(r"(?m)^## .*$", "", PROMISES))
    return [(heading, text) for heading, _, text in (section.partition("\n") for section in sections)]


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows; heads are those above a line of dashes, and left out."""
    lines = text.splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [row for row in cells if row[0].strip() not in ("case", "---")]


@cache
def named_in(file: str) -> dict[str, bool]:
    """Names of a file's tests, and whether they run the real program."""
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    whole_file = any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "pytestmark"
        and RUNS_THE_PROGRAM in ast.unparse(node.value)
        for node in tree.body
    )
    return {
        node.name: whole_file or any(RUNS_THE_PROGRAM in ast.unparse(mark) for mark in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED.findall(PROMISES + PORTED)}))
def test_every_test_that_is_named_exists(file: str) -> None:
    assert (ROOT / file).is_file()
    named = {name for found, name in NAMED.findall(PROMISES + PORTED) if found == file}
    assert not named - set(named_in(file))


@pytest.mark.parametrize("text", [pytest.param(text, id=heading[:40]) for heading, text in promises()])
def test_every_promise_is_tested_in_the_real_program(text: str) -> None:
    assert any(named_in(file)[name] for file, name in NAMED.findall(text))


@pytest.mark.parametrize("row", rows(PORTED), ids=lambda row: str(row[0]).strip()[:40])
def test_every_ported_case_has_a_test_or_a_reason(row: list[str]) -> None:
    case, here = (cell.strip() for cell in row)
    assert bool(NAMED.search(here)) != (case in WITHOUT_COUNTERPART), (
        "a test, or one of the few known reasons"
    )


def test_every_case_without_a_counterpart_is_on_the_page() -> None:
    reasons = {row[0].strip(): row[1].strip() for row in rows(PORTED)}
    assert all(reasons[case] for case in WITHOUT_COUNTERPART)


def test_all_suites_are_there() -> None:
    heads = re.findall(r"(?m)^## (.*)$", PROMISES + PORTED)
    assert {"Stopping", "Failing", "Sleeping", "vLLM", "Dynamo", "Erlang/OTP supervisor_SUITE"} <= set(heads)
    assert len(promises()) > 60
    assert len(rows(PORTED)) > 90


def test_every_end_to_end_test_of_these_is_named() -> None:
    """A test of the real program's behaviour that no row names has no promise to hold it to."""
    named = {name for _, name in NAMED.findall(PROMISES + PORTED)}
    files = """stopping stopping_at_odd_times faults clients sleeping reloading migration probes replicas
        hosted embedded real_model startup_errors""".split()
    written = {name for file in files for name in named_in(f"tests/e2e/test_{file}.py")}
    assert not written - named
