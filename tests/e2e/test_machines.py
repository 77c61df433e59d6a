"""Machines that are short of something, below the real program: each costs a warning or a pause."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.server import SCRIPTED, Serve, Server
from tests.support.waiting import eventually
from ullm.model.kernels.cpu import build

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and mounts are Linux's"),
]

PIDS = Path("/sys/fs/cgroup/pids")
KERNELS = ["--cpu-kernels", "--standby-workers", "0", "--dtype", "float32", "--device", "cpu"]
WITHOUT = "decoding without fused kernels"
SMALL_LIBRARY = """
for last; do :; done
echo 'extern "C" int answer() { return 42; }' | c++ -shared -fPIC -x c++ - -o "$last"
"""
"""Body of a compiler that makes a small library, whatever it is asked for."""


def may_mount() -> bool:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    done = subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True)
    return done.returncode == 0


needs_mounts = pytest.mark.skipif(not may_mount(), reason="needs root, to mount in a namespace of its own")


def compiler(folder: Path, body: str) -> dict[str, str]:
    """Return the environment in which a shell script is the compiler, and the cache is empty."""
    script = folder / "cxx"
    script.write_text(f"#!/bin/sh\necho called >> {folder}/calls\n{body}\n")
    script.chmod(0o755)
    return {"CXX": str(script), "ULLM_CACHE": str(folder / "cache")}


def shell(line: str, *arguments: object) -> list[str]:
    """Return a command: shell code in front of ``ullm serve``, in a namespace of mounts if it mounts."""
    command = ["sh", "-c", f'{line} && exec "$0" "$@"', sys.executable, "-m", "ullm", "serve", "--port", "0"]
    inside = ["unshare", "--mount"] if "mount" in line else []
    return [*inside, *command, *map(str, arguments)]


def answers(server: Server) -> bool:
    body = {"prompt": [3, 4], "max_tokens": 4, "ignore_eos": True}
    with server.client() as client:
        return client.post("/v1/completions", json=body).status_code == 200


def warnings(server: Server) -> list[str]:
    return [line for line in server.errors().splitlines() if WITHOUT in line]


def test_a_compiler_that_fails(serve: Serve, tiny_model: Path, tmp_path: Path) -> None:
    environ = compiler(tmp_path, "echo 'unrecognized command line option -std=c++20' >&2; exit 1")
    server = serve("--model", str(tiny_model), *KERNELS, environ=environ)
    assert answers(server)
    assert len(warnings(server)) == 1
    assert "c++20" in warnings(server)[0]


@needs_mounts
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_cache_that_is_mounted_noexec(serve: Serve, tiny_model: Path, tmp_path: Path) -> None:
    environ = compiler(tmp_path, SMALL_LIBRARY)
    (tmp_path / "cache").mkdir()
    mounted = f"mount -t tmpfs -o noexec,mode=0700 none {tmp_path}/cache"
    server = serve(command=shell(mounted, "--model", tiny_model, *KERNELS), environ=environ)
    assert answers(server)
    assert len(warnings(server)) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed"])
def test_a_library_in_the_cache_that_is_damaged(
    serve: Serve, tiny_model: Path, tmp_path: Path, damage: str
) -> None:
    """It is compiled again, and not loaded before, which would end the worker by SIGBUS."""
    library = build.library_path()
    if library is None or not library.exists():
        pytest.skip("needs kernels that were compiled before")
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True, mode=0o700)
    for file in library.parent.glob(f"{library.name}*"):
        shutil.copy2(file, folder)
    environ = {"ULLM_CACHE": str(tmp_path / "cache")}
    server = serve("--model", str(tiny_model), *KERNELS, environ=environ)
    assert answers(server)
    assert "compiling" not in server.errors()
    assert server.close() == 0
    copy, size = folder / library.name, library.stat().st_size
    os.truncate(copy, size // 2 if damage == "cut" else 0)
    os.truncate(copy, {"empty": 0, "cut": size // 2, "zeroed": size}[damage])
    server = serve("--model", str(tiny_model), *KERNELS, environ=environ, wait=False)
    server.hear("compiling fused kernels")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


@needs_mounts
def test_no_home_and_no_entry_in_passwd(serve: Serve, tiny_model: Path) -> None:
    nobody = "mount --bind /dev/null /etc/passwd && unset HOME XDG_CACHE_HOME ULLM_CACHE"
    server = serve(command=shell(nobody, "--model", tiny_model, "--no-cpu-kernels", "--standby-workers", "0"))
    assert answers(server)


def test_the_working_folder_is_removed(serve: Serve, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    options = ("--model", tiny_model, "--no-cpu-kernels", "--standby-workers", "0")
    server = serve(command=shell(f"cd {folder}", *options))
    folder.rmdir()
    first = server.worker()
    first.kill()
    eventually(lambda: server.worker().pid != first.pid)
    assert answers(server)


@pytest.fixture
def pids_group() -> Iterator[Path]:
    """A control group with a limit of processes and threads (version 1)."""
    if os.geteuid() != 0 or not (PIDS / "cgroup.procs").exists():
        pytest.skip("needs root, and control groups of version 1")
    group = PIDS / f"ullm-test-{os.getpid()}"
    group.mkdir()
    yield group
    eventually(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_limit_of_processes_at_a_workers_loss(serve: Serve, scripted_model: Path, pids_group: Path) -> None:
    inside = f"echo $$ > {pids_group}/cgroup.procs"
    server = serve(command=shell(inside, "--model", scripted_model, *SCRIPTED, "--standby-workers", "0"))
    assert answers(server)
    first = server.worker()
    group = psutil.Process(server.process.pid)
    (pids_group / "pids.max").write_text(str(group.num_threads()))  # no room for a process beside it
    lifted = threading.Timer(2, lambda: (pids_group / "pids.max").write_text("max"))
    lifted.start()
    first.kill()
    server.hear("no process can be started now")
    lifted.join()
    eventually(lambda: server.worker().pid != first.pid)
    assert answers(server)
    assert server.metric("ullm_worker_restarts_total") == 1
    server.signal(signal.SIGTERM)  # before the group goes
    assert server.wait() == 0
