"""Progress of downloads, and the diagnosis where something is missing."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from rich.console import Console

import ullm
from ullm.cli import doctor, pull, surroundings
from ullm.cli.distribution import warning
from ullm.cli.terminal import progress_bar
from ullm.config import ServerConfig


def test_progress_without_a_terminal_is_one_line_per_label() -> None:
    out = io.StringIO()
    with progress_bar(Console(file=out, force_terminal=False)) as report:
        for done in range(3):
            report("fetching [x]", done, None)
        report("converting", 1, 2)
    assert out.getvalue() == "fetching [x] …\nconverting …\n"


def test_progress_on_a_terminal_leaves_nothing_behind() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with progress_bar(console) as report:
        report("fetching", 0, None)
        report("fetching", 50, 100)
        report("fetching", 0, None)  # a heartbeat
    shown = out.getvalue()
    assert "fetching" in shown
    assert "50/100 bytes" in shown


def test_folder_size(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "sub" / "b").write_bytes(b"4567")
    assert pull.folder_size(tmp_path) == 7
    assert pull.folder_size(tmp_path / "a") == 3


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which all is well, without asking torch."""
    torch = {
        "torch": "2", "cpu": "AVX512", "threads": 2, "quota": None,
        "compiler": "/usr/bin/c++", "kernels": "AVX2",
        "cuda": [{"name": "H", "capability": "9.0", "free": 1 << 30, "total": 2 << 30}],
        "gflops": {
            "cpu": {"float32": 100.0, "bfloat16": 400.0, "float16": 3.0},
            "cuda:0": {"float32": 100.0, "bfloat16": 900.0, "float16": 900.0},
        },
    }  # fmt: skip
    monkeypatch.setattr(doctor, "probe_torch", lambda: (torch, None))
    kernels = {"crashed": False, "variant": "AVX2", "seconds": 31.0, "errors": {"linear float32": 0.002}}
    monkeypatch.setattr(doctor, "probe_kernels", lambda: {**kernels, "problem": None})
    monkeypatch.setattr(doctor, "available_memory", lambda: 8 << 30)
    monkeypatch.setattr(doctor, "memory_limit", lambda: 2 << 30)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(doctor, "cached_models", lambda: [{"name": "m", "bytes": 10**6, "intact": False}])
    monkeypatch.setattr(doctor, "port_is_free", lambda host, port: True)
    monkeypatch.setattr(doctor.surroundings, "hub_state", lambda: {"url": "https://hub", "problem": None})
    monkeypatch.setattr(doctor.surroundings, "cache_sizes", lambda: {"hub": 2_000_000, "tuning": 500})
    return monkeypatch


def found(diagnosis: doctor.Diagnosis, name: str) -> doctor.Check:
    (check,) = (check for check in diagnosis.checks if check.name == name)
    return check


