"""The ways to compile the kernels, and how this machine runs each: itself or by emulation."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ullm.machine import arm_features
from ullm.model.kernels.cpu import build

FOLDER = Path(__file__).parent
DRIVER = FOLDER / "variants.cpp"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {CROSS_COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
"""Debian's packages with the commands that tests need."""
IS_ARM = platform.machine() in ("aarch64", "arm64")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
SECONDS = 300.0


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernels.

    Args:
        name: what the kernels call it.
        lanes: floats of a vector.
        registers: how many vectors the processor holds.
        flags: the compiler's, for a processor that has no more than this.
        needs: flags of /proc/cpuinfo without which a machine cannot run it.
        emulation: flags for emulated.h, on a processor with AVX2.
        is_fused: multiplies and adds without rounding in between.
    """

    name: str
    lanes: int
    registers: int
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    emulation: tuple[str, ...] = ()
    is_fused: bool = True

    @property
    def is_arm(self) -> bool:
        return self.name.startswith("NEON")


_AVX2, _AVX512 = ("avx2", "fma"), ("avx512f", "avx512bw")
VARIANTS = (
    Variant("plain C++", 4, 16, flags=("-march=x86-64",), is_fused=False),
    Variant("SSSE3", 4, 16, flags=("-march=x86-64-v2",), needs=("ssse3",), is_fused=False),
    Variant("AVX2", 8, 16, flags=("-march=x86-64-v3",), needs=_AVX2),
    Variant(
        *("AVX2, VNNI", 8, 16),
        flags=("-march=x86-64-v3", "-mavxvnni"),
        needs=(*_AVX2, "avx_vnni"),
        emulation=("-DEMULATE_VNNI",),
    ),
    Variant(
        *("AVX-512", 16, 32),
        flags=("-march=x86-64-v4",),
        needs=_AVX512,
        emulation=("-DEMULATE_AVX512",),
    ),
    Variant(
        *("AVX-512, VNNI", 16, 32),
        flags=("-march=x86-64-v4", "-mavx512vnni"),
        needs=(*_AVX512, "avx512_vnni"),
        emulation=("-DEMULATE_AVX512", "-DEMULATE_VNNI"),
    ),
    Variant(
        *("AVX-512, VNNI, BF16", 16, 32),
        flags=("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
        needs=(*_AVX512, "avx512_vnni", "avx512_bf16"),
        emulation=("-DEMULATE_AVX512", "-DEMULATE_VNNI", "-DEMULATE_BF16"),
    ),
    Variant(
        *("AVX-512, VNNI, BF16, AMX", 16, 32),
        flags=("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        needs=(*_AVX512, "avx512_vnni", "avx512_bf16", "amx_bf16"),
        emulation=("-DEMULATE_AVX512", "-DEMULATE_VNNI", "-DEMULATE_BF16", "-DEMULATE_AMX"),
    ),
    Variant("NEON", 4, 32, flags=("-march=armv8-a",)),
    Variant("NEON, dotprod", 4, 32, flags=("-march=armv8.2-a+dotprod",), needs=("asimddp",)),
    Variant(
        "NEON, dotprod, BF16", 4, 32, flags=("-march=armv8.2-a+dotprod+bf16",), needs=("asimddp", "bf16")
    ),
    Variant(
        "NEON, dotprod, i8mm", 4, 32, flags=("-march=armv8.2-a+dotprod+i8mm",), needs=("asimddp", "i8mm")
    ),
    Variant(
        *("NEON, dotprod, i8mm, BF16", 4, 32), flags=("-march=armv8.6-a",), needs=("asimddp", "i8mm", "bf16")
    ),
)
"""Every way to compile the kernels. ``-march=native`` is one of them."""


@dataclass(frozen=True)
class Build:
    """A variant, compiled for its own processor or, by emulated.h, for AVX2."""

    variant: Variant
    is_emulated: bool = False

    def __str__(self) -> str:
        return self.variant.name.replace(", ", "-") + (" emulated" if self.is_emulated else "")

    @property
    def compiler(self) -> str | None:
        """Path of the compiler; None if it is not installed."""
        return shutil.which(CROSS_COMPILER) if self.is_cross else build.find_compiler()

    @property
    def is_cross(self) -> bool:
        """Whether it is for ARM and this machine is not, which QEMU bridges."""
        return self.variant.is_arm and not IS_ARM

    @property
    def is_foreign(self) -> bool:
        """Whether nothing here compiles for it: x86 on ARM."""
        return not self.variant.is_arm and not IS_X86

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's flags."""
        if not self.is_emulated:
            return self.variant.flags
        header = f"-include{FOLDER / 'emulated.h'}"
        return ("-march=x86-64-v3", *self.variant.emulation, f"-I{simde()}", header)

    def why_not(self) -> str:
        """Return why this machine cannot run it; empty if it can."""
        if self.is_cross:
            missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
            return f"needs Debian's {' and '.join(missing)}" if missing else ""
        if build.find_compiler() is None:
            return "needs a C++ compiler"
        if self.is_foreign:
            return "another architecture"
        if self.is_emulated and simde() is None:
            return "needs PyPI's simde-py"
        lacking = [flag for flag in (_AVX2 if self.is_emulated else self.variant.needs) if flag not in _has()]
        return f"this machine has no {lacking[0]}" if lacking else ""


