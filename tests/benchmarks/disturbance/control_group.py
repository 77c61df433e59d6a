"""A control group with a CPU quota; version 1 and 2.

See https://docs.kernel.org/scheduler/sched-bwc.html and
https://docs.kernel.org/admin-guide/cgroup-v2.html.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from ullm.errors import UllmError
from ullm.machine import control_group_mounts
from ullm.testing.processes import POLL

PERIOD = 100_000
"""Microseconds of processor time are counted over."""
REMOVE_SECONDS = 10.0
"""Seconds that the processes of a group may take to be gone after they were killed."""


class QuotaUnavailable(UllmError):
    """No control group with a CPU quota can be made here."""


@dataclass(frozen=True)
class CpuController:
    """The kernel's cpu controller.

    Args:
        point: where its control groups are mounted.
        version: 1 or 2.
    """

    point: Path
    version: int

    def create(self, name: str, cores: float) -> Path:
        """Create a group below the root; return its folder.

        Raises:
            QuotaUnavailable: it cannot be created.
        """
        folder = self.point / name
        try:
            if self.version == 2:
                self._enable()
            folder.mkdir()
            self._limit(folder, round(cores * PERIOD))
        except OSError as error:
            if folder.is_dir():
                folder.rmdir()
            raise QuotaUnavailable(
                f"control group {folder} cannot be made: {error.strerror}; it takes root, and in a container "
                "control groups that may be written"
            ) from None
        return folder

    def _enable(self) -> None:
        """Let groups below the root have quotas. It stays so, because others may rely on it by now."""
        control = self.point / "cgroup.subtree_control"
        if "cpu" not in control.read_text().split():
            control.write_text("+cpu")

    def _limit(self, folder: Path, quota: int) -> None:
        if self.version == 2:
            (folder / "cpu.max").write_text(f"{quota} {PERIOD}")
        else:
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))


def find_controller(mountinfo: Path = Path("/proc/self/mountinfo")) -> CpuController:
    """Return the cpu controller of this machine.

    Raises:
        QuotaUnavailable: there is none.
    """
    try:
        lines = mountinfo.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for mount in control_group_mounts(lines):
        if mount.version == 1 or "cpu" in (mount.point / "cgroup.controllers").read_text().split():
            return CpuController(mount.point, mount.version)
    raise QuotaUnavailable("no cpu controller of control groups is mounted")


@asynccontextmanager
async def quota_group(controller: CpuController, cores: float) -> AsyncIterator[Path]:
    """Have a control group during the block; yield its folder. Its processes must end with the block.

    Raises:
        QuotaUnavailable: it cannot be created, or not removed.
    """
    folder = controller.create(f"ullm-benchmark-{os.getpid()}", cores)
    try:
        yield folder
    finally:
        with trio.CancelScope(shield=True):
            await _remove(folder)


def enter(folder: Path) -> tuple[str, ...]:
    """Return the beginning of a command that runs the rest of it in a control group, as the same process."""
    return "sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs")


async def _remove(folder: Path) -> None:
    with trio.move_on_after(REMOVE_SECONDS):
        while True:
            try:
                await trio.Path(folder).rmdir()
                return
            except OSError:  # a killed process is not gone yet
                await trio.sleep(POLL)
    raise QuotaUnavailable(f"control group {folder} still has processes; remove it with rmdir")
