"""The kernels compiled for other processors, against plain loops over numbers; see variants.cpp.

What this machine lacks is emulated: ARM by QEMU, and the tiles of AVX-512, whose instructions QEMU does not
have, by plain vectors of the same width.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from ullm.model.kernels.cpu import build

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.xdist_group("kernel variants")]

DRIVER = Path(__file__).with_name("variants.cpp")
PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}
"""Debian's packages with the commands that tests need."""
SECONDS = 300.0


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernels.

    Args:
        name: what the kernels call it.
        flags: the compiler's.
        needs: flags of /proc/cpuinfo without which this machine cannot run it.
        is_fused: multiplies and adds without rounding in between.
    """

    name: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    is_fused: bool = True


X86 = {
    "plain": Variant("plain C++", ("-march=x86-64",), is_fused=False),
    "ssse3": Variant("SSSE3", ("-march=x86-64-v2",), ("ssse3",), is_fused=False),
    "avx2": Variant("AVX2", ("-march=x86-64-v3",), ("avx2", "fma")),
    "avx512": Variant("AVX-512", ("-march=x86-64-v4",), ("avx512f", "avx512bw")),
    "avx512-tiles": Variant("plain C++", ("-march=x86-64-v3", "-DULLM_LANES=16"), ("avx2", "fma")),
}
ARM = {
    "neon": Variant("NEON", ("-march=armv8-a",)),
    "neon-dotprod": Variant("NEON, dotprod", ("-march=armv8.2-a+dotprod",)),
    "neon-bf16": Variant("NEON, dotprod, BF16", ("-march=armv8.6-a",)),
}


@pytest.mark.parametrize("key", [*X86, *ARM])
def test_results_are_those_of_plain_loops(key: str) -> None:
    digests(key)


def test_variants_agree() -> None:
    """Products with the same rounding are equal bit by bit, so a text may move to another kind of machine."""
    fused = [key for key, variant in (X86 | ARM).items() if variant.is_fused and can_run(key)]
    if len(fused) < 2:
        pytest.skip("only one variant can run here")
    found = [digests(key) for key in fused]
    for operation in ("float32 weights", "bfloat16 weights", "float16 weights", "8 bits", "4 bits", "choose"):
        assert len({each[operation] for each in found}) == 1, operation


def digests(key: str) -> dict[str, str]:
    """Compile and run one variant; return a digest of the results of each operation.

    Raises:
        AssertionError: the results are wrong, or it is not the variant that was asked for.
    """
    if reason := cannot_run(key):
        pytest.skip(reason)
    output = run(key)
    assert "WRONG" not in output, output
    lines = dict(line.rsplit(" ", 1) for line in output.splitlines()[1:])
    assert output.splitlines()[0] == f"variant {(X86 | ARM)[key].name}"
    return lines


def can_run(key: str) -> bool:
    return not cannot_run(key)


@cache
def cannot_run(key: str) -> str:
    """Return why this machine cannot run a variant; empty if it can."""
    if key in ARM:
        missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
        return f"needs Debian's {' and '.join(missing)}" if missing else ""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "another architecture"
    if build.find_compiler() is None:
        return "needs a C++ compiler"
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    lacking = [flag for flag in X86[key].needs if flag not in flags]
    return f"this machine has no {lacking[0]}" if lacking else ""


@cache
def run(key: str) -> str:
    """Compile a variant and return what it prints; at most once per process."""
    variant = (X86 | ARM)[key]
    compiler = "aarch64-linux-gnu-g++" if key in ARM else build.find_compiler()
    emulator = ["qemu-aarch64", "-cpu", "max"] if key in ARM else []
    assert compiler is not None
    flags = [flag for flag in build.FLAGS if flag not in build.NATIVE]
    sources = [str(DRIVER), *(str(build.FOLDER / name) for name in build.SOURCES)]
    command = [compiler, *flags, *variant.flags, *(["-static"] if key in ARM else []), f"-I{build.FOLDER}"]
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/{key}"
        subprocess.run([*command, *sources, "-o", program], check=True, timeout=SECONDS)
        done = subprocess.run([*emulator, program], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode in (0, 1), (done.returncode, done.stderr)
    return done.stdout