BUILDS = (
    *(Build(variant) for variant in VARIANTS),
    *(Build(variant, is_emulated=True) for variant in VARIANTS if variant.emulation),
)


def simde() -> Path | None:
    """Return the folder of SIMDe's headers; None if they are not installed."""
    spec = importlib.util.find_spec("simde_py")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "simde"


def shape(compiler: str, flags: Sequence[str]) -> tuple[str, int, int]:
    """Return name, lanes and registers of the kernels with some flags, as the preprocessor sees them."""
    source = '#include "common.h"\n;VARIANT ULLM_TILES;ULLM_LANES;ULLM_REGISTERS\n'
    command = [compiler, *flags, "-std=c++20", f"-I{build.FOLDER}", "-E", "-P", "-xc++", "-"]
    done = subprocess.run(command, input=source, stdout=subprocess.PIPE, text=True, check=True)
    name, lanes, registers = done.stdout.rsplit(";", 3)[1:]
    return name.replace('" "', "").strip().strip('"'), int(lanes), int(registers)


def run_driver(
    target: Build, folder: Path, sources: Sequence[str] = build.SOURCES, options: Sequence[str] = ()
) -> str:
    """Compile the kernels and the driver with the flags of users, run them, and return what they print.

    Args:
        target: what to compile.
        folder: an empty one, for the program.
        sources: which of the kernels.
        options: more flags of the compiler.
    """
    assert target.compiler is not None
    flags = [flag for flag in build.FLAGS if flag not in build.NATIVE]
    command = [target.compiler, *flags, *target.flags, *options, f"-I{build.FOLDER}"]
    objects = {DRIVER: folder / "driver.o"} | {build.FOLDER / name: folder / f"{name}.o" for name in sources}
    compilers = [subprocess.Popen([*command, "-c", str(a), "-o", str(b)]) for a, b in objects.items()]
    assert not any([compiler.wait(SECONDS) for compiler in compilers])
    program = folder / "driver"
    static = ["-static"] if target.is_cross else []  # the emulator has no libraries of ARM
    subprocess.run([*command, *static, *map(str, objects.values()), "-o", str(program)], check=True)
    emulator = [EMULATOR, "-cpu", "max"] if target.is_cross else []
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode in (0, 1), (done.returncode, done.stderr)
    return done.stdout


@cache
def _has() -> frozenset[str]:
    if IS_ARM:
        return arm_features()
    info = Path("/proc/cpuinfo")
    return frozenset(info.read_text().split()) if info.exists() else frozenset()
