"""Cores that a process may use, and what entry points ask of Python's collector of garbage."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ullm import machine
from ullm.machine import (
    YOUNG_OBJECTS,
    arm_features,
    available_memory,
    collect_rarely,
    cpu_quota,
    memory_limit,
    usable_cores,
)


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """A number for each collection; thresholds are as before afterwards."""
    seen: list[int] = []
    before = gc.get_threshold()

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(count)
    yield seen
    gc.callbacks.remove(count)
    gc.set_threshold(*before)


def test_a_burst_of_objects_is_no_reason_to_look(collections: list[int]) -> None:
    collect_rarely()
    gc.collect()
    collections.clear()
    for _ in range(50):
        burst = [[number] for number in range(YOUNG_OBJECTS // 2)]
        del burst
    assert collections == []


def test_garbage_is_found_nevertheless(collections: list[int]) -> None:
    collect_rarely()
    gc.collect()
    collections.clear()
    for _ in range(2 * YOUNG_OBJECTS):
        ring: list[object] = []
        ring.append(ring)
    assert collections


# --- cores -----------------------------------------------------------------------------------------


def process(folder: Path, groups: str, *mounts: str) -> Path:
    """Lay out a process's folder in /proc; ``{}`` in a mount stands for ``folder``."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text("".join(f"{mount.format(folder)}\n" for mount in mounts))
    return proc


def limit(group: Path, **files: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("_", ".", 1)).write_text(text + "\n")


V2 = "30 23 0:26 / {}/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {root} {{}}/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"


def test_the_least_quota_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    proc = process(tmp_path, "0::/kubepods/pod1/main\n", V2)
    limit(tmp_path / "cgroup" / "kubepods", cpu_max="400000 100000")
    limit(tmp_path / "cgroup" / "kubepods" / "pod1", cpu_max="150000 100000")
    limit(tmp_path / "cgroup" / "kubepods" / "pod1" / "main", cpu_max="max 100000")
    assert cpu_quota(proc) == 1.5


@pytest.mark.parametrize(("quota", "cores"), [("50000", 0.5), ("-1", None)])
@pytest.mark.parametrize("root", ["/", "/docker/1"])
def test_version_1_also_where_the_mount_begins_at_the_container(
    root: str, quota: str, cores: float | None, tmp_path: Path
) -> None:
    path = "/docker/1"
    proc = process(tmp_path, f"4:memory:/\n2:cpu,cpuacct:{path}\n0::/\n", V1.format(root=root))
    group = tmp_path / "cpu" / ("docker/1" if root == "/" else "")
    limit(group, cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000")
    assert cpu_quota(proc) == cores


def test_no_control_groups_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert cpu_quota(process(tmp_path, "0::/\n", V2)) is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (0.5, 1), (1.5, 2), (4.0, 4), (9.0, 4)])
def test_a_quota_is_rounded_up(quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5}, raising=False)
    assert usable_cores() == cores


# --- memory ----------------------------------------------------------------------------------------

MIB = 1 << 20
V1_MEMORY = "33 31 0:30 {root} {{}}/memory rw,relatime - cgroup cgroup rw,memory"
NO_LIMIT_V1 = str((1 << 63) - 4096)


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with 64 GiB free."""
    monkeypatch.setattr(machine, "_meminfo_available", lambda: 64 << 30)
    return 64 << 30


def memory(group: Path, **files: int | str) -> None:
    """Write the files of a group, sizes in MiB."""
    limit(group, **{f"memory_{k}": str(v if isinstance(v, str) else v * MIB) for k, v in files.items()})


def test_page_cache_that_is_not_in_use_is_free(plenty: int, tmp_path: Path) -> None:
    proc = process(tmp_path, "0::/pod\n", V2)
    stat = f"anon {90 * MIB}\ninactive_file {850 * MIB}\nactive_file {50 * MIB}"
    memory(tmp_path / "cgroup" / "pod", max=1000, current=990, stat=stat)
    assert available_memory(proc, tmp_path) == 860 * MIB


def test_the_tightest_of_all_levels_counts(plenty: int, tmp_path: Path) -> None:
    proc = process(tmp_path, "0::/system.slice/ullm.service\n", V2)
    memory(tmp_path / "cgroup" / "system.slice", max=600, current=100, high="max")
    memory(tmp_path / "cgroup" / "system.slice" / "ullm.service", max="max", current=80)
    assert available_memory(proc, tmp_path) == 500 * MIB
    memory(tmp_path / "cgroup" / "system.slice" / "ullm.service", high=200)
    assert available_memory(proc, tmp_path) == 120 * MIB
    assert memory_limit(proc, tmp_path) == 200 * MIB


@pytest.mark.parametrize("root", ["/", "/docker/1"])
def test_limits_of_version_1_count(root: str, plenty: int, tmp_path: Path) -> None:
    proc = process(tmp_path, "4:memory:/docker/1\n2:cpu,cpuacct:/\n0::/\n", V1_MEMORY.format(root=root))
    group = tmp_path / "memory" / ("docker/1" if root == "/" else "")
    stat = f"inactive_file 1\ntotal_inactive_file {300 * MIB}"
    memory(group, limit_in_bytes=600, usage_in_bytes=500, stat=stat)
    assert available_memory(proc, tmp_path) == 400 * MIB
    assert memory_limit(proc, tmp_path) == 600 * MIB
    memory(group, limit_in_bytes=NO_LIMIT_V1)
    assert available_memory(proc, tmp_path) == plenty
    assert memory_limit(proc, tmp_path) is None


def test_files_at_the_usual_place_count_without_a_mount(plenty: int, tmp_path: Path) -> None:
    memory(tmp_path / "laid-over", max=600, current=700)
    assert available_memory(tmp_path / "none", tmp_path / "laid-over") == 0
    assert available_memory(tmp_path / "none", tmp_path) == plenty


def test_a_limit_of_the_address_space_counts(plenty: int, tmp_path: Path) -> None:
    proc = process(tmp_path, "", V2)
    (proc / "statm").write_text("3 2 1 0 0 0 0\n")
    heading, line = (
        "Limit                     Soft Limit           Hard Limit           Units",
        "Max address space   ",
    )
    (proc / "limits").write_text(f"{heading}\n{line}      {10 * mmap.PAGESIZE}    unlimited     bytes\n")
    assert available_memory(proc, tmp_path) == 7 * mmap.PAGESIZE
    (proc / "limits").write_text(f"{heading}\n{line}      unlimited    unlimited     bytes\n")
    assert available_memory(proc, tmp_path) == plenty


def test_the_kv_cache_fits_into_what_a_group_leaves(
    plenty: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ullm.model.memory import kv_pool

    memory(tmp_path, max=600, current=200)
    monkeypatch.setattr(kv_pool, "available_memory", lambda: available_memory(tmp_path / "none", tmp_path))
    assert 0 < kv_pool.cpu_budget() <= 400 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


# --- the processor -----------------------------------------------------------------------------------------


def test_features_of_an_arm_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nCPU part\t: 0xd4f\n")
    assert arm_features(cpuinfo) == {"fp", "asimd", "asimddp", "i8mm", "bf16"}


def test_other_processors_have_no_features_of_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert arm_features(cpuinfo) == frozenset()
    assert arm_features(tmp_path / "missing") == frozenset()
