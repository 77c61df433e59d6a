"""Every promise has a mutant that breaks it and a check that notices."""

from __future__ import annotations

import sys

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import ROOT, Chaos, Copy, Mutant, NamedTest

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform == "win32", reason="chaos sends POSIX signals"),
]

SAMPLE = ("refused for ever after the third loss", "a client that leaves is not noticed")
"""Mutants whose chaos runs are in the slow tier."""
PROCESSES = ("tests/e2e/", "tests/actors/transports/test_process")
"""How tests begin that start processes."""


def tier(mutant: Mutant, check: NamedTest | Chaos) -> list[pytest.MarkDecorator]:
    """The marks of a check: tests in memory are fast, and chaos takes half a minute."""
    if isinstance(check, Chaos):
        return [pytest.mark.slow if mutant.name in SAMPLE else pytest.mark.long, pytest.mark.timeout(600)]
    return [pytest.mark.slow] if check.name.startswith(PROCESSES) else []


CASES = [
    pytest.param(mutant, check, id=f"{mutant.name}: {check.kind}", marks=tier(mutant, check))
    for mutant in MUTANTS
    for check in mutant.checks
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize(("mutant", "check"), CASES)
def test_the_check_notices(copy: Copy, mutant: Mutant, check: NamedTest | Chaos) -> None:
    copy.must_notice(mutant, check)


@pytest.mark.slow
def test_the_tests_are_content_with_the_package_as_it_is(copy: Copy) -> None:
    checks = (check for mutant in MUTANTS for check in mutant.checks)
    copy.must_be_content([check for check in dict.fromkeys(checks) if isinstance(check, NamedTest)])


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "check",
    list({c.options: c for m in MUTANTS for c in m.checks if isinstance(c, Chaos)}.values()),
    ids=lambda check: check.options,
)
def test_chaos_is_content_with_the_package_as_it_is(copy: Copy, check: Chaos) -> None:
    copy.must_be_content(check)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_no_mutant_is_stale(mutant: Mutant) -> None:
    text = (ROOT / "ullm" / mutant.file).read_text("utf-8")
    assert text.count(mutant.old) == 1, f"ullm/{mutant.file} does not have these lines once:\n{mutant.old}"
    assert mutant.new != mutant.old


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    assert all(mutant.checks for mutant in MUTANTS)
