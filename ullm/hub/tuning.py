"""What `ullm doctor --calibrate` and a first start have measured, kept in ullm's cache.

One file for each model, machine and set of versions; a file that cannot be read counts as none.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from ullm.config import ModelConfig, Tuning
from ullm.hub.files import cache_dir
from ullm.logs import get_logger

log = get_logger(__name__)

CPUINFO = Path("/proc/cpuinfo")
CPU_LINES = ("flags", "Features", "model name", "CPU part")


def tuning_path(config: ModelConfig, model_path: str) -> Path:
    """Return the file for a model on this machine, which may not exist."""
    parts = [_version("ullm-engine"), _version("torch"), _cpu(), os.path.realpath(model_path)]
    parts += [config.dtype, config.quantization, os.environ.get("CXX", "")]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return cache_dir() / "tuning" / f"{digest}.json"


def read_tuning(config: ModelConfig, model_path: str) -> Tuning | None:
    """Return what was measured; None, and a warning if there is a file, if nothing usable was."""
    path = tuning_path(config, model_path)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Tuning)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("calibration not usable; it is made anew", path=str(path), reason=str(error))
        return None


def list_tunings() -> dict[str, str]:
    """Return what is in the cache: model → what was picked, and when."""
    found: dict[str, str] = {}
    for path in sorted((cache_dir() / "tuning").glob("*.json")):
        try:
            tuning = msgspec.json.decode(path.read_bytes(), type=Tuning)
        except (OSError, msgspec.DecodeError):
            found[path.name] = "damaged; it is made anew at the next start"
        else:
            found[tuning.model] = f"{tuning.label}, {tuning.origin}"
    return found


def write_tuning(config: ModelConfig, model_path: str, tuning: Tuning) -> Path:
    """Write the file beside its final path and rename it, and return the path.

    Raises:
        OSError: it cannot be written.
    """
    path = tuning_path(config, model_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.write_bytes(msgspec.json.encode(tuning))
        temporary.replace(path)
    return path


def _version(package: str) -> str:
    """Read the version from the package's metadata: torch is not imported in this process."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    if not CPUINFO.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = CPUINFO.read_text(errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(CPU_LINES)}))
