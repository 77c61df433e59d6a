"""Mutants: copies of the package with one promise broken on purpose, and the check that must notice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

PLUGINS = ("xdist", "anyio", "hypothesispytest", "cacheprovider", "schemathesis")
"""Plugins of pytest that no check needs, and that take long to import."""

TEST_SECONDS = 60.0
CHAOS_SECONDS = 280.0
"""Seconds after which a check that has not ended has noticed something: the mutant hangs it."""


@dataclass(frozen=True)
class NamedTest:
    """A named test, with the file's path."""

    name: str

    @property
    def text(self) -> str:
        """As the table shows it."""
        return f"`{self.name}`"

    def command(self) -> list[str]:
        """Return the command that runs it, within a copy."""
        switched_off = [text for plugin in PLUGINS for text in ("-p", f"no:{plugin}")]
        every_tier = ("-m", "slow or not slow", "-q", "-x", "--no-header", "--tb=line", "-W", "ignore")
        return [sys.executable, "-m", "pytest", *switched_off, *every_tier, self.name]

    @property
    def seconds(self) -> float:
        """See `TEST_SECONDS`."""
        return TEST_SECONDS

    noticed_by = "failed|error"
    kind = "test"


@dataclass(frozen=True)
class Chaos:
    """A chaos run, with these options; what it says must match a pattern."""

    options: str
    says: str

    @property
    def text(self) -> str:
        """As the table shows it."""
        return f"`ullm chaos {self.options}`"

    def command(self) -> list[str]:
        """Return the command that runs it, within a copy."""
        return [sys.executable, "-m", "ullm", "chaos", *self.options.split()]

    @property
    def seconds(self) -> float:
        """See `CHAOS_SECONDS`."""
        return CHAOS_SECONDS

    @property
    def noticed_by(self) -> str:
        """What it says when it notices."""
        return self.says

    kind = "chaos"


@dataclass(frozen=True)
class Mutant:
    """One promise, broken.

    Args:
        promise: which one, in a few words.
        file: below ``ullm/``.
        old, new: one or two lines of it, and what stands there in the mutant; ``old`` occurs once.
        checks: each must notice.
    """

    name: str
    promise: str
    file: str
    old: str
    new: str
    checks: tuple[NamedTest | Chaos, ...]


class Copy:
    """A copy of the package, in which checks run; the tests and the docs are this checkout's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(
            ROOT / "ullm", folder / "ullm"
        )  # with times of change, so that nothing is compiled again
        shutil.copy(ROOT / "pyproject.toml", folder)
        for name in ("tests", "docs", "README.md"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, check: NamedTest | Chaos | Sequence[NamedTest]) -> tuple[bool, str]:
        """Run a check, or several tests at once; return whether it is content, and what it said."""
        first = check if isinstance(check, NamedTest | Chaos) else check[0]
        others = [] if isinstance(check, NamedTest | Chaos) else [test.name for test in check[1:]]
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("ULLM_", "PYTEST_"))
        }
        environ["PYTHONPATH"] = str(self.folder)
        try:
            done = subprocess.run(
                [*first.command(), *others],
                cwd=self.folder,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=first.seconds * (1 + len(others)),
            )
        except subprocess.TimeoutExpired as error:
            said = error.stdout.decode() if isinstance(error.stdout, bytes) else str(error.stdout)
            return False, f"{said}\nfailed: no end within {first.seconds:g} s"
        return done.returncode == 0, done.stdout

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """Have the mutant's lines in place.

        Raises:
            AssertionError: the lines that it replaces are not there, or not once: it is stale.
        """
        file = self.folder / "ullm" / mutant.file
        text = file.read_text("utf-8")
        assert text.count(mutant.old) == 1, (
            f"the mutant {mutant.name!r} is stale: ullm/{mutant.file} does not have these lines once:\n"
            f"{mutant.old}"
        )
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        file.write_text(text.replace(mutant.old, mutant.new), "utf-8")
        _forget_compiled(file)
        try:
            yield
        finally:
            file.write_text(text, "utf-8")
            os.utime(file, ns=times)
            _forget_compiled(file)

    def must_notice(self, mutant: Mutant, check: NamedTest | Chaos) -> None:
        """Run a check on a mutant.

        Raises:
            AssertionError: the check does not notice, or fails for another reason than it is to name.
        """
        with self.mutated(mutant):
            content, said = self.run(check)
        assert not content, f"{check.text} does not notice {mutant.name!r}: {mutant.promise}\n{said[-3000:]}"
        assert re.search(check.noticed_by, said), (
            f"{check.text} fails on {mutant.name!r}, but does not say {check.noticed_by!r}:\n{said[-3000:]}"
        )

    def must_be_content(self, check: NamedTest | Chaos | Sequence[NamedTest]) -> None:
        """Run a check, or several tests at once, on the package as it is.

        Raises:
            AssertionError: it fails.
        """
        content, said = self.run(check)
        assert content, f"{check} fails on the package as it is:\n{said[-3000:]}"


def _forget_compiled(file: Path) -> None:
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()