def test_all_is_well(machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor(ServerConfig(), as_json=False) == 0
    diagnosis = doctor.diagnose(ServerConfig())
    assert (
        "GFLOP/s: float32 100, bfloat16 400, float16 3.0; fast in float32, bfloat16"
        in found(diagnosis, "cpu").detail
    )
    assert "1.0 GiB of 2.0 GiB free" in found(diagnosis, "cuda:0").detail
    assert found(diagnosis, "models").detail == "m (1 MB, damaged)"
    assert (
        found(diagnosis, "kernels").detail
        == "use AVX2; compiled in 31 s; compute as PyTorch does, within 0.2%"
    )
    assert found(diagnosis, "limits").detail == "memory 2.0 GiB, 1.5 cores"
    shown = " ".join(capsys.readouterr().out.split())
    assert "fast in float32" in shown
    assert "For a bug report, paste all of this" in shown


@pytest.mark.parametrize(
    ("report", "status", "says"),
    [
        ({"crashed": True, "problem": "was ended by SIGILL"}, "fail", "SIGILL; use --no-cpu-kernels"),
        ({"crashed": False, "problem": "they compute wrongly: x", "errors": {"x": 1.0}}, "fail", "wrongly"),
        ({"crashed": False, "problem": "c++ could not compile them", "errors": {}}, "warn", "could not"),
    ],
)
def test_kernels_that_do_not_work(
    report: dict[str, object], status: str, says: str, machine: pytest.MonkeyPatch
) -> None:
    machine.setattr(doctor, "probe_kernels", lambda: report)
    check = found(doctor.diagnose(ServerConfig()), "kernels")
    assert check.status == status
    assert says in check.detail


def test_without_limits(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(doctor, "memory_limit", lambda: None)
    assert found(doctor.diagnose(ServerConfig()), "limits").detail == "memory not limited, 1.5 cores"
    machine.setattr(doctor, "cpu_quota", lambda: None)
    assert "no container or control group" in found(doctor.diagnose(ServerConfig()), "limits").detail


def test_torch_that_cannot_be_imported(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(doctor, "probe_torch", lambda: (None, "ImportError: libfoo.so"))
    assert doctor.doctor(ServerConfig(), as_json=True) == 1
    assert found(doctor.diagnose(ServerConfig()), "torch") == doctor.Check(
        "torch", "fail", "ImportError: libfoo.so"
    )


def test_too_little_memory(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(doctor, "available_memory", lambda: 1 << 20)
    diagnosis = doctor.diagnose(ServerConfig())
    assert not diagnosis.healthy
    assert "1 GiB needed" in found(diagnosis, "memory").detail


def test_a_missing_package(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(doctor, "PACKAGES", ("trio", "no-such-package"))
    diagnosis = doctor.diagnose(ServerConfig())
    assert found(diagnosis, "packages") == doctor.Check("packages", "fail", "missing: no-such-package")


def test_a_taken_port_only_warns(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(doctor, "port_is_free", lambda host, port: False)
    diagnosis = doctor.diagnose(ServerConfig())
    assert diagnosis.healthy
    assert found(diagnosis, "port").status == "warn"


def test_another_project_of_the_same_name_is_named(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    diagnosis = doctor.diagnose(ServerConfig())
    assert [check for check in diagnosis.checks if check.name == "distribution"] == []
    info = tmp_path / "ullm-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ullm\nVersion: 0.3\n")
    machine.syspath_prepend(str(tmp_path))
    check = found(doctor.diagnose(ServerConfig()), "distribution")
    assert check.status == "warn"
    assert check.detail == warning("0.3")


def test_what_surrounds_it_is_told_without_keys(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("ULLM_PORT", "81")
    machine.setenv("ULLM_API_KEY", "hunter2")
    machine.setenv("ULLM_MODEL", "")
    diagnosis = doctor.diagnose(ServerConfig())
    assert found(diagnosis, "system").detail.startswith(f"ullm {ullm.__version__}, ")
    told = found(diagnosis, "variables").detail
    assert "ULLM_API_KEY=(hidden)" in told
    assert "ULLM_PORT=81" in told
    assert "ULLM_MODEL" not in told
    assert "hunter2" not in str(diagnosis)
    assert found(diagnosis, "caches").detail == "hub 2.0 MB, tuning 0.5 kB; ullm list shows more"
    assert found(diagnosis, "hub").detail == "https://hub in reach"


def test_a_hub_out_of_reach_only_warns(machine: pytest.MonkeyPatch) -> None:
    problem = {"url": "https://hub", "problem": "no answer within 2 s"}
    machine.setattr(doctor.surroundings, "hub_state", lambda: problem)
    diagnosis = doctor.diagnose(ServerConfig())
    assert diagnosis.healthy
    assert found(diagnosis, "hub").status == "warn"


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    answer = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: answer.wait(60) and None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert surroundings.hub_state(0.01)["problem"] == "no answer within 0.01 s"
    answer.set()
