"""The check of ``ullm doctor``: the kernels of this machine, and ones that compute something else."""

from __future__ import annotations

import pytest
import torch

from ullm.model.kernels.cpu import check
from ullm.model.kernels.cpu.build import find_compiler
from ullm.model.kernels.cpu.kernels import CpuKernels

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")


def test_the_kernels_of_this_machine() -> None:
    found = check.check()
    assert found["problem"] is None
    assert found["variant"]
    assert set(found["errors"]) == {
        f"{name} {dtype}" for name in ("linear", "int8", "int4", "norm") for dtype in ("float32", "bfloat16")
    }
    assert max(found["errors"].values()) > 0


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_wrong_results_are_noticed(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> torch.Tensor:
        return torch.full((check.ROWS, check.INPUTS), value)

    monkeypatch.setattr(CpuKernels, "add_rms_norm", wrong)
    problem = check.check()["problem"]
    assert problem.startswith("they compute wrongly: norm float32 by ")
    assert problem.endswith("; use --no-cpu-kernels")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    assert "no C++ compiler" in check.check()["problem"]
