"""The kernels compiled for other processors, against plain loops over numbers; see variants.cpp.

What this machine lacks is emulated: ARM by QEMU, instructions of x86 by SIMDe.
"""

from __future__ import annotations

import re
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.model.kernels.variants import BUILDS, VARIANTS, Build, run_driver, shape
from ullm.model.kernels.cpu import build

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("kernel variants")]

DOCS = Path(__file__).parents[3] / "docs" / "explanation" / "performance.md"
SHAPES = {(variant.name, variant.lanes, variant.registers) for variant in VARIANTS}
ROUNDED = {
    "bfloat16 arithmetic",
    "fewer inputs",
    "attention in bfloat16",
    "attention of wide heads in bfloat16",
}
"""What SIMDe's vdpbf16ps rounds otherwise than the processor's."""
SAMPLE = next(target for target in BUILDS if target.variant is VARIANTS[-1])
"""The one that no other test of the fast tier comes near."""


@pytest.mark.parametrize("target", [each for each in BUILDS if not each.is_emulated], ids=str)
def test_flags_choose_the_variant(target: Build) -> None:
    if target.compiler is None or target.is_foreign:
        pytest.skip(target.why_not() or "needs a C++ compiler")
    variant = target.variant
    assert shape(target.compiler, target.flags) == (variant.name, variant.lanes, variant.registers)


def test_what_this_machine_has_is_a_variant() -> None:
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    assert shape(compiler, build.NATIVE) in SHAPES


def test_the_documentation_has_every_variant() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (\d+) floats, (\d+) registers \|", DOCS.read_text(), re.MULTILINE)
    assert sorted((name, int(lanes), int(registers)) for name, lanes, registers in rows) == sorted(SHAPES)


def test_products_of_a_sample(tmp_path: Path) -> None:
    if reason := SAMPLE.why_not():
        pytest.skip(reason)
    options = ("-O2", "-DPRODUCTS_ONLY")
    check(SAMPLE, run_driver(SAMPLE, tmp_path, ("linear.cpp", "quantized.cpp"), options))


@pytest.mark.slow
@pytest.mark.parametrize("target", BUILDS, ids=str)
def test_results_are_those_of_plain_loops(target: Build) -> None:
    digests(target)


@pytest.mark.slow
def test_variants_agree() -> None:
    """Products with the same rounding are equal bit by bit, so a text may move to another kind of machine."""
    fused = [target for target in BUILDS if target.variant.is_fused and not target.why_not()]
    if len(fused) < 2:
        pytest.skip("only one variant can run here")
    found = [digests(target) for target in fused]
    for operation in ("float32 weights", "bfloat16 weights", "float16 weights", "8 bits", "4 bits", "choose"):
        assert len({each[operation] for each in found}) == 1, operation


@pytest.mark.slow
@pytest.mark.parametrize("target", [each for each in BUILDS if each.is_emulated], ids=str)
def test_emulated_instructions_are_the_processors(target: Build) -> None:
    native = Build(target.variant)
    if reason := native.why_not() or target.why_not():
        pytest.skip(reason)
    emulated, real = digests(target), digests(native)
    rounded = ROUNDED if "BF16" in str(target) else set()
    assert emulated.keys() == real.keys() > rounded
    assert [name for name in real if emulated[name] != real[name] and name not in rounded] == []


def digests(target: Build) -> dict[str, str]:
    """Compile and run one variant; return a digest of the results of each operation.

    Raises:
        AssertionError: the results are wrong, or it is not the variant that was asked for.
    """
    if reason := target.why_not():
        pytest.skip(reason)
    return check(target, output(target))


def check(target: Build, printed: str) -> dict[str, str]:
    assert "WRONG" not in printed, printed
    first, *lines = printed.splitlines()
    assert first == f"variant {target.variant.name}"
    return dict((line.rsplit(" ", 1)[0], line.rsplit(" ", 1)[1]) for line in lines)


@cache
def output(target: Build) -> str:
    """Compile a variant and return what it prints; at most once per process."""
    with tempfile.TemporaryDirectory() as folder:
        return run_driver(target, Path(folder))
