"""The choice among ways to divide products: by time, among equal results only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from tests.model.model_fixtures import config, save_tiny
from ullm.config import Tuning
from ullm.hub import cache_dir
from ullm.hub.tuning import list_tunings, read_tuning, tuning_path, write_tuning
from ullm.model import calibrate
from ullm.model.calibrate import CANDIDATES, choose, measure
from ullm.model.kernels.cpu import build
from ullm.model.kernels.cpu.kernels import NAMES, load_kernels
from ullm.model.layers.quantization import quantize
from ullm.testing import write_tiny_model

FAST = CANDIDATES[1]


class Machine:
    """A clock that each product moves by what its tuning takes."""

    def __init__(self, seconds: Callable[[Tuning], float]) -> None:
        self.now, self.seconds, self.tuning = 0.0, seconds, Tuning()
        self.wrong: Tuning | None = None

    def use(self, tuning: Tuning) -> None:
        self.tuning = tuning

    def product(self) -> Tensor:
        self.now += self.seconds(self.tuning)
        return torch.tensor([1.0 if self.tuning == self.wrong else 0.0])

    def choice(self, seconds: float = 3.0) -> Tuning:
        rounds, _ = measure(
            self.use, {1: self.product, 512: self.product}, clock=lambda: self.now, seconds=seconds
        )
        return choose(rounds)


@pytest.mark.parametrize(("share", "expected"), [(0.9, FAST), (0.97, Tuning()), (1.0, Tuning())])
def test_the_fastest_is_chosen_if_it_is_clearly_faster(share: float, expected: Tuning) -> None:
    assert Machine(lambda tuning: 0.01 * (share if tuning == FAST else 1.0)).choice() == expected


def test_a_candidate_with_another_result_is_never_chosen() -> None:
    machine = Machine(lambda tuning: 0.001 if tuning == FAST else 0.01)
    machine.wrong = FAST
    assert machine.choice() == Tuning()


def test_measurements_end_in_time() -> None:
    machine = Machine(lambda _: 0.1)
    machine.choice()
    assert machine.now <= 3.3
    slow = Machine(lambda tuning: 1.0 if tuning == FAST else 2.0)
    assert slow.choice() == Tuning()
    assert slow.now <= 3.0 + 4.0


def test_a_disturbance_in_one_half_decides_nothing() -> None:
    machine = Machine(lambda _: 0.0)
    machine.seconds = lambda tuning: 0.005 if tuning == FAST and machine.now < 0.5 else 0.01
    assert machine.choice() == Tuning()


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULLM_CACHE", str(tmp_path))
    assert read_tuning(config("m"), "/m") is None
    tuning = Tuning(4, 48, False, "calibrated on 2026-01-02", "m")
    path = write_tuning(config("m"), "/m", tuning)
    assert read_tuning(config("m"), "/m") == tuning
    assert list(path.parent.iterdir()) == [path]
    assert list_tunings() == {"m": "chunk_tiles=4, prefetch=False, calibrated on 2026-01-02"}
    assert read_tuning(config("m", quantization="int8"), "/m") is None
    assert read_tuning(config("m"), "/other") is None


@pytest.mark.parametrize(
    "content", [b"", b"\xff\0", b"[]", b'{"chunk_tiles": 0}', b'{"chunk_tiles": "8"}', b'{"piece": 9999999}']
)
def test_a_damaged_file_is_as_none(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ULLM_CACHE", str(tmp_path))
    path = write_tuning(config("m"), "/m", Tuning())
    path.write_bytes(content)
    assert read_tuning(config("m"), "/m") is None
    assert "made anew" in caplog.text
    assert list(list_tunings().values()) == ["damaged; it is made anew at the next start"]


def test_the_file_is_of_this_machine_and_these_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuning_path(config("m"), "/m")
    for name in ("_version", "_cpu"):
        with monkeypatch.context() as patch:
            patch.setattr(f"ullm.hub.tuning.{name}", lambda *_: "other")
            assert tuning_path(config("m"), "/m") != before


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_no_candidate_changes_a_result(dtype: torch.dtype, kind: str) -> None:
    kernels = load_kernels(dtype)
    assert kernels is not None
    kernels.use_threads(2)
    weight = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    if kind == "plain":
        packed = kernels.pack(weight.to(dtype))
    else:
        packed = kernels.pack_quantized(quantize(weight, 8 if kind == "int8" else 4))
    linear = kernels.linear(packed, None, 200, 96)
    try:
        for rows in (1, 4, 16, 64, 200):
            x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).to(dtype)
            results = []
            for tuning in (*CANDIDATES, Tuning(1, 1), Tuning(1024, 1024)):
                kernels.use_tuning(tuning.chunk_tiles, tuning.piece, prefetch=tuning.prefetch)
                results.append(linear(x))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        kernels.use_tuning(8, 48, prefetch=True)
        kernels.use_threads(1)


@pytest.mark.slow
@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
def test_a_tiny_model_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    monkeypatch.setattr(calibrate, "write_tuning", lambda *_: tmp_path / "kept.json")
    threads = torch.get_num_threads()
    try:
        result = calibrate.calibrate(config(tmp_path, dtype="float32"), str(tmp_path))
    finally:
        torch.set_num_threads(threads)
    assert [timing.rows for timing in result.timings] == [1, 4, 16, 64, 512]
    assert all({"default", "PyTorch"} <= timing.seconds.keys() for timing in result.timings)
    assert msgspec.json.decode(msgspec.json.encode(result), type=calibrate.Calibration) == result
    assert result.tuning.origin.startswith("calibrated on ")


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
def test_doctor_prints_the_table_and_keeps_the_choice(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    environ = os.environ | {"ULLM_CACHE": str(tmp_path / "cache")}

    def doctor(*arguments: object) -> str:
        command = [sys.executable, "-m", "ullm", "doctor", *map(str, arguments)]
        return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout

    load_kernels(torch.float32)
    shutil.copytree(cache_dir() / "kernels", tmp_path / "cache" / "kernels")  # compiled already
    table = doctor("--calibrate", tmp_path / "model")
    assert "PyTorch" in table
    assert [line.split()[0] for line in table.splitlines()[1:6]] == ["1", "4", "16", "64", "512"]
    assert len(list((tmp_path / "cache" / "tuning").glob("*.json"))) == 1
    (choice,) = json.loads(doctor("--json"))["data"]["calibrations"].values()
    assert "calibrated on " in choice
