"""What cannot start says why in one line, with exit status 1 or 2, within seconds, and leaves nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.server import SCRIPTED
from ullm.testing import write_scripted_model, write_tiny_model

pytestmark = pytest.mark.process


def start(*arguments: str, port: int = 0, warnings: bool = False, status: int = 1) -> str:
    """Run a server that cannot start; the one line that it says.

    Args:
        warnings: records of the log may come before it.
    """
    done = subprocess.run(
        [sys.executable, "-m", "ullm", "serve", "--port", str(port), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 or warnings, done.stderr
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("error: ")
    assert "ready" not in done.stdout
    return lines[-1]


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def scramble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


@pytest.mark.parametrize("option", ["--api-key-file", "--ssl-certfile"])
def test_files_of_the_server_are_read_before_anything_is_started(option: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    also = ["--ssl-keyfile", missing] if option == "--ssl-certfile" else []
    assert start(option, missing, *also) == f"error: {option} {missing}: No such file or directory"


def pipe(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


def brackets(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


def pickled(folder: Path) -> None:
    change_config(folder, architectures=["OlmoForCausalLM"], model_type="olmo")
    config = json.loads((folder / "config.json").read_text())
    del config["rms_norm_eps"]  # another line would say that it has no effect
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")


DAMAGES = [
    (pipe("config.json"), ["config.json", "named pipe"]),
    (truncate, ["model.safetensors", "truncated"]),
    (lambda folder: change_config(folder, intermediate_size=256), ["model.safetensors", "mlp", "256", "128"]),
]
MORE_DAMAGES = [
    (lambda folder: change_config(folder, architectures=["FooForCausalLM"], model_type="foo"), ["foo"]),
    (pipe("model.safetensors"), ["model.safetensors", "named pipe"]),
    (pipe("tokenizer.json"), ["tokenizer.json", "named pipe"]),
    (scramble, ["model.safetensors"]),
    (lambda folder: (folder / "model.safetensors").unlink(), ["safetensors"]),
    (lambda folder: change_config(folder, num_hidden_layers=3), ["model.layers.2"]),
    (lambda folder: change_config(folder, quantization_config={"quant_method": "hqq"}), ["hqq"]),
    (lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["tokenizer"]),
    (brackets, ["config.json", "nested too deeply"]),
    (pickled, ["must have model.safetensors"]),
    (lambda folder: change_config(folder, architectures=[5]), ["architectures", "[5]"]),
    (lambda folder: change_config(folder, num_hidden_layers=100_000), ["num_hidden_layers", "100000"]),
]


@pytest.mark.parametrize(
    ("damage", "says"), [*DAMAGES, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_DAMAGES)]
)
def test_a_damaged_model(tmp_path: Path, damage: Callable[[Path], object], says: list[str]) -> None:
    write_tiny_model(tmp_path)
    damage(tmp_path)
    line = start("--model", str(tmp_path))
    assert all(part.lower() in line.lower() for part in says), line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kv-cache-memory", "100"], "one block"),
        pytest.param(["--dtype", "bfloat16", "--num-blocks", "999999999"], "memory", marks=pytest.mark.slow),
        pytest.param(["--device", "cuda"], "cuda", marks=pytest.mark.slow),
        pytest.param(["--tp-size", "5"], "5", marks=pytest.mark.slow),
        pytest.param(["--runner", "nowhere:Nothing"], "nowhere:Nothing", marks=pytest.mark.slow),
    ],
)
def test_options_that_cannot_work(tiny_model: Path, options: list[str], says: str) -> None:
    assert says.lower() in start("--model", str(tiny_model), *options).lower()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--context-len", "0"], "--context-len"),
        (["--max-bs", "64", "--max-num-batched-tokens", "8"], "--max-num-batched-tokens"),
    ],
)
def test_options_that_are_wrong_wherever_they_are_given(options: list[str], says: str) -> None:
    assert says in start("--model", "/nothing", *options, status=2)


def test_a_taken_port_is_known_before_anything_is_loaded(tmp_path: Path) -> None:
    """Before even the model is looked for."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = start("--model", str(tmp_path / "no-model"), port=port)
    assert str(port) in line
    assert "in use" in line


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    assert "nothing-here" in start("--model", str(tmp_path / "nothing-here"))


@pytest.mark.parametrize("transport", ["process", pytest.param("thread", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("worker.start:oom", "out of memory"),
        ("worker.start:crash", "SIGKILL"),
        ("worker.start:raise", "injected fault"),
    ],
)
def test_a_worker_that_does_not_start(tmp_path: Path, transport: str, plan: str, says: str) -> None:
    model = write_scripted_model(tmp_path / "scripted")
    options = (*SCRIPTED, "--transport", transport, "--faults", plan)
    assert says in start("--model", str(model), *options, warnings=True)


def test_a_traceback_is_shown_to_those_who_debug(tmp_path: Path) -> None:
    model = write_scripted_model(tmp_path / "scripted")
    options = (*SCRIPTED, "--log-level", "debug", "--faults", "worker.start:raise")
    command = [sys.executable, "-m", "ullm", "serve", "--port", "0", "--model", str(model), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
