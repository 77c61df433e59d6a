"""Three suites in a project that is not ullm's: the wheel, its plugin and six others at once; no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(600)]

PLUGINS = ("pytest-asyncio", "pytest-randomly")
"""What the project has beside what ullm's own tests have."""


def pip(*arguments: str) -> None:
    """Run pip; skip the test where there is no index of packages."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode and re.search(
        r"connection|No matching distribution|resolve", done.stderr, re.IGNORECASE
    ):
        pytest.skip(f"pip has no index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and with the packages of this one but for torch."""
    folder = tmp_path_factory.mktemp("outsider-venv")
    quietly = ("--quiet", "--disable-pip-version-check")
    pip("wheel", *quietly, "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    (wheel,) = folder.glob("*.whl")
    pip("--python", str(python), "install", *quietly, "--no-deps", str(wheel), *PLUGINS)
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.check_output(command, text=True).strip())
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (packages / "no_torch.pth").write_text("import sys; sys.modules['torch'] = None\n")
    return python


def test_the_suites_of_an_outsider_pass(python: Path, tmp_path: Path) -> None:
    project = tmp_path / "outsider"
    shutil.copytree(Path(__file__).parent / "project", project)
    where = [str(python), "-c", "import ullm; print(ullm.__file__)"]
    assert str(python.parents[1]) in subprocess.check_output(where, cwd=project, text=True, env={})
    command = [
        str(python),
        "-m",
        "pytest",
        "-n",
        "2",
        "-v",
        "-p",
        "no:schemathesis",
        "-p",
        "no:cacheprovider",
    ]
    environ = {"PATH": str(python.parent), "ULLM_MAX_BS": "nonsense", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environ, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b15 passed\b", done.stdout), done.stdout[-3000:]
    plugins = "\n".join(line for line in done.stdout.splitlines() if line.startswith(("plugins:", "Using")))
    for name in ("ullm", "xdist", "randomly", "timeout", "asyncio", "anyio", "hypothesis", "trio"):
        assert name in plugins, plugins
